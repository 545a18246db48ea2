"""What objects and trainings show of themselves in a notebook, without one."""

import io
import math
import os
import random
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from itertools import product
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from flowbook.checkpoint import inspect_checkpoint
from flowbook.data import EndlessDataset, FlowDataset, prepare_dataset
from flowbook.display import Curve, DrawSamples, LiveView, ProgressBar, ProgressLine, run_picture, svg_curves
from flowbook.flows import FLOWS, create_flow
from flowbook.nets import ModelSummary, create_model
from flowbook.runs import read_summary
from flowbook.sources import SAMPLERS
from flowbook.tracking import read_metrics
from flowbook.trainer import FlowTrainer, TrainingInterrupted

from conftest import PressCtrlC, assert_same, training_state


def text(html):
    """What a person reads in a page, or in something that shows itself as one."""
    page = html if isinstance(html, str) else html._repr_html_()
    return " ".join(re.sub("<[^>]+>", " ", page).split())


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


def test_a_path_that_takes_no_single_numbers_is_said():
    class OnlyImages:
        "x_t of images"
        time_range = (0.0, 1.0)
        def at(self, *arguments): raise ValueError("only <images>")

    flow = create_flow("icfm")
    flow.path = OnlyImages()
    page = flow._repr_html_()
    assert "It has no picture: ValueError: only &lt;images&gt;" in page and "x_t of images" in page


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
    assert "all MLP" in text(model) == text(ModelSummary(model)) and "first" in text(torch.compile(model))
    assert "Linear" in repr(ModelSummary(model)) and "first" in text(ModelSummary(torch.compile(model))._repr_html_())


def test_a_checkpoint_is_a_dictionary_and_a_table(trained_run):
    contents = inspect_checkpoint(trained_run / "best.pt")
    assert isinstance(contents, dict) and contents["config"].epochs == 2
    page = text(contents._repr_html_())
    assert "run mlp-icfm-moons-all-none" in page and "best val loss" in page and "TrainingConfig" in page


@pytest.fixture
def generous(monkeypatch):
    """A view that shows everything in every step."""
    monkeypatch.setattr(LiveView, "interval", 0)
    monkeypatch.setattr(LiveView, "curves_share", math.inf)
    monkeypatch.setattr(LiveView, "picture_is_due", lambda self, trainer: True)


def test_a_view_is_two_displays_and_changes_nothing(configured, new_trainer, tmp_path, shown, generous, recwarn):
    plain = new_trainer(configured())
    plain.train()
    watched = new_trainer(configured(checkpoint_dir=str(tmp_path / "watched")), callbacks=[DrawSamples(every=1)])
    watched.callbacks[0] = LiveView()
    watched.train()
    assert_same(*(training_state(trainer._state()) for trainer in (plain, watched)))
    assert [type(thing).__name__ for thing, new in shown] == ["HTML", "Image"] * (1 + 28) + ["SummaryTable", "Image"]
    assert [new for _, new in shown] == [True] * 2 + [False] * 58       # All others take the places of those before the first step
    assert "best validation loss" in text(shown[-2][0]) and not plt.get_fignums() and not recwarn.list


