"""A step that is recorded and repeated as a whole is the step, line by line."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.functional import mse_loss

from conftest import FLOW_CASES, PressCtrlC, assert_same, training_state
from flowbook.capture import CapturedStep, Tape, record_on_tape
from flowbook.checkpoint import read_checkpoint
from flowbook.learner import Learner, NotFinite
from flowbook.nets import create_model
from flowbook.optimizer import FlatAdamW
from flowbook.randomness import set_seed


@pytest.fixture
def on_tape(monkeypatch):
    """Learners on a processor capture their steps, too: on a tape, which is as blind as a CUDA graph."""
    captured = Learner._captured
    monkeypatch.setattr(Learner, "_captures", lambda self: self.config.compile != "off")
    monkeypatch.setattr(Learner, "_captured", lambda self: captured(self, record=record_on_tape))


class Everything(nn.Module):
    """Dropout, batch normalisation, a frozen weight, a weight that nothing depends on, and a large one."""

    def __init__(self, shape=(2,)):
        super().__init__()
        # No bias before the normalisation: its gradient would be rounding, which AdamW makes as long as any other
        self.layers = nn.Sequential(nn.Linear(3, 512, bias=False), nn.BatchNorm1d(512), nn.SiLU(), nn.Dropout(0.1), nn.Linear(512, 512),
                                    nn.Linear(512, 2))
        self.unused = nn.Parameter(torch.ones(3))
        self.layers[-1].bias.requires_grad_(False)

    def forward(self, x, t, cond=None): return self.layers(torch.cat([x, t[:, None]], 1))


def new_learner(config, network=Everything):
    set_seed(config.seed)
    return Learner(network(), config)


def learned(learner):
    """All that a learner has come to, on the CPU."""
    learner.meter.read(learner.step)
    return {"model": learner.model.state_dict(), "ema": learner.ema.state_dict(), "optimizer": learner.optimizer.state_dict(),
            "meter": learner.meter.state_dict(), "lr": learner.lr}


def assert_close(first, second, tolerance=2e-5):
    """Two nested states are the same to rounding."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first: assert_close(first[key], second[key], tolerance)
    elif isinstance(first, (list, tuple)):
        for a, b in zip(first, second, strict=True): assert_close(a, b, tolerance)
    elif isinstance(first, (torch.Tensor, float)):
        a, b = torch.as_tensor(first).double(), torch.as_tensor(second).double()
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), (a - b).abs().max()
    else: assert first == second


def is_repeated(learner): return isinstance(learner._learn, CapturedStep) and learner._learn.refused is None


def test_a_captured_run_is_the_run(configured, on_tape):
    config = configured(ema_decay=0.9, grad_clip=0.5)
    repeated, usual = new_learner(config), new_learner(config.replace(compile="off"))
    for _ in range(12):
        repeated.update()
        usual.update()
    assert is_repeated(repeated) and usual._learn == usual.learn
    assert_close(learned(repeated), learned(usual))


def test_the_first_step_leaves_nothing_behind_but_itself(configured, on_tape):
    config = configured(lr=2**-9, warmup_steps=0, schedule="constant", ema_decay=0.5, ema_warmup=False)      # Exact as float32, too
    repeated, usual = new_learner(config), new_learner(config.replace(compile="off"))
    for _ in range(5):
        before = torch.get_rng_state()
        repeated.update()
        with torch.random.fork_rng([]): usual.update()
        assert_same(learned(repeated), learned(usual))
        assert not torch.equal(before, torch.get_rng_state())       # `update` seeds the generator; `train` puts it back


