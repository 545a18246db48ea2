"""A published table, run again: `make reproduce`, or `python benchmarks/c2ot.py [otcfm ...] [--seeds 0 1 2]`.

Cheng and Schwing (C2OT, arXiv 2503.10636) carry 8gaussians to moons and measure the exact W₂² between 10,000 samples and 10,000 fresh
points of the data, after one step of Euler's method and with dopri5 at tolerances of 1e-4: mean and deviation of ten seeds. The protocol
below is that of their code: network, optimiser, batches and scoring. Each run is an ordinary `FlowTrainer`, kept in checkpoints/c2ot/,
so a run that is stopped goes on where it was; each finished seed is added to results/c2ot.json, and what is there is not run again.
Several processes may share the work: give them different seeds.

Beside the protocol stand runs whose weights and rate come to rest (`-averaged`), and one with the points in the order of that code
(`icfm-in-order`): nbs/tutorials/07_a_published_table.ipynb says why.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from filelock import FileLock
from saving import machine
from torch import nn

from flowbook.config import TrainingConfig, atomic_path
from flowbook.data import prepare_dataset
from flowbook.pictures import duration
from flowbook.flows import FLOWS
from flowbook.metrics import wasserstein2_squared
from flowbook.nets import create_model, register_model
from flowbook.randomness import set_seed
from flowbook.sampling import load_flow
from flowbook.sources import SAMPLERS
from flowbook.trainer import FlowTrainer

RESULTS = Path(__file__).with_name("results") / "c2ot.json"
RUNS = Path(__file__).parents[1] / "checkpoints" / "c2ot"
PROTOCOL = dict(arch="c2ot", source="8gaussians", dataset="moons-endless", batch_size=256, lr=3e-4, weight_decay=0.0, warmup_steps=0,
                schedule="constant", ema_decay=0.0, grad_clip=0.0, patience=0, log_every=100)
EPOCH, STEPS, POINTS = 1000, 20_000, 10_000
# Weights averaged over about the last thousand steps, and a rate that begins higher and falls to nothing
AVERAGED = {"ema_decay": 0.999, "schedule": "cosine", "lr": 1e-3}
BY_BATCH = {"flow": "otcfm", "flow_options": {"ot_batch_size": 1024}}      # 1,024 pairs matched exactly, cut into four batches
BY_SET = {"flow": "semidiscrete"}       # To 10,000 points, drawn once; the validation loss still asks about others
METHODS = {
    "icfm": {"flow": "icfm"},
    "icfm-in-order": {"flow": "icfm"},
    "otcfm": BY_BATCH,
    "otcfm-averaged": BY_BATCH | AVERAGED,
    "semidiscrete": BY_SET,
    "semidiscrete-averaged": BY_SET | AVERAGED,
}
SOLVERS = {"euler-1": {"method": "euler", "steps": 1}, "dopri5": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}}


class ResidualBlock(nn.Sequential):
    """x + W₂ GELU(W₁ x), four times as wide inside."""
    def __init__(self, width):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x): return x + super().forward(x)


class ResidualNetwork(nn.Module):
    """The network of the paper's code: 396 thousand parameters in all."""
    def __init__(self, data_shape, width=128, depth=3):
        super().__init__()
        self.of_x, self.of_t = nn.Linear(*data_shape, width), nn.Linear(1, width)
        self.rest = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)), nn.Linear(width, *data_shape))

    def forward(self, x, t, cond=None): return self.rest(self.of_x(x) + self.of_t(t[:, None]))


