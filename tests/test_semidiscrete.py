"""Semidiscrete transport: the shares are even, the ways are the shortest, and the same seed finds the same."""

import ot
import pytest
import torch
from scipy.stats import norm

from flowbook.couplings import OptimalTransportCoupling
from flowbook.data import FlowDataset, NormalizationStats
from flowbook.flow_matching import GaussianSource, create_source
from flowbook.semidiscrete import SemidiscreteCoupling, centred_columns, chi_squared, lowest
from flowbook.sources import SAMPLERS


def generator(seed):
    return torch.Generator().manual_seed(seed)


def data_set(points):
    """As they are, so that distances are those of the points."""
    return FlowDataset.from_tensor(points, NormalizationStats.identity(tuple(points.shape[1:])))


def fitted(dataset, source=None, seed=0, **options):
    coupling = SemidiscreteCoupling(**options)
    coupling.use(dataset, coupling.fit(dataset, source or GaussianSource(), seed, "cpu", False), "cpu")
    return coupling


def shares(coupling, dataset, n=200_000, source=None):
    noise = (source or GaussianSource()).like(dataset.tensor[:1].expand(n, *dataset.data_shape), generator(9))
    index = coupling.pair(noise, None, generator(8))[2]
    return torch.bincount(index, minlength=len(dataset)) / n


# ---- closed forms

@pytest.mark.parametrize("n", [2, 5])
def test_on_a_line_the_borders_are_quantiles(n):
    points = torch.linspace(-3, 2, n)[torch.randperm(n, generator=generator(0))][:, None]
    coupling, noise = fitted(data_set(points), fit_chi2=1e-4), torch.linspace(-4, 4, 80_001)[:, None]
    partners = coupling.pair(noise)[1].squeeze(1)
    assert (partners.diff() >= 0).all()         # in one dimension the best plan keeps the order
    borders = noise[1:][partners.diff() > 0].squeeze(1)
    assert torch.allclose(borders.double(), torch.tensor(norm.ppf([k / n for k in range(1, n)])), atol=0.03)


