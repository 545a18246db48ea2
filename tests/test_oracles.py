"""Against closed forms and other libraries, on settings that the chapters do not use."""

import math

import pytest
import torch

from flowbook.flows import create_flow
from flowbook.sampling import integrate
from flowbook.scheduler import cosine_with_warmup, get_cosine_schedule_with_warmup


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dimension", [1, 3])
def test_the_regression_of_icfm_is_the_exact_gaussian_velocity(seed, dimension):
    generator = torch.Generator().manual_seed(seed)
    m = 3 * torch.randn(dimension, generator=generator, dtype=torch.double)
    s = 0.3 + 2 * torch.rand(1, generator=generator, dtype=torch.double).item()
    t = 0.05 + 0.9 * torch.rand(1, generator=generator, dtype=torch.double).item()
    n = 100_000
    x0, x1 = (torch.randn(n, dimension, generator=generator, dtype=torch.double) for _ in range(2))
    batch = create_flow("icfm").sample(x0, m + s * x1, torch.full((n,), t, dtype=torch.double), generator)
    slope = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
    centred = batch.x_t - t * m
    rest = batch.u_t - (m + slope * centred)        # independent of x_t, with mean 0, if the velocity is right
    error = rest.std() / math.sqrt(n)
    assert rest.mean(0).abs().max() < 5 * error, f"seed {seed}"
    assert (rest * centred).mean(0).abs().max() < 5 * (rest * centred).std() / math.sqrt(n), f"seed {seed}"


def test_sigma_widens_the_path_and_leaves_the_velocity():
    generator = torch.Generator().manual_seed(0)
    x0, x1, t = torch.zeros(50_000, 2), torch.ones(50_000, 2), torch.full((50_000,), 0.25)
    batch = create_flow("icfm", sigma=0.3).sample(x0, x1, t, generator)
    assert abs(batch.x_t.mean() - 0.25) < 0.005 and abs(batch.x_t.std() - 0.3) < 0.005
    assert torch.equal(batch.u_t, x1 - x0)


@pytest.mark.slow
def test_the_schedule_agrees_with_transformers():
    optimization = pytest.importorskip("transformers.optimization")
    for warmup, total, cycles in [(0, 50, 0.5), (10, 100, 0.5), (7, 31, 0.5), (5, 60, 1.5)]:
        for step in range(total + 1):
            theirs = optimization._get_cosine_schedule_with_warmup_lr_lambda(
                step, num_warmup_steps=warmup, num_training_steps=total, num_cycles=cycles)
            assert cosine_with_warmup(step, warmup, total, cycles) == pytest.approx(theirs, abs=1e-12)

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler, seen = make(optimizer, 10, 100), []
        for _ in range(101):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(get_cosine_schedule_with_warmup) == pytest.approx(rates(optimization.get_cosine_schedule_with_warmup), abs=1e-12)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_solver_asks_for_no_time_outside_0_to_1_and_makes_the_steps_it_was_told(method, dtype):
    m, s, stages = 1.5, 0.01, {"euler": 1, "midpoint": 2, "rk4": 4, "dopri5": 0}[method]
    x0 = torch.linspace(-2, 2, 9, dtype=dtype)[:, None]
    for steps in [1, 49, 61, 98, 109, 300] if stages else [None]:
        asked = []

        def velocity(x, t, asked=asked):
            asked.append(t[0].item())
            t = t[:, None]
            return m + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * (x - t * m)

        end = integrate(velocity, x0, method, steps).end
        assert min(asked) >= 0 and max(asked) <= 1
        assert not stages or len(asked) == stages * steps
    if method == "dopri5":
        assert (end - (m + s * x0)).abs().max() < 1e-3