@pytest.mark.parametrize("flow_case", FLOW_CASES, indirect=True)
def test_a_captured_run_goes_on_bit_for_bit(configured, new_trainer, on_tape, flow_case, tmp_path):
    config = configured(arch_options={"width": 16, "depth": 2, "dropout": 0.1}, **flow_case)
    unbroken = new_trainer(config.replace(checkpoint_dir=str(tmp_path / "unbroken")))
    unbroken.train()
    with pytest.raises(KeyboardInterrupt): new_trainer(config, callbacks=[PressCtrlC(10)]).train()
    resumed = new_trainer(config, resume_path="auto")
    resumed.train()
    assert is_repeated(unbroken) and is_repeated(resumed)
    assert_same(*(training_state(read_checkpoint(trainer.folder / "last.pt")) for trainer in (resumed, unbroken)))


def test_a_run_may_go_on_without_capturing(configured, new_trainer, on_tape):
    with pytest.raises(KeyboardInterrupt): new_trainer(configured(), callbacks=[PressCtrlC(10)]).train()
    assert new_trainer(configured(compile="off"), resume_path="auto").train()["status"] == "finished"


def test_a_step_that_goes_wrong_is_held_and_named(configured, on_tape):
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 2))

        def forward(self, x, t, cond=None):
            far = x.norm(dim=1, keepdim=True) > 2.6
            return self.layers(torch.cat([x, t[:, None]], 1)) * torch.where(far, torch.nan, 1.0)

    def outcome(**changes):
        learner = new_learner(configured(**changes), Fragile)
        with pytest.raises(NotFinite) as stopped:
            for _ in range(4): learner.train_epoch()
        return str(stopped.value), learner.model.state_dict(), learner.ema.state_dict()

    for skipped in (0, 1):
        repeated, usual = outcome(max_skipped_steps=skipped), outcome(max_skipped_steps=skipped, compile="off")
        assert repeated[0] == usual[0] and "the network's answer" in usual[0]
        assert_close(repeated[1:], usual[1:])


def test_what_a_recording_cannot_see_is_recorded_anew(configured, on_tape):
    def train(**changes):
        learner = new_learner(configured(ema_decay=0.9, **changes))
        for step in range(13):
            if step == 3: learner.optimizer.param_groups[0]["weight_decay"] = 10.0
            if step == 5: learner.model.eval()
            if step == 7: learner.ema.module.double().float()
            if step == 8: learner.model.layers[0].weight.requires_grad_(False)
            if step == 9: learner.model.train().layers[1].eval()
            if step == 11: learner.model.layers[1].running_mean = torch.full((512,), 0.3)       # Another tensor
            learner.update()
        return learner

    repeated, usual = train(), train(compile="off")
    assert is_repeated(repeated)
    assert_close(learned(repeated), learned(usual))


def test_weights_that_were_moved_are_not_trained_in_vain(configured, on_tape):
    learner = new_learner(configured())
    learner.update()
    learner.model.double().float()
    with pytest.warns(UserWarning, match="repeated as a whole"), pytest.raises(RuntimeError, match="weights have been moved"):
        learner.update()


def counting_step(stop_at=None):
    """A step that notes how often its lines run, and may be interrupted in one of them."""
    torch.manual_seed(0)
    model = create_model("mlp", (2,), width=16, depth=1)
    optimizer, lines = FlatAdamW(list(model.parameters())), []

    def step(x, t, u, lr):
        lines.append(lr)
        if len(lines) == stop_at: raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = mse_loss(model(x, t), u)
        loss.backward()
        norm = optimizer.clip(1.0)
        optimizer.step(lr=lr)
        return loss.detach(), norm

    return CapturedStep(step, lambda: optimizer.changed, lambda: None, record_on_tape), model, lines


INPUTS = (torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 8), torch.ones(8, 2), 1e-3)


def test_once_recorded_no_line_runs_again():
    step, model, lines = counting_step()
    step(*INPUTS)
    recorded = len(lines)
    for _ in range(5): step(*INPUTS)
    assert len(lines) == recorded
    step(*(value[:4] if isinstance(value, torch.Tensor) else value for value in INPUTS))       # A smaller batch
    assert len(lines) > recorded and step.refused is None