def batch_in_order(trainer, step):
    """A batch as the paper's code cuts it for FM: one quarter of 1,024 points, which come in order along the arcs."""
    return SAMPLERS["moons"](1024, trainer.randomness.generator("data", step // 4)).split(256)[step % 4]


register_model("c2ot", ResidualNetwork)


def run(method, seed, folder, steps=STEPS, points=POINTS):
    """Train, or go on training, one seed of a method, and score what it has come to; returns a row of the table."""
    torch.set_num_threads(1)
    prepare_dataset("moons", folder / "datasets", normalize=False)
    options = PROTOCOL | METHODS.get(method, {"flow": method})
    config = TrainingConfig(**options, seed=seed, epochs=steps // EPOCH, steps_per_epoch=EPOCH, data_dir=str(folder / "datasets"),
                            checkpoint_dir=str(folder / f"{steps}-steps" / method))
    set_seed(seed)
    trainer = FlowTrainer(create_model("c2ot", (2,)), config, wandb_project=None, resume_path="auto")
    if method == "icfm-in-order": trainer.loader.batch = partial(batch_in_order, trainer)
    trainer.train()
    start = time.perf_counter()
    row = {"method": method, "seed": seed, "steps": steps, "points": points, "w2_squared": score(trainer.folder / "last.pt", seed, points),
           "train_seconds": round(trainer.seconds, 1), "score_seconds": round(time.perf_counter() - start, 1), "options": options}
    return row | {"machine": machine() | {"device": str(trainer.device)}}


def score(checkpoint, seed, points):
    """W₂² to fresh points of the data for each solver; the points are those of the seed, the same for all methods."""
    flow, generator = load_flow(checkpoint, device="cpu"), torch.Generator()
    data = SAMPLERS["moons"](points, generator.manual_seed(10_000 + seed))
    return {name: wasserstein2_squared(flow.sample(points, **solver, generator=generator.manual_seed(20_000 + seed)), data)
            for name, solver in SOLVERS.items()}


def add(row, path):
    """Put a row into the table on the disk, where another process may be adding one as well."""
    with FileLock(f"{path}.lock"):
        rows = [other for other in read(path) if key_of(other) != key_of(row)] + [row]
        rows.sort(key=key_of)
        with atomic_path(path) as temporary: temporary.write_text(json.dumps(rows, indent=1) + "\n")


def read(path): return json.loads(path.read_text()) if path.exists() else []


def key_of(row): return row["method"], row["steps"], row["points"], row["seed"]


def summary(rows):
    """The table: mean ± deviation over seeds."""
    lines = [f"{'method':24}{'seeds':>6}" + "".join(f"{name:>20}" for name in SOLVERS)]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row["w2_squared"] for row in rows if row["method"] == method]
        columns = [[scores[name] for scores in found] for name in SOLVERS]
        shown = [f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}" for values in columns]
        lines.append(f"{method:24}{len(found):>6}" + "".join(f"{text:>20}" for text in shown))
    return "\n".join(lines)


def main():
    """Run what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(METHODS), help=f"of {', '.join(METHODS)}, or another flow; default: these")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="default: 0 to 9")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a multiple of {EPOCH:,}; default: {STEPS:,}")
    parser.add_argument("--points", type=int, default=POINTS, help=f"to score with; default: {POINTS:,}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file that rows are added to")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where the runs are kept")
    options = parser.parse_args()
    for method in options.methods:
        if method not in METHODS and method not in FLOWS: parser.error(f"there is no method {method!r}")
    if options.steps < EPOCH or options.steps % EPOCH: parser.error(f"--steps {options.steps}: it must be a multiple of {EPOCH:,}")
    wanted = [(method, options.steps, options.points, seed) for seed in options.seeds for method in options.methods]
    start, done = time.monotonic(), 0
    for number, (method, steps, points, seed) in enumerate(wanted, 1):
        if (method, steps, points, seed) in map(key_of, read(options.results)): continue
        print(f"{method}, seed {seed}: {number} of {len(wanted)}", flush=True)
        row = run(method, seed, options.folder, steps, points)
        add(row, options.results)
        done, missing = done + 1, sum(key not in map(key_of, read(options.results)) for key in wanted)
        print(", ".join(f"{name} {value:.3f}" for name, value in row["w2_squared"].items()),
              f"in {duration(row['train_seconds'] + row['score_seconds'])}; at this pace "
              f"{duration((time.monotonic() - start) / done * missing)} for the {missing} that are missing", flush=True)
    print(summary([row for row in read(options.results) if key_of(row) in wanted]))


if __name__ == "__main__":
    main()
