"""Plots that a chapter does not show: other inputs, other axes, nothing left behind when something is refused."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from flowbook.config import TrainingConfig
from flowbook.data import NormalizationStats
from flowbook.nets import create_model
from flowbook.plots import plot_ema_horizon, plot_loss_by_time, plot_losses, plot_schedule, plot_trajectories, plot_velocity
from flowbook.sampling import TrainedFlow, Trajectories
from flowbook.scheduler import cosine_with_warmup
from flowbook.tracking import RunRecord


@pytest.fixture(autouse=True)
def figures():
    yield
    plt.close("all")


class Turn(nn.Module):
    """v(x, t) = t·(-x₂, x₁), in normalised units."""
    def forward(self, x, t, cond=None): return t[:, None] * torch.stack([-x[:, 1], x[:, 0]], 1)


STATS = NormalizationStats(torch.tensor([5.0, -1.0]), torch.tensor([2.0, 0.5]))


def test_bad_numbers_and_rows_of_other_kinds_are_left_out(tmp_path):
    record = RunRecord(tmp_path)
    for step, loss in enumerate((2.0, math.nan, 1.0, math.inf), 1): record.log(step, 1, **{"train/loss": loss, "val/loss": loss})
    record.log(5, 1, **{"train/lr": 1.0})
    axes = plot_losses(tmp_path)
    assert axes.get_yscale() == "linear" and axes.lines[-1].get_ydata().tolist() == [1.0]
    assert not plot_loss_by_time(tmp_path).lines


@pytest.mark.parametrize("plot", [plot_losses, plot_loss_by_time])
def test_a_record_that_is_missing_leaves_no_figure(tmp_path, plot):
    with pytest.raises(FileNotFoundError, match="metrics"): plot(tmp_path / "nowhere" / "metrics.jsonl")
    assert not plt.get_fignums()


def test_the_axes_that_are_given_are_drawn_on_and_returned(tmp_path):
    record, config = RunRecord(tmp_path), TrainingConfig(dataset="moons-1k")
    record.log(1, 1, **{"train/loss": 1.0, "val/loss": 1.0, "val/loss_first_quarter": 1.0})
    flow = TrainedFlow(Turn(), STATS)
    plots = (lambda axes: plot_losses(tmp_path, axes), lambda axes: plot_loss_by_time(tmp_path, axes),
             lambda axes: plot_schedule(config, 5, axes), lambda axes: plot_ema_horizon(config, 5, axes),
             lambda axes: plot_trajectories(flow.trajectories(3), axes), lambda axes: plot_velocity(flow, [0.5], [axes])[0])
    for plot in plots:
        axes = plt.figure().gca()
        assert plot(axes) is axes and axes.lines
    assert len(plt.get_fignums()) == len(plots)


@pytest.mark.parametrize("epochs", [1, 400])
def test_the_schedule_is_the_one_that_is_trained_with(epochs):
    config = TrainingConfig(dataset="moons-1k", epochs=epochs, warmup_steps=3, lr=0.5)
    line, = plot_schedule(config, 7).lines
    assert line.get_xdata()[0] == 0 and line.get_xdata()[-1] == 7 * epochs - 1 and len(line.get_xdata()) == min(7 * epochs, 1000)
    for step, rate in zip(*line.get_data(), strict=True): assert rate == 0.5 * cosine_with_warmup(step, 3, 7 * epochs)
    assert plot_schedule(config.replace(schedule="constant"), 7).lines[0].get_ydata()[-1] == 0.5


@pytest.mark.parametrize("decay, warmup, last", [(0.9, False, 10), (0.5, True, 2), (0.0, False, 1), (0.9999, True, 49 / 9)])
def test_the_horizon_of_the_average(decay, warmup, last):
    axes = plot_ema_horizon(TrainingConfig(dataset="moons-1k", epochs=4, ema_decay=decay, ema_warmup=warmup), 10)
    assert axes.lines[1].get_ydata()[-1] == pytest.approx(last)


def test_a_field_is_drawn_in_data_units():
    panels = plot_velocity(TrainedFlow(Turn(), STATS), times=(0.0, 0.5, 1.0), arrows=4)
    assert [len(panel.collections) for panel in panels] == [1, 1, 1]
    for panel, time in zip(panels, (0.0, 0.5, 1.0), strict=True):
        arrows, = panel.collections
        x, y = torch.tensor(arrows.XY).T
        assert torch.allclose(torch.tensor(arrows.U), (-time * (y + 1) / 0.5 * 2).to(torch.tensor(arrows.U).dtype), atol=1e-5)
        assert torch.allclose(torch.tensor(arrows.V), (time * (x - 5) / 2 * 0.5).to(torch.tensor(arrows.V).dtype), atol=1e-5)


@pytest.mark.parametrize("times", [(), (0.5, 0.1), (-0.1, 1), (0, math.nan)])
def test_times_that_are_none(times):
    with pytest.raises(ValueError, match="they must be in order, and lie between 0 and 1"): plot_velocity(TrainedFlow(Turn(), STATS), times)
    assert not plt.get_fignums()


def test_ways_begin_and_end_where_they_do():
    x = torch.randn(7, 5, 2)
    axes = plot_trajectories(Trajectories(torch.linspace(0, 1, 7), x, 1))
    *ways, start, end = axes.lines
    assert all(torch.equal(torch.tensor(way.get_xydata()).float(), x[:, k]) for k, way in enumerate(ways))
    for line, points in ((start, x[0]), (end, x[-1])): assert torch.equal(torch.tensor(line.get_xydata()).float(), points)


@pytest.mark.cuda
def test_a_flow_on_a_gpu_is_drawn():
    flow = TrainedFlow(create_model("mlp", (2,), width=16).cuda(), STATS)
    assert len(plot_velocity(flow)) == 5 and plot_trajectories(flow.trajectories(3)).lines
