"""The metrics against closed forms and other libraries, and `evaluate` on flows of known quality."""

import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import energy_distance as scipy_energy_distance
from torch import nn

import flowbook.evaluation
from flowbook.data import NormalizationStats
from flowbook.evaluation import EVALUATED_SAMPLERS, evaluate, evaluation_table, memorization
from flowbook.metrics import (c2st, energy_distance, nearest_neighbour_accuracy, normalized_path_energy, path_energy, sliced_wasserstein,
                              straightness, wasserstein2, wasserstein2_squared)
from flowbook.sampling import TrainedFlow

DISTANCES = [sliced_wasserstein, wasserstein2, wasserstein2_squared, energy_distance, nearest_neighbour_accuracy, c2st]


def normal(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Distances


@pytest.mark.parametrize("seed", range(5))
def test_w2_is_the_best_assignment_of_scipy_and_its_square_is_the_other_function(seed):
    x, y = normal(60, 3, seed=seed), 2 + 3 * normal(60, 3, seed=seed + 100)
    costs = (x[:, None] - y).square().sum(2)
    best = costs[linear_sum_assignment(costs)].mean().item()
    assert wasserstein2_squared(x, y) == pytest.approx(best, rel=1e-9), f"seed {seed}"
    assert wasserstein2(x, y) == pytest.approx(math.sqrt(best), rel=1e-9), f"seed {seed}"


def test_w2_between_large_gaussian_sets_is_near_the_closed_form():
    x, y = normal(1500, 2), torch.tensor([3.0, -1.0]) + torch.tensor([2.0, 0.5]) * normal(1500, 2, seed=1)
    assert wasserstein2_squared(x, y) == pytest.approx(9 + 1 + 1 + 0.25, rel=0.05)    # |m|² + Σ (1 - s)²


def test_a_transport_that_was_not_found_is_refused(monkeypatch):
    import ot

    exact = ot.emd2
    monkeypatch.setattr(ot, "emd2", lambda *args, **options: exact(*args, **options | {"numItermax": 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="exact transport between 50 points was not found"):
            wasserstein2(normal(50, 2), normal(50, 2, seed=1))


def test_energy_distance_is_the_square_of_scipys_and_not_changed_by_the_parts_it_is_summed_in():
    x, y = normal(2300, 1), 1 + 2 * normal(2300, 1, seed=1)
    assert energy_distance(x, y) == pytest.approx(scipy_energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance_takes_images_of_any_float_type_and_refuses_what_is_not_finite(distance):
    x, y = normal(20, 1, 3, 3, dtype=torch.float32), normal(20, 1, 3, 3, seed=1, dtype=torch.float32)
    assert type(distance(x, y)) is float
    assert distance(x, y) == pytest.approx(distance(x.flatten(1).double(), y.flatten(1).double()), rel=1e-6)
    x[3, 0, 1, 1] = torch.inf
    with pytest.raises(ValueError, match="1 of 20 points hold numbers that are infinite"):
        distance(x, y)


# The learned judge


def test_c2st_knows_equal_from_different_and_does_not_mind_the_order():
    x, y = normal(150, 3), normal(150, 3, seed=1)
    assert abs(c2st(x, y) - 0.5) < 0.1
    assert c2st(x, y + 10) == 1
    assert abs(c2st(x, 3 * y) - c2st(3 * y, x)) < 0.05
    assert c2st(x, 3 * y) > 0.75        # the means agree: no straight cut could tell
    units, zero = torch.tensor([1e-3, 1.0, 1e5]), torch.tensor([0.0, 1e3, -1e5])
    assert c2st(units * x + zero, units * 3 * y + zero) == pytest.approx(c2st(x, 3 * y), abs=0.02)


def test_c2st_is_decided_by_its_seed_and_leaves_every_global_generator_alone():
    x, y = normal(100, 2), 0.5 + normal(100, 2, seed=1)
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    before = np.random.get_state(), torch.get_rng_state(), random.getstate()
    first, again, other = c2st(x, y), c2st(x, y), c2st(x, y, seed=1)
    after = np.random.get_state(), torch.get_rng_state(), random.getstate()
    assert first == again != other
    assert (after[0][1] == before[0][1]).all() and after[0][2:] == before[0][2:]
    assert torch.equal(after[1], before[1]) and after[2] == before[2]
    np.random.seed(2)
    torch.manual_seed(2)
    assert c2st(x, y) == first


def test_a_constant_feature_changes_nothing_for_c2st_and_nothing_is_warned_of():
    x, y = normal(150, 2), 1 + normal(150, 2, seed=1)
    with_constant = [torch.cat([points, torch.full((150, 1), 0.1)], 1) for points in (x, y)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(c2st(*with_constant) - c2st(x, y)) < 0.07
        assert c2st(torch.zeros(10, 2), torch.zeros(10, 2)) == 0.5


# Ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_of_a_way_are_those_of_the_closed_form(dtype):
    t = torch.linspace(0, 1, 501, dtype=dtype)
    start = normal(50, 1, 2, 2).to(dtype)
    step = torch.full((1, 2, 2), 1.5, dtype=dtype)
    length = 4 * 1.5**2
    x = start + (t**2)[:, None, None, None, None] * step                # dx/dt = 2t·c
    assert path_energy(t, x) == pytest.approx(4 / 3 * length, rel=1e-4)
    assert straightness(t, x) == pytest.approx(length / 3, rel=1e-4)
    assert normalized_path_energy(t, x) == pytest.approx(1 / 3, rel=1e-3)


def test_the_way_of_the_exact_gaussian_flow_has_the_energy_of_the_integral():
    m, s = 2.0, 0.5                     # independent pairs from N(0, 1) to N(m, s²): x(t) = t·m + σ(t)·x0
    t = torch.linspace(0, 1, 2001, dtype=torch.double)
    width = ((1 - t) ** 2 + (t * s) ** 2).sqrt()
    x0 = normal(100, 1)
    x0 = (x0 - x0.mean()) / x0.std(correction=0)
    slope = (t * s**2 - (1 - t)) / width
    energy = m**2 + torch.trapezoid(slope**2, t).item()
    least = m**2 + (1 - s) ** 2
    x = t[:, None, None] * m + width[:, None, None] * x0
    assert path_energy(t, x) == pytest.approx(energy, rel=1e-5)
    assert straightness(t, x) == pytest.approx(energy - least, rel=1e-4)
    assert normalized_path_energy(t, x) == pytest.approx((energy - least) / least, rel=1e-4)


def test_a_way_backwards_or_by_a_clock_that_stops_early_or_looks_unevenly_is_the_same_way():
    t = torch.tensor([0, 0.1, 0.15, 0.4, 0.8, 1.0], dtype=torch.double)
    x = normal(6, 30, 2)
    for measure in (path_energy, straightness, normalized_path_energy):
        assert measure(t.flip(0), x.flip(0)) == pytest.approx(measure(t, x))
        assert measure(0.001 + 0.998 * t, x) == pytest.approx(measure(t, x))
    assert path_energy(t, x) == pytest.approx(((x.diff(dim=0) ** 2).sum(2).mean(1) / t.diff()).sum().item())


def test_the_paper_normalises_by_the_data_and_the_two_agree_for_many_points_in_the_plane_only():
    start, data = normal(2000, 2), normal(2000, 2, seed=1) + 3
    t = torch.linspace(0, 1, 201)
    x = start + (t**2)[:, None, None] * 3           # to the right place, and a third too dear
    assert normalized_path_energy(t, x) == pytest.approx(1 / 3, abs=1e-3)
    assert normalized_path_energy(t, x, data) == pytest.approx(1 / 3, abs=0.03)
    start, data = normal(100, 64), normal(100, 64, seed=1) + 0.5
    x = torch.stack([start, start + 0.5])           # the best way there is, and few points in many dimensions
    assert normalized_path_energy(t[[0, -1]], x) < 1e-9
    assert normalized_path_energy(t[[0, -1]], x, data) == pytest.approx(1 - 16 / wasserstein2_squared(start, data))


# Copies


def test_copies_are_counted_exactly_and_in_parts_too_small_for_all_distances():
    train, new = normal(12_000, 6, dtype=torch.float32), normal(3000, 6, seed=1, dtype=torch.float32)
    samples = torch.where(torch.arange(3000)[:, None] < 600, train[:3000], new)
    found = memorization(samples, train, new)
    assert found["copies"]["samples"] - 0.8 * memorization(new[600:], train, new)["copies"]["samples"] == pytest.approx(0.2)
    assert memorization(train[:50], train, new)["distance"]["samples"] == 0
    near = torch.cdist(new.double(), train.double(), compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False).values
    assert found["distance"]["test"] == pytest.approx(near[:, 0].median().item())
    assert found["copies"]["test"] == (near[:, 0] <= near[:, 1] / 3).double().mean().item()


def test_a_copy_of_a_training_point_that_is_there_twice_is_a_copy():
    train = normal(100, 5).repeat(2, 1)
    assert memorization(train[:40], train, normal(40, 5, seed=1))["copies"] == {"samples": 1, "test": 0}


# All of it


class ToGaussian(nn.Module):
    """Every point straight and steadily to m + s·x0: the best way there is."""

    def __init__(self, m, s):
        super().__init__()
        self.m, self.s = nn.Parameter(torch.tensor(m)), s

    def forward(self, x, t, cond=None):
        t = t[:, None]
        return self.m + (self.s - 1) * (x - t * self.m) / (1 + t * (self.s - 1))


STATS = NormalizationStats(mean=torch.tensor([5.0, -5.0]), std=torch.tensor([4.0, 4.0]))


def points_of(n, seed, m=1.0, s=0.5):
    return STATS.denormalize(m + s * normal(n, 2, seed=seed, dtype=torch.float32))


@pytest.fixture(scope="module")
def judged():
    flow = TrainedFlow(ToGaussian(1.0, 0.5), STATS)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    results = evaluate(flow, points_of(400, seed=1), points_of(120, seed=2))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    return results


def test_a_perfect_flow_is_as_good_as_training_points_by_any_sampler(judged):
    assert list(judged["samplers"]) == list(EVALUATED_SAMPLERS) and judged["points"] == 120
    assert [result["evaluations"] for result in judged["samplers"].values()][:5] == [1, 2, 4, 8, 100]
    baseline = judged["baseline"]
    for result in judged["samplers"].values():
        assert result["w2"] < 1.5 * baseline["w2"] and result["w2"] ** 2 == pytest.approx(result["w2_squared"])
        assert abs(result["c2st"] - 0.5) < 0.12 and abs(result["nearest_neighbour_accuracy"] - 0.5) < 0.12
    first, last = judged["samplers"]["euler-1"], judged["samplers"]["dopri5"]
    assert first["w2"] == pytest.approx(last["w2"], rel=1e-3), "straight ways, the same noise: one step is as good as any number"


def test_ways_are_measured_in_normalised_units_and_likelihood_in_those_of_the_data(judged):
    ways = judged["trajectories"]
    assert ways["points"] == 120 and ways["straightness"] < 1e-3 and ways["excess"]["normalized_path_energy"] < 1e-3
    assert ways["path_energy"] == pytest.approx(2 * (1 + 0.25), rel=0.15)       # |m|² + (1 - s)², each for two features
    density = torch.distributions.Normal(STATS.denormalize(torch.ones(2)), 4 * 0.5)
    nats = density.log_prob(points_of(120, seed=2)).sum(1).mean().item()
    assert judged["log_likelihood"]["nats"] == pytest.approx(nats, abs=1e-3)
    assert judged["log_likelihood"]["bits_per_dimension"] == pytest.approx(-nats / 2 / math.log(2), abs=1e-3)


def test_results_are_plain_decided_by_the_seed_and_shown_whole(judged):
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    few = {"euler-1": EVALUATED_SAMPLERS["euler-1"]}
    flow, train, test = TrainedFlow(ToGaussian(1.0, 0.5), STATS), points_of(400, seed=1), points_of(120, seed=2)
    first, again, other = (evaluate(flow, train, test, few, most=50, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["points"] == 50
    assert first["baseline"]["w2"] != other["baseline"]["w2"] and first["samplers"]["euler-1"]["w2"] != other["samplers"]["euler-1"]["w2"]
    table = evaluation_table(judged)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6 + 1 and len({row.count("|") for row in rows}) == 1
    assert f"{judged['baseline']['w2_squared']:.4g}" in rows[-1] and f"{judged['log_likelihood']['nats']:.4g} ±" in table


class StandIn:
    """What `evaluate` asks of a flow, and nothing else; it draws the training points and knows no density."""

    data_shape, evaluations, stats = (2,), 3, STATS

    def __init__(self, train):
        self.train = train

    def sample(self, n, method="dopri5", steps=None, generator=None):
        if method == "euler":
            raise ValueError("no euler here")
        if method == "midpoint":
            raise AssertionError("underflow in dt 0.0: much more: that nobody reads")
        return self.train[:n] * (torch.nan if steps == 2 else 1)

    def trajectories(self, n, generator=None):
        x0 = self.sample(n)
        return type("Trajectories", (), dict(t=torch.tensor([0.0, 0.5, 1.0]), x=torch.stack([x0, x0 + 8, x0]), evaluations=3))

    def log_prob(self, x, exact=None, generator=None):
        assert exact, "two features are few enough"
        raise ValueError("no density: it lies on a sphere")


def test_what_can_not_be_measured_says_why_and_the_rest_is_there():
    train, test = points_of(100, seed=1), points_of(60, seed=2)
    samplers = {"euler": {"method": "euler"}, "midpoint": {"method": "midpoint"}, "nan": {"steps": 2}, "copies": {}}
    results = evaluate(StandIn(train), train, test, samplers)
    assert results["samplers"]["euler"] == {"why_not": "no euler here"}
    assert results["samplers"]["midpoint"] == {"why_not": "the solver gave up: underflow in dt 0.0"}
    assert results["samplers"]["nan"]["evaluations"] == 3 and "60 of 60 points hold" in results["samplers"]["nan"]["why_not"]
    assert results["memorization"]["copies"]["samples"] == 1 and results["memorization"]["distance"]["samples"] == 0
    ways = results["trajectories"]
    assert ways["path_energy"] == pytest.approx(2 * 16) and "end where they began" in ways["excess"]["why_not"]     # 8 / 4, there and back
    assert results["log_likelihood"] == {"why_not": "no density: it lies on a sphere"}
    table = evaluation_table(results)
    for reason in ("no euler here", "underflow", "60 of 60", "end where they began", "on a sphere"):
        assert reason in table
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    nothing = evaluate(StandIn(train), train, test, {"euler": {"method": "euler"}})
    assert nothing["memorization"] == {"why_not": "no euler here"} and "no euler here" in evaluation_table(nothing)


def test_a_feature_that_never_varies_in_training_is_not_blown_up_for_c2st():
    train, test = points_of(200, seed=1), points_of(100, seed=2)
    train[:, 1], test[:, 1] = 3, 3

    class WithSpecks(StandIn):
        def sample(self, n, generator=None):
            return points_of(n, seed=3) * torch.tensor([1, 0]) + torch.stack([torch.zeros(n), 3 + 1e-6 * normal(n, seed=4)], 1)

    result = evaluate(WithSpecks(train), train, test, {"specks": {}})["samplers"]["specks"]
    assert abs(result["c2st"] - 0.5) < 0.12


def test_points_that_can_not_be_compared_are_refused(monkeypatch):
    train, test = points_of(100, seed=1), points_of(60, seed=2)
    monkeypatch.setattr(flowbook.evaluation, "_distances", lambda *_: pytest.fail("it began to measure"))
    for message, call in {
        r"test has shape \(60, 1\): it must be \(n, 2\)": (train, test[:, :1]),
        "3 points can't be compared": (train[:3], test),
        "all training points are the same": (train[:1].repeat(50, 1), test),
        "there is no sampler to judge": (train, test, {}),
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate(StandIn(train), *call)
