"""Faults other than kills: damaged files, full disks, wrong folders, two processes, signals, errors, clocks, hostile files.

Most tests end alike: once the fault is gone, the run goes on and ends with the weights, the moments and the record, bit for bit,
of a run that nothing happened to. Random tests print their seed; FLOWBOOK_SEED=7 gives them another."""

import contextlib
import io
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import COMMAND, assert_same, training_state
from flowbook.checkpoint import CheckpointError, read_checkpoint, restore, run_folder, seal
from flowbook.cli import main
from flowbook.data import AUGMENTATIONS, FlowDataset, prepare_dataset
from flowbook.early_stopping import EarlyStopping
from flowbook.ema import EMAModel
from flowbook.flow_matching import LinearPath
from flowbook.flows import FLOWS, FlowRow
from flowbook.nets import ARCHITECTURES, MLP, create_model
from flowbook.optimizer import FlatAdamW
from flowbook.runs import Saver, read_summary, sole_use
from flowbook.sampling import load_flow
from flowbook.scheduler import create_scheduler
from flowbook.tracking import WandbTracker, read_metrics
from flowbook.trainer import FlowTrainer, Learner, TrainingInterrupted

SEED = int(os.environ.get("FLOWBOOK_SEED", 0))
STATES = ("last.pt", "previous.pt", "best.pt")
IN_WORDS = (CheckpointError, OSError, TypeError, ValueError)    # what the command answers with a sentence and exit code 2
needs_root = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux, to mount a disk")


# ---- What several sections need

class At:
    """A callback that does something after a certain step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, trainer):
        if trainer.step == self.step:
            self.action()


def stop_at(step, number=signal.SIGINT):
    return At(step, partial(signal.raise_signal, number))


def contents(folder):
    """Every file below a folder, byte for byte, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def states(folder):
    return {name: (folder / name).read_bytes() for name in STATES if (folder / name).exists()}


def no_temporary_is_left(folder):
    return not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """What several tests look at, and a folder for it."""
    return {}, tmp_path_factory.mktemp("once")


@pytest.fixture
def ends_as_unbroken(made_once, configured, new_trainer):
    """Is what lies in a run's folder, bit for bit, what a run that nothing happened to leaves behind?"""
    def check(folder, **changes):
        runs, place = made_once
        if (key := str(changes)) not in runs:
            unbroken = new_trainer(configured(checkpoint_dir=str(place / f"unbroken-{len(runs)}"), **changes))
            unbroken.train()
            runs[key] = unbroken.folder
        for name in ("last.pt", "best.pt"):
            assert_same(*(training_state(read_checkpoint(run / name)) for run in (folder, runs[key])), where=name)
        assert (folder / "metrics.jsonl").read_bytes() == (runs[key] / "metrics.jsonl").read_bytes()
        assert no_temporary_is_left(folder)
    return check


@pytest.fixture
def saving(monkeypatch):
    """Decide when runs save: after every step (0), or only at their start and end (infinity), however fast the disk is."""
    def every(pause, **options):
        monkeypatch.setattr("flowbook.trainer.Saver", partial(Saver, pause=pause, **options))
    return every