@pytest.mark.parametrize("line", range(1, 6))
def test_ctrl_c_while_a_step_is_recorded_leaves_everything_as_it_was(line):
    step, model, lines = counting_step(stop_at=line)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt): step(*INPUTS)
    assert_same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    step(*INPUTS)
    usual, same, _ = counting_step()
    usual(*INPUTS)
    assert_same(model.state_dict(), same.state_dict())


def test_ctrl_c_while_a_step_is_recorded_anew_is_no_recording():
    setting = [0]
    step, model, lines = counting_step()
    step.settings = lambda: setting[0]
    step(*INPUTS)
    changed, step.changed = step.changed, lambda: exec("raise KeyboardInterrupt")
    setting[0] = 1
    with pytest.raises(KeyboardInterrupt): step(*INPUTS)
    setting[0], step.changed = 0, changed
    losses = [step(*INPUTS[:2], scale * INPUTS[2], 1e-3)[0].item() for scale in (1, 100)]
    assert losses[1] > 1000 * losses[0]        # The points of a step are those that it was given


def test_results_are_not_written_again():
    step, _, _ = counting_step()
    first = step(*INPUTS)
    kept = [value.clone() for value in first]
    step(INPUTS[0] + 1, *INPUTS[1:])
    assert_same(list(first), kept)


