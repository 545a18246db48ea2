"""The published table of benchmarks/c2ot.py, in small: the order of the methods, and a file that several processes add to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "c2ot.py"
METHODS = ["icfm", "otcfm", "semidiscrete"]


@pytest.mark.slow
def test_the_order_of_the_methods_and_nothing_is_run_twice(tmp_path):
    results = tmp_path / "c2ot.json"

    def start(*methods):
        command = [sys.executable, SCRIPT, *methods, "--seeds", "0", "--steps", "1000", "--points", "1000", "--results", results,
                   "--folder", tmp_path / "runs"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    side_by_side = [start("otcfm"), start("icfm", "semidiscrete")]
    printed = [process.communicate()[0] for process in side_by_side]
    assert [process.returncode for process in side_by_side] == [0, 0], printed
    rows = json.loads(results.read_text())
    assert [(row["method"], row["seed"], row["steps"], row["points"]) for row in rows] == [(method, 0, 1000, 1000) for method in METHODS]
    assert all({"cpu", "torch", "flowbook", "date", "device"} <= set(row["machine"]) for row in rows)
    chance, batches, whole_set = (row["w2_squared"]["euler-1"] for row in rows)
    assert chance > 3 * batches and chance > 3 * whole_set

    before = results.read_bytes()
    again = start(*METHODS)
    assert "starting" not in again.communicate()[0] and again.returncode == 0
    assert results.read_bytes() == before