def test_the_curves_grow_with_the_record(configured, new_trainer, shown, generous):
    trainer = new_trainer(configured(log_every=1))
    trainer.callbacks[0] = LiveView()
    trainer.train()
    pages = [thing.data for thing, _ in shown if type(thing).__name__ == "HTML"]
    lengths = [[len(points.split()) for points in re.findall("points='([^']*)'", page)] for page in pages]
    assert [training for training, *_ in lengths] == list(range(29))
    assert [validation for _, validation, *_ in lengths] == [max(0, step - 1) // 7 for step in range(29)]


def test_curves_that_are_long_flat_or_empty():
    long, flat, empty = Curve(), Curve(), Curve()
    for step in range(10_001):
        long.add(step, math.sin(step / 1000) + 90 * (step == 3001))
        flat.add(step, 0.5)
    gaps = [later - earlier for (earlier, _), (later, _) in zip(long.points, long.points[1:])]
    assert 200 <= len(long.points) <= 401 and long.points[0] == (0, 0) and long.lowest[0] == 4712 and max(gaps) <= 2 * 64
    assert long.points[-1][0] == 10_000 and {3001, 4712} <= {step for step, _ in long.points} and long.points == sorted(long.points)
    assert (flat.lowest, len(flat.points) <= 202, empty.lowest, empty.points) == ((0, 0.5), True, None, [])
    for points, log in product((long.points, flat.points, [(3, 1e-3)], [(1, 1e-9), (2, 1e9)], []), (False, True)):
        picture = svg_curves({("a < b", "gray"): points}, mark=min(points, key=lambda point: point[1]) if points else None, log=log)
        assert ElementTree.fromstring(picture).tag.endswith("svg") and "nan" not in picture
        places = [tuple(map(float, place.split(","))) for place in re.search("points='([^']*)'", picture)[1].split()]
        places += [tuple(map(float, place)) for place in re.findall("cx='([^']*)' cy='([^']*)'", picture)]
        assert len(places) == len(points) + bool(points) and all(50 <= x <= 415 and 18 <= y <= 112 for x, y in places)
    wide = {("loss", "gray"): [(1, 1e-9), (2, 1.0), (3, 1e9)]}
    heights = {log: re.search("points='([^']*)'", svg_curves(wide, log=log))[1].split()[1].split(",")[1] for log in (True, False)}
    assert heights[True] == "65.0" and float(heights[False]) > 100      # The middle, and the bottom
    assert "(log)" in svg_curves(wide, log=True) and "(log)" not in svg_curves(wide)


def test_whatever_is_put_in_the_extremes_of_a_curve_stay():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for length in (1, 199, 200, 201, 402, 5000):
        curve, points = Curve(), [(step, generator.gauss(0, 1)) for step in range(length)]
        for point in points:
            curve.add(*point)
        lowest, *_, highest = sorted(points, key=lambda point: point[1]) if length > 1 else points * 2
        assert curve.lowest == lowest and {lowest, highest, points[-1]} <= {*curve.points} <= {*points}
        assert len(curve.points) <= 401 and (length > 200 or curve.points == points)


@pytest.mark.parametrize("losses", [(0.02, 0.09), (0.22, 2.5), (1.5, 2), (900, 5000), (1e-4, 1e6), (1e5, 1e6)])
def test_a_picture_cuts_nothing_off_and_writes_plain_numbers(losses, monkeypatch):
    axes = []
    monkeypatch.setattr("flowbook.display.readable_anywhere", axes.append)
    rows = [{"step": step, "train/loss": loss, "val/loss": loss, "train/lr": 1e-3, "train/grad_norm": loss}
            for step, loss in zip((1, 99_999), reversed(losses))]
    opacity = plt.imread(io.BytesIO(run_picture(rows)))[..., 3]
    assert not any(edge.any() for edge in (opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]))
    labels = [label.get_text().replace("\u2212", "-") for label in axes[0].get_yticklabels(which="both")]
    unit = float(axes[0].yaxis.get_offset_text().get_text() or 1)
    assert len([label for label in labels if losses[0] <= unit * float(label) <= losses[1]]) >= 2
    assert axes[0].get_yscale() == ("log" if losses[1] > 10 * losses[0] else "linear")


def test_the_table_that_stays_is_text_as_well(configured, new_trainer, shown):
    trainer = new_trainer(configured())
    trainer.callbacks[0] = LiveView()
    trainer.train()
    table = shown[-2][0]
    assert repr(table).split() == text(table).split() and "best validation loss" in repr(table)


