"""Who is paired with whom, against other libraries, closed forms and brute force."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from flowbook.checkpoint import save_checkpoint
from flowbook.config import TrainingConfig
from flowbook.couplings import EntropicCoupling, OptimalTransportCoupling, ReflowCoupling, alignment, assignment, entropic_plan
from flowbook.data import FlowDataset
from flowbook.flow_matching import Flow, GaussianSource, create_source
from flowbook.nets import create_model
from flowbook.sampling import load_flow
from flowbook.sources import digits

SHAPES = [(1, 3), (2, 1), (7, 2), (64, 64), (200, 2), (50, 1, 8, 8), (30, 3, 4, 4)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def points(shape, seed, dtype=torch.float32):
    return torch.randn(2, *shape, generator=seeded(seed), dtype=torch.double).to(dtype)


def costs(x0, x1):
    """Squared distances, summed up coordinate by coordinate, in double precision."""
    x0, x1 = x0.double().flatten(1), x1.double().flatten(1)
    return (x0[:, None] - x1).square().sum(2)


def cost_of(x0, x1, index):
    return costs(x0, x1)[torch.arange(len(x0)), index].sum().item()


def is_permutation(index):
    return torch.equal(index.sort().values, torch.arange(len(index)))


# Optimal transport

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_assignment_costs_what_pot_says_and_uses_every_point_once(shape, dtype):
    ot = pytest.importorskip("ot")
    for seed in range(5):
        x0, x1 = points(shape, seed, dtype)
        x1 = 3 * x1 + 1
        y0, y1, index = OptimalTransportCoupling().pair(x0, x1)
        assert y0 is x0 and torch.equal(y1, x1[index]) and y1.dtype == dtype and index.dtype == torch.long
        assert is_permutation(index)
        expected = ot.emd2([], [], costs(x0, x1).numpy()) * len(x0)
        assert cost_of(x0, x1, index) == pytest.approx(expected, rel=1e-6), f"seed {seed}"


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_points_that_occur_several_times_are_used_as_often_as_they_occur(distinct):
    x0, x1 = points((40, 2), 0)
    x0, x1 = x0[torch.arange(40) % distinct], x1[torch.arange(40) % distinct]
    _, y1, index = OptimalTransportCoupling().pair(x0, x1)
    assert is_permutation(index)
    best = min(cost_of(x0[:distinct], x1[:distinct], list(order)) for order in itertools.permutations(range(distinct)))
    assert cost_of(x0, x1, index) == pytest.approx(best * 40 / distinct, abs=1e-5)


@pytest.mark.parametrize("n", range(1, 7))
def test_no_permutation_of_few_points_costs_less(n):
    for seed in range(10):
        x0, x1 = points((n, 2), seed)
        best = min(cost_of(x0, x1, list(order)) for order in itertools.permutations(range(n)))
        assert cost_of(x0, x1, OptimalTransportCoupling().pair(x0, x1)[2]) == pytest.approx(best, rel=1e-6), f"seed {seed}"


# Above 255 points the solver is given a start
@pytest.mark.parametrize("n", [256, 259, 1030])
@pytest.mark.parametrize("kind", ["plane", "64 dimensions", "a grid", "two points", "all the same", "in order", "far apart", "tiny"])
def test_a_start_changes_no_assignment(kind, n):
    generator = seeded(n)
    x0, x1 = torch.randn(2, n, 64 if kind == "64 dimensions" else 2, dtype=torch.float64, generator=generator)
    if kind == "a grid": x0, x1 = x0.round(), x1.round()        # many are as good as each other
    if kind == "two points": x1 = x1.sign()[:, :1] * torch.ones(2)
    if kind == "all the same": x0, x1 = x0 * 0, x1 * 0 + 1
    if kind == "in order": x0, x1 = x0.sort(0).values, x1.sort(0).values
    if kind == "far apart": x1 = x1 * 10.0**torch.randint(9, (n, 1), generator=generator)
    if kind == "tiny": x0, x1 = x0 * 1e-150, x1 * 1e-150
    products = alignment(x0, x1).numpy()
    expected, found = linear_sum_assignment(products, maximize=True)[1], assignment(products)
    assert is_permutation(torch.from_numpy(found))
    rows = np.arange(n)
    assert products[rows, found].sum() == pytest.approx(products[rows, expected].sum(), rel=1e-12, abs=0), f"{kind}, {n}"
    if kind in ("plane", "64 dimensions"): assert (found == expected).all()       # No two pairings are as good


coordinate = st.integers(-20, 20).map(lambda k: k / 4) | st.floats(-5, 5, width=32)      # the first kind makes ties and duplicates


@settings(deadline=None, max_examples=100)
@given(data=st.data(), n=st.integers(1, 12), dimension=st.integers(1, 4))
def test_no_permutation_that_is_tried_costs_less(data, n, dimension):
    row = st.lists(coordinate, min_size=n * dimension, max_size=n * dimension)
    x0, x1 = (torch.tensor(data.draw(row)).view(n, dimension) for _ in range(2))
    other = torch.tensor(data.draw(st.permutations(range(n))))
    index = OptimalTransportCoupling().pair(x0, x1)[2]
    assert is_permutation(index)
    assert cost_of(x0, x1, index) <= cost_of(x0, x1, other) + 1e-9 * (1 + costs(x0, x1).max())


@pytest.mark.parametrize(("offset", "dtype"), [(1e3, torch.float32), (1e4, torch.float32), (1e8, torch.float64)], ids=str)
def test_points_far_from_the_origin_are_paired_as_those_near_it(offset, dtype):
    x0, x1 = points((100, 2), 0, torch.float64)
    far0, far1 = (x0 + offset).to(dtype), (x1 - 2 * offset).to(dtype)
    near0, near1 = far0.double() - offset, far1.double() + 2 * offset      # rounded as those that are far
    best = cost_of(near0, near1, OptimalTransportCoupling().pair(near0, near1)[2])
    assert cost_of(near0, near1, OptimalTransportCoupling().pair(far0, far1)[2]) == pytest.approx(best, rel=1e-9)
    plans = [entropic_plan(alignment(*pair), 0.5, tolerance=1e-6)[0] for pair in [(far0, far1), (near0, near1)]]
    assert (plans[0] - plans[1]).abs().max() < 1e-4


def test_optimal_transport_draws_nothing():
    x0, x1 = points((30, 2), 0)
    generator = seeded(5)
    before, state, numpy_state = generator.get_state(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = OptimalTransportCoupling().pair(x0, x1, generator)[2]
    again = OptimalTransportCoupling().pair(x0, x1)[2]
    assert torch.equal(first, again) and torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_lines_of_optimal_transport_never_meet():
    x0, x1 = points((60, 2), 0)
    x0, x1, _ = OptimalTransportCoupling().pair(x0, x1)
    times = torch.linspace(0, 1, 201)[:, None, None]
    ways = torch.lerp(x0, x1, times)
    apart = torch.stack([torch.pdist(moment) for moment in ways]).amin(0)
    d0, d1 = torch.pdist(x0), torch.pdist(x1)
    assert (apart >= d0 * d1 / (d0**2 + d1**2).sqrt() * (1 - 1e-4)).all()   # the least that Δ0·Δ1 >= 0 allows


@pytest.mark.parametrize("value", [-1, 1.5, "256", True, None])
def test_numbers_of_points_are_whole_numbers(value):
    for make in (lambda: OptimalTransportCoupling(ot_batch_size=value), lambda: ReflowCoupling("somewhere", pairs=value)):
        with pytest.raises(ValueError, match=r"is not allowed: it must be a whole number, at least 1, or 0 for"):
            make()


@pytest.mark.parametrize("coupling", [OptimalTransportCoupling(), EntropicCoupling()], ids=lambda c: type(c).__name__)
def test_points_that_have_no_distances_are_refused(coupling):
    x0, x1 = points((8, 2), 0)
    for bad in (float("nan"), float("inf")):
        broken = x1.clone()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="NaN, infinite or huge can't be paired"):
            coupling.pair(x0, broken)
    with pytest.raises(ValueError, match=r"x0 has shape \(8, 2\) and x1 \(8, 1\): they must be the same"):
        coupling.pair(x0, x1[:, :1])


# Entropic

@pytest.mark.parametrize(("shape", "sigma"), [((1, 2), 1), ((30, 2), 1), ((9, 2), 10), ((40, 64), 3), ((20, 1, 8, 8), 2)], ids=str)
def test_the_plan_is_that_of_pot(shape, sigma):
    ot = pytest.importorskip("ot")
    for seed in range(2):
        x0, x1 = points(shape, seed)
        x1 = 1.5 * x1 - 1
        plan, error = entropic_plan(alignment(x0, x1), sigma, tolerance=1e-7, iterations=20_000)
        assert error <= 1e-7
        theirs = ot.bregman.sinkhorn_log([], [], costs(x0, x1).numpy(), reg=2 * sigma**2, numItermax=20_000, stopThr=1e-9)
        assert np.abs(plan.numpy() - len(x0) * theirs).max() < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 10.0])
def test_rows_sum_to_1_and_columns_nearly(sigma, tolerance):
    for seed in range(3):
        plan, error = entropic_plan(alignment(*points((100, 3), seed)), sigma, tolerance, iterations=10_000)
        assert (plan.sum(1) - 1).abs().max() < 1e-12
        assert (plan.sum(0) - 1).abs().max() <= tolerance and error == pytest.approx((plan.sum(0) - 1).abs().max().item(), rel=1e-6)


def test_a_large_sigma_is_chance_and_a_small_one_the_assignment():
    for seed in range(5):
        x0, x1 = points((20, 2), seed)
        products = alignment(x0, x1)
        assert (entropic_plan(products, 1e4)[0] - 1 / 20).abs().max() < 1e-6
        assert torch.equal(entropic_plan(products, 0.01)[0].argmax(1), OptimalTransportCoupling().pair(x0, x1)[2]), f"seed {seed}"


def test_the_columns_error_is_reported_when_the_iterations_run_out():
    products = alignment(*points((50, 2), 0))
    for iterations in (1, 2, 7):
        plan, error = entropic_plan(products, 0.05, iterations=iterations)
        assert error > 0.01 and error == pytest.approx((plan.sum(0) - 1).abs().max().item(), rel=1e-9)
        assert (plan.sum(1) - 1).abs().max() < 1e-12


def test_nothing_overflows_where_distances_are_a_thousand_times_sigma():
    x0, x1 = points((32, 784), 0)
    plan, error = entropic_plan(alignment(x0, x1), 0.02)
    assert plan.isfinite().all() and (plan.sum(1) - 1).abs().max() < 1e-12 and error < 1.1


@pytest.mark.parametrize("seed", range(3))
def test_partners_are_drawn_as_often_as_the_plan_says(seed):
    draws, n, sigma = 1000, 5, 0.6
    x0, x1 = points((n, 2), seed)
    plan, _ = entropic_plan(alignment(x0, x1), sigma)
    generator, coupling = seeded(seed), EntropicCoupling(sigma)
    index = torch.stack([coupling.pair(x0, x1, generator)[2] for _ in range(draws)])
    found = torch.nn.functional.one_hot(index, n).double().mean(0)
    error = (plan * (1 - plan) / draws).sqrt()
    assert ((found - plan).abs() <= 4 * error + 4 / draws).all(), f"seed {seed}"     # the rest is for cells that are hardly ever drawn
    together = (index[:, 0] == 0) & (index[:, 1] == 1)      # rows are drawn independently
    p = (plan[0, 0] * plan[1, 1]).item()
    assert abs(together.double().mean().item() - p) <= 4 * (p * (1 - p) / draws) ** 0.5 + 4 / draws, f"seed {seed}"


def test_a_regularisation_of_twice_sigma_squared():
    """Two points a side: the odds of the two pairings are those of two Brownian motions, each row's e^(-(cost difference)/2σ²·½)."""
    x0, x1, sigma = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]), 0.8
    plan, _ = entropic_plan(alignment(x0, x1), sigma, tolerance=1e-12)
    straight, crossed = costs(x0, x1).trace(), costs(x0, x1).flip(1).trace()
    # P = ((a, b), (b, a)) with a + b = 1 and (a/b)² = e^(-(straight - crossed)/2σ²)
    odds = ((crossed - straight) / (2 * sigma**2) / 2).exp()
    assert plan[0, 0].item() == pytest.approx((odds / (1 + odds)).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (20, 2), (10, 1, 8, 8)], ids=str)
