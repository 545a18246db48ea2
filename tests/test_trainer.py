"""A run is the same run however it was interrupted, and refuses what can't be right before it writes anything."""

import json
import math
import pickle
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import FLOW_CASES, PressCtrlC, assert_same, training_state
from flowbook.checkpoint import CheckpointError, read_checkpoint, run_folder
from flowbook.data import FlowDataset, prepare_dataset
from flowbook.learner import NotFinite
from flowbook.nets import create_model
from flowbook.runs import read_summary
from flowbook.tracking import read_metrics
from flowbook.trainer import FlowTrainer, TrainingInterrupted


def final_state(trainer):
    return training_state(read_checkpoint(trainer.folder / "last.pt")), training_state(read_checkpoint(trainer.folder / "best.pt"))


def interrupted_and_resumed(new_trainer, config, step):
    """Run to `step`, stop, and go on with a new trainer whose network has other first weights."""
    with pytest.raises(KeyboardInterrupt):
        new_trainer(config, callbacks=[PressCtrlC(step)]).train()
    torch.manual_seed(step)
    model = create_model(config.arch, (2,), **config.arch_options)
    resumed = FlowTrainer(model, config, wandb_project=None, resume_path="auto")
    assert resumed.step == step
    resumed.train()
    return resumed


@pytest.mark.parametrize("flow_case", FLOW_CASES, indirect=True)
def test_resumed_equals_uninterrupted_for_every_flow_and_augmentation(tmp_path, configured, new_trainer, flow_case):
    config = configured(**flow_case, arch_options={"width": 16, "depth": 2, "dropout": 0.2})
    unbroken = new_trainer(config)
    unbroken.train()
    other = config.replace(checkpoint_dir=str(tmp_path / "resumed"))
    resumed = interrupted_and_resumed(new_trainer, other, step=10)
    for first, second in zip(final_state(unbroken), final_state(resumed), strict=True):
        assert_same(first, second)
    assert (unbroken.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("step", [1, 6, 7, 8, 14, 27, 28])
def test_resumed_equals_uninterrupted_from_any_step(tmp_path, configured, new_trainer, step):
    config = configured()       # 4 epochs of 7 steps: first, inside, last of an epoch, last of all
    unbroken = new_trainer(config)
    unbroken.train()
    resumed = interrupted_and_resumed(new_trainer, config.replace(checkpoint_dir=str(tmp_path / "resumed")), step)
    assert_same(final_state(unbroken)[0], final_state(resumed)[0])
    assert (unbroken.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()


def test_early_stopping_survives_a_resume(tmp_path, configured, new_trainer):
    config = configured(epochs=60, patience=3, lr=0.05, schedule="constant", warmup_steps=0)
    unbroken = new_trainer(config)
    summary = unbroken.train()
    assert summary["status"] == "early-stopped" and summary["stop_reason"] == "no improvement in 3 validations"
    resumed = interrupted_and_resumed(new_trainer, config.replace(checkpoint_dir=str(tmp_path / "resumed")), unbroken.step - 9)
    assert_same(final_state(unbroken)[0], final_state(resumed)[0])
    best = min((row for row in read_metrics(resumed.folder) if "val/loss" in row), key=lambda row: row["val/loss"])
    state = read_checkpoint(resumed.folder / "best.pt")
    assert (state["step"], state["best_val_loss"]) == (best["step"], best["val/loss"])


def test_a_longer_run_continues_with_a_new_plan(configured, new_trainer, capsys):
    new_trainer(configured(epochs=2)).train()
    capsys.readouterr()
    trainer = new_trainer(configured(epochs=4), resume_path="auto")
    assert (trainer.epoch, trainer.step) == (3, 14)
    summary = trainer.train()
    printed = capsys.readouterr().out
    assert "Stats consistency check: PASSED" in printed
    assert "The schedule is planned anew over 4 epochs instead of 2" in printed
    assert (summary["final_epoch"], summary["steps"]) == (4, 28)
    assert [row["step"] for row in read_metrics(trainer.folder) if "val/loss" in row] == [7, 14, 21, 28]


def test_the_starting_table(configured, new_trainer, tmp_path):
    config = configured()
    trainer = new_trainer(config, resume_path="auto")      # nothing there: trains
    trainer.train()
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        new_trainer(config)
    with pytest.raises(ValueError, match="choose one"):
        new_trainer(config, resume_path="auto", overwrite=True)
    before = {path.name: path.read_bytes() for path in trainer.folder.iterdir()}
    assert new_trainer(config, resume_path="auto").train()["status"] == "finished"     # finished: changes nothing
    assert {path.name: path.read_bytes() for path in trainer.folder.iterdir()} == before
    new_trainer(config, overwrite=True).train()
    assert (trainer.folder.with_name(trainer.folder.name + ".old-1") / "last.pt").read_bytes() == before["last.pt"]

    from_best = new_trainer(config, resume_path=trainer.folder / "best.pt")                # a path: that state
    assert from_best.step == read_checkpoint(trainer.folder / "best.pt")["step"]

    for name in ("last.pt", "previous.pt", "best.pt"):
        (trainer.folder / name).write_bytes(before["last.pt"][:1000])
    with pytest.raises(CheckpointError, match="nothing in .* can be used to go on: .*last.pt .1000 bytes. does not end with a SHA-256"):
        new_trainer(config, resume_path="auto")


def test_rows_after_the_resumed_step_are_moved_aside(configured, new_trainer):
    trainer = new_trainer(configured(epochs=2))
    trainer.train()
    early = trainer.folder.parent / "early.pt"
    state = read_checkpoint(trainer.folder / "best.pt")
    early.write_bytes((trainer.folder / "best.pt").read_bytes())
    new_trainer(configured(epochs=4), resume_path="auto").train()
    rows_before = read_metrics(trainer.folder)
    resumed = new_trainer(configured(epochs=4), resume_path=early)
    resumed.train()
    steps = [row["step"] for row in read_metrics(trainer.folder)]
    assert steps == sorted(steps) and max(steps) == 28
    assert rows_before[-1]["step"] == 28 > state["step"]
    assert [path.name for path in trainer.folder.glob("metrics-undone*")] == [f"metrics-undone-after-step-{state['step']}.jsonl"]
    assert read_checkpoint(trainer.folder / "last.pt.undone-1")["step"] == 28      # what was given up is kept
    assert read_checkpoint(trainer.folder / "best.pt")["best_val_loss"] == resumed.best_val_loss


def test_a_run_that_goes_on_elsewhere_takes_its_best_state_along(tmp_path, configured, new_trainer):
    trainer = new_trainer(configured())
    trainer.train()
    elsewhere = configured(checkpoint_dir=str(tmp_path / "elsewhere"))
    moved = new_trainer(elsewhere, resume_path=trainer.folder / "last.pt")
    assert moved.train()["status"] == "finished"
    assert (moved.folder / "best.pt").read_bytes() == (trainer.folder / "best.pt").read_bytes()
    assert_same(final_state(moved), final_state(trainer))
    assert (moved.folder / "metrics.jsonl").read_bytes() == (trainer.folder / "metrics.jsonl").read_bytes()
    longer = new_trainer(elsewhere.replace(epochs=5), resume_path="auto")
    assert longer.train()["steps"] == 35
    assert read_checkpoint(longer.folder / "best.pt")["best_val_loss"] == longer.best_val_loss


@pytest.mark.parametrize(("change", "words"), [
    ({"lr": 0.1}, "lr is 0.1, the run was started with 0.002"),
    ({"batch_size": 50, "ema_decay": 0.9}, "batch_size is 50, the run was started with 100; ema_decay is 0.9"),
])
def test_other_settings_are_refused_by_name(configured, new_trainer, change, words):
    trainer = new_trainer(configured())
    trainer.train()
    before = {path.name: path.read_bytes() for path in trainer.folder.iterdir()}
    with pytest.raises(ValueError, match=words):
        new_trainer(configured(**change), resume_path="auto")
    assert {path.name: path.read_bytes() for path in trainer.folder.iterdir()} == before


def test_other_statistics_and_other_points_are_refused(configured, new_trainer, data_dir):
    config = configured(dataset="points")
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    data = FlowDataset.from_tensor(points)
    new_trainer(config, train_dataset=data).train()
    with pytest.raises(ValueError, match=r"Stats consistency check: FAILED. mean differs in 1 of 2 features \(1\)"):
        new_trainer(config, train_dataset=FlowDataset.from_tensor(points + torch.tensor([0.0, 0.5])), resume_path="auto")
    with pytest.raises(ValueError, match="started on other data points"):
        new_trainer(config, train_dataset=FlowDataset.from_tensor(points.flip(0), data.stats), resume_path="auto")


def test_unknown_names_and_impossible_batches_leave_no_trace(configured, new_trainer, tmp_path):
    for change, words in [({"flow": "icmf"}, "unknown flow: 'icmf' .did you mean 'icfm'"), ({"aug": "blur"}, "blur"),
                          ({"batch_size": 5000}, "5000"), ({"dataset": "moons-5k"}, "700 training points")]:
        with pytest.raises(ValueError, match=words):
            new_trainer(configured(**change))
    with pytest.raises(FileNotFoundError, match="flowbook prepare digits"):
        new_trainer(configured(dataset="digits-1k"))
    assert not (tmp_path / "runs").exists()


def test_sigterm_saves_and_exits_with_143(configured, new_trainer):
    trainer = new_trainer(configured(), callbacks=[PressCtrlC(5, signal.SIGTERM)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert read_checkpoint(trainer.folder / "last.pt")["step"] == 5
    assert read_summary(trainer.folder)["status"] == "interrupted"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_stop_in_the_middle_of_validation_changes_nothing(tmp_path, configured, new_trainer, error):
    config = configured()
    unbroken = new_trainer(config)
    unbroken.train()
    other = config.replace(checkpoint_dir=str(tmp_path / "resumed"))
    stopped, validate = new_trainer(other), FlowTrainer.validate

    def broken_validate():
        if stopped.step == 14:
            raise error
        return validate(stopped)

    stopped.validate = broken_validate
    with pytest.raises(error):
        stopped.train()
    resumed = new_trainer(other, resume_path="auto")
    assert (resumed.step, resumed.epoch) == (14, 2)
    resumed.train()
    assert_same(final_state(unbroken)[0], final_state(resumed)[0])
    assert (unbroken.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()


def test_a_state_from_before_the_exam_is_older_than_one_from_after_it(tmp_path, configured, new_trainer):
    """... although both have made as many steps: a run is stopped before an exam, goes on, and is killed when best.pt was written."""
    config = configured()
    unbroken = new_trainer(config)
    unbroken.train()
    other = config.replace(checkpoint_dir=str(tmp_path / "resumed"))
    with pytest.raises(KeyboardInterrupt):
        new_trainer(other, callbacks=[PressCtrlC(14)]).train()
    killed, before = new_trainer(other, resume_path="auto"), (unbroken.folder.parent.parent / "resumed" / unbroken.folder.name)
    last = (before / "last.pt").read_bytes()
    assert (killed.step, killed.epoch) == (14, 2)

    class Killed(BaseException):
        pass

    class Kill:
        def on_epoch(self, trainer, metrics):
            trainer._saver.save_best()
            raise Killed

    killed.callbacks.append(Kill())
    with pytest.raises(Killed):
        killed.train()
    (before / "last.pt").write_bytes(last)      # as if the newest had not been written any more
    (before / "previous.pt").unlink()
    resumed = new_trainer(other, resume_path="auto")
    assert (resumed.step, resumed.epoch) == (14, 3)         # from best.pt
    (before / "best.pt").unlink()
    resumed = new_trainer(other, resume_path="auto")        # from last.pt: the epoch is judged once more, and its row is there once
    assert (resumed.step, resumed.epoch) == (14, 2)
    resumed.train()
    assert_same(final_state(unbroken)[0], final_state(resumed)[0])
    assert (unbroken.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()


def test_networks_that_misbehave(configured):
    class Scaled(nn.Module):
        """Changes its inputs in place, which is its own business."""

        def __init__(self, outputs=2):
            super().__init__()
            self.layer = nn.Linear(3, outputs)

        def forward(self, x, t, cond=None):
            t *= 10
            x -= 1
            return self.layer(torch.cat([x, t[:, None]], 1))

    config = configured(arch="own", arch_options={})
    trainer = FlowTrainer(Scaled(), config, wandb_project=None)
    assert trainer.validate() == trainer.validate() < 1000

    class NarrowWhileTraining(Scaled):
        def forward(self, x, t, cond=None):
            return super().forward(x, t)[:, :1] if self.training else super().forward(x, t)

    class Nothing(Scaled):
        def forward(self, x, t, cond=None):
            return None

    with pytest.raises(ValueError, match=r"returned shape .100, 1. for points of shape .100, 2."):
        FlowTrainer(NarrowWhileTraining(), config, wandb_project=None).train_epoch()
    with pytest.raises(ValueError, match="returned NoneType for points of shape"):
        FlowTrainer(Nothing(), config, wandb_project=None)
    model = Scaled()
    model.model_spec = {"arch": "own", "options": {"act": nn.ReLU}}
    with pytest.raises(TypeError, match="state.model_spec.options.act"):
        FlowTrainer(model, config, wandb_project=None)


def test_validation_points_with_other_statistics_are_refused(configured):
    train, val = (FlowDataset.from_tensor(torch.randn(200, 2) * scale) for scale in (1, 50))
    with pytest.raises(ValueError, match="other statistics than the training points .mean differs"):
        FlowTrainer(create_model("mlp", (2,), width=8), configured(), train, val, wandb_project=None)


def test_a_folder_that_was_used_in_between_is_not_touched(configured, new_trainer):
    first, second = new_trainer(configured()), new_trainer(configured())
    first.train()
    before = (first.folder / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="another trainer has saved to"):
        second.train()
    assert (first.folder / "last.pt").read_bytes() == before


def test_a_second_signal_stops_at_once_and_saves_no_half_step(configured, new_trainer):
    class TwiceInAStep(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x, t, cond=None):
            self.calls += 1
            if self.calls == 4 and self.training:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the second signal did not interrupt")
            return self.net(x, t)

    config = configured(arch="own", arch_options={})
    trainer = FlowTrainer(TwiceInAStep(create_model("mlp", (2,), width=16)), config, wandb_project=None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 3
    assert read_checkpoint(trainer.folder / "last.pt")["step"] < 4
    with pytest.raises(RuntimeError, match="a step of this trainer was cut short"):
        trainer.train()


@pytest.mark.parametrize("callbacks, words", [
    ([print], "has no method that is called"), (PressCtrlC(3), "write callbacks="), ([PressCtrlC], "write PressCtrlC"),
    ([SimpleNamespace(on_step=5)], "5 is not a callable"), ([SimpleNamespace(on_epoch=lambda trainer: 0)], "too many positional arg")])
def test_callbacks_that_nobody_would_call_are_refused(configured, new_trainer, callbacks, words):
    with pytest.raises((TypeError, ValueError), match=words): new_trainer(configured(), callbacks=callbacks)
    assert not run_folder(configured().run_name, configured().checkpoint_dir).exists()


def test_a_run_that_fails_before_its_first_step_is_not_in_the_way(configured, new_trainer):
    class Broken:
        def on_train_start(self, trainer): raise OSError("no such display")
    with pytest.raises(OSError, match="no such display"): new_trainer(configured(), callbacks=[Broken()]).train()
    assert read_summary(run_folder(configured().run_name, configured().checkpoint_dir))["status"] == "failed"
    assert new_trainer(configured()).train()["status"] == "finished"


def test_a_stop_while_the_run_is_opened_leaves_a_trainer_that_works(configured, new_trainer, monkeypatch):
    new_trainer(configured()).train()
    def stopped(*arguments): raise KeyboardInterrupt
    trainer = new_trainer(configured(), overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flowbook.trainer.open_record", stopped)
        trainer.train()
    assert trainer.train()["status"] == "finished"
    assert [path.name for path in trainer.folder.parent.glob("*.old-*")] == [f"{trainer.folder.name}.old-1"]


def test_what_stops_a_run_comes_out_of_another_process():
    for error in (TrainingInterrupted(3, 25, True), NotFinite("the loss is nan in step 5", 5)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_what_changes_only_the_training_leaves_the_exam_as_it_is(configured, new_trainer):
    def exam(flow, **options): return new_trainer(configured(flow=flow, flow_options=options)).exam_fingerprint
    assert exam("otcfm") == exam("otcfm", ot_batch_size=200, time="logit-normal") != exam("icfm")
    assert exam("sbcfm") != exam("sbcfm", sigma=0.5)


def test_a_summary_names_its_exam_while_the_run_is_running(configured, new_trainer):
    class Look:
        def on_step(self, trainer): seen.append(read_summary(trainer.folder))
    seen = []
    trainer = new_trainer(configured(epochs=1), callbacks=[Look()])
    trainer.train()
    assert seen[0]["status"] == "running" and seen[0]["exam"] == read_summary(trainer.folder)["exam"] == trainer.exam_fingerprint


def test_a_callbacks_error_is_the_users_and_the_run_says_failed(configured, new_trainer):
    class Broken:
        def on_step(self, trainer):
            if trainer.step == 9:
                raise KeyError("my own mistake")

    trainer = new_trainer(configured(), callbacks=[Broken()])
    with pytest.raises(KeyError, match="my own mistake"):
        trainer.train()
    assert read_summary(trainer.folder)["error"] == "KeyError: 'my own mistake'"
    resumed = new_trainer(configured(), resume_path="auto")
    assert resumed.step == 9
    assert resumed.train()["status"] == "finished" and read_summary(trainer.folder)["status"] == "finished"


def poison_weights(trainer):
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = math.nan


def poison_gradients(trainer):
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize(("poison", "words"), [
    (poison_gradients, "the norm of the gradient is nan in step 31"),
    (poison_weights, "the loss is nan in step 31|weights that are NaN or infinite after step 30"),
])
def test_nan_is_named_and_never_saved(configured, new_trainer, poison, words):
    class Poison:
        def on_step(self, trainer):
            if trainer.step == 30:
                poison(trainer)

    trainer = new_trainer(configured(epochs=20, log_every=1000), callbacks=[Poison()])
    with pytest.raises(NotFinite, match=words):
        trainer.train()
    assert read_summary(trainer.folder)["status"] == "failed"
    for name in ("last.pt", "best.pt"):
        weights = read_checkpoint(trainer.folder / name)["model"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_training_leaves_the_users_random_state_alone(configured, new_trainer):
    trainer = new_trainer(configured(arch_options={"width": 16, "dropout": 0.5}, aug="mixup+noise"))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before)
    draws = [torch.rand(3) for _ in range(2)]
    torch.manual_seed(123)
    assert torch.equal(torch.rand(3), draws[0])


def test_the_exam_is_the_same_for_every_batch_size_and_seed_and_leaves_the_model_alone(configured, new_trainer):
    first, second = new_trainer(configured()), new_trainer(configured(batch_size=50, seed=7, arch_options={"width": 16, "depth": 2}))
    assert_same(first.exam, second.exam)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    losses = {first.validate() for _ in range(3)}
    assert len(losses) == 1 and first.model.training
    assert_same(dict(first.model.state_dict()), before)


def test_the_loss_of_a_new_network_is_what_it_must_be(configured, new_trainer, data_dir):
    trainer = new_trainer(configured())
    points = trainer.val_dataset.tensor
    expected = 1 + points.square().mean().item()       # E|x1 - x0|² with x0 ~ N(0, I), a network that answers 0
    assert abs(trainer.validate() - expected) < 5 * 2 / math.sqrt(points.numel())


def test_a_grid_of_settings_trains(configured, new_trainer):
    changes = dict(ema_decay=0, grad_clip=0, patience=0, schedule="constant", ema_warmup=False, weight_decay=0, warmup_steps=0, seed=7)
    for name, value in changes.items():
        trainer = new_trainer(configured(**{name: value}, epochs=1, checkpoint_dir=f"{configured().checkpoint_dir}-{name}"))
        assert trainer.train()["status"] == "finished"
        if name == "ema_decay":
            assert_same(dict(trainer.ema.module.state_dict()), dict(trainer.model.state_dict()))


def test_a_run_that_died_before_its_summary_gets_one(configured, new_trainer):
    trainer = new_trainer(configured())
    trainer.train()
    (trainer.folder / "summary.json").write_text(json.dumps({"status": "running"}))     # as after a kill right before the end
    new_trainer(configured(), resume_path="auto").train()
    assert read_summary(trainer.folder)["status"] == "finished"


def test_batch_normalisation_and_frozen_weights(configured):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 2))
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x, t, cond=None):
            return self.frozen(self.layers(torch.cat([x, t[:, None]], 1)))

    torch.manual_seed(0)
    model = Net()
    frozen = model.frozen.weight.clone()
    trainer = FlowTrainer(model, configured(arch="own", arch_options={}), wandb_project=None)
    trainer.train()
    assert torch.equal(model.frozen.weight, frozen)
    assert torch.equal(trainer.ema.module.layers[1].running_mean, model.layers[1].running_mean)


def test_images_of_your_own_from_a_file(tmp_path, new_trainer, configured):
    torch.save(torch.rand(60, 3, 4, 4), tmp_path / "pictures.pt")
    prepare_dataset(tmp_path / "pictures.pt", tmp_path / "data")
    config = configured(dataset="pictures-all", data_dir=str(tmp_path / "data"), batch_size=20)
    trainer = FlowTrainer(create_model("mlp", (3, 4, 4), width=16), config, wandb_project=None)
    assert trainer.train()["status"] == "finished"


def test_a_time_that_is_not_broadcast_is_noticed_before_anything_is_written(configured, tmp_path):
    class Misplaced(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t, cond=None):
            return self.layer(x) + t

    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        FlowTrainer(Misplaced(), configured(arch="own", arch_options={}), wandb_project=None)
    assert not (tmp_path / "runs").exists()


def test_a_bad_step_reaches_neither_weights_nor_moments_nor_average(configured, new_trainer):
    """... and neither do the steps after it, until it is read."""
    def bad_from(trainer, step):
        def spoil(gradient):
            return gradient * (math.nan if trainer.step >= step else 1)
        next(trainer.model.parameters()).register_hook(spoil)

    trainer, stopped = new_trainer(configured(log_every=1000)), new_trainer(configured())
    bad_from(trainer, step=10)
    for learner, steps in ((trainer, 14), (stopped, 10)):
        while learner.step < steps:
            learner.epoch = learner.step // learner.steps_per_epoch + 1
            for _ in learner.steps():
                learner.update()
                if learner.step == steps:
                    break
    assert_same(dict(trainer.model.state_dict()), dict(stopped.model.state_dict()))
    assert_same(trainer.optimizer.state_dict()["state"], stopped.optimizer.state_dict()["state"])
    assert all(weight.isfinite().all() for weight in trainer.ema.module.state_dict().values())
    name = next(name for name, _ in trainer.model.named_parameters())
    with pytest.raises(NotFinite, match=f"the norm of the gradient is nan in step 11: repeated, the gradient of {name} is not finite"):
        trainer.read_meter()


class NowAndThen(nn.Module):
    """A network with batch normalisation that answers NaN in some steps."""

    def __init__(self, bad_calls):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 2))
        self.bad_calls, self.calls = bad_calls, 0

    def forward(self, x, t, cond=None):
        self.calls += self.training
        return self.layers(torch.cat([x, t[:, None]], 1) * (math.nan if self.training and self.calls in self.bad_calls else 1))


def test_bad_steps_are_left_out_and_counted_up_to_a_limit(configured):
    torch.manual_seed(0)
    config = configured(arch="own", arch_options={}, max_skipped_steps=2)
    trainer = FlowTrainer(NowAndThen({4, 5}), config, wandb_project=None)
    assert trainer.train()["status"] == "finished"
    assert [row.get("train/skipped_steps") for row in read_metrics(trainer.folder) if "train/loss" in row] == [None] + [2] * 8
    assert all(value.isfinite().all() for value in (*trainer.model.state_dict().values(), *trainer.ema.module.state_dict().values()))

    torch.manual_seed(0)
    config = config.replace(checkpoint_dir=f"{config.checkpoint_dir}-3")
    trainer = FlowTrainer(NowAndThen({4, 5, 20}), config, wandb_project=None)
    with pytest.raises(NotFinite, match="the loss is nan in step 20"):
        trainer.train()
    assert read_summary(trainer.folder)["status"] == "failed"
    assert all(value.isfinite().all() for value in read_checkpoint(trainer.folder / "last.pt")["model"].values())
    resumed = FlowTrainer(NowAndThen(()), config.replace(max_skipped_steps=0), wandb_project=None, resume_path="auto")
    assert resumed.meter.skipped == 2 and resumed.train()["status"] == "finished"      # those are behind us


def test_no_step_waits_for_a_number(configured, new_trainer, monkeypatch):
    """Holding a bad step back must not cost a synchronisation: numbers are taken out of tensors only where they are read."""
    trainer, waits = new_trainer(configured(log_every=1000)), []
    for name in ("item", "tolist", "__bool__", "__float__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, method=method, name=name: waits.append(name) or method(self, *a))
    for _ in trainer.steps():
        trainer.update()
    assert trainer.step == 7 and waits == []
    trainer.read_meter()
    assert waits == ["tolist"]


def test_epochs_made_by_hand_are_saved(configured, new_trainer):
    trainer = new_trainer(configured(epochs=2))
    trainer.train_epoch()
    trainer.train_epoch()
    assert trainer.train()["status"] == "finished"
    assert read_checkpoint(trainer.folder / "last.pt")["step"] == 14


@pytest.mark.slow
def test_a_compiled_network_resumes_bit_for_bit_and_is_saved_under_its_own_names(tmp_path, configured):
    config = configured(flow="icfm")

    def compiled(seed):
        torch.manual_seed(seed)
        torch.compiler.reset()      # as in another process
        return torch.compile(create_model("mlp", (2,), width=16, depth=2))

    unbroken = FlowTrainer(compiled(0), config, wandb_project=None)
    unbroken.train()
    other = config.replace(checkpoint_dir=str(tmp_path / "resumed"))
    with pytest.raises(KeyboardInterrupt):
        FlowTrainer(compiled(0), other, wandb_project=None, callbacks=[PressCtrlC(10)]).train()
    resumed = FlowTrainer(compiled(1), other, wandb_project=None, resume_path="auto")
    resumed.train()
    assert_same(final_state(unbroken)[0], final_state(resumed)[0])
    create_model("mlp", (2,), width=16, depth=2).load_state_dict(read_checkpoint(resumed.folder / "last.pt")["model"])
