"""What objects and trainings show of themselves in a notebook, without one."""

import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from flowbook.checkpoint import inspect_checkpoint
from flowbook.data import EndlessDataset, FlowDataset, prepare_dataset
from flowbook.display import DrawSamples, LiveView, ProgressLine, run_picture
from flowbook.flows import FLOWS, create_flow
from flowbook.nets import ModelSummary, create_model
from flowbook.sources import SAMPLERS
from flowbook.tracking import read_metrics
from flowbook.trainer import TrainingInterrupted

from conftest import PressCtrlC, assert_same, training_state


def text(html):
    """What a person reads in a page."""
    return " ".join(re.sub("<[^>]+>", " ", html).split())


@pytest.fixture
def shown(monkeypatch):
    """Everything that is shown in place: kind of thing, and whether it is new or takes the place of an earlier one."""
    things = []

    def show(thing, handle=None):
        things.append((thing, handle is None))
        return handle or object()

    monkeypatch.setattr("flowbook.display.shown_in_place", show)
    return things


def test_every_flow_shows_its_parts_and_a_path(trained_run):
    for name in FLOWS:
        page = create_flow(name, **({"from_run": str(trained_run)} if name == "reflow" else {}))._repr_html_()
        assert f"flow {name} coupling" in text(page) and page.count("data:image/png") == 1
    assert not plt.get_fignums()        # A display touches nobody's figures


def test_data_sets_show_themselves_with_a_picture_where_there_is_one(data_dir, tmp_path):
    prepared = prepare_dataset("moons", data_dir, points=1000)
    assert "700 train, 100 validation, 200 test" in text(prepared._repr_html_()) and "<img" in prepared._repr_html_()
    assert "nothing was changed" in text(prepared._repr_html_())
    vectors = FlowDataset.from_tensor(torch.randn(50, 7))
    assert "50, normalised" in text(vectors._repr_html_()) and "<img" not in vectors._repr_html_()
    assert "fresh ones" in text(EndlessDataset(SAMPLERS["moons"])._repr_html_())
    few = FlowDataset.from_tensor(torch.randn(3, 3, 4, 4))
    assert "<img" in few._repr_html_()


def test_a_prepared_data_set_that_is_gone_is_still_a_table(tmp_path):
    prepared = prepare_dataset("moons", tmp_path, points=100)
    for path in (tmp_path / "moons").iterdir():
        path.unlink()
    assert "<img" not in prepared._repr_html_() and "70 train" in text(prepared._repr_html_())


def test_a_summary_counts_every_number_once():
    model = create_model("mlp", (5,), width=8, depth=2)
    model.first.requires_grad_(False)
    rows = ModelSummary(model).rows()
    counts = [int(row["parameters"].split(",")[0].split()[0]) for row in rows[:-1] if "not trained" not in row["parameters"]]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters()) == int(rows[-1]["parameters"].replace(",", ""))
    assert [row["layer"] for row in rows if "frozen" in row["parameters"]] == ["first"]
    assert "Linear" in repr(ModelSummary(model)) and "first" in text(ModelSummary(torch.compile(model))._repr_html_())


def test_a_checkpoint_is_a_dictionary_and_a_table(trained_run):
    contents = inspect_checkpoint(trained_run / "best.pt")
    assert isinstance(contents, dict) and contents["config"].epochs == 2
    page = text(contents._repr_html_())
    assert "run mlp-icfm-moons-all-none" in page and "best val loss" in page and "TrainingConfig" in page


def test_a_view_is_two_displays_and_changes_nothing(configured, new_trainer, tmp_path, shown):
    plain = new_trainer(configured())
    plain.train()
    watched = new_trainer(configured(checkpoint_dir=str(tmp_path / "watched")), callbacks=[DrawSamples(every=1)])
    watched.callbacks[0] = view = LiveView()
    view.interval = view.seldom = 0     # In every step
    watched.train()
    assert_same(*(training_state(trainer._state()) for trainer in (plain, watched)))
    kinds = [type(thing).__name__ for thing, new in shown if new]
    assert sorted(kinds) == ["HTML", "Image"]       # All others take their places
    assert len(shown) > 28 and "best validation loss" in text(shown[-2][0].data) and not plt.get_fignums()


def test_a_view_that_is_stopped_says_so_and_the_error_how_to_go_on(configured, new_trainer, shown):
    trainer = new_trainer(configured(), callbacks=[PressCtrlC(10)])
    trainer.callbacks[0] = LiveView()
    with pytest.raises(TrainingInterrupted) as stopped: trainer.train()
    assert "interrupted in epoch 2" in text(shown[-2][0].data)
    assert stopped.value._render_traceback_() == ["Training was stopped in epoch 2, after step 10. Call train() again to go on from here"]
    trainer.callbacks.pop()
    trainer.train()
    assert "all epochs are done" in text(shown[-2][0].data) and [new for _, new in shown].count(True) == 4


def test_a_trainer_outside_a_notebook_shows_a_line(configured, new_trainer):
    assert type(new_trainer(configured()).callbacks[0]) is ProgressLine


@pytest.mark.parametrize("shape", [(7,), (4, 5, 5)])
def test_points_without_a_picture_are_said_and_stop_nothing(shape):
    dataset = FlowDataset.from_tensor(torch.randn(20, *shape))
    samples, axes = DrawSamples(), Figure().subplots()
    samples.on_train_start(SimpleNamespace(train_dataset=dataset))
    samples.draw(SimpleNamespace(), axes)
    assert f"points of shape\n{shape}" in axes.texts[0].get_text()


def test_a_run_without_a_row_has_a_picture(trained_run):
    assert run_picture([])[:4] == run_picture(read_metrics(trained_run))[:4] == b"\x89PNG"


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every=0 is not allowed: it must be at least 1"):
        DrawSamples(every=0)
