"""Flows as a run uses them: any source, endless data, points paired for several steps, couplings that are fitted."""

import math
import shutil

import pytest
import torch

from conftest import assert_same, training_state
from flowbook.checkpoint import read_checkpoint
from flowbook.config import TrainingConfig
from flowbook.data import EndlessDataset, FlowDataset, NormalizationStats, prepare_dataset
from flowbook.flow_matching import create_source, read_fit
from flowbook.flows import FLOWS, create_flow, options_of
from flowbook.learner import Learner
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.sampling import load_flow
from flowbook.sources import SAMPLERS
from flowbook.tracking import read_metrics


def new_learner(config):
    set_seed(config.seed)
    return Learner(create_model(config.arch, (2,), **config.arch_options), config)


def distances_to(those, points):
    """Of each point to the nearest of those, in double precision."""
    return torch.cdist(points.flatten(1).double(), those.flatten(1).double()).min(1).values


def test_every_name_of_the_design_is_a_row():
    assert list(FLOWS) == ["icfm", "otcfm", "fm", "sbcfm", "si-gvp", "vp", "slerp", "semidiscrete", "reflow"]
    assert create_flow("fm").path.sigma == 1e-4 and create_flow("sbcfm").path.sigma == create_flow("sbcfm").coupling.sigma == 1
    assert create_flow("icfm").path.sigma == 0


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "reflow"])
@pytest.mark.parametrize("time", ["uniform", "stratified", "logit-normal"])
def test_times_stay_where_the_path_is_defined(name, time):
    flow = create_flow(name, time=time)
    low, high = flow.path.time_range
    x0, x1 = torch.randn(2, 512, 2, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        sample = flow.between(x0.to(dtype), x1.to(dtype), generator=torch.Generator().manual_seed(1))
        assert low <= sample.t.min() < sample.t.max() <= high
        assert sample.t.dtype == sample.x_t.dtype == sample.u_t.dtype == dtype
        assert sample.x_t.isfinite().all() and sample.u_t.isfinite().all()


def test_options_are_listed_and_defaults_make_the_same_flow():
    for name in FLOWS:
        options = options_of(name) | ({"from_run": "a run"} if name == "reflow" else {})
        assert repr(create_flow(name, **options)) == repr(create_flow(name, **({"from_run": "a run"} if name == "reflow" else {})))


# ---- sources

@pytest.mark.parametrize("name", ["fm", "vp"])
def test_what_is_defined_for_gaussian_noise_refuses_another_source_before_anything_is_written(configured, new_trainer, name):
    config = configured(flow=name, source="8gaussians")
    with pytest.raises(ValueError, match=f"flow '{name}' is defined for noise from .* the source is '8gaussians'"):
        new_trainer(config)
    with pytest.raises(ValueError, match="unknown source: '8gausians' .did you mean '8gaussians'"):
        new_trainer(configured(source="8gausians"))


def test_a_source_is_a_sampler_or_the_points_of_a_data_set(tmp_path):
    prepare_dataset("digits", tmp_path)
    stats = NormalizationStats(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 3.0]))
    source, generator = create_source("8gaussians", stats), torch.Generator().manual_seed(0)
    raw = stats.denormalize(source.like(torch.empty(4000, 2), generator))
    assert abs(raw.norm(dim=1).mean() - 5) < 0.1 and raw.mean(0).abs().max() < 0.3
    assert torch.equal(source.like(torch.empty(5, 2), generator.manual_seed(1)), source.like(torch.empty(5, 2), generator.manual_seed(1)))

    digits = FlowDataset(tmp_path, "digits", "1k")
    drawn = create_source("digits-1k", digits.stats, tmp_path).like(torch.empty(50, 1, 8, 8), generator)
    assert distances_to(digits.tensor, drawn).max() < 1e-4
    with pytest.raises(ValueError, match="source='digits-1k' has points of shape .1, 8, 8., and the data .2,."):
        create_source("digits-1k", stats, tmp_path)


