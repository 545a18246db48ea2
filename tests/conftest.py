"""What several tests need: small data, small runs, and the command line as a user runs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowbook.config import TrainingConfig
from flowbook.data import AUGMENTATIONS, prepare_dataset
from flowbook.flows import FLOWS
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.trainer import FlowTrainer

COMMAND = str(Path(sys.executable).with_name("flowbook"))


@pytest.fixture(autouse=True)
def _off_the_network(monkeypatch):
    """No test talks to W&B's server, whatever key the developer has; those that test W&B set what they need."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("no_proxy", "127.0.0.1")     # A proxy would answer for servers that aren't there


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Two moons, 1,000 points: 700 to train on."""
    folder = tmp_path_factory.mktemp("datasets")
    prepare_dataset("moons", folder, points=1000)
    return folder


# Every flow with all augmentations at once, one that pairs the points of two steps together, and every augmentation with one flow
FLOW_CASES = [*[pytest.param((name, {}, "mixup+noise"), id=name) for name in FLOWS],
              pytest.param(("otcfm", {"ot_batch_size": 200}, "mixup+noise"), id="otcfm of two steps"),
              *[pytest.param(("icfm", {}, aug), id=f"icfm, {aug}") for aug in AUGMENTATIONS if aug != "mixup+noise"]]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, data_dir):
    """The folder of a finished run, whose pairs reflow can use."""
    config = TrainingConfig(dataset="moons-all", epochs=2, batch_size=100, arch_options={"width": 16, "depth": 2},
                            data_dir=str(data_dir), checkpoint_dir=str(tmp_path_factory.mktemp("trained")))
    set_seed(config.seed)
    trainer = FlowTrainer(create_model(config.arch, (2,), **config.arch_options), config, wandb_project=None)
    trainer.train()
    return trainer.folder


@pytest.fixture
def flow_case(request, trained_run):
    """Settings that choose flow and augmentation: `@pytest.mark.parametrize("flow_case", FLOW_CASES, indirect=True)`."""
    name, options, aug = request.param
    return {"flow": name, "flow_options": {"from_run": str(trained_run)} if name == "reflow" else options, "aug": aug}


@pytest.fixture
def configured(tmp_path, data_dir):
    """A configuration of a run that takes a second: 7 steps an epoch."""
    def make(**changes):
        settings = dict(dataset="moons-all", epochs=4, batch_size=100, lr=2e-3, warmup_steps=5, log_every=3,
                        arch_options={"width": 16, "depth": 2}, data_dir=str(data_dir), checkpoint_dir=str(tmp_path / "runs"))
        return TrainingConfig(**(settings | changes))
    return make


@pytest.fixture
def new_trainer():
    """A trainer with a network of the configuration's, its first weights decided by the seed, without W&B."""
    def make(config, **options):
        set_seed(config.seed)
        return FlowTrainer(create_model(config.arch, (2,), **config.arch_options), config, **({"wandb_project": None} | options))
    return make


@pytest.fixture
def flowbook(tmp_path):
    """Run the command `flowbook` in an empty folder, in a process of its own."""
    def run(*arguments, timeout=120):
        command = [COMMAND, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    return run


class PressCtrlC:
    """A callback that behaves like a person who presses Ctrl-C in a certain step."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def on_step(self, trainer):
        if trainer.step == self.step:
            signal.raise_signal(self.number)


def assert_same(first, second, where="state"):
    """Two nested states are equal, bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for position, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{position}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    else:
        assert first == second, where


def training_state(checkpoint):
    """What must be the same in two runs that are the same: all but the time it took and where it lies."""
    state = dict(checkpoint)
    config = {name: value for name, value in state.pop("config").items() if name != "checkpoint_dir"}
    progress = {name: value for name, value in state.pop("progress").items() if name != "seconds"}
    return state | {"config": config, "progress": progress}