def test_panels_wait_until_they_can_be_paid_whenever_training_ends(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flowbook.display.time", SimpleNamespace(monotonic=lambda: now[0]))
    view, config = LiveView(), SimpleNamespace(epochs=100, patience=0)
    trainer = SimpleNamespace(config=config, step=0, steps_per_epoch=10)

    def due(second, epochs=100):        # A second for an epoch
        now[0], trainer.step, config.epochs = second, 10 * second, epochs
        return view.picture_is_due(trainer)

    view._cost, view._last_cost = 0.06, 0.1
    view.begin(trainer)
    assert not due(7) and due(9)        # 0.06 are three quarters of a hundredth of 8
    assert due(9, epochs=14) and not due(9, epochs=13)      # Twice the panels, the last picture, and 0.5% of the rest: 1.8% of 13.5
    view._spent = 0.1
    assert due(9, epochs=22) and not due(9, epochs=21)


@pytest.mark.parametrize("options", [{"every": 0}, {"n": 0}, {"n": -3}])
def test_samples_that_can_not_be_are_refused(options):
    with pytest.raises(ValueError, match="is not allowed: it must be at least 1"): DrawSamples(**options)


def test_a_row_without_a_number_is_no_point(configured, new_trainer, shown, generous):
    trainer = new_trainer(configured(log_every=1, max_skipped_steps=5))
    trainer.callbacks[0] = LiveView()
    trainer.train_dataset.tensor[0] = 1e30      # Once in an epoch, so a row of every epoch has no loss
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*skipped.*|.*left out.*")
        assert trainer.train()["status"] == "finished"
    losses = [row["train/loss"] for row in read_metrics(trainer.folder) if "train/loss" in row]
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert len(losses) == 28 > len(finite)
    page = [thing.data for thing, _ in shown if "<svg" in str(getattr(thing, "data", ""))][-1]
    assert len(re.search("points='([^']*)'", page)[1].split()) == len(finite)


def test_a_panel_that_fails_says_so_in_its_place_and_stops_nothing(configured, new_trainer, shown, generous, monkeypatch):
    class Broken:
        def draw(self, trainer, axes): raise ZeroDivisionError("no \u221e, and no $")

    drawn = []
    monkeypatch.setattr("flowbook.display.readable_anywhere", lambda axes: drawn.append([text.get_text() for text in axes.texts]))
    trainer = new_trainer(configured(), callbacks=[Broken(), DrawSamples()])
    trainer.callbacks[0] = LiveView()
    drawn.clear()       # It has drawn an empty picture
    assert trainer.train()["status"] == "finished"
    assert drawn[:2] == [["Broken: ZeroDivisionError:\nno \u221e, and no $"], []]


def test_a_view_that_fails_is_a_warning_and_stops_nothing(configured, new_trainer, shown, generous, monkeypatch):
    class Worse:
        def draw(self, trainer, axes): axes.set_title(r"$\frac$")       # An error when the letters are set, and not before

    trainer = new_trainer(configured(), callbacks=[Worse()])
    trainer.callbacks[0] = LiveView()
    monkeypatch.setattr(LiveView, "curves", lambda self: 1 / 0)
    with pytest.warns(UserWarning, match="the live view could not be shown") as told: summary = trainer.train()
    assert summary["status"] == read_summary(trainer.folder)["status"] == "finished"
    assert {str(warning.message).split(": ")[1] for warning in told} >= {"ZeroDivisionError"}
    assert "best validation loss" in text(shown[-1][0])


def test_a_record_that_is_long_does_not_set_the_pace(configured, new_trainer, shown, monkeypatch):
    with pytest.raises(TrainingInterrupted): new_trainer(configured(), callbacks=[PressCtrlC(10)]).train()
    trainer, read, now = new_trainer(configured(), resume_path="auto"), LiveView.read_record, [0.0]

    def read_slowly(self, trainer):
        now[0] += 30 if self._record is None else 0
        read(self, trainer)

    monkeypatch.setattr(LiveView, "read_record", read_slowly)
    monkeypatch.setattr("flowbook.display.time", SimpleNamespace(monotonic=lambda: now[0]))
    view = trainer.callbacks[0] = LiveView()
    trainer.train()
    assert view.interval == LiveView.interval and view._spent >= 30


def test_a_second_stop_while_the_end_is_saved_leaves_a_closed_record(configured, new_trainer):
    def stop(): raise KeyboardInterrupt

    class Impatient:
        def on_step(self, trainer):
            if trainer.step == 10:
                trainer._saver.save = stop      # The second stop
                stop()

    trainer = new_trainer(configured(), callbacks=[Impatient()])
    with pytest.raises(TrainingInterrupted): trainer.train()
    assert read_summary(trainer.folder)["status"] == "interrupted"
    assert trainer.train()["status"] == "finished"


def test_a_second_stop_while_the_end_is_drawn_leaves_a_closed_record(configured, new_trainer, shown):
    class Impatient:
        def on_train_end(self, trainer, summary): raise KeyboardInterrupt

    trainer = new_trainer(configured(), callbacks=[PressCtrlC(10), Impatient()])
    with pytest.raises(TrainingInterrupted): trainer.train()
    assert read_summary(trainer.folder)["status"] == "interrupted"
    trainer = new_trainer(configured(), callbacks=[Impatient()], resume_path="auto")
    with pytest.raises(KeyboardInterrupt): trainer.train()
    assert read_summary(trainer.folder)["status"] == "finished"


def test_before_the_first_validation_there_is_no_checkpoint(configured, new_trainer, shown):
    trainer = new_trainer(configured(), callbacks=[PressCtrlC(3)])
    trainer.callbacks[0] = LiveView()
    with pytest.raises(TrainingInterrupted): trainer.train()
    assert "checkpoint none yet" in text(shown[-2][0]) and not (trainer.folder / "best.pt").exists()


def test_a_finished_run_without_a_record_still_has_its_table(configured, new_trainer, shown):
    trainer = new_trainer(configured())
    trainer.train()
    (trainer.folder / "metrics.jsonl").unlink()
    trainer.callbacks[0] = LiveView()
    with pytest.warns(UserWarning, match="the live view could not be shown: FileNotFoundError"): trainer.train()
    assert "all epochs are done" in text(shown[-1][0])


def test_in_a_notebook_the_view_is_the_default(configured, new_trainer, monkeypatch):
    monkeypatch.setattr("flowbook.trainer.in_notebook", lambda: True)
    assert type(new_trainer(configured()).callbacks[0]) is LiveView
    assert type(new_trainer(configured(), live_view=False).callbacks[0]) is ProgressLine


def test_trainings_in_two_threads_have_a_view_each(configured, new_trainer, tmp_path, shown, generous):
    alone = new_trainer(configured())
    alone.train()
    trainers = [new_trainer(configured(checkpoint_dir=str(tmp_path / name)), callbacks=[DrawSamples(every=1)]) for name in "ab"]
    for trainer in trainers: trainer.callbacks[0] = LiveView()
    with ThreadPoolExecutor(2) as threads: summaries = list(threads.map(FlowTrainer.train, trainers))
    assert [summary["status"] for summary in summaries] == ["finished"] * 2 and [new for _, new in shown].count(True) == 4
    for trainer in trainers: assert_same(*(training_state(each._state()) for each in (alone, trainer)))


def test_a_finished_run_shows_its_end_again(configured, new_trainer, shown, capsys):
    for options in ({}, {"resume_path": "auto"}):
        trainer = new_trainer(configured(), callbacks=[DrawSamples()], **options)
        trainer.callbacks[0] = LiveView()
        trainer.train()
        end = [getattr(thing, "data", None) or repr(thing) for thing, _ in shown[-2:]]
        shown.clear()
        trainer.train()
        assert [getattr(thing, "data", None) or repr(thing) for thing, _ in shown] == end and [new for _, new in shown] == [True] * 2
    assert "The run mlp-icfm-moons-all-none is finished" in capsys.readouterr().out


def test_a_view_that_is_stopped_says_so_and_the_error_how_to_go_on(configured, new_trainer, shown):
    trainer = new_trainer(configured(), callbacks=[PressCtrlC(10)])
    trainer.callbacks[0] = LiveView()
    with pytest.raises(TrainingInterrupted) as stopped: trainer.train()
    assert "interrupted in epoch 2" in text(shown[-2][0])
    sentence, = stopped.value._render_traceback_()
    assert sentence.startswith("Training was stopped in epoch 2, after step 10. Call train() again to go on from here")
    trainer.callbacks.pop()
    trainer.train()
    assert "all epochs are done" in text(shown[-2][0]) and [new for _, new in shown].count(True) == 4


@contextmanager
def terminal_of(columns):
    """A terminal as stderr; afterwards what stood in its last line, one after the other."""
    ours, theirs = pytest.importorskip("pty").openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, columns))

    def read():
        with suppress(OSError):     # The other end is closed
            while piece := os.read(ours, 4096): written.append(piece)
        os.close(ours)

    written, lines = [], []
    with ThreadPoolExecutor(1) as reader, open(theirs, "w", encoding="utf-8") as file, redirect_stderr(file):
        reader.submit(read)
        yield lines
    lines += b"".join(written).decode().split("\r")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_shows_a_bar_in_one_line(configured, new_trainer, monkeypatch, columns):
    monkeypatch.setattr(ProgressBar, "interval", 0)
    with terminal_of(columns) as lines:
        summary = new_trainer(configured()).train()
    *shown, end = filter(None, lines)
    assert end == "\n" and {len(line) for line in shown} == {columns - 1}
    assert len(shown) > summary["steps"] and shown[0].startswith("  0%|") and shown[-1].startswith("100%|")
    best = f"val {summary['best_val_loss']:.4f}"
    assert columns < 80 or "epoch 1/4" in shown[0] and "epoch 4/4" in shown[-1] and any(best in line for line in shown)
    assert columns < 120 or shown[-1].rstrip().endswith("finished")


