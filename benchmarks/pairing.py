"""What pairing costs and buys: `python benchmarks/pairing.py [--rounds 30]`.

Three couplings pair noise with the same data: exact optimal transport within 256 and within 1,024 points, and semidiscrete transport to
all training points. Measured are the transport cost, which is the mean squared length of the ways in normalised units, beside that of
chance; and the time to pair 256 points (a quarter of that for 1,024), in rounds in which the couplings take turns, as a ratio to the first
one in the same round. The time of the fit stands alone. One PyTorch thread. Printed are medians; results/pairing.json has machine and
versions as well.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, stdev

import torch
from saving import machine

from flowbook.couplings import OptimalTransportCoupling
from flowbook.data import FlowDataset, prepare_dataset
from flowbook.flow_matching import GaussianSource, IndependentCoupling
from flowbook.semidiscrete import SemidiscreteCoupling

RESULTS = Path(__file__).with_name("results") / "pairing.json"
WORKLOADS = {"digits": ("digits", "1k", None), "moons": ("moons", "all", 14_286)}   # 1,000 of 64 numbers; 10,001 of 2


def couplings(dataset):
    """Name → (coupling, how many points it pairs at a time), and what the fit cost and found."""
    semidiscrete = SemidiscreteCoupling()
    start = time.perf_counter()
    semidiscrete.use(dataset, semidiscrete.fit(dataset, GaussianSource(), 0, "cpu", False), "cpu")
    seconds = time.perf_counter() - start
    return ({"otcfm, 256": (OptimalTransportCoupling(), 256), "otcfm, 1024": (OptimalTransportCoupling(), 1024),
             "semidiscrete": (semidiscrete, 256), "chance": (IndependentCoupling(), 256)},
            {"fit_seconds": round(seconds, 1), **semidiscrete.convergence})


def measure(workload, rounds):
    """Cost and time of every coupling on one data set."""
    torch.set_num_threads(1)
    name, size, points = WORKLOADS[workload]
    with tempfile.TemporaryDirectory() as folder:
        prepare_dataset(name, folder, points=points)
        dataset = FlowDataset(folder, name, size)
    contenders, fit = couplings(dataset)
    generator, costs, times = torch.Generator().manual_seed(1), {}, {}
    for number in range(-2, rounds):        # two to warm up
        for name, (coupling, n) in contenders.items():
            x1 = dataset.tensor[torch.randperm(len(dataset), generator=generator)[:min(n, len(dataset))]]
            x0 = torch.randn(x1.shape, generator=generator)
            start = time.perf_counter()
            x0, x1, _ = coupling.pair(x0, x1, generator)
            seconds = (time.perf_counter() - start) * 256 / len(x0)
            if number >= 0:
                costs.setdefault(name, []).append((x0 - x1).square().flatten(1).sum(1).mean().item())
                times.setdefault(name, []).append(seconds)
    first = times["otcfm, 256"]
    return {"points": len(dataset), "data_shape": list(dataset.data_shape), "fit": fit, "couplings": {name: {
        "transport_cost": sum(costs[name]) / rounds, "standard_error": stdev(costs[name]) / rounds**0.5,
        "milliseconds_for_256": 1000 * median(times[name]),
        "time_to_first": median(mine / theirs for mine, theirs in zip(times[name], first, strict=True))} for name in contenders}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    workloads = {name: measure(name, rounds) for name in WORKLOADS}
    for name, result in workloads.items():
        print(f"\n{name}: {result['points']:,} points of shape {tuple(result['data_shape'])}, fitted in {result['fit']['fit_seconds']} s, "
              f"χ² {result['fit']['chi2']:.4f}\n{'':15}transport cost       ms for 256 points   time / otcfm, 256")
        for coupling, its in result["couplings"].items():
            print(f"{coupling:15}{its['transport_cost']:8.3f} ± {its['standard_error']:.3f}{its['milliseconds_for_256']:16.2f}"
                  f"{its['time_to_first']:20.3f}")
    RESULTS.write_text(json.dumps({**machine(), "rounds": rounds, "workloads": workloads}, indent=2) + "\n")


if __name__ == "__main__":
    main()