@pytest.fixture
def stopped(configured, new_trainer):
    """A run that is stopped in the middle of its third epoch, and its folder."""
    def make(step=17, **changes):
        config = configured(**changes)
        trainer = new_trainer(config, callbacks=[stop_at(step)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        return config, trainer.folder
    return make


@pytest.fixture
def real(made_once, stopped, configured):
    """The state of a real run, and a configuration with which it could go on."""
    made, place = made_once
    if "real" not in made:
        made["real"] = stopped(checkpoint_dir=str(place / "real"))[1] / "last.pt"
    return read_checkpoint(made["real"]), configured()


@pytest.fixture
def go_on(new_trainer):
    """Resume a run, and train it to its end."""
    def run(config, **options):
        trainer = new_trainer(config, resume_path="auto", **options)
        trainer.train()
        return trainer
    return run


@pytest.fixture
def train_arguments(tmp_path):
    """The arguments of `flowbook` that train what a configuration says."""
    def spell(config, *more):
        config.save(tmp_path / "run.json")
        return ["train", "--config", str(tmp_path / "run.json"), "--wandb-project", "None", *map(str, more)]
    return spell


@pytest.fixture
def command(capsys):
    """The command `flowbook`, in this process: its exit code, what it printed, and what it complained about."""
    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([*map(str, arguments)])
        except SystemExit as stop:      # what tyro refuses
            code = stop.code
        out, err = (" ".join(printed.replace("│", " ").split()) for printed in capsys.readouterr())
        assert "Traceback" not in out + err, err
        return code, out, err
    return run


@pytest.fixture
def refused_before_the_first_step(tmp_path, command, train_arguments, monkeypatch):
    """`flowbook train` refuses in a sentence with these words, makes no step, and writes nothing."""
    def check(config, *how, words=()):
        arguments, before = train_arguments(config, *how), contents(tmp_path)
        with monkeypatch.context() as without_steps:
            without_steps.setattr(Learner, "update", lambda *_: pytest.fail("a step was made"))
            code, _, err = command(*arguments)
        assert code == 2 and err and all(str(word) in err for word in words), err
        assert contents(tmp_path) == before
    return check


# A command that waits in the middle: a network or a disk that is slow. It waits until its stdin is closed.
WAITS = """
import os, select, sys
from flowbook import cli, nets, runs

where, step = sys.argv[1], int(sys.argv[2])
forward, write, fsync, steps = nets.MLP.forward, runs.write_checkpoint, os.fsync, 0

def wait():
    print("waiting", flush=True)
    while not select.select([sys.stdin], [], [], .05)[0]: pass      # A signal right before a read that blocks would wait for its end

def slow_forward(self, x, t, cond=None):
    global steps
    steps += self.training
    if self.training and steps == step: wait()
    return forward(self, x, t, cond)

def slow_fsync(number):
    fsync(number)
    wait()

def slow_write(path, state, **options):
    if state["step"] >= step: os.fsync = slow_fsync
    try: write(path, state, **options)
    finally: os.fsync = fsync

if where == "in a step": nets.MLP.forward = slow_forward
else: runs.write_checkpoint = slow_write
sys.exit(cli.main(sys.argv[3:]))
"""


@contextlib.contextmanager
def waiting(where, step, arguments):
    """A process that trains and has come to wait in a certain step, or in the first save from that step on."""
    process = subprocess.Popen([sys.executable, "-c", WAITS, where, str(step), *arguments], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    try:
        while "waiting" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        yield process
    finally:
        deadline.cancel()
        process.kill()
        process.communicate()


# ---- 2. Files that are cut, empty or changed

def cut(content):
    return content[:len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    place = random.Random(SEED).randrange(8 * len(content))
    print(f"FLOWBOOK_SEED={SEED}: bit {place} of {8 * len(content):,}")
    return content[:place // 8] + bytes([content[place // 8] ^ 1 << place % 8]) + content[place // 8 + 1:]


def damage_states(folder, names, damage):
    for name in names:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))


@pytest.mark.parametrize(("pause", "damaged", "damage", "left"), [      # what is left to go on from
    (0, ["last.pt"], cut, "previous.pt"), (0, ["last.pt"], emptied, "previous.pt"), (0, ["last.pt"], flipped, "previous.pt"),
    (0, ["last.pt", "previous.pt"], flipped, "best.pt"), (0, ["last.pt", "best.pt"], cut, "previous.pt"),
    (0, ["best.pt"], emptied, "last.pt"), (math.inf, ["last.pt"], flipped, "best.pt"),
    (math.inf, ["last.pt", "best.pt"], cut, "previous.pt")])
def test_a_damaged_state_is_told_kept_aside_and_the_newest_other_one_taken(
        stopped, saving, new_trainer, ends_as_unbroken, capsys, recwarn, pause, damaged, damage, left):
    saving(pause)       # 0: previous.pt is newer than best.pt; infinity: it is the first state, and older
    config, folder = stopped()
    damage_states(folder, damaged, damage)
    state = read_checkpoint(folder / left)
    step, best_is_lost = state["step"], "best.pt" in damaged and math.isfinite(state["best_val_loss"])
    assert all(read_checkpoint(folder / name)["step"] <= step for name in STATES if name not in damaged)
    before = contents(folder)
    capsys.readouterr()
    trainer = new_trainer(config, resume_path="auto")
    assert trainer.step == step
    assert contents(folder) == before, "something was renamed before the training started"
    trainer.train()
    printed = capsys.readouterr().out
    for name in damaged:
        assert "SHA-256" in printed and f"{name}.damaged-1" in printed, printed
        assert (folder / f"{name}.damaged-1").read_bytes() == before[name]
    assert len(list(folder.glob("*.damaged-*"))) == len(damaged)
    assert any("best.pt is missing or damaged" in str(warning.message) for warning in recwarn) == best_is_lost
    ends_as_unbroken(folder)


def test_what_was_kept_aside_is_never_overwritten(stopped, go_on, ends_as_unbroken):
    config, folder = stopped()
    (folder / "last.pt.damaged-1").write_bytes(b"an earlier one")
    damage_states(folder, ["last.pt"], cut)
    damaged = (folder / "last.pt").read_bytes()
    go_on(config)
    assert [(folder / f"last.pt.damaged-{number}").read_bytes() for number in (1, 2)] == [b"an earlier one", damaged]
    ends_as_unbroken(folder)


@pytest.mark.parametrize("damage", [cut, flipped])
def test_without_a_usable_state_every_fault_is_told_and_nothing_is_touched(
        stopped, new_trainer, command, train_arguments, ends_as_unbroken, damage):
    config, folder = stopped()
    damage_states(folder, STATES, damage)
    before = contents(folder)
    code, _, err = command(*train_arguments(config, "--resume"))
    assert code == 2 and all(str(folder / name) in err for name in STATES) and err.count("SHA-256") >= 3, err
    assert contents(folder) == before
    with pytest.raises(CheckpointError, match="last.pt(.|\n)*previous.pt(.|\n)*best.pt"):
        new_trainer(config, resume_path="auto")
    new_trainer(config, overwrite=True).train()     # there is a way on
    ends_as_unbroken(folder)


@pytest.mark.parametrize("width", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_one_changed_bit_in_any_byte_is_noticed(stopped, width):
    _, folder = stopped(arch_options={"width": width, "depth": 1})
    path, generator = folder / "last.pt", random.Random(SEED)
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(content)):
            os.pwrite(file.fileno(), bytes([content[place] ^ 1 << generator.randrange(8)]), place)
            with pytest.raises(CheckpointError, match="last.pt"):
                read_checkpoint(path)
            os.pwrite(file.fileno(), content[place:place + 1], place)
    print(f"FLOWBOOK_SEED={SEED}: in each of {len(content):,} bytes a bit was changed, and it was noticed")
    read_checkpoint(path)


# ---- 3. A disk that fills

@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte. It can be filled until so many bytes are left, emptied again, and made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine mounts no disk: {made.stderr}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, left):
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - left))


def empty(disk):
    (disk / "ballast").unlink()


