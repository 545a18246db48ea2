"""Drawing, the ways of points, densities, other sources and the sphere: against closed forms."""

import math

import pytest
import torch
from torch import nn

from flowbook.checkpoint import save_checkpoint
from flowbook.config import TrainingConfig
from flowbook.data import NormalizationStats, unit_length
from flowbook.ema import EMAModel
from flowbook.flow_matching import SampledSource, create_source
from flowbook.nets import create_model
from flowbook.sampling import METHODS, TrainedFlow, integrate, load_flow, log_density, trace_directions

STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}


class Gaussian(nn.Module):
    """The exact velocity from N(0, I) to N(mean, covariance), for points of any shape; it writes down what it is asked."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean, self.covariance = nn.Parameter(mean), nn.Parameter(covariance)
        self.asked, self.times = [], []

    def forward(self, x, t, cond=None):
        self.asked.append(x.detach())
        self.times.append(t[0].item())
        t, eye = t[0], torch.eye(len(self.mean), dtype=x.dtype)
        now, rate = (1 - t) ** 2 * eye + t**2 * self.covariance, t * self.covariance - (1 - t) * eye
        return (self.mean + (x.flatten(1) - t * self.mean) @ torch.linalg.solve(now, rate)).view_as(x)


def random_gaussian(seed, size, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=dtype) / math.sqrt(size)
    mean = torch.randn(size, generator=generator, dtype=dtype)
    return Gaussian(mean, root @ root.T + 0.1 * torch.eye(size, dtype=dtype))


def random_stats(seed, data_shape, **options):
    generator = torch.Generator().manual_seed(seed + 1000)
    mean, std = 5 * torch.randn(data_shape, generator=generator), 0.1 + 3 * torch.rand(data_shape, generator=generator)
    return NormalizationStats(mean, std, **options)


def bent_network(data_shape, seed=0, **options):
    """A network as `create_model` makes it, with weights all of which do something."""
    torch.manual_seed(seed)
    network = create_model("mlp", data_shape, **({"width": 16, "depth": 2} | options))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


# ---- steps and ways

@pytest.mark.parametrize("method", STAGES)
def test_halving_the_steps_divides_the_error_as_the_order_says(method):
    def velocity(x, t): return 6 * x * (1 - x) * t[:, None] ** 2     # log(x / (1 - x)) grows by 2t³

    def error(steps):
        end = integrate(velocity, torch.full((1, 1), 0.2, dtype=torch.double), method, steps).end
        return abs(end.item() - 1 / (1 + 4 * math.exp(-2)))

    order = math.log2(error(32) / error(64))
    assert abs(order - STAGES[method]) < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_looking_does_not_change_where_points_end_nor_the_price(method):
    flow = TrainedFlow(bent_network((2,)), random_stats(0, (2,)))
    steps = None if method == "dopri5" else 7
    x0 = torch.randn(25, 2, generator=torch.Generator().manual_seed(0))
    for batch_size in (10_000, 10):
        samples = flow.sample(x0=x0, method=method, steps=steps, batch_size=batch_size)
        price = flow.evaluations
        for times in (2, 101, torch.tensor([0.001, 0.6, 1.0]), [1.0]):
            ways = flow.trajectories(x0=x0, times=times, method=method, steps=steps, batch_size=batch_size)
            assert torch.equal(ways.end, samples) and ways.evaluations == flow.evaluations == price
            assert ways.x.shape == (len(ways.t), 25, 2) and ways.t[-1] == 1
            assert ways.t[0] > 0 or torch.equal(ways.x[0], flow.stats.denormalize(x0))


def test_ways_are_the_points_of_the_solver_and_straight_between_them():
    network, x0 = bent_network((2,)), torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    by_hand = [x0]
    with torch.no_grad():
        for k in range(10):
            by_hand.append(by_hand[-1] + network(by_hand[-1], torch.full((9,), k / 10)) / 10)
        ways = integrate(network, x0, "euler", 10, times=41)
    assert torch.allclose(ways.x[::4], torch.stack(by_hand), atol=1e-6)
    assert torch.allclose(ways.x[2::4], (ways.x[:-1:4] + ways.x[4::4]) / 2, atol=1e-6)


def test_dopri5_is_as_right_between_its_steps_as_at_the_end():
    network = random_gaussian(0, 2)
    x0 = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    with torch.no_grad():
        ways, fine = integrate(network, x0, times=41), integrate(network, x0, "rk4", 400, times=41)
    assert (ways.x - fine.x).abs().max() < 5e-4 and ways.evaluations < 100


@pytest.mark.parametrize("times", [1, 0, -3, [], [0.0, 0.5, 0.5], [0.5, 0.2], [-0.1, 1.0], [0.0, 1.1], [0.0, math.nan, 1.0], [[0.0, 1.0]]])
def test_times_that_are_none_are_refused(times):
    with pytest.raises(ValueError, match="is not allowed: it must be"):
        integrate(lambda x, t: x, torch.zeros(1, 1), times=times)


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_the_calls_of_the_network_for_a_sample(method):
    network = random_gaussian(1, 2, torch.float)
    flow = TrainedFlow(network, NormalizationStats.identity((2,)))
    assert flow.evaluations is None
    steps = None if method == "dopri5" else 5
    for ask in (flow.sample, flow.trajectories):
        network.asked.clear()
        ask(3, method=method, steps=steps, generator=torch.Generator().manual_seed(0))
        assert flow.evaluations == len(network.asked) and (steps is None or flow.evaluations == steps * STAGES[method])
    network.asked.clear()
    flow.log_prob(torch.zeros(3, 2), method=method, steps=steps)
    assert flow.evaluations == len(network.asked)


def test_of_several_batches_the_dearest_counts():
    flow = TrainedFlow(bent_network((1,)), NormalizationStats.identity((1,)))
    near, far = torch.zeros(4, 1), torch.linspace(-30, 30, 4)[:, None]
    prices = []
    for x0 in (near, far):
        flow.sample(x0=x0, rtol=1e-7, atol=1e-7)
        prices.append(flow.evaluations)
    flow.sample(x0=torch.cat([far, near]), rtol=1e-7, atol=1e-7, batch_size=4)
    assert prices[0] != prices[1] and flow.evaluations == max(prices)


@pytest.mark.parametrize("speed", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("method", METHODS)
def test_no_velocity_is_asked_for_outside_0_to_1_whichever_way_and_however_slow(method, speed):
    asked = []

    class Slow(nn.Module):
        def forward(self, x, t, cond=None):
            asked.extend(t.tolist())
            return speed * torch.cos(x + t[:, None])

    flow = TrainedFlow(Slow(), NormalizationStats.identity((2,)))
    flow.sample(5, method=method, generator=torch.Generator().manual_seed(0))
    flow.log_prob(torch.ones(5, 2), method=method)
    assert min(asked) >= 0 and max(asked) <= 1


# ---- densities

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("data_shape", [(1,), (3,), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_of_a_gaussian_is_what_torch_says(seed, data_shape, dtype):
    network, stats = random_gaussian(seed, math.prod(data_shape), dtype), random_stats(seed, data_shape)
    flow, std = TrainedFlow(network, stats), stats.std.flatten().to(dtype)
    mean = stats.denormalize(network.mean.detach().view(data_shape)).flatten()
    exact = torch.distributions.MultivariateNormal(mean, std[:, None] * network.covariance.detach() * std)
    noise = torch.randn(20, len(mean), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x = mean + noise @ exact.scale_tril.T
    log_p = flow.log_prob(x.view(-1, *data_shape), rtol=1e-6, atol=1e-6)
    assert log_p.dtype == dtype and not log_p.requires_grad and log_p.shape == (20,)
    error = (log_p - exact.log_prob(x)).abs().max()
    assert error < (1e-3 if dtype == torch.float32 else 1e-4), f"seed {seed}: {error}"
    assert network.mean.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_density_and_one_with_fixed_steps_does_not_depend_on_the_company(method):
    network = random_gaussian(3, 2)
    flow = TrainedFlow(network, NormalizationStats.identity((2,)))
    exact = torch.distributions.MultivariateNormal(network.mean.detach(), network.covariance.detach())
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    steps = None if method == "dopri5" else 100
    log_p = flow.log_prob(x, method=method, steps=steps)
    assert (log_p - exact.log_prob(x)).abs().max() < (0.5 if method == "euler" else 5e-3)
    apart = flow.log_prob(x, method=method, steps=steps, batch_size=3)
    assert torch.allclose(apart, log_p, atol=1e-3 if method == "dopri5" else 1e-10)


def test_features_that_never_vary_are_left_out_and_shown_to_the_network_as_0():
    inner, varies = random_gaussian(0, 4), torch.tensor([True, False, True, True, False, True])

    class WithConstants(nn.Module):
        def forward(self, x, t, cond=None):
            assert (x[:, ~varies] == 0).all()
            v = 100 * torch.ones_like(x) * x.sum()      # what it says about the constant ones must not matter
            return v.index_copy(1, varies.nonzero()[:, 0], inner(x[:, varies], t).to(v))

    few, all_six = TrainedFlow(inner, random_stats(0, (4,))), torch.full((6,), 7.0)
    mean, std = all_six.masked_scatter(varies, few.stats.mean), all_six.masked_scatter(varies, few.stats.std)
    flow = TrainedFlow(WithConstants(), NormalizationStats(mean, std, varies))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    log_p = flow.log_prob(x)
    assert torch.allclose(log_p, few.log_prob(x[:, varies].double()).float(), atol=2e-3)
    x[:, ~varies] = 123.0
    assert torch.equal(flow.log_prob(x), log_p)


def test_hutchinsons_estimate_is_right_on_average_and_more_probes_scatter_less():
    seed, n = 5, 3000
    network = random_gaussian(seed, 5, torch.float)
    flow, generator = TrainedFlow(network, NormalizationStats.identity((5,))), torch.Generator().manual_seed(seed)
    x = torch.randn(1, 5, generator=generator)
    exact = flow.log_prob(x, method="rk4", steps=20)
    scatter = []
    for probes in (1, 4):
        estimates = flow.log_prob(x.expand(n, -1), method="rk4", steps=20, exact=False, probes=probes, generator=generator)
        scatter.append(estimates.std().item())
        assert abs(estimates.mean() - exact) < 4 * scatter[-1] / math.sqrt(n), f"seed {seed}, {probes} probes"
    assert 0.05 < scatter[1] and abs(scatter[0] / scatter[1] - 2) < 0.15, f"seed {seed}: {scatter}"


def test_the_estimates_directions_come_from_the_generator_and_stay_for_the_whole_way():
    flow = TrainedFlow(random_gaussian(0, 6, torch.float), NormalizationStats.identity((6,)))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))

    def estimate(seed, **options):
        return flow.log_prob(x, exact=False, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(estimate(1), estimate(1)) and not torch.equal(estimate(1), estimate(2))
    assert torch.allclose(estimate(1, method="rk4", steps=20), estimate(1, method="rk4", steps=20, batch_size=2), atol=1e-4)
    assert flow.log_prob(x, exact=False, probes=3).isfinite().all()     # without a generator, too
    estimate(1)
    assert flow.evaluations < 100       # a direction that changed at each look would leave dopri5 nothing to converge to


@pytest.mark.parametrize(["features", "exact"], [(100, True), (101, False)])
def test_the_divergence_is_exact_for_up_to_100_features_that_vary(features, exact):
    varies = torch.arange(150) < features
    flow = TrainedFlow(bent_network((150,)), NormalizationStats(torch.zeros(150), torch.ones(150), varies))
    x = torch.randn(2, 150, generator=torch.Generator().manual_seed(0))
    by_default, forced, other = (flow.log_prob(x, "rk4", 2, exact=choice, generator=torch.Generator().manual_seed(1))
                                 for choice in (None, exact, not exact))
    assert torch.equal(by_default, forced) and not torch.allclose(by_default, other)


def test_any_network_has_a_density_with_area_1():
    flow = TrainedFlow(bent_network((1,), dropout=0.5), NormalizationStats(torch.tensor([3.0]), torch.tensor([2.0])))
    flow_samples = flow.sample(1000, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(flow_samples.min() - 10, flow_samples.max() + 10, 1001)[:, None]
    area = torch.trapezoid(flow.log_prob(x).double().exp(), x[:, 0].double())
    assert abs(area - 1) < 1e-3


def test_the_density_is_that_of_the_samples_by_the_determinant_of_the_whole_way():
    network, stats = bent_network((3,), dropout=0.5), random_stats(0, (3,))
    flow = TrainedFlow(network.double(), stats)
    x0 = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    samples = flow.sample(x0=x0, method="rk4", steps=100)

    def carried(point): return stats.denormalize(integrate(network, point[None], "rk4", 100).end)[0]

    stretched = torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(carried, point))[1] for point in x0])
    exact = torch.distributions.Normal(0, 1).log_prob(x0).sum(1) - stretched
    error = (flow.log_prob(samples, rtol=1e-6, atol=1e-6) - exact).abs().max()
    assert error < 1e-3, f"{error}"


def test_a_velocity_that_does_not_look_at_its_point_has_divergence_0():
    x = torch.linspace(-1, 3, 5)[:, None]
    log_p, _ = log_density(lambda x, t: torch.full_like(x, 2.0), x, trace_directions(x))
    assert torch.allclose(log_p, torch.distributions.Normal(2, 1).log_prob(x)[:, 0], atol=1e-5)


def test_whole_numbers_are_points_too():
    network = random_gaussian(0, 2, torch.float)
    flow = TrainedFlow(network, random_stats(0, (2,)))
    assert torch.equal(flow.log_prob(torch.tensor([[1, 2]])), flow.log_prob(torch.tensor([[1.0, 2.0]], dtype=torch.double)))


def test_what_has_no_density_and_points_that_do_not_fit_are_refused():
    network, stats = random_gaussian(0, 2, torch.float), NormalizationStats.identity((2,))
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="lie on a sphere"):
        TrainedFlow(network, NormalizationStats.identity((2,), sphere=True)).log_prob(x)
    with pytest.raises(ValueError, match=r"does not start from N\(0, I\)"):
        TrainedFlow(network, stats, source=create_source("8gaussians", stats)).log_prob(x)
    with pytest.raises(ValueError, match="all of its training points were the same"):
        TrainedFlow(network, NormalizationStats(torch.zeros(2), torch.ones(2), torch.tensor([False, False]))).log_prob(x)
    flow = TrainedFlow(network, stats)
    for wrong in (torch.zeros(3, 3), torch.zeros(2), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"x has shape \(.*\): it must be \(n, 2\), n at least 1"):
            flow.log_prob(wrong)
    with pytest.raises(ValueError, match="NaN or infinite"):
        flow.log_prob(torch.full((1, 2), math.nan))
    with pytest.raises(ValueError, match="probes=0 is not allowed"):
        flow.log_prob(x, exact=False, probes=0)


# ---- other sources

def test_samples_begin_at_the_source_and_one_generator_decides():
    stats = random_stats(0, (2,))
    source = create_source("8gaussians", stats)
    flow = TrainedFlow(create_model("mlp", (2,)), stats, source=source)     # a new network leaves its points where they are
    first, again = (flow.sample(50, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    drawn = stats.denormalize(source.like(torch.empty(50, 2), torch.Generator().manual_seed(3)))
    assert torch.equal(first, again) and torch.allclose(first, drawn, atol=1e-5)
    assert flow.sample(5).shape == (5, 2) and flow.trajectories(5).x.shape == (101, 5, 2)
    noise = torch.zeros(4, 2)
    assert torch.allclose(flow.sample(x0=noise), stats.mean.expand(4, 2))   # given points are in normalised units, whatever the source


def test_a_checkpoint_brings_its_source(tmp_path):
    stats, model = random_stats(0, (2,)), create_model("mlp", (2,), width=8)
    rest = dict(epoch=1, step=0, best_val_loss=1.0, stats=stats, model=model, ema=EMAModel(model))
    for name in ("gaussian", "moons"):
        save_checkpoint(tmp_path / f"{name}.pt", config=TrainingConfig(source=name), **rest)
    assert load_flow(tmp_path / "gaussian.pt").source.gaussian
    flow = load_flow(tmp_path / "moons.pt")
    assert isinstance(flow.source, SampledSource) and flow.source.name == "moons"
    expected = create_source("moons", stats).like(torch.empty(9, 2), torch.Generator().manual_seed(0))
    samples = flow.sample(9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(samples, stats.denormalize(expected), atol=1e-5)


# ---- the sphere

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data_shape", [(2,), (3,), (1, 4, 4)])
def test_on_the_sphere_all_points_have_length_1_on_their_whole_way(method, data_shape):
    network, axes = bent_network(data_shape), len(data_shape)
    asked = []
    network.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[0]))
    flow = TrainedFlow(network, NormalizationStats.identity(data_shape, sphere=True))
    steps, generator = None if method == "dopri5" else 5, torch.Generator().manual_seed(0)
    ways = flow.trajectories(100, 12, method, steps, generator=generator)
    for points in (ways.x.flatten(0, 1), torch.cat(asked)):
        assert (points.flatten(1).norm(dim=1) - 1).abs().max() < 1e-6
    assert (ways.x[0] - ways.end).abs().max() > 0.1     # it moved
    samples = flow.sample(100, method, steps, generator=generator.manual_seed(0))
    assert torch.equal(samples, ways.end)
    noise = 5 * torch.randn(100, *data_shape, generator=generator)
    assert torch.allclose(flow.trajectories(x0=noise).x[0], unit_length(noise, axes), atol=1e-6)


def test_a_rotation_ends_where_it_must():
    turn = 2.0

    class Rotation(nn.Module):      # about the third axis, and off the sphere, which must not matter
        def forward(self, x, t, cond=None): return turn * torch.stack([-x[:, 1], x[:, 0], torch.zeros_like(x[:, 0])], 1) + 3 * x

    flow = TrainedFlow(Rotation(), NormalizationStats.identity((3,), sphere=True))
    x0 = unit_length(torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double), 1)

    def turned(angle):
        c, s = math.cos(angle), math.sin(angle)
        return x0 @ torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.double)

    for method, steps, allowed in (("dopri5", None, 1e-4), ("rk4", 50, 1e-6), ("midpoint", 200, 1e-4), ("euler", 2000, 2e-3)):
        assert (flow.sample(x0=x0, method=method, steps=steps) - turned(turn)).abs().max() < allowed, method
    equator = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.double)
    end = flow.sample(x0=equator, method="euler", steps=4)      # each step goes straight on, then back: by atan(turn / 4)
    angle = 4 * math.atan(turn / 4)
    assert torch.allclose(end, torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.double), atol=1e-12)
