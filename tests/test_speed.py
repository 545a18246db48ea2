"""What makes a step fast changes nothing that is trained."""

import copy
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR

from conftest import PressCtrlC, assert_same, training_state
from flowbook.checkpoint import read_checkpoint
from flowbook.couplings import EntropicCoupling, OptimalTransportCoupling
from flowbook.data import FlowDataset
from flowbook.device import matmul_precision
from flowbook.ema import EMAModel
from flowbook.learner import Learner, NotFinite
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.scheduler import cosine_with_warmup


def new_learner(config, **options):
    set_seed(config.seed)
    return Learner(create_model(config.arch, (2,), **config.arch_options), config, **options)


def apart(model, other):
    return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_learner_trains_as_the_usual_loop_does(configured):
    config = configured(grad_clip=0.5, ema_decay=0.99)
    learner, usual = new_learner(config), new_learner(config)       # Of the second, only the draws are used
    first, model = copy.deepcopy(usual.model), usual.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: cosine_with_warmup(step, config.warmup_steps, config.epochs * usual.steps_per_epoch))
    average, clipped = EMAModel(model, config.ema_decay), 0
    for step in range(28):
        learner.update()
        usual.step = step
        sample = usual.draw()
        model.zero_grad()
        mse_loss(usual.velocity(sample.x_t, sample.t), sample.u_t).backward()
        clipped += nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item() > config.grad_clip
        optimizer.step()
        scheduler.step()
        average.update(model)
    assert 0 < clipped < 28 and apart(first, model) > 0.02
    assert apart(learner.model, model) < 1e-5 and apart(learner.ema.module, average.module) < 1e-5
    assert learner.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert learner.scheduler.get_last_lr() == scheduler.get_last_lr()


def test_an_average_of_one_vector_is_that_of_each_weight(configured):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.last.bias.requires_grad_(False)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x, t, cond=None): return self.last(self.norm(self.first(torch.cat([x, t[:, None]], 1)).relu()))

    set_seed(0)
    learner = Learner(Frozen(), configured())
    usual = EMAModel(learner.model, learner.ema.decay)
    for _ in range(20):
        learner.update()
        usual.update(learner.model)
    assert_same(learner.ema.state_dict(), usual.state_dict())
    learner.ema.update(other := Frozen())       # Somebody else's weights, which lie in no vector
    usual.update(other)
    assert_same(learner.ema.state_dict(), usual.state_dict())


def test_an_average_that_was_moved_goes_on(configured):
    learner = new_learner(configured())
    usual = EMAModel(learner.model, learner.ema.decay)
    learner.ema.module.double().float()     # Its weights lie elsewhere now
    for _ in range(3):
        learner.update()
        usual.update(learner.model)
    assert_same(learner.ema.state_dict(), usual.state_dict())


def test_a_network_that_was_moved_is_not_trained_in_vain(configured):
    learner = new_learner(configured())
    learner.update()
    learner.model.double().float()
    with pytest.raises(RuntimeError, match="weights have been moved since this optimiser was made"): learner.update()
    first = new_learner(configured())
    Learner(first.model, configured())
    with pytest.raises(RuntimeError, match="by another optimiser or trainer"): first.update()


def test_a_network_in_one_vector_is_a_network_like_any_other(configured, tmp_path):
    learner = new_learner(configured())
    learner.update()
    plain = create_model("mlp", (2,), **learner.config.arch_options)
    plain.load_state_dict(learner.model.state_dict())
    save_file(learner.model.state_dict(), tmp_path / "ours")
    save_file(plain.state_dict(), tmp_path / "plain")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "plain").read_bytes()
    for model, name in ((learner.model, "ours.pt"), (plain, "plain.pt")): torch.save(model.state_dict(), tmp_path / name)
    assert (tmp_path / "ours.pt").stat().st_size < 1.2 * (tmp_path / "plain.pt").stat().st_size
    copied = copy.deepcopy(learner.model)
    learner.update()
    assert_same(copied.state_dict(), plain.state_dict())


