"""What holds for every chapter: its place in the order, that it runs alone, and what importing the package costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check import chapter_order, export_targets, notebooks

ROOT = Path(__file__).parent.parent
LONG = ["06_why_couplings_matter"]
HEAVY = ["wandb", "matplotlib", "sklearn", "scipy", "ot", "torchdiffeq", "pandas"]

# nbdev_test runs several notebooks in one process, so that one may lean on what another left behind; this does not
RUN_NOTEBOOK = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
notebook, *skipped_flags = sys.argv[1:]
passed, seconds = test_nb(Path(notebook), skip_flags=skipped_flags, basepath=get_config().config_path)
sys.exit(0 if passed else "a cell failed")
"""


def run_alone(notebook, *skipped_flags):
    """Run a notebook's cells in a process of their own, those with one of these flags left out."""
    command = [sys.executable, "-c", RUN_NOTEBOOK, str(notebook), *skipped_flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)


def write_notebook(path, *sources):
    """A notebook of code cells with these sources."""
    cells = [{"cell_type": "code", "id": f"cell{i}", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
             for i, source in enumerate(sources)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_chapters_import_only_earlier_chapters():
    assert chapter_order(ROOT) == []


def test_only_chapters_export_and_each_to_its_own_module():
    assert export_targets(ROOT) == []


@pytest.mark.parametrize("line", [
    "from flowbook.second import g",
    "import flowbook.second",
    "from flowbook import second",
    "from .second import g",
    "def f():\n    from flowbook.second import g  # inside a function",
    "%time 1\nimport flowbook.second as s",
    "from flowbook.first import f",
    "import flowbook.missing",
])
def test_an_import_of_a_later_chapter_is_found(tmp_path, line):
    write_notebook(tmp_path / "nbs" / "00_first.ipynb", "#| default_exp first", line)
    write_notebook(tmp_path / "nbs" / "01_second.ipynb", "#| default_exp second", "from flowbook.first import f\nimport flowbook")
    [complaint] = chapter_order(tmp_path)
    assert complaint.startswith("00_first.ipynb, cell cell1: imports flowbook.")


def test_an_export_from_a_tutorial_and_a_wrong_target_are_found(tmp_path):
    write_notebook(tmp_path / "nbs" / "00_first.ipynb", "#| default_exp frist")
    write_notebook(tmp_path / "nbs" / "tutorial.ipynb", "#|export\nx = 1")
    assert [complaint.split(":")[0] for complaint in export_targets(tmp_path)] == ["00_first.ipynb", "tutorial.ipynb"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda path: path.stem)
def test_notebook_runs_alone(notebook):
    if notebook.stem in LONG and "FLOWBOOK_LONG" not in os.environ:
        pytest.skip("it takes five minutes: FLOWBOOK_LONG=1 runs it, too")
    result = run_alone(notebook, "cuda")  # slow cells, too: the tutorials train for real
    assert result.returncode == 0, result.stderr


def test_a_failing_cell_is_found_and_flagged_cells_are_skipped(tmp_path):
    flagged = write_notebook(tmp_path / "good.ipynb", "x = 1", "#| cuda\nraise ValueError", "#| slow\nraise ValueError")
    good = run_alone(flagged, "cuda", "slow")
    bad = run_alone(write_notebook(tmp_path / "bad.ipynb", "x = 1", "assert x == 2"))
    assert (good.returncode, bad.returncode) == (0, 1), good.stderr
    assert "AssertionError" in bad.stderr


def test_importing_the_trainer_loads_no_heavy_module():
    command = f"import sys, flowbook.trainer; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
