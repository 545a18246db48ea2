"""How soon it starts: `python benchmarks/startup.py [--rounds 10]`.

Three processes take turns, each in an empty folder: one that imports torch and ends; `flowbook train --help`; and what `make train` runs,
`flowbook prepare digits` and `flowbook train --resume`, until the first step is made. Printed are medians of seconds, and of the ratio to
the first in the same round. Everything has been read from the disk once before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from saving import machine

RESULTS = Path(__file__).with_name("results") / "startup.json"
COMMAND = str(Path(sys.executable).with_name("flowbook"))
FIRST_STEP = """
import os, sys
from flowbook.cli import main
from flowbook.learner import Learner
update = Learner.update
def once(self):
    update(self)
    os._exit(0)
Learner.update = once
main()
"""
STARTS = {"import torch": [[sys.executable, "-c", "import torch"]],
          "flowbook train --help": [[COMMAND, "train", "--help"]],
          "make train, to the first step": [[COMMAND, "prepare", "digits"], [sys.executable, "-c", FIRST_STEP, "train", "--resume"]]}


def seconds(commands):
    """From the first process's start to the last one's end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for command in commands: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    for commands in STARTS.values(): seconds(commands)
    times = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, commands in STARTS.items(): times[name].append(round(seconds(commands), 3))
    for name, values in times.items():
        low, middle, high = quantiles([a / b for a, b in zip(values, times["import torch"], strict=True)], n=4)
        print(f"{name:30}{median(values):6.2f} s{middle:8.2f} times importing torch ({low:.2f} to {high:.2f})")
    RESULTS.write_text(json.dumps({"machine": machine(), "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