def test_two_points_share_the_noise_by_a_plane_through_its_middle():
    points = torch.tensor([[1.0, 4.0, 0.0], [-2.0, 0.0, 1.0]])
    coupling = fitted(data_set(points), fit_chi2=1e-4)
    noise = torch.randn(20_000, 3, generator=generator(1))
    side = noise @ (points[0] - points[1])
    clear = side.abs() > 0.1
    assert torch.equal(coupling.pair(noise)[2][clear] == 0, side[clear] > 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_potentials_bound_the_cost_of_the_best_plan_from_below_and_closely(seed):
    """POT's plan from 4,000 noise points to 40 data points: no potentials can do better, and the fitted ones nearly do as well."""
    draw = generator(seed)
    points = torch.randn(40, 3, generator=draw) * torch.tensor([3.0, 1.0, 0.3]) + 1
    dataset, noise = data_set(points), torch.randn(4000, 3, generator=draw).double()
    potentials = SemidiscreteCoupling(fit_chi2=1e-3).fit(dataset, GaussianSource(), seed, "cpu", False)["potentials"]
    costs = torch.cdist(noise, points.double()).square()
    bound, best = (costs - potentials).amin(1).mean() + potentials.mean(), ot.emd2([], [], costs.numpy(), numItermax=10**7)
    assert 0.99 * best < bound <= best


# ---- even shares

@pytest.mark.parametrize("source", ["gaussian", "8gaussians"])
def test_every_point_gets_its_share_and_ways_are_shorter_than_within_batches(source):
    points = SAMPLERS["moons"](300, generator(0))
    dataset = FlowDataset.from_tensor(points)
    begin = create_source(source, dataset.stats)
    coupling = fitted(dataset, begin)
    found = shares(coupling, dataset, source=begin)
    assert (300 * found.square().sum() - 1) < 0.05
    assert coupling.convergence["chi2"] < 0.05
    draw, within, whole = generator(4), 0, 0
    for _ in range(20):
        x0, x1 = begin.like(dataset.tensor[:64], draw), dataset.tensor[torch.randperm(300, generator=draw)[:64]]
        within += (x0 - OptimalTransportCoupling().pair(x0, x1)[1]).square().sum()
        whole += (x0 - coupling.pair(x0)[1]).square().sum()
    assert whole < 0.95 * within


@pytest.mark.parametrize("stats", ["identity", "normalised"])
def test_heaps_far_from_each_other_get_their_halves_and_each_point_its_share(stats):
    """Between them there is no noise that small steps could move: it takes large ones, while there are few points."""
    points = 0.1 * torch.randn(300, 2, generator=generator(0)) + torch.tensor([[0.0, 0.0], [20.0, 0.0]]).repeat_interleave(150, 0)
    dataset = data_set(points) if stats == "identity" else FlowDataset.from_tensor(points)
    coupling = fitted(dataset)
    found = shares(coupling, dataset)
    assert coupling.convergence["chi2"] < 0.02 and abs(found[:150].sum() - 0.5) < 0.005
    assert 300 * found.square().sum() - 1 < 0.02 + 300 / 200_000


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dimension", [2, 5])
def test_points_far_out_are_reached(dimension, seed):
    """Heavy tails: the farthest is a hundred times as far out as the middle one. Steps that only shrink never get there."""
    draw = generator(seed)
    points = torch.randn(200, dimension, generator=draw) / torch.rand(200, 1, generator=draw)
    dataset = FlowDataset.from_tensor(points)
    coupling = fitted(dataset, seed=seed)
    assert coupling.convergence["chi2"] < 0.1 and shares(coupling, dataset).max() < 2 / 200


@pytest.mark.parametrize("goal", [0.1, 0.01, 0.001])
def test_it_stops_where_it_is_asked_to(goal):
    coupling = fitted(FlowDataset.from_tensor(SAMPLERS["8gaussians"](200, generator(0))), fit_chi2=goal, fit_steps=50_000)
    assert coupling.convergence["chi2"] < 1.5 * goal


def test_equal_points_share_what_their_place_gets():
    place = torch.tensor([[0.0, 2.0], [3.0, 0.0], [-1.0, -1.0]])
    dataset = data_set(place[[0, 1, 1, 1, 2]])
    found = shares(fitted(dataset, fit_chi2=1e-4), dataset)
    assert torch.allclose(found, torch.full((5,), 0.2), atol=0.01)


def test_one_point_gets_all_and_images_and_doubles_are_points():
    dataset = data_set(torch.ones(1, 2))
    assert torch.equal(fitted(dataset).pair(torch.randn(5, 2))[1], torch.ones(5, 2))
    images = data_set(torch.randn(20, 1, 4, 4, generator=generator(0)))
    x0, x1, index = fitted(images).pair(torch.randn(6, 1, 4, 4, dtype=torch.double, generator=generator(1)))
    assert x1.shape == (6, 1, 4, 4) and x1.dtype == torch.double and torch.equal(x1.float(), images.tensor[index])


# ---- the figure of convergence

def test_chi_squared_is_right_on_average_whatever_the_number_of_draws():
    weights = torch.full((50,), 1 / 50, dtype=torch.double)
    shares = torch.softmax(0.3 * torch.randn(50, generator=generator(0), dtype=torch.double), 0)
    truth = 50 * shares.square().sum() - 1
    for draws in (20, 500):
        rows = torch.multinomial(shares.expand(4000, 50), draws, replacement=True, generator=generator(draws))
        estimates = torch.stack([chi_squared(torch.bincount(row, minlength=50).double(), weights) for row in rows])
        assert (estimates.mean() - truth).abs() < 4 * estimates.std() / 4000**0.5


# ---- the same again

def test_the_seed_decides_and_nothing_else():
    dataset = FlowDataset.from_tensor(SAMPLERS["8gaussians"](200, generator(0)))
    first, again, other = (SemidiscreteCoupling().fit(dataset, GaussianSource(), seed, "cpu", False) for seed in (0, 0, 1))
    torch.manual_seed(5)
    for name, value in first.items():
        assert torch.equal(value, again[name])
    assert not torch.equal(first["potentials"], other["potentials"])


@pytest.mark.parametrize("at_once", [1, 7, 64, 1000, 10**6])
def test_in_parts_as_in_one_piece(at_once):
    """A million points of 384 numbers never stand beside a batch as a whole table: parts of it must find the same."""
    points, noise = torch.randn(90, 5, generator=generator(0)), torch.randn(33, 5, generator=generator(1))
    columns, heights = centred_columns(points, "cpu"), torch.randn(90, generator=generator(2))
    best, partner = lowest(noise, columns, heights, at_once)
    table = heights.double() - noise.double() @ columns.double()
    assert torch.equal(partner, table.argmin(1)) and torch.allclose(best.double(), table.amin(1), atol=1e-5)


# ---- refusals

def test_what_can_not_be_is_refused_in_words():
    with pytest.raises(RuntimeError, match=r"call flow.fit\(dataset\) first"):
        SemidiscreteCoupling().pair(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="fit_chi2=0 is not allowed: it must be greater than 0"):
        SemidiscreteCoupling(fit_chi2=0)
    with pytest.raises(ValueError, match="fit_steps=0 is not allowed: it must be a whole number, at least 1"):
        SemidiscreteCoupling(fit_steps=0)
    with pytest.raises(ValueError, match=r"points of shape \(3,\) on cpu, and the data set that the coupling was fitted to \(2,\)"):
        fitted(data_set(torch.randn(5, 2, generator=generator(0)))).pair(torch.zeros(3, 3))


@pytest.mark.cuda
def test_a_gpu_finds_shares_as_even_as_a_processor():
    dataset = FlowDataset.from_tensor(SAMPLERS["moons"](500, generator(0)))
    coupling = SemidiscreteCoupling()
    found = coupling.fit(dataset, GaussianSource(), 0, "cuda", False)
    assert found["potentials"].device.type == "cpu" and found["chi2"] < 0.05
    noise = torch.randn(1000, 2, generator=generator(1))
    coupling.use(dataset, found, "cuda")
    there = coupling.pair(noise.cuda())[2].cpu()
    coupling.use(dataset, found, "cpu")
    assert (there == coupling.pair(noise)[2]).float().mean() > 0.999       # but for ties that rounding decides
