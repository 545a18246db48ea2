"""What saving costs: `python benchmarks/saving.py [--workload digits] [--repeats 3]`.

Measured is the share of `FlowTrainer.train()` that goes into saving: into holding a copy of the best state in memory, and into writing
states to the disk. Validation stands beside them and is no part of it. It is a ratio within one run, and not the difference between a run
that saves and one that does not: that would be a hundredth, and on a machine with other work two equal runs differ by more. A clock is put
around the methods of `flowbook.runs.Saver` from outside. It charges every moment to the innermost of them, so a save within a save counts
once. (`save_if_due` is left alone: every step calls it to compare two numbers, and the clock would cost a hundred times as much as that.)
CPU time is that of the training thread: it leaves out other processes, and the wait for the disk.

Each run is a process of its own with one PyTorch thread, in a temporary folder (TMPDIR says on which disk), without W&B, which would only
make the whole longer. The workloads take turns. Printed are medians; results/saving.json has the runs as well.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from flowbook import __version__, runs
from flowbook.config import TrainingConfig
from flowbook.data import data_sets, prepare_dataset
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.trainer import FlowTrainer

RESULTS = Path(__file__).with_name("results") / "saving.json"
WORKLOADS = {
    "digits": dict(dataset="digits-1k"),  # what `flowbook train` does
    "moons": dict(dataset="moons-1k"),
    "wide": dict(dataset="digits-1k", arch_options={"width": 1024}, epochs=100),  # a state of 360 MB
}
SHOWN = ("saving", "hold", "write", "validate")  # saving is hold and write


class Clock:
    """Charges wall and CPU time to the innermost section that is running."""
    def __init__(self):
        self.seconds, self.calls = {"wall": Counter(), "cpu": Counter()}, Counter()
        self.running, self.last = [], (0, 0)

    def charge(self):
        """Charge what has passed since the last call to the section that is running."""
        now = time.perf_counter(), time.thread_time()
        for spent, start, end in zip(self.seconds.values(), self.last, now):
            if self.running: spent[self.running[-1]] += end - start
        self.last = now

    def around(self, owner, section, *methods):
        """Replace methods of a class by such whose time is charged to a section."""
        for method in methods: setattr(owner, method, self._timed(getattr(owner, method), section))

    def _timed(self, function, section):
        def timed(*arguments, **options):
            self.charge()
            self.running.append(section)
            self.calls[section] += 1
            try: return function(*arguments, **options)
            finally:
                self.charge()
                self.running.pop()
        return timed


def measure(workload):
    """Train a workload with the clock around it; returns what was spent, held and written."""
    torch.set_num_threads(1)
    clock, settings, sizes, write = Clock(), WORKLOADS[workload], defaultdict(list), runs.write_checkpoint

    def write_and_note(path, *arguments, **options):
        write(path, *arguments, **options)
        sizes[path.name].append(path.stat().st_size)

    runs.write_checkpoint = write_and_note
    clock.around(runs.Saver, "hold", "hold_best")
    clock.around(runs.Saver, "write", "save_best", "save")
    clock.around(FlowTrainer, "validate", "validate")
    clock.around(FlowTrainer, "train", "train")
    with tempfile.TemporaryDirectory() as folder:
        prepare_dataset(settings["dataset"].partition("-")[0], f"{folder}/datasets")
        config = TrainingConfig(**settings, device="cpu", data_dir=f"{folder}/datasets", checkpoint_dir=f"{folder}/runs")
        set_seed(config.seed)
        model = create_model(config.arch, data_sets(config)[0].data_shape, **config.arch_options)
        epochs = FlowTrainer(model, config, wandb_project=None).train()["final_epoch"]
    shares = {kind: {name: spent[name] / spent.total() for name in SHOWN} for kind, spent in clock.seconds.items()}
    for share in shares.values(): share["saving"] = share["hold"] + share["write"]
    return {"epochs": epochs, "held": clock.calls["hold"], "seconds": clock.seconds, "shares": shares,
            "written": {name: {"times": len(each), "bytes": max(each)} for name, each in sizes.items()}}


def medians(results):
    """The middle of several results, number by number."""
    if not isinstance(results[0], dict): return median(results)
    return {name: medians([result[name] for result in results]) for name in results[0]}


def machine():
    """What is measured, and on what."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in info if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__,
            "flowbook": __version__, "date": datetime.now(UTC).date().isoformat()}


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    workloads = [options.workload] if options.workload else list(WORKLOADS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as new_process_each:
        results = list(new_process_each.map(measure, workloads * options.repeats))
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    print("wall (CPU) time   " + "".join(f"{name:>16}" for name in SHOWN))
    for number, workload in enumerate(workloads):
        of_it = results[number::len(workloads)]
        middle = medians(of_it)
        report[workload] = {"machine": machine(), "median": middle, "runs": of_it}
        shares = "".join(f"{middle['shares']['wall'][name]:8.2%} ({middle['shares']['cpu'][name]:.2%})" for name in SHOWN)
        files = ", ".join(f"{file['times']:.0f} × {name} ({file['bytes'] / 1e6:.1f} MB)" for name, file in middle["written"].items())
        print(f"{workload:8}{sum(middle['seconds']['wall'].values()):8.1f} s{shares}  {middle['held']:.0f} held, {files}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