def test_the_generator_alone_decides_the_partners(shape, dtype):
    x0, x1 = points(shape, 0, dtype)
    coupling, found = EntropicCoupling(3.0), []
    for disturbance in range(3):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)
        y0, y1, index = coupling.pair(x0, x1, seeded(1))
        assert y0 is x0 and torch.equal(y1, x1[index]) and y1.dtype == dtype and index.shape == (len(x0),)
        found.append(index)
    assert all(torch.equal(index, found[0]) for index in found)
    if len(x0) > 1:
        assert not torch.equal(coupling.pair(x0, x1, seeded(2))[2], found[0])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    coupling.pair(x0, x1, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sigma_that_is_too_small_is_warned_of_once():
    x0, x1 = points((40, 64), 0)
    coupling = EntropicCoupling(0.005)
    with pytest.warns(UserWarning, match=r"sigma=0.005 is small beside the distances .* Take a larger sigma; or otcfm") as said:
        for _ in range(2):
            index = coupling.pair(x0, x1, seeded(0))[2]
    assert len(said) == 1 and ((0 <= index) & (index < 40)).all()


@pytest.mark.parametrize("sigma", [0, -1.0, float("inf"), float("nan")])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(ValueError, match="is not allowed: it must be greater than 0, and finite"):
        EntropicCoupling(sigma)


# Reflow

@pytest.fixture
def dataset():
    return FlowDataset.from_tensor(3 * torch.randn(300, 2, generator=seeded(0)) + torch.tensor([5.0, -1.0]))


@pytest.fixture
def trained(tmp_path, dataset):
    """Write a checkpoint of a network with weights of its own; a run's folder."""
    def make(name="run", seed=0, stats=None, config=None):
        torch.manual_seed(seed)
        model = create_model("mlp", dataset.data_shape, width=16, depth=1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_checkpoint(folder / "best.pt", model=model, epoch=1, step=0, best_val_loss=1.0, stats=stats or dataset.stats,
                        config=config or TrainingConfig())
        return folder
    return make


def test_the_pairs_are_those_of_the_ode(trained, dataset):
    folder = trained()
    for path in (folder, folder / "best.pt", str(folder)):
        flow = Flow(coupling=ReflowCoupling(path, pairs=200)).fit(dataset, seed=3)
        found = flow.fitted["found"]
        assert found["x0"].shape == found["x1"].shape == (200, 2)
        expected = load_flow(folder / "best.pt").sample(x0=found["x0"], method="rk4", steps=200)
        assert (found["x1"] - dataset.stats.normalize(expected)).abs().max() < 2e-3
        assert (found["x1"] - found["x0"]).abs().mean() > 0.1        # the network does move them
        assert abs(found["x0"].mean()) < 0.2 and abs(found["x0"].std() - 1) < 0.15


def test_rows_of_the_pairs_are_drawn_by_the_generator(trained, dataset):
    flow = Flow(coupling=ReflowCoupling(trained(), pairs=50)).fit(dataset)
    found, ignored = flow.fitted["found"], torch.full((4000, 2), float("nan"))
    x0, x1, rows = flow.coupling.pair(ignored, ignored, seeded(1))
    assert torch.equal(x0, found["x0"][rows]) and torch.equal(x1, found["x1"][rows])
    torch.manual_seed(9)
    assert torch.equal(flow.coupling.pair(ignored, ignored, seeded(1))[2], rows)
    assert not torch.equal(flow.coupling.pair(ignored, ignored, seeded(2))[2], rows)
    counts = rows.bincount(minlength=50)
    assert ((counts - 80).square() / 80).sum() < 49 + 5 * (2 * 49) ** 0.5       # χ² with 49 degrees of freedom
    double = flow.coupling.pair(ignored.double(), ignored.double(), seeded(1))
    assert double[0].dtype == double[1].dtype == torch.float64 and torch.equal(double[2], rows)


def test_the_exam_has_pairs_of_its_own_and_both_depend_on_the_seed(trained, dataset):
    coupling = ReflowCoupling(trained(), pairs=500)
    found = {(seed, held_out): coupling.fit(dataset, GaussianSource(), seed, "cpu", held_out)["x0"]
             for seed in (0, 1) for held_out in (False, True)}
    assert torch.equal(coupling.fit(dataset, GaussianSource(), 0, "cpu", True)["x0"], found[0, True])
    for first, second in itertools.combinations(found.values(), 2):
        assert not (first[:, None] == second).all(2).any()


@pytest.mark.parametrize(("pairs", "held_out", "expected"), [(0, False, 10_000), (0, True, 1_000), (70, False, 70), (70, True, 1_000)])
def test_as_many_pairs_as_are_asked_for(trained, dataset, pairs, held_out, expected):
    found = ReflowCoupling(trained(), pairs=pairs).fit(dataset, GaussianSource(), 0, "cpu", held_out)
    assert len(found["x0"]) == len(found["x1"]) == expected


def test_a_larger_data_set_asks_for_more_pairs(trained, dataset):
    larger = FlowDataset.from_tensor(dataset.denormalize(dataset.tensor).repeat(35, 1), stats=dataset.stats)
    for held_out in (False, True):
        assert len(ReflowCoupling(trained()).fit(larger, GaussianSource(), 0, "cpu", held_out)["x0"]) == len(larger) == 10_500


def test_kept_pairs_are_used_again_until_the_checkpoint_is_another(trained, dataset, tmp_path):
    def fit():
        flow = Flow(coupling=ReflowCoupling(tmp_path / "run", pairs=60)).fit(dataset, kept=tmp_path / "kept.pt")
        flow.write_fit(tmp_path / "kept.pt")
        return flow.fitted

    trained(seed=0)
    first = fit()
    forged = {"key": first["key"], "found": {name: value + 7 for name, value in first["found"].items()}}
    torch.save(forged, tmp_path / "kept.pt")
    assert torch.equal(fit()["found"]["x1"], forged["found"]["x1"])     # it is the file that was read
    trained(seed=1)
    second = fit()
    assert second["key"] != first["key"]
    assert torch.equal(second["found"]["x0"], first["found"]["x0"]) and not torch.allclose(second["found"]["x1"], first["found"]["x1"])


def test_the_checkpoint_and_not_its_name_decides(trained, dataset):
    assert ReflowCoupling(trained("one")).made_from(dataset) == ReflowCoupling(trained("one")).made_from(dataset)
    moved = trained("one").rename(trained("one").parent / "elsewhere")
    digest = ReflowCoupling(moved).made_from(dataset)
    assert len(digest) == 64 and digest == ReflowCoupling(moved / "best.pt").made_from(dataset)


def test_a_run_on_other_data_is_refused(trained, dataset):
    other = FlowDataset.from_tensor(dataset.denormalize(dataset.tensor) + 1)
    with pytest.raises(ValueError, match=r"best.pt was trained on points that were normalised otherwise \(mean differs in 2 of 2"):
        Flow(coupling=ReflowCoupling(trained())).fit(other)
    with pytest.raises(ValueError, match=r"shape \(2,\) against \(1, 8, 8\)"):
        Flow(coupling=ReflowCoupling(trained())).fit(FlowDataset.from_tensor(digits()[:50]))


def test_a_run_from_another_source_is_refused(trained, dataset):
    flow = Flow(coupling=ReflowCoupling(trained()), source=create_source("moons", dataset.stats))
    with pytest.raises(ValueError, match="was trained from source='gaussian', and this run starts from 'moons'"):
        flow.fit(dataset)


def test_a_run_that_is_not_there_is_named(tmp_path, dataset):
    for given_path, missing in [(tmp_path / "none", "none"), (tmp_path, "best.pt"), (tmp_path / "x.pt", "x.pt")]:
        coupling = ReflowCoupling(given_path)       # made without complaint: the path of a reflow is needed when its teacher is gone
        for ask in (coupling.made_from, Flow(coupling=coupling).fit):
            with pytest.raises(FileNotFoundError, match=f"there is no .*{missing}"):
                ask(dataset)
    for nothing in ("", None):
        with pytest.raises(ValueError, match="from_run is missing: say which trained run"):
            ReflowCoupling(nothing)


def test_pairs_must_be_made_before_they_are_drawn():
    with pytest.raises(RuntimeError, match="fit it first"):
        ReflowCoupling("somewhere").pair(*points((4, 2), 0))


# On other devices, and against the peer

@pytest.mark.cuda
def test_pairs_are_made_where_the_points_are(trained, dataset):
    x0, x1 = points((64, 2), 0)
    on_gpu, generator = (x0.cuda(), x1.cuda()), torch.Generator("cuda").manual_seed(0)
    assert torch.equal(OptimalTransportCoupling().pair(*on_gpu)[2].cpu(), OptimalTransportCoupling().pair(x0, x1)[2])
    index = EntropicCoupling().pair(*on_gpu, generator)[2]
    assert index.is_cuda and torch.equal(index, EntropicCoupling().pair(*on_gpu, generator.manual_seed(0))[2])
    flow = Flow(coupling=ReflowCoupling(trained(), pairs=100)).fit(dataset, device="cuda")
    assert all(part.is_cuda for part in flow.coupling.pair(*on_gpu, generator))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), (40, 2), (256, 2), (64, 1, 8, 8)], ids=str)
