"""What pairing costs and buys: `python benchmarks/pairing.py [--rounds 30]`.

Three couplings pair noise with the same data: exact optimal transport within 256 and within 1,024 points, and semidiscrete transport to
all training points. Measured are the transport cost, which is the mean squared length of the ways in normalised units, beside that of
chance; and the time to pair 256 points (a quarter of that for 1,024), in rounds in which the couplings take turns, as a ratio to the first
one in the same round. The time of the fit stands alone. Then the solver: the time of `assignment` beside that of scipy's
`linear_sum_assignment` alone on the same points. One PyTorch thread. Printed are medians; results/pairing.json has machine and versions
as well.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, stdev

import torch
from saving import machine
from scipy.optimize import linear_sum_assignment

from flowbook.couplings import OptimalTransportCoupling, alignment, assignment
from flowbook.data import FlowDataset, prepare_dataset
from flowbook.flow_matching import GaussianSource, IndependentCoupling
from flowbook.semidiscrete import SemidiscreteCoupling
from flowbook.sources import eight_gaussians, moons

RESULTS = Path(__file__).with_name("results") / "pairing.json"
WORKLOADS = {"digits": ("digits", "1k", None), "moons": ("moons", "all", 14_286)}   # 1,000 of 64 numbers; 10,001 of 2
SOLVED = {"8gaussians to moons": (256, 1024, 2048), "64": (128, 256, 1024), "384": (256, 1024)}    # A number: dimensions, noise to noise


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


def solve(kind, n, rounds):
    """Milliseconds of scipy's solver alone, and the ratio of ours to it."""
    generator, alone, ratios = torch.Generator().manual_seed(2), [], []
    for number in range(-1, rounds):
        if kind.isdigit(): x0, x1 = torch.randn(2, n, int(kind), generator=generator)
        else: x0, x1 = eight_gaussians(n, generator), moons(n, generator)
        products = alignment(x0, x1).numpy()
        start = time.perf_counter()
        theirs = linear_sum_assignment(products, maximize=True)[1]
        between = time.perf_counter()
        ours = assignment(products)
        end = time.perf_counter()
        if (ours != theirs).any(): raise RuntimeError(f"{kind}, {n} points: the pairings differ")
        if number >= 0:
            alone.append(1000 * (between - start))
            ratios.append((end - between) / (between - start))
    return {"milliseconds_of_scipy": median(alone), "time_to_scipy": median(ratios), "least": min(ratios), "most": max(ratios)}


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
    solver = {f"{kind}, {n}": solve(kind, n, rounds) for kind, sizes in SOLVED.items() for n in sizes}
    print(f"\n{'':28}ms, scipy alone   assignment / scipy")
    for name, its in solver.items():
        print(f"{name:28}{its['milliseconds_of_scipy']:15.2f}{its['time_to_scipy']:12.2f} ({its['least']:.2f} to {its['most']:.2f})")
    RESULTS.write_text(json.dumps({**machine(), "rounds": rounds, "workloads": workloads, "assignment": solver}, indent=2) + "\n")


if __name__ == "__main__":
    main()