def blind(network, **options):
    """Why a network's step is not captured, if it is not."""
    torch.manual_seed(0)
    optimizer = FlatAdamW(list(network.parameters()))

    def step(x, t, u, lr):
        optimizer.zero_grad()
        loss = mse_loss(network(x, t), u)
        loss.backward()
        optimizer.step(lr=lr)
        return (loss.detach(),)

    captured = CapturedStep(step, lambda: optimizer.changed, lambda: None, record_on_tape, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured(*INPUTS)
    return captured.refused


class Linear(nn.Module):
    """A layer whose answer is changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(2, 2), change

    def forward(self, x, t, cond=None): return self.change(self.layer(x))


TABLE = torch.arange(16.0).view(8, 2)
CAPTURED = {"a look-up": lambda y: y + TABLE[torch.arange(8).flip(0)], "repeats": lambda y: y.repeat_interleave(2, 0, output_size=16)[::2],
            "dropout": nn.functional.dropout,
            "checkpointed": lambda y: torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False)}
REFUSED = {"a mask": (lambda y: y + y[y > 0].sum(), "aten.index"),
           "a mask that is written": (lambda y: y.masked_scatter(y > 0, y) + masked(y), "aten"),
           "a value": (lambda y: y * y.sum().item(), "_local_scalar_dense"), "unique": (lambda y: y + len(y.detach().unique()), "unique"),
           "Python's chance": (lambda y: y * random.random(), "draws random numbers"),
           "NumPy's chance": (lambda y: y * np.random.rand(), "draws random numbers"),
           "Python's chance, sometimes": (lambda y: y if random.random() > 1e-9 else 0 * y, "draws random numbers")}


def masked(y):
    other = torch.zeros_like(y)
    other[y > 0] = 1.0
    return other


@pytest.mark.parametrize("name", CAPTURED)
def test_what_can_be_captured_is(name): assert blind(Linear(CAPTURED[name])) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused(name):
    change, words = REFUSED[name]
    assert words in blind(Linear(change))
    with pytest.raises(RuntimeError, match="can't be repeated as a whole"): blind(Linear(change), required=True)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_network_stays_compiled(fullgraph):
    compilations, calls = [], []

    def backend(graph, examples):
        compilations.append(graph)
        return lambda *arguments: calls.append(1) or graph(*arguments)

    network = torch.compile(Linear(torch.sin), backend=backend, fullgraph=fullgraph)
    assert blind(network) is None
    assert len(compilations) == 1 and len(calls) >= 6       # In the warm-up, the rehearsal, the comparison and the recording
    network(*INPUTS[:2])
    assert len(compilations) <= 2 and len(calls) >= 7       # Without gradients it may be compiled again


def test_large_gradients_can_be_looked_at(configured, on_tape):
    """A callback that logs gradients sees those of the last step."""
    repeated, usual = new_learner(configured(warmup_steps=0)), new_learner(configured(warmup_steps=0, compile="off"))
    for _ in range(4):
        repeated.update()
        usual.update()
        ours, its = (learner.model.layers[4].weight.grad for learner in (repeated, usual))
        assert torch.allclose(ours, its, rtol=1e-3, atol=1e-6)


def test_a_network_that_fails_fails_with_its_own_error(configured, on_tape):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t, cond=None):
            if len(x) == 100: raise KeyError("my own mistake")
            return self.layer(x)

    with pytest.raises(KeyError, match="my own mistake"): new_learner(configured(), Failing).update()


def test_a_copy_to_another_device_is_found():
    points = torch.ones(2)
    with pytest.raises(RuntimeError, match="cpu and meta copy"): record_on_tape(lambda: points.to("meta"))
    with pytest.raises(RuntimeError, match="nonzero"): record_on_tape(lambda: points.nonzero())
    with Tape() as tape: result = points + 1
    points.fill_(5)
    tape()
    assert torch.equal(result, torch.full((2,), 6.0))


def test_a_graph_without_a_gpu_is_refused(configured, new_trainer, tmp_path):
    with pytest.raises(ValueError, match='compile="graph" needs a CUDA GPU, and this run is on cpu'):
        new_trainer(configured(compile="graph", device="cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.parametrize("flow_case", FLOW_CASES, indirect=True)
def test_on_a_gpu_a_captured_run_is_the_run_and_goes_on_bit_for_bit(configured, new_trainer, flow_case, tmp_path):
    config = configured(device="cuda", compile="graph", arch_options={"width": 16, "depth": 2, "dropout": 0.1}, **flow_case)
    usual = new_trainer(config.replace(compile="off", checkpoint_dir=str(tmp_path / "usual")))
    usual.train()
    unbroken = new_trainer(config.replace(checkpoint_dir=str(tmp_path / "unbroken")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unbroken.train()
    with pytest.raises(KeyboardInterrupt): new_trainer(config, callbacks=[PressCtrlC(10)]).train()
    resumed = new_trainer(config, resume_path="auto")
    resumed.train()
    assert is_repeated(unbroken) and is_repeated(resumed)
    assert_same(*(training_state(read_checkpoint(trainer.folder / "last.pt")) for trainer in (resumed, unbroken)))
    assert_close(unbroken.model.state_dict(), usual.model.state_dict(), 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_on_a_gpu_everything_is_captured(configured, precision):
    config = configured(device="cuda", ema_decay=0.9, precision=precision)
    repeated, usual = new_learner(config), new_learner(config.replace(compile="off"))
    repeated.train_epoch(), usual.train_epoch()
    assert is_repeated(repeated), repeated._learn.refused
    assert_close(learned(repeated), learned(usual), 1e-3)


@pytest.mark.cuda
def test_a_capture_that_fails_leaves_a_gpu_that_works():
    points, layer, stream = torch.ones(4, 4, device="cuda"), nn.Dropout(0.5), torch.cuda.current_stream()

    def step(x, fails):        # A rehearsal does not see a tensor that is made of a number; a capture does
        return (layer(x).sum() + (torch.tensor(2.0, device="cuda") if fails else 0),)

    def seeded(work, *arguments):
        torch.cuda.manual_seed(0)
        return work(*arguments)[0].item()

    captured = CapturedStep(lambda x: step(x, False), lambda: [], lambda: None)
    assert seeded(captured, points) == seeded(step, points, False) and captured.refused is None
    failing = CapturedStep(lambda x: step(x, True), lambda: [], lambda: None)
    with pytest.warns(UserWarning, match="can't be repeated as a whole"): seeded(failing, points)
    assert torch.cuda.current_stream() == stream
    assert seeded(captured, points) == seeded(step, points, False) == seeded(failing, points) - 2