def test_a_bar_that_is_stopped_stays_where_it_was_and_goes_on_from_there(configured, new_trainer):
    with terminal_of(120) as stopped, pytest.raises(TrainingInterrupted):
        new_trainer(configured(), callbacks=[PressCtrlC(10)]).train()
    trainer = new_trainer(configured(), resume_path="auto")
    with terminal_of(120) as resumed: trainer.train()
    percent = f"{100 * 10 / trainer.step:3.0f}%|"
    assert stopped[-1] == "\n" and stopped[-2].startswith(percent) and "epoch 2/4" in stopped[-2] and "interrupted" in stopped[-2]
    assert next(filter(None, resumed)).startswith(percent) and resumed[-2].startswith("100%|")


def test_a_file_gets_no_bar(configured, new_trainer, capsys):
    trainer = new_trainer(configured())
    trainer.train()
    assert type(trainer.callbacks[0]) is ProgressBar and capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(7,), (4, 5, 5)])
def test_points_without_a_picture_are_said_and_stop_nothing(shape):
    dataset = FlowDataset.from_tensor(torch.randn(20, *shape))
    samples, axes = DrawSamples(), Figure().subplots()
    samples.draw(SimpleNamespace(train_dataset=dataset), axes)
    assert f"points of shape\n{shape}" in axes.texts[0].get_text()


def test_a_run_without_a_row_has_a_picture(trained_run):
    assert run_picture([])[:4] == run_picture(read_metrics(trained_run))[:4] == b"\x89PNG"


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every=0 is not allowed: it must be at least 1"):
        DrawSamples(every=0)