COUPLINGS = {"otcfm": {}, "otcfm of two steps": {"ot_batch_size": 200}, "sbcfm": {}}


@pytest.mark.parametrize("aug", ["none", "mixup+noise"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_pairs_that_are_looked_for_ahead_are_the_same_pairs(configured, monkeypatch, name, aug):
    config = configured(flow=name.split()[0], flow_options=COUPLINGS[name], aug=aug)
    ahead = new_learner(config).pairs
    found = {step: ahead.at(step) for step in range(20)}
    for coupling in (OptimalTransportCoupling, EntropicCoupling): monkeypatch.setattr(coupling, "pair_ahead", False)
    one_by_one = new_learner(config).pairs
    for step in [*range(20), 3, 2, 19, 4]:
        assert_same(list(one_by_one.at(step)), list(found[step]), f"step {step}")
        assert_same(list(ahead.at(step)), list(found[step]), f"step {step}, again")
    assert ahead._threads is not None and one_by_one._threads is None


def test_pairs_are_looked_for_while_a_step_is_trained_on(configured, monkeypatch):
    pair, looked_for_by = OptimalTransportCoupling.pair, []

    def slow(self, x0, x1, generator=None):
        looked_for_by.append(threading.current_thread())
        return pair(self, x0, x1, generator)

    learner = new_learner(configured(flow="otcfm"))
    monkeypatch.setattr(OptimalTransportCoupling, "pair", slow)
    learner.pairs.at(0)
    until = time.monotonic() + 60
    while len(looked_for_by) < 2 and time.monotonic() < until: time.sleep(0.01)
    assert len(looked_for_by) >= 2 and threading.main_thread() not in looked_for_by


def test_searches_that_nobody_waits_for_are_given_up(configured, new_trainer):
    trainer = new_trainer(configured(flow="otcfm"), callbacks=[PressCtrlC(3)])
    with pytest.raises(KeyboardInterrupt): trainer.train()
    assert trainer.pairs._ahead == {}
    trainer.train()         # They are looked for again
    unbroken = new_trainer(configured(flow="otcfm"), overwrite=True)
    unbroken.train()
    assert_same(trainer.model.state_dict(), unbroken.model.state_dict())


def test_an_error_in_a_search_is_raised_in_its_own_step(configured, monkeypatch, data_dir):
    train, val = (FlowDataset(data_dir, "moons", "all", split) for split in ("train", "validation"))
    learner = new_learner(configured(flow="otcfm"), train_dataset=train, val_dataset=val)
    pair, calls = OptimalTransportCoupling.pair, []

    def once_wrong(self, x0, x1, generator=None):
        calls.append(mine := torch.equal(x1, wrong))        # Other threads append, too
        if mine: raise KeyError("my own mistake")
        return pair(self, x0, x1, generator)

    monkeypatch.setattr(OptimalTransportCoupling, "pair", once_wrong)
    wrong = learner.loader.batch(3)
    for step in range(3): learner.pairs.at(step)
    with pytest.raises(KeyError, match="my own mistake"): learner.pairs.at(3)
    learner.pairs.at(4)
    assert sum(calls) == 1


class Watch:
    """Notes which kind of products a trainer uses."""
    def __init__(self): self.seen, self.in_the_exam = set(), set()
    def on_step(self, trainer): self.seen.add(torch.get_float32_matmul_precision())

    def on_train_start(self, trainer):
        trainer.ema.module.register_forward_hook(lambda *arguments: self.in_the_exam.add(torch.get_float32_matmul_precision()))


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision, inside", [("fp32", "highest"), ("tf32", "high"), ("bf16", "highest")])
def test_a_run_uses_the_products_it_was_asked_for_and_leaves_the_process_as_it_was(configured, new_trainer, precision, inside, before):
    try:
        torch.set_float32_matmul_precision(before)
        new_trainer(configured(precision=precision, epochs=1), callbacks=[watch := Watch()]).train()
        assert watch.seen == {inside} and watch.in_the_exam == {"highest"} and torch.get_float32_matmul_precision() == before
        with pytest.raises(NotFinite): new_trainer(configured(precision=precision, seed=1, lr=1e30, grad_clip=0.0)).train()
        assert torch.get_float32_matmul_precision() == before
    finally: torch.set_float32_matmul_precision("highest")


def test_beside_the_newer_switches_the_older_ones_are_left_alone(tmp_path):
    code = """if True:
        import torch
        from flowbook.device import matmul_precision
        switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        def values(): return [switch.fp32_precision for switch in switches]
        for switch in switches: switch.fp32_precision = "tf32"
        for precision, inside in (("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")):
            with matmul_precision(precision): assert values() == [inside] * 2, (precision, values())
            assert values() == ["tf32"] * 2
        """
    if not hasattr(torch.backends, "fp32_precision"): pytest.skip("this PyTorch has the older switches only")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_convolutions_are_as_exact_as_products():
    before = torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "tf32", "bf16"):
        with matmul_precision(precision): assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.backends.cudnn.allow_tf32 == before


def test_a_run_in_bf16_stays_near_the_exact_one_and_resumes_bit_for_bit(configured, new_trainer, tmp_path):
    config = configured(precision="bf16", ema_decay=0.9)
    rough, exact = new_trainer(config), new_trainer(config.replace(precision="fp32", checkpoint_dir=str(tmp_path / "exact")))
    rough.train()
    exact.train()
    assert 0 < apart(rough.model, exact.model) < 0.02 < apart(exact.model, create_model("mlp", (2,), **config.arch_options))
    assert abs(rough.best_val_loss - exact.best_val_loss) < 0.02

    elsewhere = config.replace(checkpoint_dir=str(tmp_path / "resumed"))
    stopped = new_trainer(elsewhere, callbacks=[PressCtrlC(10)])
    with pytest.raises(KeyboardInterrupt): stopped.train()
    resumed = new_trainer(elsewhere, resume_path="auto")
    resumed.train()
    assert_same(training_state(read_checkpoint(resumed.folder / "last.pt")), training_state(read_checkpoint(rough.folder / "last.pt")))
    assert {tensor.dtype for tensor in resumed.model.state_dict().values()} == {torch.float32}


def test_another_precision_is_another_run(configured, new_trainer):
    with pytest.raises(KeyboardInterrupt): new_trainer(configured(), callbacks=[PressCtrlC(5)]).train()
    with pytest.raises(ValueError, match="precision"): new_trainer(configured(precision="bf16"), resume_path="auto")


def test_the_readme_says_what_was_measured():
    root = Path(__file__).parents[1]
    results = json.loads((root / "benchmarks" / "results" / "speed.json").read_text())
    rows = {"**flowbook**": "flowbook", "the usual loop": "usual loop", "TorchCFM": "torchcfm", "that loop": "torchcfm, fused",
            "accelerate": "accelerate", "Lightning with": "Lightning", "the same with": "Lightning, bar and rows"}
    table = (root / "README.md").read_text().split("## What a step costs")[1].split("\n\n")[2]
    for start, name in rows.items():
        line, = [line for line in table.splitlines() if line.startswith(f"| {start}")]
        for cell, workload in zip(line.split("|")[2:5], ("2d", "digits", "embeddings"), strict=True):
            times = results[workload]["microseconds"]
            measured = median(mine / floor for mine, floor in zip(times[name], times["floor"], strict=True))
            assert cell.strip() == f"{measured:.2f}", f"{name}, {workload}"


@pytest.mark.slow
def test_the_benchmark_lets_every_trainer_take_its_turns(tmp_path):
    root, results = Path(__file__).parents[1], tmp_path / "speed.json"
    command = [sys.executable, root / "benchmarks" / "speed.py", "2d", "--rounds", "1", "--results", results]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    times = json.loads(results.read_text())["2d"]["microseconds"]
    kept = json.loads((root / "benchmarks" / "results" / "speed.json").read_text())["2d"]["microseconds"]
    assert times.keys() == kept.keys() and all(len(rounds) == 1 and min(rounds) > 0 for rounds in times.values())
    for name in times: assert name in done.stdout
