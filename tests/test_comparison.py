"""Real runs side by side: what the table says is what was trained, and what is damaged does not hide the rest."""

import json
import re
import shutil

import matplotlib.pyplot as plt
import pytest
import torch

from conftest import PressCtrlC
from flowbook.checkpoint import read_checkpoint
from flowbook.comparison import Comparison, Run, compare_runs
from flowbook.data import FlowDataset, prepare_dataset
from flowbook.runs import read_summary
from flowbook.tracking import read_metrics


@pytest.fixture
def study(configured, new_trainer):
    """Two networks of one flow, one of them stopped, and another flow; the folder, and what `train` returned."""
    summaries = {}
    for changes in (dict(lr=2e-3), dict(lr=5e-3, seed=1), dict(flow="otcfm", flow_options={"ot_batch_size": 200})):
        config = configured(**changes)
        stopped = changes.get("seed") == 1
        trainer = new_trainer(config, callbacks=[PressCtrlC(16)] if stopped else [])
        if stopped:
            with pytest.raises(KeyboardInterrupt): trainer.train()
        else: summaries[config.run_name] = trainer.train()
    return trainer.folder.parent, summaries


def test_the_table_says_what_was_trained(study):
    folder, summaries = study
    runs = compare_runs(folder)
    assert runs.settings == ["flow", "flow_options", "seed", "lr"] and [len(exam) for exam in runs.exams] == [2, 1]
    rows = {row["run"]: row for row in runs.rows()}
    run, flow, options, seed, lr, status, steps, best, _ = rows["mlp-icfm-moons-all-none-s1"].values()
    assert (flow, options, seed, lr, status, steps) == ("icfm", "{}", "1", "0.005", "interrupted", "16")
    assert best.startswith(f"{read_summary(folder / run)['best_val_loss']:.4f} at step ")
    for name, summary in summaries.items():
        run, = [run for run in runs.runs if run.folder.name == name]
        assert run.status == summary["status"] == rows[name]["status"] and run.best["val/loss"] == summary["best_val_loss"]
        assert rows[name]["steps"] == str(summary["steps"])
    for exam in runs.exams:
        losses = [run.best["val/loss"] for run in exam]
        assert losses == sorted(losses)
    text, html = repr(runs), runs._repr_html_()
    assert all(name in text and name in html for name in rows) and html.count("<img") == 2 and "another exam" in html
    assert not plt.get_fignums()        # A display touches nobody's figures


def test_losses_are_comparable_by_the_points_and_not_by_their_name(configured, new_trainer, tmp_path):
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    runs = []
    for number, (given, seed) in enumerate([(points, 0), (points, 1), (points**3, 0), (points[:450], 0)]):
        config = configured(dataset="mine", seed=seed, epochs=1, checkpoint_dir=str(tmp_path / f"by hand {number}"))
        train = FlowDataset.from_tensor(given[:400])
        val = FlowDataset.from_tensor(given[400:], train.stats)
        runs.append(Run(config.checkpoint_dir + f"/{new_trainer(config, train_dataset=train, val_dataset=val).train()['run']}"))
    assert sorted(sorted(runs.index(run) for run in exam) for exam in Comparison(runs).exams) == [[0, 1], [2], [3]]

    for number in (1, 2):       # The same, prepared twice
        prepare_dataset("moons", tmp_path / f"data {number}", points=500)
        config = configured(data_dir=str(tmp_path / f"data {number}"), epochs=1, checkpoint_dir=str(tmp_path / f"prepared {number}"))
        with pytest.raises(KeyboardInterrupt): new_trainer(config, callbacks=[PressCtrlC(2)]).train()
    assert len(Comparison([Run(tmp_path / f"prepared {number}" / config.run_name) for number in (1, 2)]).exams) == 1


def test_a_run_is_read_as_it_is_shown(study):
    folder, summaries = study
    name = next(iter(summaries))
    run = Run(folder / name)
    assert name in repr(run) and "finished" in repr(run) and "arch_options" in run._repr_html_() and not plt.get_fignums()