def test_one_distribution_is_carried_to_another(configured, new_trainer):
    """8gaussians → moons, from endless data: the trained flow begins where the source is and ends where the data is."""
    config = configured(flow="otcfm", source="8gaussians", dataset="moons-endless", epochs=3, steps_per_epoch=200, batch_size=128,
                        arch_options={"width": 64, "depth": 2}, patience=0)
    assert config.run_name == "mlp-otcfm-8gaussians-to-moons-endless-none"
    trainer = new_trainer(config)
    summary = trainer.train()
    assert summary["steps"] == 600
    flow, generator = load_flow(summary["checkpoint_path"]), torch.Generator().manual_seed(0)
    begin, end = (flow.trajectories(1000, times=2, generator=generator).x)
    assert abs(begin.norm(dim=1).mean() - 5) < 0.1
    data = SAMPLERS["moons"](1000, generator)
    assert (end.mean(0) - data.mean(0)).abs().max() < 0.3 and (end.std(0) - data.std(0)).abs().max() < 0.3
    with pytest.raises(ValueError, match="the density of its source is not known"):
        flow.log_prob(data)


# ---- endless data

def test_endless_data_resumes_bit_for_bit(tmp_path, configured, new_trainer):
    config = configured(dataset="moons-endless", steps_per_epoch=7, aug="mixup+noise")
    unbroken = new_trainer(config)
    unbroken.train()
    other = config.replace(checkpoint_dir=str(tmp_path / "other"))

    def stop(trainer):
        if trainer.step == 10:
            trainer.stop_request.request()
    callback = type("Stop", (), {"on_step": staticmethod(stop)})()
    with pytest.raises(KeyboardInterrupt):
        new_trainer(other, callbacks=[callback]).train()
    resumed = new_trainer(other, resume_path="auto")
    resumed.train()
    states = [training_state(read_checkpoint(trainer.folder / "last.pt")) for trainer in (unbroken, resumed)]
    assert_same(*states)
    assert (unbroken.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()


def test_endless_batches_are_new_in_every_step_and_the_same_for_the_same_step(configured):
    learner = new_learner(configured(dataset="moons-endless", steps_per_epoch=5))
    batches = [learner.loader.batch(step) for step in (0, 1, 5, 0)]
    assert torch.equal(batches[0], batches[3])
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert len(list(learner.loader)) == 5


def test_endless_data_that_can_not_be_drawn_or_have_no_epochs_are_refused(tmp_path, configured, new_trainer):
    torch.save(torch.randn(100, 2), tmp_path / "mine.pt")
    prepare_dataset(tmp_path / "mine.pt", tmp_path / "datasets")
    with pytest.raises(ValueError, match="mine-endless' is not possible: mine.pt can't be drawn anew; only moons"):
        new_trainer(configured(dataset="mine-endless", data_dir=str(tmp_path / "datasets"), steps_per_epoch=5))
    with pytest.raises(ValueError, match="moons-endless never ends: say how many steps make an epoch"):
        new_trainer(configured(dataset="moons-endless"))
    with pytest.raises(ValueError, match="steps_per_epoch=5 is for endless data sets"):
        new_trainer(configured(steps_per_epoch=5))


def test_a_sampler_of_ones_own_is_a_data_set(configured, new_trainer):
    def ring(n, generator):
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        return torch.stack([angle.cos(), angle.sin()], 1)

    endless = EndlessDataset(ring)
    trainer = new_trainer(configured(steps_per_epoch=5), train_dataset=endless)
    assert trainer.train()["steps"] == 20 and len(trainer.val_dataset) == 1000
    assert (distances_to(endless.tensor, trainer.val_dataset.tensor) == 0).float().mean() < 0.01     # other points, but for rounding


def test_points_that_shall_not_be_normalised_are_not(tmp_path):
    prepare_dataset("moons", tmp_path, points=100, normalize=False)
    dataset = FlowDataset(tmp_path, "moons", "all")
    assert torch.equal(dataset.tensor, dataset.denormalize(dataset.tensor)) and dataset.tensor.max() > 3
    with pytest.raises(FileExistsError, match="moons, seed 0, not normalised; asked for were 100 points from moons, seed 0, and"):
        prepare_dataset("moons", tmp_path, points=100)


# ---- points that are paired for several steps

def test_a_window_uses_every_point_once_and_is_the_same_from_whatever_step_it_is_reached(configured):
    config = configured(flow="otcfm", flow_options={"ot_batch_size": 300})      # An epoch has 7 steps: windows reach over its end
    plain, learner, other = new_learner(config.replace(flow="icfm", flow_options={})), new_learner(config), new_learner(config)
    for window in range(4):
        steps = range(3 * window, 3 * window + 3)
        x0, x1 = map(torch.cat, zip(*map(learner.pairs.at, steps), strict=True))
        drawn_x0, drawn_x1 = map(torch.cat, zip(*map(plain.pairs.at, steps), strict=True))
        assert torch.equal(x0, drawn_x0)        # the noise of each step, in its order
        assert torch.equal(x1.sort(0).values, drawn_x1.sort(0).values)
        assert (x0 - x1).square().sum() < (drawn_x0 - drawn_x1).square().sum()
    for step in (11, 4, 7, 3):
        assert_same(other.pairs.at(step), learner.pairs.at(step))


def test_windows_of_other_than_whole_steps_are_refused_before_anything_is_written(configured, new_trainer):
    config = configured(flow="otcfm", flow_options={"ot_batch_size": 150})
    with pytest.raises(ValueError, match="ot_batch_size=150 .* multiple of batch_size=100"):
        new_trainer(config)


# ---- couplings that are fitted

def test_a_fit_is_kept_with_the_run_and_used_again(configured, new_trainer, monkeypatch):
    config = configured(flow="semidiscrete", epochs=2)
    trainer = new_trainer(config)
    assert not trainer.folder.exists()
    trainer.train()
    kept = trainer.folder / "coupling.pt"
    assert_same(read_fit(kept, trainer.flow.fitted["key"]), trainer.flow.fitted["found"])
    assert read_fit(kept, "another key") is None

    fits = []
    coupling = type(trainer.flow.coupling)
    fit = coupling.fit
    monkeypatch.setattr(coupling, "fit", lambda self, dataset, *rest: fits.append(len(dataset)) or fit(self, dataset, *rest))
    again = new_trainer(config.replace(epochs=3), resume_path="auto")
    assert fits == [len(trainer.val_dataset)]       # the exam's only, which is small
    assert_same(again.flow.fitted, trainer.flow.fitted)
    kept.write_bytes(b"damaged")
    damaged = new_trainer(config.replace(epochs=3), resume_path="auto")
    assert fits[1:] == [len(trainer.train_dataset), len(trainer.val_dataset)]
    assert_same(damaged.flow.fitted, trainer.flow.fitted)


def test_the_exam_of_a_fitted_coupling_asks_about_validation_points_only(configured):
    learner = new_learner(configured(flow="semidiscrete"))
    x_t, t, u_t = learner.exam[0]
    ends = x_t + (1 - t[:, None]) * u_t
    assert distances_to(learner.val_dataset.tensor, ends).max() < 1e-4
    assert len(ends) == len(learner.val_dataset)


def test_semidiscrete_transport_of_endless_data_is_fitted_to_ten_thousand_points(configured):
    roughly = {"fit_steps": 50}
    learner = new_learner(configured(flow="semidiscrete", flow_options=roughly, dataset="moons-endless", steps_per_epoch=5))
    assert len(learner.flow.fitted["found"]["potentials"]) == 10_000


def test_augmentation_follows_the_pairing_where_the_coupling_chooses(configured):
    learner, plain = (new_learner(configured(flow="semidiscrete", aug=aug)) for aug in ("noise", "none"))
    (x0, noisy), (same, chosen) = learner.pairs.at(3), plain.pairs.at(3)
    assert torch.equal(x0, same)
    assert 0.05 < (noisy - chosen).std() < 0.2      # noise_std is 0.1: the same partners, moved a little


def test_reflow_of_other_statistics_is_refused_before_anything_is_written(tmp_path, configured, new_trainer, trained_run):
    prepare_dataset("moons", tmp_path, points=500, seed=3)
    config = configured(flow="reflow", flow_options={"from_run": str(trained_run)}, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="differ"):
        new_trainer(config)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        new_trainer(configured(flow="reflow", flow_options={"from_run": "nowhere"}))


def test_a_fit_is_kept_for_the_same_statistics_only():
    """The two agree in shape, smallest and largest value, and differ in which feature has which."""
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    data = [FlowDataset.from_tensor(points, NormalizationStats(torch.zeros(2), std)) for std in torch.tensor([[1.0, 2.0], [2.0, 1.0]])]
    keys = [create_flow("semidiscrete", fit_steps=1).fit(dataset).fitted["key"] for dataset in data]
    assert keys[0] != keys[1]


def test_a_fit_that_can_not_be_written_leaves_nothing_that_looks_like_a_run(configured, new_trainer):
    trainer = new_trainer(configured(flow="semidiscrete", flow_options={"fit_steps": 10}))
    (trainer.folder / "coupling.pt").mkdir(parents=True)       # in the way
    with pytest.raises(OSError):
        trainer.train()
    assert [path.name for path in trainer.folder.iterdir()] == ["coupling.pt"]


def test_a_run_whose_source_is_another_data_set_now_is_not_resumed(tmp_path, configured, new_trainer, data_dir):
    config = configured(source="beginning-all")
    for seed, refused in ((0, False), (0, False), (1, True)):
        points = torch.randn(200, 2, generator=torch.Generator().manual_seed(seed))
        torch.save(points, tmp_path / "beginning.pt")
        shutil.rmtree(data_dir / "beginning", ignore_errors=True)
        prepare_dataset(tmp_path / "beginning.pt", data_dir)
        if refused:
            with pytest.raises(ValueError, match="started on other data points"):
                new_trainer(config, resume_path="auto")
        else:
            new_trainer(config, resume_path="auto").train()


# ---- the sphere

def test_a_flow_on_the_sphere_brings_data_there_and_samples_stay_there(configured, new_trainer):
    trainer = new_trainer(configured(flow="slerp"))
    assert trainer.train_dataset.stats.sphere and trainer.val_dataset.stats.sphere
    assert (trainer.train_dataset.tensor.norm(dim=1) - 1).abs().max() < 1e-6
    summary = trainer.train()
    flow = load_flow(summary["checkpoint_path"])
    for method, steps in (("euler", 4), ("dopri5", None)):
        samples = flow.sample(100, method=method, steps=steps, generator=torch.Generator().manual_seed(0))
        assert (samples.norm(dim=1) - 1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="sphere"):
        flow.log_prob(samples)


def test_on_the_sphere_a_run_is_trained_from_the_source_that_samples_come_from(configured, new_trainer):
    trainer = new_trainer(configured(flow="slerp", source="8gaussians", epochs=1))
    flow = load_flow(trainer.train()["checkpoint_path"])
    seen, drawn = (source.like(torch.empty(50, 2), torch.Generator().manual_seed(0)) for source in (trainer.flow.source, flow.source))
    assert torch.equal(seen, drawn) and (seen.norm(dim=1) - 1).abs().max() < 1e-6


def test_points_without_a_direction_are_refused_on_the_sphere(configured, new_trainer):
    points, stats = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), NormalizationStats.identity((2,))
    good = FlowDataset.from_tensor(points.clone(), stats)
    points[[7, 9]] = 0
    with pytest.raises(ValueError, match="2 points that are 0 everywhere, the first in row 7: they have no direction"):
        new_trainer(configured(flow="slerp"), train_dataset=FlowDataset.from_tensor(points, stats), val_dataset=good)


# ---- the loss by time

def test_the_loss_by_time_is_recorded_and_averages_to_the_loss(configured, new_trainer):
    trainer = new_trainer(configured(epochs=2))
    trainer.train()
    rows = [row for row in read_metrics(trainer.folder) if "val/loss" in row]
    quarters = [f"val/loss_{name}_quarter" for name in ("first", "second", "third", "last")]
    times = torch.cat([t for _, t, _ in trainer.exam])
    counts = [int(((times >= k / 4) & (times < (k + 1) / 4)).sum()) for k in range(4)]
    for row in rows:
        assert row["val/loss"] == pytest.approx(sum(count * row[name] for count, name in zip(counts, quarters, strict=True)) / sum(counts))
    assert len({row[name] for row in rows for name in quarters}) == 8


def test_a_configuration_names_its_source_and_its_run():
    assert TrainingConfig().run_name == "mlp-icfm-digits-1k-none"
    assert TrainingConfig(source="8gaussians", dataset="moons-endless").run_name == "mlp-icfm-8gaussians-to-moons-endless-none"
