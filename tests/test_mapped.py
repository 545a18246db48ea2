"""Points that stay in their file are the same points, and train the same network."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import FLOW_CASES, PressCtrlC, assert_same, training_state
from flowbook import data, sources
from flowbook.checkpoint import read_checkpoint
from flowbook.data import FlowDataset, NormalizationStats, create_dataloader, fingerprint, prepare_dataset
from flowbook.sources import check_points

POINTS = np.random.default_rng(0).normal(3.0, 2.0, size=(1000, 3, 2, 2)).astype("float32")
POINTS[:, 1, 0, 1] = 7.0        # A pixel that never varies


def both(folder, name, **options):
    return [FlowDataset(folder, name, "all", mapped=mapped, **options) for mapped in (False, True)]


@pytest.fixture
def in_small_pieces(monkeypatch): monkeypatch.setattr(sources, "PIECE", 1000)


def test_pieces_are_all_of_it(in_small_pieces):
    points = torch.from_numpy(POINTS)
    pieces = list(data.pieces(points))
    assert len(pieces) > 10 and torch.equal(torch.cat(pieces), points)
    wide = torch.zeros(3, 100_000)
    assert [len(piece) for piece in data.pieces(wide)] == [1, 1, 1]


def test_in_pieces_nothing_comes_out_otherwise(tmp_path, monkeypatch):
    np.save(tmp_path / "mine.npy", POINTS)
    points = torch.from_numpy(POINTS)
    whole = fingerprint(points), NormalizationStats.from_data(points), prepare_dataset(tmp_path / "mine.npy", tmp_path / "whole")
    monkeypatch.setattr(sources, "PIECE", 1000)
    monkeypatch.setattr(sources, "memory_bytes", lambda: 40_000)     # The file is too large for a quarter of it
    assert isinstance(sources._read_npy(tmp_path / "mine.npy"), np.memmap)
    parts = fingerprint(points), NormalizationStats.from_data(points), prepare_dataset(tmp_path / "mine.npy", tmp_path / "parts")
    assert whole[0] == parts[0] and whole[2].digest == parts[2].digest and whole[2].counts == parts[2].counts
    assert torch.equal(whole[1].varies, parts[1].varies)
    for name in ("mean", "std"): assert torch.allclose(getattr(whole[1], name), getattr(parts[1], name), rtol=1e-6, atol=0)
    for split in data.SPLITS:
        first, second = ((tmp_path / folder / "mine" / f"{split}.npy").read_bytes() for folder in ("whole", "parts"))
        assert first == second
    assert np.array_equal(np.load(tmp_path / "mine.npy"), POINTS)       # Copy on write: the source is not written


def test_what_is_wrong_in_a_late_piece_is_named(in_small_pieces):
    points = torch.from_numpy(POINTS.copy())
    points[900, 2, 1, 0], points[950, 0, 0, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"x: 2 of 12,000 values .* the first is nan in row 900, feature \(2, 1, 0\)"):
        check_points(points, "x")


def test_a_mapped_data_set_is_the_data_set(tmp_path):
    np.save(tmp_path / "mine.npy", POINTS)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    resident, mapped = both(tmp_path, "mine")
    rows = torch.tensor([5, 3, 699, 5])
    for one, other in ((resident, mapped), (resident.on_sphere(), mapped.on_sphere()), (resident.hold_out()[0], mapped.hold_out()[0])):
        for found in (lambda it: it.tensor, lambda it: it[3], lambda it: it[2:9],
                      lambda it: it[rows % len(it)], lambda it: it.rows(rows % len(it))):
            assert torch.equal(found(one), found(other))
        assert len(one) == len(other) and one.fingerprint == other.fingerprint
        assert_same(vars(one.stats), vars(other.stats))
    assert mapped.mapped and "in their file" in repr(mapped) and "in their file" not in repr(resident)
    before = (tmp_path / "mine" / "train.npy").read_bytes()
    mapped[:10].add_(1)
    mapped.rows(rows).zero_()
    assert (tmp_path / "mine" / "train.npy").read_bytes() == before and torch.equal(mapped.tensor, resident.tensor)


def test_points_without_a_direction_are_found_in_a_file(tmp_path, in_small_pieces):
    points = POINTS.reshape(1000, 12).copy()
    points[:] = np.where(np.arange(1000)[:, None] == 500, 0, points)
    np.save(tmp_path / "mine.npy", points)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    sets = [FlowDataset(tmp_path, "mine", "all", split, mapped=True) for split in data.SPLITS]
    wrong = [dataset for dataset in sets if (np.load(dataset.name) == 0).all(1).any()]
    assert len(wrong) == 1
    with pytest.raises(ValueError, match="has 1 points that are 0 everywhere, the first in row"): wrong[0].on_sphere()


def test_points_stay_in_their_file_when_they_are_many(tmp_path, monkeypatch):
    np.save(tmp_path / "mine.npy", POINTS)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    size = 700 * 12 * 4
    for memory, mapped in ((4 * size, False), (4 * size - 4, True)):
        monkeypatch.setattr(data, "memory_bytes", lambda memory=memory: memory)
        assert FlowDataset(tmp_path, "mine", "all").mapped == mapped
    monkeypatch.setattr(data, "memory_bytes", lambda: size - 1)
    with pytest.raises(MemoryError, match="take some rows, or a smaller size"): _ = FlowDataset(tmp_path, "mine", "all").tensor
    assert FlowDataset(tmp_path, "mine", "all")[:5].shape == (5, 3, 2, 2)


@pytest.mark.parametrize("shuffle, drop_last", [(True, True), (False, False)])
def test_batches_from_a_file_are_the_batches(tmp_path, shuffle, drop_last):
    np.save(tmp_path / "mine.npy", POINTS)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    resident, mapped = (create_dataloader(dataset, 64, shuffle, 1, drop_last) for dataset in both(tmp_path, "mine"))
    assert len(resident) == len(mapped)
    for epoch in range(3): assert_same(list(mapped), list(resident), f"epoch {epoch}")
    for step in (5, 4, 30, 0): assert torch.equal(mapped.batch(step), resident.batch(step))


def test_batches_are_read_ahead_by_others(tmp_path, monkeypatch):
    np.save(tmp_path / "mine.npy", POINTS)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    read_by, rows = [], FlowDataset.rows

    def noted(self, index):
        read_by.append(threading.current_thread())
        return rows(self, index)

    monkeypatch.setattr(FlowDataset, "rows", noted)
    loader = create_dataloader(FlowDataset(tmp_path, "mine", "all", mapped=True), 64, True)
    loader.batch(0)
    loader._threads.shutdown()
    assert len(read_by) == 2 * data.READERS_AHEAD and threading.main_thread() not in read_by


def test_an_error_while_reading_is_raised_in_its_own_step(tmp_path, monkeypatch):
    np.save(tmp_path / "mine.npy", POINTS)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    loader = create_dataloader(FlowDataset(tmp_path, "mine", "all", mapped=True), 64)
    rows = FlowDataset.rows

    def broken(self, index):
        if index[0] == 128: raise OSError(5, "Input/output error")
        return rows(self, index)

    monkeypatch.setattr(FlowDataset, "rows", broken)
    for step in (0, 1): loader.batch(step)
    with pytest.raises(OSError, match="Input/output error"): loader.batch(2)


@pytest.mark.parametrize("flow_case", FLOW_CASES, indirect=True)
def test_a_run_on_points_in_a_file_is_the_run(configured, new_trainer, data_dir, flow_case, tmp_path):
    def sets(mapped): return dict(train_dataset=FlowDataset(data_dir, "moons", "all", mapped=mapped),
                                  val_dataset=FlowDataset(data_dir, "moons", "all", "validation", mapped=mapped))
    config = configured(**flow_case)
    resident = new_trainer(config.replace(checkpoint_dir=str(tmp_path / "resident")), **sets(False))
    resident.train()
    with pytest.raises(KeyboardInterrupt): new_trainer(config, callbacks=[PressCtrlC(10)], **sets(True)).train()
    mapped = new_trainer(config, resume_path="auto", **sets(True))
    mapped.train()
    assert mapped.loader.copies and not resident.loader.copies
    assert_same(*(training_state(read_checkpoint(trainer.folder / "last.pt")) for trainer in (mapped, resident)))


MEMORY = """
import re, sys, threading, time
from pathlib import Path
import numpy as np
import torch
from torch import nn
from flowbook import data, sources
from flowbook.config import TrainingConfig
from flowbook.trainer import FlowTrainer

