"""The paths between noise and data, against differentiation, closed forms, scipy and torchcfm."""

import math

import numpy as np
import pytest
import torch

from flowbook.flow_matching import Flow, LinearPath
from flowbook.paths import BrownianBridgePath, GaussianPath, SphericalPath, TrigonometricPath, VariancePreservingPath


def diffusion_alpha(t):
    """exp of minus half the rate of noising, b(s) = 0.1 + 19.9 s, summed up from the data to 1 - t, by quadrature."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(4))
    s = (1 - t)[..., None] * (nodes + 1) / 2
    return torch.exp(-0.5 * (1 - t) * ((0.1 + 19.9 * s) * weights).sum(-1) / 2)


# What each path should be, α(t)·x1 + β(t)·x0 + γ(t)·ε, written down a second time
LINEAR = [
    (LinearPath(), lambda t: (t, 1 - t, 0 * t)),
    (LinearPath(sigma=0.3), lambda t: (t, 1 - t, 0 * t + 0.3)),
    (GaussianPath(), lambda t: (t, 1 - t + 1e-4 * t, 0 * t)),
    (GaussianPath(sigma=0.0), lambda t: (t, 1 - t, 0 * t)),
    (GaussianPath(sigma=0.4), lambda t: (t, 1 - t + 0.4 * t, 0 * t)),
    (TrigonometricPath(), lambda t: ((math.pi * t / 2).sin(), (math.pi * (1 - t) / 2).sin(), 0 * t)),
    (VariancePreservingPath(), lambda t: (diffusion_alpha(t), (1 - diffusion_alpha(t) ** 2).sqrt(), 0 * t)),
    (BrownianBridgePath(), lambda t: (t, 1 - t, (t - t**2).sqrt())),
    (BrownianBridgePath(sigma=0.2), lambda t: (t, 1 - t, 0.2 * (t - t**2).sqrt())),
]
PATHS = [path for path, _ in LINEAR] + [SphericalPath()]


def name(value):
    return f"{type(value).__name__}{vars(value) or ''}" if hasattr(value, "at") else ""


def random(seed):
    print(f"seed {seed}")       # pytest shows it when the test fails
    return torch.Generator().manual_seed(seed)


def coefficients(weights, t):
    """α, β, γ and their derivatives at a time, as numbers."""
    values, derivatives = torch.func.jvp(weights, (torch.tensor(t, dtype=torch.double),), (torch.tensor(1.0, dtype=torch.double),))
    return [value.item() for value in values], [value.item() for value in derivatives]


def times_in_range(path, n, generator):
    """Both ends and random times between them."""
    low, high = path.time_range
    t = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.double)
    t[0], t[-1] = low, high
    return t


# Every path

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("path", "shape"), [
    (path, shape) for path in PATHS for shape in [(9,), (9, 1), (9, 5), (9, 2, 3, 4)]
    if math.prod(shape[1:]) > 1 or not isinstance(path, SphericalPath)], ids=name)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")      # torch's own, when it first differentiates forwards
def test_the_velocity_is_the_derivative_of_the_place_with_the_noise_held(path, shape, seed):
    generator = random(seed)
    x0, x1 = 3 * torch.randn(2, *shape, generator=generator, dtype=torch.double)
    t = times_in_range(path, len(x0), generator)
    (x_t, u_t), (derivative, _) = torch.func.jvp(
        lambda t: path.at(x0, x1, t, torch.Generator().manual_seed(seed)), (t,), (torch.ones_like(t),))
    assert x_t.shape == u_t.shape == shape and x_t.dtype == u_t.dtype == torch.double
    assert (u_t - derivative).abs().max() < 1e-10 * (1 + derivative.abs().max())


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_single_precision_is_precise_between_the_ends_of_the_time_range(path):
    generator = random(0)
    x0, x1 = torch.randn(2, 2000, 6, generator=generator)
    t = times_in_range(path, len(x0), generator).float()
    noise = torch.randn(x0.shape, generator=generator)
    single = at_with_noise(path, x0, x1, t, noise)
    double = at_with_noise(path, x0.double(), x1.double(), t.double(), noise.double())
    for low, high in zip(single, double):
        assert low.dtype == torch.float32
        assert ((low - high).abs() / (1 + high.abs())).max() < 3e-6


def at_with_noise(path, x0, x1, t, noise):
    """`path.at`, with this ε in place of a drawn one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("flowbook.paths", "flowbook.flow_matching"):
            patch.setattr(f"{module}.noise_like", lambda x, generator=None: noise)
        return path.at(x0, x1, t)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_what_is_drawn_comes_from_the_generator_alone_and_the_givens_stay_as_they_are(path):
    generator = random(0)
    x0, x1 = torch.randn(2, 16, 3, generator=generator)
    given, before = (x0.clone(), x1.clone()), torch.get_rng_state()
    first, again, other = (Flow(path=path).sample(x0, x1, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x0, given[0]) and torch.equal(x1, given[1])
    assert torch.equal(first.x_t, again.x_t) and torch.equal(first.u_t, again.u_t) and not torch.equal(first.x_t, other.x_t)
    low, high = path.time_range
    assert first.t.min() >= low and first.t.max() <= high
    empty = Flow(path=path).sample(x0[:0], x1[:0])
    assert empty.x_t.shape == empty.u_t.shape == (0, 3)


# Paths that are sums of their ends and noise

@pytest.mark.parametrize(("path", "weights"), LINEAR, ids=name)
def test_the_path_is_the_sum_that_the_papers_say(path, weights):
    generator = random(0)
    x0, x1, noise = torch.randn(3, 50, 4, generator=generator, dtype=torch.double)
    t = times_in_range(path, 50, generator)
    x_t, u_t = at_with_noise(path, x0, x1, t, noise)
    values, derivatives = torch.func.jvp(weights, (t,), (torch.ones_like(t),))
    for found, (a, b, c) in [(x_t, values), (u_t, derivatives)]:
        expected = a[:, None] * x1 + b[:, None] * x0 + c[:, None] * noise
        assert (found - expected).abs().max() < 1e-8 * (1 + expected.abs().max())


@pytest.mark.parametrize(("path", "low", "high"), [
    (LinearPath(), (0, 1), (1, 0)), (GaussianPath(), (0, 1), (1, 1e-4)), (GaussianPath(sigma=0.4), (0, 1), (1, 0.4)),
    (TrigonometricPath(), (0, 1), (1, 0)), (VariancePreservingPath(), (math.exp(-5.025), 1), (1, 0.0105)),
    (BrownianBridgePath(sigma=0.0), (1e-3, 1 - 1e-3), (1 - 1e-3, 1e-3)),
], ids=name)
def test_the_ends_are_noise_and_data(path, low, high):
    x0, x1 = torch.randn(2, 20, 3, generator=random(0), dtype=torch.double)
    for t, (a, b) in zip(path.time_range, (low, high)):
        x_t, _ = path.at(x0, x1, torch.full((20,), t, dtype=torch.double), torch.Generator().manual_seed(0))
        assert (x_t - a * x1 - b * x0).abs().max() < 2e-4


def gaussian_data(n, dimension, generator):
    """x1 ~ N(m, Σ) of several dimensions, not round, with m and Σ."""
    m = 2 * torch.randn(dimension, generator=generator, dtype=torch.double)
    root = torch.randn(dimension, dimension, generator=generator, dtype=torch.double) + 0.5 * torch.eye(dimension)
    return m + torch.randn(n, dimension, generator=generator, dtype=torch.double) @ root.T, m, root @ root.T


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize(("path", "weights"), LINEAR, ids=name)
def test_mean_and_covariance_of_the_crowd(path, weights, dimension, share):
    generator, n = random(dimension), 20_000
    x1, m, covariance = gaussian_data(n, dimension, generator)
    x0 = torch.randn(n, dimension, generator=generator, dtype=torch.double)
    t = path.time_range[0] + share * (path.time_range[1] - path.time_range[0])
    x_t, _ = path.at(x0, x1, torch.full((n,), t, dtype=torch.double), generator)
    (a, b, c), _ = coefficients(weights, t)
    expected = a**2 * covariance + (b**2 + c**2) * torch.eye(dimension)
    variance = expected.diag()
    assert ((x_t.mean(0) - a * m).abs() < 4 * (variance / n).sqrt()).all()
    error = ((variance[:, None] * variance + expected**2) / n).sqrt()
    assert ((x_t.T.cov().view(dimension, dimension) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize(("path", "weights"), LINEAR, ids=name)
def test_the_regression_is_the_exact_average_velocity_of_gaussian_data(path, weights, dimension, seed):
    generator, n = random(seed), 20_000
    x1, m, covariance = gaussian_data(n, dimension, generator)
    x0 = torch.randn(n, dimension, generator=generator, dtype=torch.double)
    low, high = path.time_range
    t = low + (high - low) * torch.rand((), generator=generator).item()
    batch = Flow(path=path).sample(x0, x1, torch.full((n,), t, dtype=torch.double), generator)
    (a, b, c), (da, db, dc) = coefficients(weights, t)
    eye, centred = torch.eye(dimension, dtype=torch.double), batch.x_t - a * m
    slope = (a * da * covariance + (b * db + c * dc) * eye) @ torch.linalg.inv(a**2 * covariance + (b**2 + c**2) * eye)
    rest = batch.u_t - (da * m + centred @ slope.T)     # independent of x_t, with mean 0, if the velocity is right
    assert (rest.mean(0).abs() < 5 * rest.std(0) / math.sqrt(n)).all()
    products = rest[:, :, None] * centred[:, None, :]
    assert (products.mean(0).abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_the_diffusion_velocity_is_the_one_in_the_paper_as_a_function_of_the_place():
    x0, x1 = torch.randn(2, 100, 3, generator=random(0), dtype=torch.double)
    t = times_in_range(VariancePreservingPath(), 100, random(1))
    x_t, u_t = VariancePreservingPath().at(x0, x1, t)
    s = 1 - t[:, None]
    total, rate = 0.1 * s + 19.9 * s**2 / 2, 0.1 + 19.9 * s       # T(s) and T'(s) of Lipman et al., Equation 19
    theirs = -rate / 2 * (torch.exp(-total) * x_t - torch.exp(-total / 2) * x1) / (1 - torch.exp(-total))
    assert (u_t - theirs).abs().max() < 1e-8


@pytest.mark.parametrize("independent", [True, False])
def test_the_quarter_circle_keeps_the_variance_of_independent_pairs_only(independent):
    x0, x1 = torch.randn(2, 100_000, generator=random(0))
    x_t, _ = TrigonometricPath().at(x0, x1 if independent else x0, torch.full((100_000,), 0.5))
    assert abs(x_t.var().item() - (1 if independent else 2)) < 0.03


# The sphere

def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def ends(kind, dimension, dtype, n=2000):
    """Pairs of unit vectors: anywhere, equal, opposite, so up to rounding, or nearly so, from one rounding apart to clearly apart."""
    generator = random(0)
    x0, x1 = torch.randn(2, n, dimension, generator=generator, dtype=torch.double)
    if kind != "anywhere":
        distance = 10 ** torch.linspace(-17, -2, n, dtype=torch.double)[:, None] if "nearly" in kind else 0
        length = 0.1 + 10 * torch.rand(n, 1, generator=generator, dtype=torch.double) if "rounded" in kind else 1
        x1 = (-length if "opposite" in kind else length) * (x0 + distance * x1)
    return unit(x0.to(dtype)), unit(x1.to(dtype))


KINDS = ["anywhere", "equal", "opposite", "rounded equal", "rounded opposite", "nearly equal", "nearly opposite"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [2, 3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_sphere_everywhere(kind, dimension, dtype):
    x0, x1 = ends(kind, dimension, dtype)
    tolerance = 16 * torch.finfo(dtype).eps
    angle = 2 * torch.atan2((x1.double() - x0.double()).norm(dim=1), (x1.double() + x0.double()).norm(dim=1))
    for t in (0.0, 0.1, 0.5, 0.7, 1.0):
        t = torch.full((len(x0),), t, dtype=dtype)
        x_t, u_t = SphericalPath().at(x0, x1, t)
        assert (x_t.norm(dim=1) - 1).abs().max() < tolerance
        assert (x_t * u_t).sum(1).abs().max() < tolerance
        assert (u_t.norm(dim=1).double() - angle).abs().max() < tolerance
        back, reverse = SphericalPath().at(x1, x0, 1 - t)
        assert (x_t - back).abs().max() < tolerance and (u_t + reverse).abs().max() < 2 * tolerance
    for t, end in [(0, x0), (1, x1)]:
        x_t, _ = SphericalPath().at(x0, x1, torch.full((len(x0),), t, dtype=dtype))
        assert (x_t - end).abs().max() < tolerance
    if kind == "equal":
        assert not u_t.any()


@pytest.mark.parametrize("dimension", [2, 3, 10])
@pytest.mark.parametrize("kind", ["anywhere", "equal", "nearly equal"])
def test_the_arc_agrees_with_scipy(kind, dimension):
    spatial = pytest.importorskip("scipy.spatial")
    times = np.linspace(0, 1, 7)
    x0, x1 = ends(kind, dimension, torch.double, n=30)
    ours = torch.stack([SphericalPath().at(x0, x1, torch.full((len(x0),), t, dtype=torch.double))[0] for t in times], 1)
    theirs = np.stack([spatial.geometric_slerp(a, b, times) for a, b in zip(x0.numpy(), x1.numpy())])
    assert np.abs(ours.numpy() - theirs).max() < 1e-12


@pytest.mark.parametrize("shape", [(20, 2), (20, 1, 4, 4)])
def test_the_arc_is_a_turn_and_lengths_of_the_givens_do_not_matter(shape):
    x0, x1 = torch.randn(2, *shape, generator=random(0), dtype=torch.double)
    t = torch.rand(len(x0), generator=random(1), dtype=torch.double)
    x_t, u_t = SphericalPath().at(7 * x0, 0.01 * x1, t)
    assert x_t.shape == u_t.shape == shape
    for k in range(len(x0)):
        a, b = (x[k].flatten() / x[k].norm() for x in (x0, x1))
        w = (b - (a @ b) * a) / (b - (a @ b) * a).norm()
        turn = torch.acos(a @ b) * (torch.outer(w, a) - torch.outer(a, w))      # d/dt x_t = turn · x_t
        place = torch.linalg.matrix_exp(t[k] * turn) @ a
        assert (x_t[k].flatten() - place).abs().max() < 1e-12 and (u_t[k].flatten() - turn @ place).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_without_a_direction_go_to_a_fixed_place(dtype):
    some, pole = unit(torch.randn(5, 3, generator=random(0), dtype=dtype)), torch.tensor([[1.0, 0, 0]], dtype=dtype).expand(5, 3)
    t = torch.linspace(0, 1, 5, dtype=dtype)
    for x0, x1 in [(0 * some, some), (some, 0 * some), (0 * some, 0 * some), (0 * some, -pole)]:
        x_t, u_t = SphericalPath().at(x0, x1, t)
        expected = SphericalPath().at(x0 if x0.any() else pole, x1 if x1.any() else pole, t)
        assert torch.equal(x_t, expected[0]) and torch.equal(u_t, expected[1]) and x_t.isfinite().all() and u_t.isfinite().all()


def test_on_every_axis_the_opposite_is_reached_along_a_great_circle():
    for dimension in (2, 3, 5):
        x0 = torch.cat([torch.eye(dimension), -torch.eye(dimension)])
        x_t, u_t = SphericalPath().at(x0, -x0, torch.full((len(x0),), 0.5))
        assert (x_t * x0).sum(1).abs().max() < 1e-6 and (x_t.norm(dim=1) - 1).abs().max() < 1e-6
        assert (u_t.norm(dim=1) - math.pi).abs().max() < 1e-6


# What is refused, and what the other parts read

@pytest.mark.parametrize(("make", "allowed", "refused"), [
    (GaussianPath, [0, 1e-4, 0.999], [-1e-9, 1, 2.0, math.nan, math.inf]), (BrownianBridgePath, [0, 1, 5.0], [-0.1, math.nan, math.inf])])
def test_options_that_make_no_path_are_refused_in_words(make, allowed, refused):
    for sigma in allowed:
        assert make(sigma=sigma).sigma == sigma and f"{make.__name__}(sigma={sigma})" in repr(Flow(path=make(sigma=sigma)))
    for sigma in refused:
        with pytest.raises(ValueError, match=f"sigma={sigma} is not allowed: it must be at least 0, and"):
            make(sigma=sigma)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
def test_single_numbers_are_refused_on_the_sphere(shape):
    with pytest.raises(ValueError, match="are no directions: they need 2 numbers or more"):
        SphericalPath().at(torch.ones(shape), torch.ones(shape), torch.zeros(4))


def test_paths_say_what_they_need():
    assert {type(path) for path in PATHS if getattr(path, "needs_gaussian_source", False)} == {GaussianPath, VariancePreservingPath}
    assert {type(path) for path in PATHS if getattr(path, "on_sphere", False)} == {SphericalPath}


# torchcfm

def torchcfm_cases():
    from torchcfm import conditional_flow_matching as theirs

    bridge = theirs.SchrodingerBridgeConditionalFlowMatcher
    return [
        (LinearPath(sigma=0.5), theirs.ConditionalFlowMatcher(0.5)), (LinearPath(), theirs.ConditionalFlowMatcher(0.0)),
        (GaussianPath(sigma=0.5), theirs.TargetConditionalFlowMatcher(0.5)),
        (GaussianPath(), theirs.TargetConditionalFlowMatcher(1e-4)),
        (TrigonometricPath(), theirs.VariancePreservingConditionalFlowMatcher(0.0)),
        (BrownianBridgePath(sigma=0.5), bridge(0.5)), (BrownianBridgePath(), bridge(1.0)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64,), (64, 3), (64, 1, 4, 4)])
def test_torchcfm_says_the_same_where_it_has_the_method(shape):
    for path, matcher in torchcfm_cases():
        x0, x1, noise = torch.randn(3, *shape, generator=random(0), dtype=torch.double)
        t = 0.01 + 0.98 * torch.rand(len(x0), generator=random(1), dtype=torch.double)
        x_t, u_t = at_with_noise(path, x0, x1, t, noise)
        their_x = matcher.sample_xt(x0, x1, t, x0 if isinstance(path, GaussianPath) else noise)
        their_u = matcher.compute_conditional_flow(x0, x1, t, their_x)
        if isinstance(path, BrownianBridgePath):        # they add 1e-8 to what they divide by
            wide = t.view(-1, *[1] * (x0.ndim - 1))
            their_u = x1 - x0 + (their_u - (x1 - x0)) * (1 + 1e-8 / (2 * wide * (1 - wide)))
        assert (x_t - their_x).abs().max() < 1e-12, name(path)
        assert (u_t - their_u).abs().max() < 1e-10, name(path)


# As in torchcfm's tests/test_conditional_flow_matcher.py: sigma 0.5, and (x0, x1, t, ε) -> (x_t, u_t) computed there
THEIR_TESTS = {
    LinearPath(sigma=0.5): lambda x0, x1, t, noise: (t * x1 + (1 - t) * x0 + 0.5 * noise, x1 - x0),
    GaussianPath(sigma=0.5): lambda x0, x1, t, _: (t * x1 + (0.5 * t - t + 1) * x0,
        (x1 - 0.5 * (t * x1 + (0.5 * t - t + 1) * x0)) / (1 - 0.5 * t)),
    TrigonometricPath(): lambda x0, x1, t, _: (torch.cos(math.pi / 2 * t) * x0 + torch.sin(math.pi / 2 * t) * x1,
        math.pi / 2 * (torch.cos(math.pi / 2 * t) * x1 - torch.sin(math.pi / 2 * t) * x0)),
    BrownianBridgePath(sigma=0.5): lambda x0, x1, t, noise: (t * x1 + (1 - t) * x0 + 0.5 * torch.sqrt(t * (1 - t)) * noise,
        (1 - 2 * t) / (2 * t * (1 - t) + 1e-8) * (0.5 * torch.sqrt(t * (1 - t)) * noise) + x1 - x0),
}


@pytest.mark.parametrize("path", THEIR_TESTS, ids=name)
def test_torchcfm_s_own_tests_pass_with_ours(path):
    """128 points of shape (2, 2); times, then noise, from seed 1994: a flow draws in this order, too."""
    x0, x1 = torch.randn(2, 128, 2, 2, generator=random(0))
    generator = torch.Generator().manual_seed(1994)
    t = Flow(path=path).in_range(torch.rand(128, generator=generator))
    expected = THEIR_TESTS[path](x0, x1, t[:, None, None], torch.randn(x0.shape, generator=generator))
    batch = Flow(path=path).sample(x0, x1, generator=torch.Generator().manual_seed(1994))
    assert torch.equal(batch.t, t)
    assert torch.allclose(batch.x_t, expected[0], atol=1e-6) and torch.allclose(batch.u_t, expected[1], rtol=1e-5, atol=1e-5)
