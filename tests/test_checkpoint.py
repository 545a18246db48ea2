"""Any change of a checkpoint is noticed, nothing in it is executed, and a failed save leaves the old one."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import assert_same
from flowbook.checkpoint import (
    CheckpointError,
    checkpoint_state,
    load_checkpoint,
    load_checkpoint_with_stats_check,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from flowbook.config import TrainingConfig
from flowbook.data import NormalizationStats
from flowbook.early_stopping import EarlyStopping
from flowbook.ema import EMAModel
from flowbook.scheduler import create_scheduler

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2**62, 2**62) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.builds(lambda n, seed: torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)), st.integers(0, 4), st.integers(0, 99)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=3), max_leaves=8)


def whole(**entries):
    """The smallest state that a checkpoint may hold, with some entries changed."""
    return checkpoint_state(model=torch.nn.Linear(1, 1), epoch=1, step=0, best_val_loss=0.5, config=TrainingConfig(), extra=entries)


@settings(deadline=None, max_examples=50)
@given(contents=plain)
def test_any_plain_state_comes_back_equal(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("state") / "state.pt"
    write_checkpoint(path, whole(versions={"contents": contents}))
    assert_same(read_checkpoint(path)["versions"]["contents"], contents)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    write_checkpoint(path, whole(weights=torch.arange(300.0)))
    return path


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_changed_byte_is_noticed(checkpoint, data):
    content = bytearray(checkpoint.read_bytes())
    place, change = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    content[place] ^= change
    damaged = checkpoint.with_name("damaged.pt")
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged.pt"):
        read_checkpoint(damaged)


def test_every_truncation_is_noticed(checkpoint):
    content, cut = checkpoint.read_bytes(), checkpoint.with_name("cut.pt")
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut.pt"):
            read_checkpoint(cut)


def test_a_failed_save_names_the_path_and_leaves_the_old_state(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not save .*last.pt \(.* MB are needed\): No space left on device"):
        write_checkpoint(checkpoint, whole(weights=torch.zeros(300)))
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob(".last.pt*"))


def test_torch_reads_a_sealed_file(checkpoint):
    assert torch.equal(torch.load(checkpoint, weights_only=True)["weights"], torch.arange(300.0))


def parts(width=4):
    model = torch.nn.Linear(2, width)
    optimizer = torch.optim.AdamW(model.parameters())
    return dict(model=model, ema=EMAModel(model), optimizer=optimizer, scheduler=create_scheduler("cosine", optimizer, 2, 10),
                early_stopping=EarlyStopping())


def test_a_restore_goes_model_ema_optimizer_scheduler_early_stopping(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", **parts(), epoch=3, step=20, best_val_loss=0.5, config=TrainingConfig())
    run, order = parts(), []
    for name, part in run.items():
        def load(self, *state, name=name, load_before=part.__class__.load_state_dict):
            order.append(name)
            return load_before(self, *state)
        monkeypatch.setattr(part.__class__, "load_state_dict", load)
    assert load_checkpoint(tmp_path / "last.pt", **run) == (3, 0.5)
    assert list(dict.fromkeys(order)) == ["model", "ema", "optimizer", "scheduler", "early_stopping"]


def test_other_statistics_are_an_error_or_a_warning(tmp_path, capsys):
    mine, other = (NormalizationStats(torch.tensor([0.0, shift]), torch.ones(2)) for shift in (0.0, 0.25))
    other.save(tmp_path / "stats.pt")
    save_checkpoint(tmp_path / "last.pt", **parts(), epoch=3, step=20, best_val_loss=0.5, config=TrainingConfig(), stats=mine)
    run = parts()
    before = {name: value.clone() for name, value in run["model"].state_dict().items()}
    for current in (other, tmp_path / "stats.pt"):
        with pytest.raises(ValueError, match=r"FAILED. mean differs in 1 of 2 features \(1\), by up to 0.25"):
            load_checkpoint_with_stats_check(tmp_path / "last.pt", **run, current_stats=current)
    assert_same(dict(run["model"].state_dict()), before)
    with pytest.warns(UserWarning, match="mean differs in 1 of 2 features"):
        assert load_checkpoint_with_stats_check(tmp_path / "last.pt", **run, current_stats=other, on_mismatch="warn") == (3, 0.5)
    load_checkpoint_with_stats_check(tmp_path / "last.pt", **run, current_stats=mine)
    assert capsys.readouterr().out == "Stats consistency check: PASSED\n"