def anonymous(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES, bias=False)
    def forward(self, x, t, cond=None): return self.layer(x)

FEATURES = 256
data.memory_bytes = sources.memory_bytes = lambda: 200 * 2**20
most = before = anonymous()
def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(.002)

threading.Thread(target=watch, daemon=True).start()
data.prepare_dataset("large.npy")
config = TrainingConfig(dataset="large-all", epochs=1, batch_size=512, device="cpu")
train = data.FlowDataset("datasets", "large", "all")
assert train.mapped
val = data.FlowDataset.from_tensor(train.denormalize(train[:1000]), train.stats)
FlowTrainer(Small(), config, train, val, wandb_project=None).train()
print(most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_data_larger_than_memory_are_prepared_and_trained_on(tmp_path):
    """400 MiB of points, with what is read and let go of again counted out."""
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float32, (400 * 2**20 // 1024, 256))
    rng = np.random.default_rng(0)
    for start in range(0, len(large), 2**14): large[start:start + 2**14] = rng.normal(size=(len(large[start:start + 2**14]), 256))
    large.flush()
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 250, done.stdout        # Pieces of 16 MiB in double precision, and what training imports (140)


@pytest.mark.cuda
def test_batches_from_a_file_come_to_a_gpu(tmp_path):
    np.save(tmp_path / "mine.npy", POINTS)
    prepare_dataset(tmp_path / "mine.npy", tmp_path)
    resident, mapped = (create_dataloader(dataset, 64, True, 1, device="cuda") for dataset in both(tmp_path, "mine"))
    for one, other in zip(resident, mapped, strict=True): assert other.is_cuda and torch.allclose(one, other)