def test_a_run_that_is_killed_at_once_is_listed(study):
    folder, summaries = study
    run = folder / next(iter(summaries))
    (run / "metrics.jsonl").write_bytes(b"")
    (run / "summary.json").unlink()
    row, = [row for row in compare_runs(folder).rows() if row["run"] == run.name]
    assert (row["status"], row["steps"], row["best validation loss"], row["time"]) == ("unknown", "0", "not validated yet", "")
    assert "<img" in Run(run)._repr_html_() and "<img" in compare_runs(folder)._repr_html_()
    plt.close(compare_runs(folder).plot().figure)


@pytest.mark.parametrize("file, content", [("config.json", "{"), ("config.json", None), ("config.json", '{"lr": -1}'),
                                           ("config.json", '{"colour": 1}'), ("summary.json", "[]")])
def test_a_run_that_cannot_be_read_is_left_out_and_named(study, file, content):
    folder, summaries = study
    name = next(iter(summaries))
    (folder / name / file).unlink() if content is None else (folder / name / file).write_text(content)
    with pytest.warns(UserWarning, match=f"{re.escape(name)} is left out"): runs = compare_runs(folder)
    assert len(runs.runs) == 2


def test_what_a_run_says_is_no_html(study):
    folder, summaries = study
    path = folder / next(iter(summaries)) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed", "error": "<script>alert(1)</script>"}))
    assert "<script>" not in Run(path.parent)._repr_html_() and "&lt;script&gt;" in Run(path.parent)._repr_html_()


def test_folders_in_folders_and_none_at_all(study, tmp_path):
    folder, summaries = study
    shutil.copytree(folder, folder / "older" / "study")
    names = {row["run"] for row in compare_runs(folder).rows()}
    assert len(names) == 6 and f"older/study/{next(iter(summaries))}" in names
    aside = folder / next(iter(summaries))
    shutil.copytree(aside, aside.with_name(f"{aside.name}.old-1"))
    assert {row["run"] for row in compare_runs(folder).rows()} == names
    (tmp_path / "empty").mkdir()
    nothing = compare_runs(tmp_path / "empty")
    assert (nothing.runs, nothing.rows(), nothing.settings, nothing.exams, repr(nothing)) == ([], [], [], [], "no runs")
    assert "no runs" in nothing._repr_html_()
    with pytest.raises(IndexError, match="these runs took 0"): nothing.plot()


def test_the_ten_best_of_an_exam_have_a_name_in_the_plot(study):
    folder, summaries = study
    run = Run(folder / next(iter(summaries)))
    axes = Comparison([run] * 12).plot()
    assert len(axes.get_legend().get_texts()) == 10
    assert [line.get_color() for line in axes.lines if len(line.get_xdata()) > 1][10:] == ["gray"] * 2
    plt.close(axes.figure)


def test_the_runs_of_a_group_stand_alone_and_what_only_follows_is_no_setting(configured, new_trainer):
    for group, seed in (("first", 1), ("second", 2), ("second", 3)):
        new_trainer(configured(group=group, seed=seed)).train()
    folder = configured().checkpoint_dir
    assert [len(compare_runs(folder, group=group).runs) for group in (None, "first", "second", "third")] == [3, 1, 2, 0]
    assert compare_runs(folder, group="second").settings == ["seed"]
    checkerboard = configured(dataset="checkerboard-all", seed=4)
    prepare_dataset("checkerboard", checkerboard.data_dir, points=200)
    new_trainer(checkerboard).train()
    assert compare_runs(folder).settings == ["dataset", "group", "seed"]       # and not where the statistics lie


def test_the_best_of_a_run_is_what_its_checkpoint_holds(configured, new_trainer):
    trainer = new_trainer(configured(min_delta=0.05, epochs=8))
    summary = trainer.train()
    run, lowest = Run(trainer.folder), min(row.get("val/loss", 1e9) for row in read_metrics(trainer.folder))
    assert run.best["val/loss"] == summary["best_val_loss"] > lowest
    assert run.best["step"] == read_checkpoint(trainer.folder / "best.pt")["step"]


def test_one_run_far_above_the_others_does_not_flatten_them(study):
    folder, _ = study
    runs = compare_runs(folder)
    assert runs.plot().get_yscale() == "linear"
    path = next(iter(runs.exams[0])).folder / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "epoch": 1, "val/loss": 4000.0}) + "\n" + path.read_text())
    assert compare_runs(folder).plot().get_yscale() == "log"
    plt.close("all")