@needs_root
def test_a_disk_that_is_full_when_a_state_is_saved(
        small_disk, stopped, go_on, command, train_arguments, ends_as_unbroken):
    config, folder = stopped(checkpoint_dir=str(small_disk / "runs"))
    before = states(folder)
    assert len(before) == 3
    fill(small_disk, left=len(before["last.pt"]) // 2)
    code, _, err = command(*train_arguments(config, "--resume"))
    assert code == 1 and f"could not save {folder / 'last.pt'} (0.1 MB are needed): No space left on device" in err, err
    assert states(folder) == before and no_temporary_is_left(folder)
    assert read_summary(folder)["status"] == "failed"
    empty(small_disk)
    go_on(config)
    ends_as_unbroken(folder)


@needs_root
def test_a_disk_that_is_full_when_a_row_is_written(small_disk, configured, new_trainer, saving, go_on, ends_as_unbroken):
    saving(math.inf)
    changes = dict(epochs=8, log_every=1)       # more rows than the 4 kB that the file's last block still has room for
    config = configured(checkpoint_dir=str(small_disk / "runs"), **changes)
    trainer = new_trainer(config, callbacks=[At(15, lambda: fill(small_disk, left=0))])
    with pytest.warns(UserWarning, match="could not be"), pytest.raises(OSError, match="a row of metrics could not be written") as full:
        trainer.train()
    assert full.value.filename == str(trainer.folder / "metrics.jsonl") and 15 < trainer.step < 56
    assert read_checkpoint(trainer.folder / "last.pt")["step"] == 1 and no_temporary_is_left(trainer.folder)
    empty(small_disk)
    go_on(config)
    ends_as_unbroken(trainer.folder, **changes)


def test_files_that_may_not_grow_as_large_as_a_state(stopped, go_on, train_arguments, ends_as_unbroken):
    resource = pytest.importorskip("resource")
    config, folder = stopped()
    before, limit = states(folder), 50_000
    result = subprocess.run([COMMAND, *train_arguments(config, "--resume")], capture_output=True, text=True, timeout=120,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"could not save {folder / 'last.pt'} (0.1 MB are needed): File too large" in result.stderr, result.stderr
    assert states(folder) == before and no_temporary_is_left(folder)
    go_on(config)
    ends_as_unbroken(folder)


# ---- 4. A folder that can't be

@pytest.mark.parametrize("place", ["file", "file/runs", "file/deep/runs"])
def test_a_checkpoint_dir_that_is_a_file(tmp_path, configured, refused_before_the_first_step, place):
    (tmp_path / "file").write_text("something of the user's")
    refused_before_the_first_step(configured(checkpoint_dir=str(tmp_path / place)), words=[tmp_path / "file"])


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
def test_a_run_folder_that_is_a_file(configured, refused_before_the_first_step, how):
    config = configured()
    folder = run_folder(config.run_name, config.checkpoint_dir)
    folder.parent.mkdir()
    folder.write_text("something of the user's")
    refused_before_the_first_step(config, *how, words=[folder])


@needs_root
def test_a_disk_that_can_only_be_read(small_disk, configured, stopped, refused_before_the_first_step):
    there, _ = stopped(checkpoint_dir=str(small_disk / "runs"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    new, beside = configured(checkpoint_dir=str(small_disk / "new")), there.replace(seed=1)
    for config, how in [(there, "--resume"), (there, "--overwrite"), (new, "--resume"), (beside, "--resume")]:
        refused_before_the_first_step(config, how, words=[config.checkpoint_dir, "Read-only file system"])


# Root may write everywhere. Without its powers it is a user like others.
POWERLESS = ["setpriv", "--bounding-set=-all"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []


@pytest.mark.parametrize("what", ["the parent of checkpoint_dir", pytest.param("the run's folder", marks=pytest.mark.slow)])
def test_a_folder_that_may_not_be_written(tmp_path, configured, stopped, go_on, train_arguments, what):
    config, folder = stopped()
    closed = folder
    if what != "the run's folder":
        closed = tmp_path / "closed"
        closed.mkdir()
        config = configured(checkpoint_dir=str(closed / "runs"))
    arguments = train_arguments(config, "--resume")
    before = contents(tmp_path)
    closed.chmod(0o555)
    try:
        result = subprocess.run([*POWERLESS, COMMAND, *arguments], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("root needs setpriv to be refused anything")
    finally:
        closed.chmod(0o755)
    assert result.returncode == 2 and str(closed) in result.stderr and "Permission denied" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and contents(tmp_path) == before
    go_on(config)       # now it may


# ---- 5. Another network, other settings, other statistics, other data

def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_everything_that_differs_is_named_at_once_and_nothing_is_loaded(configured, new_trainer, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "other", MLP)
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(SEED))
    config = configured(dataset="points")
    first = new_trainer(config, train_dataset=FlowDataset.from_tensor(points), callbacks=[stop_at(1)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    other = config.replace(arch="other", arch_options={"width": 24, "depth": 2}, lr=0.1, batch_size=50)
    model, before = create_model(other.arch, (2,), **other.arch_options), contents(first.folder)
    weights_before = weights(model)
    with pytest.raises(ValueError) as error:
        FlowTrainer(model, other, FlowDataset.from_tensor(points * 2 + 1), wandb_project=None, resume_path=first.folder / "last.pt")
    for words in ["arch is 'other', the run was started with 'mlp'", "arch_options is {'width': 24, 'depth': 2}", "lr is 0.1",
                  "batch_size is 50", "mean differs in 2 of 2 features", "std differs", "other data points",
                  "first.weight has shape (16, 2) where (24, 2) is needed"]:
        assert words in str(error.value), f"{words!r} is not in {error.value}"
    assert_same(weights(model), weights_before)
    assert contents(first.folder) == before


def without(*keys):
    """Leave an entry of a state out."""
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]
    return change


def with_(value, *keys):
    """Put another value into an entry of a state."""
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value
    return change


FIRST_MOMENT = ("optimizer", "state", 0, "exp_avg")
MALFORMED = {
    "optimizer is text": with_("text", "optimizer"), "optimizer is empty": with_({}, "optimizer"),
    "optimizer without groups": with_([], "optimizer", "param_groups"), "a group without lr": without("optimizer", "param_groups", 0, "lr"),
    "lr is text": with_("fast", "optimizer", "param_groups", 0, "lr"), "moments are a list": with_([], "optimizer", "state"),
    "moments of another shape": with_(torch.zeros(3), *FIRST_MOMENT), "a moment is a number": with_(0.5, *FIRST_MOMENT),
    "a moment is missing": without(*FIRST_MOMENT), "a moment of a tensor too many": with_({}, "optimizer", "state", 99),
    "steps are a matrix": with_(torch.ones(2, 2), "optimizer", "state", 0, "step"),
    "scheduler is a number": with_(7, "scheduler"), "scheduler is empty": with_({}, "scheduler"),
    "scheduler at a word": with_("ten", "scheduler", "last_epoch"),
    "early stopping is empty": with_({}, "early_stopping"), "patience counts words": with_("two", "early_stopping", "counter"),
    "the EMA is empty": with_({}, "ema"), "the EMA without its count": without("ema", "updates"),
    "EMA weights of another shape": with_(torch.zeros(7), "ema", "module", "first.weight"),
    "a weight is text": with_("text", "model", "first.weight"), "no weights": with_({}, "model"), "weights are None": with_(None, "model"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_restore_takes_everything_or_nothing(real, new_trainer, fault):
    state, config = real
    MALFORMED[fault](state)
    trainer = new_trainer(config)
    parts = [trainer.model, trainer.ema, trainer.optimizer, trainer.scheduler, trainer.early_stopping]
    before = [json.dumps(part.state_dict(), default=torch.Tensor.tolist) for part in parts]
    with pytest.raises(ValueError):
        restore(state, *parts)
    assert [json.dumps(part.state_dict(), default=torch.Tensor.tolist) for part in parts] == before


def test_another_optimizer_is_refused(real):
    state, _ = real
    model = create_model("mlp", (2,), width=16, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler, before = create_scheduler("cosine", optimizer, 5, 28), weights(model)
    with pytest.raises(ValueError, match="SGD|optimizer"):
        restore(state, model, EMAModel(model), optimizer, scheduler, EarlyStopping())
    assert_same(weights(model), before)
    assert not optimizer.state and "betas" not in optimizer.param_groups[0] and scheduler.last_epoch == 0


# ---- 7. Two at once

def test_a_second_process_is_refused_and_a_killed_one_is_no_obstacle(configured, command, train_arguments, go_on, ends_as_unbroken):
    config = configured()
    folder = run_folder(config.run_name, config.checkpoint_dir)
    with waiting("in a step", 4, train_arguments(config)) as first:
        before, beside = contents(folder), os.listdir(folder.parent)
        summary = read_summary(folder)
        assert (summary["status"], summary["process"], summary["host"]) == ("running", first.pid, socket.gethostname())
        for how in ([], ["--resume"], ["--overwrite"]):
            code, _, err = command(*train_arguments(config, *how))
            assert code == 2 and str(first.pid) in err and socket.gethostname() in err, err
            assert contents(folder) == before and os.listdir(folder.parent) == beside
        first.send_signal(signal.SIGKILL)
        assert first.wait(60) == -signal.SIGKILL
    go_on(config)
    ends_as_unbroken(folder)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_second_trainer_in_the_same_process_is_refused(configured, new_trainer, ends_as_unbroken):
    config, refused = configured(), []

    def begin_again():
        for options in ({}, {"resume_path": "auto"}, {"overwrite": True}):
            with pytest.raises(FileExistsError) as error:
                new_trainer(config, **options).train()
            refused.append(str(error.value))

    first = new_trainer(config, callbacks=[At(10, begin_again)])
    first.train()
    assert len(refused) == 3 and all(str(os.getpid()) in words and socket.gethostname() in words for words in refused), refused
    ends_as_unbroken(first.folder)


def test_a_trainer_made_before_another_one_trained_is_refused(stopped, new_trainer, go_on):
    config, folder = stopped(step=10)
    late = new_trainer(config, resume_path="auto")
    with pytest.raises(KeyboardInterrupt):
        go_on(config, callbacks=[stop_at(20)])
    before = contents(folder)
    with pytest.raises(FileExistsError):
        late.train()
    assert contents(folder) == before and late.step == 10
    assert new_trainer(config, resume_path="auto").train()["status"] == "finished"


# ---- 8. Signals

def test_a_second_signal_does_not_wait_for_the_step(stopped, train_arguments, go_on, ends_as_unbroken):
    config, folder = stopped(step=10)
    before = states(folder)
    with waiting("in a step", 3, train_arguments(config, "--resume")) as process:     # two steps on
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert "Interrupted at step 12" in process.stdout.read()
    assert (folder / "best.pt").read_bytes() == before["best.pt"] and read_checkpoint(folder / "last.pt")["step"] <= 12
    go_on(config)
    ends_as_unbroken(folder)


def test_a_second_signal_does_not_wait_for_the_disk(stopped, train_arguments, go_on, ends_as_unbroken):
    config, folder = stopped(step=10)
    before = states(folder)
    with waiting("in a save", 11, train_arguments(config, "--resume")) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, process.stderr.read()
    assert states(folder) == before and no_temporary_is_left(folder)
    go_on(config)
    ends_as_unbroken(folder)


@pytest.mark.parametrize(("where", "step", "saved", "codes"), [
    ("in a step", 3, 13, [143]), ("in a save", 11, 11, [143]),
    pytest.param("in a save", 28, 28, [143, 0], marks=pytest.mark.slow)])       # Nothing is left to stop
def test_one_signal_waits_for_the_step_and_for_the_state(stopped, train_arguments, go_on, ends_as_unbroken, where, step, saved, codes):
    config, folder = stopped(step=10)
    with waiting(where, step, train_arguments(config, "--resume")) as process:
        process.send_signal(signal.SIGTERM)
        process.stdin.close()                   # the network or the disk is fast again
        process.stdin = None
        assert process.wait(60) in codes, process.stderr.read()
    assert saved <= read_checkpoint(folder / "last.pt")["step"] <= saved + (where == "in a save")
    go_on(config)
    ends_as_unbroken(folder)


# ---- 9. Ctrl-C in a notebook

def test_a_trainer_that_was_interrupted_can_be_used_and_goes_on(configured, new_trainer, ends_as_unbroken):
    stops = [3, 7, 10, 14, 27]
    trainer = new_trainer(configured(), callbacks=[stop_at(step) for step in stops])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        state = read_checkpoint(trainer.folder / "last.pt")
        assert state["step"] == trainer.step == step
        assert_same(weights(trainer.model), state["model"])
        assert not torch.equal(trainer.model.first.weight, trainer.ema.module.first.weight)     # the raw ones, not the average
        try:
            trainer.validate()      # the cell that people run next
        except KeyboardInterrupt:
            pytest.fail("the stop was over, and came again in the next cell")
    assert trainer.train()["status"] == "finished"
    ends_as_unbroken(trainer.folder)


def test_a_thread_does_not_listen_for_signals_but_can_be_asked_to_stop(configured, new_trainer, go_on, ends_as_unbroken):
    handler, seen, outcome = signal.getsignal(signal.SIGINT), [], []

    def ask():
        seen.append(signal.getsignal(signal.SIGINT))
        trainer.stop_request.request()

    def train():
        try:
            outcome.append(trainer.train())
        except BaseException as stop:
            outcome.append(type(stop))

    trainer = new_trainer(configured(), callbacks=[At(10, ask)])
    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert outcome == [TrainingInterrupted] and seen == [handler] and signal.getsignal(signal.SIGINT) is handler
    assert read_checkpoint(trainer.folder / "last.pt")["step"] == 10 and read_summary(trainer.folder)["status"] == "interrupted"
    go_on(configured())
    ends_as_unbroken(trainer.folder)


# ---- 10. Errors in code of the user's

class Mistake:
    """A function of the user's that goes wrong at its n-th call, and gives back what it was given at all others."""

    def __init__(self, call=1):
        self.left = call

    def __call__(self, value=None, *more):
        self.left -= 1
        if self.left == 0:
            raise KeyError("my own mistake")
        return value


def failed_in_the_users_code(error, folder):
    last = error.traceback[-1]
    assert (str(last.path), last.name) == (__file__, "__call__"), error.traceback
    assert read_summary(folder).items() >= {"status": "failed", "error": "KeyError: 'my own mistake'"}.items()
    for name in states(folder):
        read_checkpoint(folder / name)
    assert no_temporary_is_left(folder)


@pytest.mark.parametrize(("event", "call"), [("on_train_start", 1), ("on_step", 1), ("on_step", 7), ("on_step", 10), ("on_step", 28),
                                             ("on_epoch", 1), ("on_epoch", 4), ("on_train_end", 1)])
def test_an_error_in_a_callback(configured, new_trainer, go_on, ends_as_unbroken, event, call):
    callback = type("Callback", (), {event: staticmethod(Mistake(call))})
    trainer = new_trainer(configured(), callbacks=[callback()])
    with pytest.raises(KeyError) as error:
        trainer.train()
    failed_in_the_users_code(error, trainer.folder)
    go_on(configured())
    assert read_summary(trainer.folder)["status"] == "finished"
    ends_as_unbroken(trainer.folder)


def in_the_network(patch, mistake, **data):
    forward = MLP.forward
    patch.setattr(MLP, "forward", lambda self, x, t: forward(self, mistake(x) if self.training else x, t))


def in_the_backward(patch, mistake, **data):
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return mistake(gradient)

    forward = MLP.forward
    patch.setattr(MLP, "forward", lambda self, x, t: Identity.apply(forward(self, x, t)))


def in_the_flow(patch, mistake, **data):
    class Path(LinearPath):
        def at(self, x0, x1, t, generator=None):
            return super().at(x0, mistake(x1), t, generator)

    patch.setitem(FLOWS, "icfm", FlowRow(path=Path))


def in_the_augmentation(patch, mistake, **data):
    patch.setitem(AUGMENTATIONS, "none", (lambda x, generator, **options: mistake(x),))


def in_the_data(patch, mistake, train_dataset, val_dataset):
    class Points(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            if function is torch.Tensor.index_select:
                mistake()
            return super().__torch_function__(function, types, arguments, options or {})

    train_dataset._points = train_dataset.tensor.as_subclass(Points)


def after_the_optimizer(patch, mistake, **data):
    step = FlatAdamW.step
    patch.setattr(FlatAdamW, "step", lambda self, **options: mistake(step(self, **options)))


@pytest.mark.parametrize("call", [3, 12])
@pytest.mark.parametrize("place", [in_the_network, in_the_backward, in_the_flow, in_the_augmentation, in_the_data, after_the_optimizer])
def test_an_error_in_the_middle_of_a_step(configured, new_trainer, go_on, ends_as_unbroken, monkeypatch, data_dir, place, call):
    data = {f"{name}_dataset": FlowDataset(data_dir, "moons", "all", split) for name, split in [("train", "train"), ("val", "validation")]}
    with monkeypatch.context() as patch:
        place(patch, Mistake(call), **data)
        trainer = new_trainer(configured(), **data)
        with pytest.raises(KeyError) as error:
            trainer.train()
    failed_in_the_users_code(error, trainer.folder)
    go_on(configured())
    ends_as_unbroken(trainer.folder)


# ---- 11. Weights & Biases

@pytest.fixture
def wandb_environment(monkeypatch, tmp_path):
    """No setting, key or folder of the user's; W&B's own process is shut down afterwards."""
    for name in ("NETRC", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield monkeypatch
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


def works(patch, folder):
    pass


def is_missing(patch, folder):
    patch.setitem(sys.modules, "wandb", None)


def is_unreachable(patch, folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    patch.setenv("WANDB_API_KEY", "0" * 40)
    patch.setenv("WANDB_MODE", "online")


def is_unwritable(patch, folder):
    folder.mkdir(parents=True)
    (folder / "wandb").write_text("a file where W&B's folder would be")


def fails_in_the_middle(patch, folder):
    log, mistake = WandbTracker.log, Mistake(4)
    patch.setattr(WandbTracker, "log", lambda self, row: log(self, mistake(row)))


def fails_at_the_end(patch, folder):
    patch.setattr(WandbTracker, "close", Mistake())


@pytest.mark.parametrize("wandb", [works, is_missing, is_unreachable, is_unwritable, fails_in_the_middle, fails_at_the_end])
def test_training_does_not_depend_on_wandb(tmp_path, configured, new_trainer, wandb_environment, recwarn, wandb):
    config = configured(aug="mixup+noise", arch_options={"width": 16, "depth": 2, "dropout": 0.2})
    alone = new_trainer(config.replace(checkpoint_dir=str(tmp_path / "alone")))
    alone.train()
    with wandb_environment.context() as patch:
        wandb(patch, run_folder(config.run_name, config.checkpoint_dir))
        trainer = new_trainer(config, wandb_project="flowbook")
        assert trainer.train()["status"] == "finished"
    told = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert len(told) == (wandb is not works), told
    for name in ("last.pt", "best.pt"):
        first, second = (training_state(read_checkpoint(run.folder / name)) for run in (alone, trainer))
        assert first.pop("wandb_run_id") is None and second.pop("wandb_run_id")
        assert_same(first, second)
    assert (alone.folder / "metrics.jsonl").read_bytes() == (trainer.folder / "metrics.jsonl").read_bytes()


def test_a_killed_and_resumed_run_is_one_run_on_wandb(configured, go_on, train_arguments, wandb_environment):
    config = configured()
    with waiting("in a step", 4, train_arguments(config)[:3]) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    trainer = go_on(config, wandb_project="flowbook")
    # The files say whose they are; a folder of the same second as another gets a number behind its name.
    kept = [path.name for path in (trainer.folder / "wandb").glob("offline-run-*/*.wandb")]
    run_id = read_checkpoint(trainer.folder / "last.pt")["wandb_run_id"]
    assert kept == [f"run-{run_id}.wandb"] * 2, (kept, run_id)


# ---- 12. Clocks

A_DAY = 24 * 3600


class Clock:
    """A clock that jumps back by a day at its n-th reading."""

    def __init__(self, clock, reading):
        self.clock, self.left = clock, reading

    def __call__(self):
        self.left -= 1
        return self.clock() - A_DAY * (self.left < 0)


@pytest.mark.parametrize("reading", [1, 5, 20])
def test_all_clocks_may_jump_backwards(configured, new_trainer, ends_as_unbroken, monkeypatch, reading):
    with monkeypatch.context() as patch:
        for name in ("time", "monotonic", "perf_counter"):
            patch.setattr(time, name, Clock(getattr(time, name), reading))
        patch.setattr("flowbook.trainer.Saver", partial(Saver, clock=time.monotonic))
        trainer = new_trainer(configured())
        trainer.train()
    ends_as_unbroken(trainer.folder)


def test_states_are_saved_whatever_the_time_of_day_says(configured, new_trainer, saving, monkeypatch):
    saving(pause=0)
    saved = []

    class Look:
        def on_step(self, trainer):
            if trainer.step == 10:
                monkeypatch.setattr(time, "time", Clock(time.time, 0))
            if trainer.step > 1:
                saved.append(trainer.step - read_checkpoint(trainer.folder / "last.pt")["step"])

    new_trainer(configured(), callbacks=[Look()]).train()
    assert saved == [1] * 27        # before each step's own save, that of the step before is there


@pytest.mark.parametrize("damaged", [[], ["last.pt"]])
@pytest.mark.parametrize("times", [(1, 2, 3), (3, 2, 1), (2e9, 4e9, 3e9), (0, 0, 0)])
def test_the_newest_state_is_told_by_its_step_and_not_by_its_files_time(stopped, saving, new_trainer, damaged, times):
    saving(pause=0)
    config, folder = stopped()
    damage_states(folder, damaged, cut)
    expected = max(read_checkpoint(folder / name)["step"] for name in STATES if name not in damaged)
    for name, when in zip(STATES, times, strict=True):
        os.utime(folder / name, (when, when))
    assert new_trainer(config, resume_path="auto").step == expected


# ---- 13. Hostile files

@pytest.fixture
def trap(tmp_path):
    """An object whose pickle makes a folder when it is read. It must not be there in the end."""
    sentinel = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    yield Trap()
    assert not sentinel.exists(), "a hostile file was executed"


def write_sealed(path, state):
    """As `write_checkpoint` writes it, without looking at what is in it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(seal(buffer.getvalue()))
    return path


@pytest.fixture
def refused(tmp_path, command, refused_before_the_first_step):
    """The commands that read a checkpoint refuse this one in a sentence, and write nothing."""
    def check(path, config, by=("train", "sample")):
        if "train" in by:
            refused_before_the_first_step(config, "--resume", path)
        if "sample" in by:
            before = contents(tmp_path)
            code, _, err = command("sample", path)
            assert code == 2 and err.startswith("flowbook: "), err
            assert contents(tmp_path) == before
    return check


@contextlib.contextmanager
def little_memory(megabytes=500):
    """Who asks for more than so much memory does not get it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("where", [("more",), ("config", "group"), ("model", "first.weight"), ("progress",)])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path, real, refused, trap, where):
    state, config = real
    with_(trap, *where)(state)
    refused(write_sealed(tmp_path / "hostile.pt", state), config)


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """A sealed file whose archive has members that `change` made: (name, content) to content and the size that it claims."""
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            content, claims = change(name, content)
            archive.writestr(name, content)
            archive.filelist[-1].file_size = claims     # goes to the list of members at the end of the file
    path.write_bytes(seal(buffer.getvalue()))
    return path


def test_an_archive_that_grows_when_it_is_unpacked_is_refused(tmp_path, real, refused):
    state, config = real
    state["model"]["more"] = torch.zeros(2**24)
    path = rewritten(write_sealed(tmp_path / "hostile.pt", state), lambda name, content: (content, len(content)), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20 < 4 * 2**24
    refused(path, config)


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "version"])
def test_an_archive_that_claims_terabytes_is_refused(tmp_path, real, refused, member):
    state, config = real
    path = rewritten(write_sealed(tmp_path / "hostile.pt", state),
                     lambda name, content: (content, 2**42 if name.endswith(member) else len(content)))
    with little_memory():
        refused(path, config)


def one_number(*shape):
    """A tensor of that shape which is one number in memory, and in a file."""
    return torch.zeros(1).expand(shape)


ABSURD_TENSORS = {
    "a weight": (("model", "first.weight"), (10**6, 10**6), ["train"]),
    "an averaged weight": (("ema", "module", "first.weight"), (10**6, 10**6)),
    "the mean": (("stats", "mean"), (10**12,)), "the deviation": (("stats", "std"), (10**6, 10**6))}


@pytest.mark.parametrize("what", ABSURD_TENSORS)
def test_a_tensor_that_claims_terabytes_is_refused(tmp_path, real, refused, what):
    state, config = real
    where, shape, *by = ABSURD_TENSORS[what]
    with_(one_number(*shape), *where)(state)
    with little_memory():
        refused(write_sealed(tmp_path / "hostile.pt", state), config, *by)


def test_moments_that_claim_more_than_they_hold_are_refused(tmp_path, real, refused):
    state, config = real        # AdamW would write where no memory is
    with_(one_number(*state["optimizer"]["state"][0]["exp_avg"].shape), *FIRST_MOMENT)(state)
    refused(write_sealed(tmp_path / "hostile.pt", state), config, by=["train"])


ABSURD_NETWORKS = {
    "a billion wide": ({"width": 10**9}, "options"), "as wide as allowed": ({"width": 50_000}, "options"),
    "a billion blocks": ({"depth": 10**9}, "options"), "a billion times wider inside": ({"expansion": 10**9}, "options"),
    "a width in words": ({"width": "wide"}, "options"), "no options": (None, "options"), "an option too many": ({"x": 1}, "options"),
    "the shape twice": ({"data_shape": [3]}, "options"), "points of 4 TB": ([10**12], "data_shape"),
    "images of 4 TB": ([10**6, 10**6], "data_shape"), "a shape in words": ("text", "data_shape"),
    "half a feature": ([2.5], "data_shape"), "no shape": (None, "data_shape"),
    "a path": ("../../x", "arch"), "no arch": (None, "arch"), "a list": (["mlp"], "arch")}


@pytest.mark.parametrize("what", ABSURD_NETWORKS)
def test_a_network_that_asks_for_the_absurd_is_refused_before_it_is_made(tmp_path, real, refused, what):
    state, config = real
    value, entry = ABSURD_NETWORKS[what]
    state["model_spec"][entry] = value
    with little_memory():
        refused(write_sealed(tmp_path / "hostile.pt", state), config, by=["sample"])


def test_an_absurd_network_is_refused_though_its_weights_claim_to_fit(tmp_path, real, refused):
    state, config = real
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in create_model("mlp", (2,), width=50_000, depth=1).state_dict().items()}
    state["model_spec"]["options"] = {"width": 50_000, "depth": 1}
    state["ema"]["module"] = {name: one_number(*shape) for name, shape in shapes.items()}
    with little_memory():
        refused(write_sealed(tmp_path / "hostile.pt", state), config, by=["sample"])


@pytest.mark.parametrize(("field", "value"), [("arch", "../../x"), ("dataset", "../x"), ("aug", "/etc"), ("flow", ""), ("epochs", "many"),
                                              ("arch_options", 7), ("surprise", 1), ("checkpoint_dir", 7)])
def test_a_configuration_that_no_run_can_have_is_refused(tmp_path, real, refused, field, value):
    state, config = real
    state["config"][field] = value
    refused(write_sealed(tmp_path / "hostile.pt", state), config)


# What a resumed run or a sample does not need may be anything.
UNUSED = {"train": {"versions", "model_spec", "best_val_loss", "wandb_run_id"},
          "sample": {"versions", "model", "best_val_loss", "wandb_run_id", "optimizer", "scheduler", "early_stopping", "epoch", "step",
                     "progress", "data_fingerprint", "config", "ema"}}       # an empty configuration is the default, no EMA the weights


@pytest.mark.filterwarnings("ignore:best.pt is missing")
@pytest.mark.parametrize("value", ["missing", None, "text", {}, 0.5], ids=str)
def test_entries_that_are_missing_or_of_another_kind_are_refused_in_words(tmp_path, real, new_trainer, value):
    state, config = real
    path, wrong = tmp_path / "hostile.pt", []
    for entry in state:
        write_sealed(path, {name: content if name != entry else value for name, content in state.items()
                            if name != entry or value != "missing"})
        for use, read in {"train": partial(new_trainer, config, resume_path=path), "sample": partial(load_flow, path)}.items():
            try:
                read()
            except (CheckpointError, ValueError):
                pass
            except Exception as error:
                wrong.append(f"{use} with the entry {entry} {value!r}: {type(error).__name__}: {error}")
            else:
                if entry not in UNUSED[use]:
                    wrong.append(f"{use} with the entry {entry} {value!r}: taken")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", "..", ".", "", ".hidden", "-x", "a b", "a\nb", "a\0b", "a\\b", "ünder", "~"])
def test_a_run_name_that_climbs_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not allowed"):
        run_folder(name, tmp_path)


@pytest.mark.parametrize("flags", [["--dataset", "../x-all"], ["--arch", "../../x"], ["--flow", "/etc"], ["--aug", ".."]])
def test_flags_that_climb_are_refused(tmp_path, configured, refused_before_the_first_step, flags):
    refused_before_the_first_step(configured(), *flags, words=[f"{flags[0][2:]}={flags[1]!r} is not allowed"])


@pytest.mark.parametrize("name", ["../runs/x", "../../etc/passwd", "..", "a\0b"])
def test_samples_of_a_run_that_is_none_are_refused(tmp_path, command, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("sample", name)
    assert code == 2 and err.startswith("flowbook: ") and contents(tmp_path) == {}


@pytest.mark.parametrize("run_id", ["../../../outside", "a/b", 7])
def test_a_wandb_id_that_climbs_writes_nothing_outside_the_run(tmp_path, real, new_trainer, wandb_environment, run_id):
    state, config = real
    state["wandb_run_id"] = run_id
    path = write_sealed(tmp_path / "hostile.pt", state)

    def outside():
        inside = (run_folder(config.run_name, config.checkpoint_dir), tmp_path / "home")
        return {path for path in tmp_path.rglob("*") if not any(path.is_relative_to(folder) for folder in inside)}

    Path(config.checkpoint_dir).mkdir()
    before = outside()
    with contextlib.suppress(*IN_WORDS), warnings.catch_warnings(action="ignore"):
        new_trainer(config, resume_path=path, wandb_project="flowbook").train()
    assert {path for path in outside() - before if path.suffix != ".lock"} == set()


HOSTILE_RECORDS = {
    "nothing": b"", "zeros": b"\x00" * 100, "lists in lists": b"[" * 100_000, "tables in tables": b'{"a":' * 100_000,
    "null": b"null", "a list": b"[]", "no text": b"\xff\xfe", "a long number": b"9" * 10_000, "no status": b'{"status": []}',
    "no process": b'{"status": "running", "process": "x", "host": {}}', "no step": b'{"step": 1e400}', "no step yet": b'{"step": -7}',
    "running, and that is all": b'{"status": "running"}'}


@pytest.mark.parametrize("what", HOSTILE_RECORDS)
def test_hostile_records_stop_no_run(stopped, go_on, new_trainer, ends_as_unbroken, what):
    config, folder = stopped()
    for name in ("summary.json", "config.json"):
        (folder / name).write_bytes(HOSTILE_RECORDS[what])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(HOSTILE_RECORDS[what] + b"\n")
    go_on(config)
    ends_as_unbroken(folder)
    assert read_summary(folder)["status"] == "finished" and read_metrics(folder)
    (folder / "summary.json").write_bytes(HOSTILE_RECORDS[what])
    try:
        assert new_trainer(config, resume_path="auto").train()["status"] == "finished"
    except ValueError as error:     # nothing is left to do, and why nothing is said is said
        assert str(folder / "summary.json") in str(error)


@pytest.mark.parametrize("what", HOSTILE_RECORDS)
def test_a_run_that_is_in_use_is_refused_whatever_its_summary_says(stopped, command, train_arguments, what):
    config, folder = stopped()
    (folder / "summary.json").write_bytes(HOSTILE_RECORDS[what])
    before = contents(folder)
    with sole_use(folder):
        code, _, err = command(*train_arguments(config, "--resume"))
    assert code == 2 and str(folder) in err and contents(folder) == before, err


@pytest.mark.parametrize("file", ["train.npy", "validation.npy", "normalization_stats.pt"])
def test_prepared_data_with_a_pickle_is_not_run(tmp_path, configured, refused_before_the_first_step, trap, file):
    prepare_dataset("moons", tmp_path / "data", points=1000)
    path = tmp_path / "data" / "moons" / file
    if path.suffix == ".npy":
        np.save(path, np.array([[trap, trap]] * 700, dtype=object), allow_pickle=True)
    else:
        torch.save({"mean": torch.zeros(2), "std": trap}, path)
    refused_before_the_first_step(configured(data_dir=str(tmp_path / "data")), words=[path])
    if path.suffix == ".pt":
        refused_before_the_first_step(configured(stats_path=str(path)), words=[path])