def test_torchcfm_has_the_same_assignment(shape):
    from torchcfm.optimal_transport import OTPlanSampler

    for seed in range(3):
        x0, x1 = points(shape, seed)
        plan = OTPlanSampler("exact").get_map(x0, x1)
        assert np.array_equal(plan.argmax(1), OptimalTransportCoupling().pair(x0, x1)[2].numpy()), f"seed {seed}"


@pytest.mark.slow
def test_torchcfm_draws_pairs_with_replacement_and_ignores_the_seed_of_torch():
    from torchcfm.optimal_transport import OTPlanSampler

    x0, x1 = points((256, 2), 0)
    sampler, drawn = OTPlanSampler("exact"), []
    for _ in range(20):
        torch.manual_seed(0)
        drawn.append(sampler.sample_plan(x0, x1)[1])
    assert 0.6 < sum(len(batch.unique(dim=0)) for batch in drawn) / (20 * 256) < 0.665
    assert not all(torch.equal(batch, drawn[0]) for batch in drawn)


@pytest.mark.slow
def test_torchcfm_and_pot_lose_the_plan_where_the_logarithms_keep_it():
    ot = pytest.importorskip("ot")
    x0, x1 = points((64, 64), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = ot.sinkhorn([], [], costs(x0, x1).numpy(), reg=2 * 0.2**2)
    assert not np.isclose(lost.sum(), 1, atol=0.1)
    plan, error = entropic_plan(alignment(x0, x1), 0.2)
    assert error <= 0.01 and plan.sum().item() == pytest.approx(64)
