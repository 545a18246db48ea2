"""What the live view costs: `python benchmarks/view.py [--workload digits] [--repeats 3]`.

Measured is the share of `FlowTrainer.train()` that goes into the view: numbers and curves that change, pictures of samples, and the table
and the picture that stay. It is a ratio within one run, because two runs, one with the view and one without, differ by more. A clock is put
around the methods of `flowbook.display.LiveView` that show something, from outside.

Each run is a notebook of one cell, in a kernel of its own with one PyTorch thread. The workloads take turns. Printed are medians;
results/view.json has the runs.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median

import nbformat
import torch
from nbclient import NotebookClient
from saving import Clock, machine

from flowbook.config import TrainingConfig
from flowbook.data import FlowDataset, data_sets, prepare_dataset
from flowbook.display import DrawSamples, LiveView
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.trainer import FlowTrainer

RESULTS = Path(__file__).with_name("results") / "view.json"
WORKLOADS = {
    "digits": dict(dataset="digits-1k", epochs=300, patience=0),
    "digits-short": dict(dataset="digits-1k", epochs=75, patience=0),
    "digits-patient": dict(dataset="digits-1k"),  # what the first tutorial does
    "plane": dict(dataset="moons-5k", epochs=200, patience=0, batch_size=256, arch_options={"width": 64}),
    "embeddings": dict(dataset="embeddings-all", epochs=8, patience=0, batch_size=256, arch_options={"width": 512}),
}


def measure(workload):
    """Train a workload in a notebook, with the clock around what it shows; returns what was spent."""
    torch.set_num_threads(1)
    clock, settings = Clock(), WORKLOADS[workload]
    clock.around(LiveView, "show", "show")  # not `on_step`: it compares two numbers, and the clock would cost more than that
    clock.around(LiveView, "end", "show_end")
    clock.around(LiveView, "draw", "show_picture")
    clock.around(FlowTrainer, "train", "train")
    with tempfile.TemporaryDirectory() as folder:
        source = settings["dataset"].partition("-")[0]
        config = TrainingConfig(**settings, device="cpu", data_dir=f"{folder}/datasets", checkpoint_dir=f"{folder}/runs")
        if source == "embeddings":
            data = FlowDataset.from_tensor(torch.randn(20_000, 384, generator=torch.Generator().manual_seed(0))), None
        else:
            prepare_dataset(source, config.data_dir)
            data = data_sets(config)
        set_seed(config.seed)
        model = create_model(config.arch, data[0].data_shape, **config.arch_options)
        trainer = FlowTrainer(model, config, *data, wandb_project=None, callbacks=[DrawSamples(every=10)])
        if not isinstance(trainer.callbacks[0], LiveView): raise RuntimeError("there is no live view outside a notebook")
        trainer.train()
    spent, times = clock.seconds["wall"], clock.calls
    return {"seconds": spent.total(), "share": 1 - spent["train"] / spent.total(), "changes": times["show"],
            "change": spent["show"] / times["show"], "pictures": times["draw"], "picture": spent["draw"] / times["draw"]}


def in_a_notebook(workload):
    """What `measure` returns in a kernel of its own."""
    source = f"import json\nfrom view import measure\nresult = measure({workload!r})\nprint('measured', json.dumps(result))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, kernel_name="python3", timeout=1200, resources={"metadata": {"path": Path(__file__).parent}}).execute()
    words = "".join(output.text for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    return json.loads(words.partition("measured ")[2])


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    workloads = [options.workload] if options.workload else list(WORKLOADS)
    results = [(workload, in_a_notebook(workload)) for _ in range(options.repeats) for workload in workloads]
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for workload in workloads:
        runs = [result for name, result in results if name == workload]
        middle = {name: median(run[name] for run in runs) for name in runs[0]}
        report[workload] = {"machine": machine(), "median": middle, "runs": runs}
        print(f"{workload:16}{middle['seconds']:6.1f} s{middle['share']:8.2%}: {middle['changes']:.0f} changes of "
              f"{1000 * middle['change']:.1f} ms, {middle['pictures']:.0f} pictures of {1000 * middle['picture']:.0f} ms")
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
