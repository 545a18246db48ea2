"""AdamW on few vectors, against PyTorch's on a list of tensors."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from flowbook.optimizer import FlatAdamW


class Tied(nn.Module):
    """One matrix in two places, and a number by itself."""
    def __init__(self):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(5, 5), nn.Linear(5, 5), nn.Parameter(torch.tensor(1.5))
        self.last.weight = self.first.weight

    def forward(self, x): return self.scale * self.last(self.first(x).tanh())


def images():
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.SiLU(), nn.Conv2d(7, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 5))


def partly_frozen():
    model = nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Linear(9, 5))
    model[0].requires_grad_(False)
    return model


NETWORKS = {
    "plain": (lambda: nn.Sequential(nn.Linear(5, 33), nn.SELU(), nn.Linear(33, 17), nn.SELU(), nn.Linear(17, 5)), (5,)),
    "small and large": (lambda: nn.Sequential(nn.Linear(5, 400), nn.SELU(), nn.Linear(400, 400), nn.SELU(), nn.Linear(400, 5)), (5,)),
    "large": (lambda: nn.Sequential(nn.Linear(400, 400, bias=False), nn.SELU(), nn.Linear(400, 400, bias=False)), (400,)),
    "tied": (Tied, (5,)),
    "images": (images, (3, 8, 8)),
    "images, channels last": (lambda: images().to(memory_format=torch.channels_last), (3, 8, 8)),
    "partly frozen": (partly_frozen, (5,)),
}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, optimizer, shape, longest, first=0, steps=30, between=None):
    """Some steps, with gradients of very different lengths; returns their norms."""
    norms = []
    for step in range(first, first + steps):
        x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        if between: between()
        (model(x).square().mean() * (10 if step % 3 else 0.001)).backward()
        if isinstance(optimizer, FlatAdamW): norms.append(optimizer.clip(longest))
        else:
            norms.append(get_total_norm([parameter.grad for parameter in trainable(model)]))
            if longest:
                for parameter in trainable(model): parameter.grad /= (norms[-1] / longest).clamp(min=1).float()
        optimizer.step()
    return torch.stack(norms)


def two(name, lr=0.01, weight_decay=0.1):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    usual = make().double()
    flat = copy.deepcopy(usual)
    return (usual, torch.optim.AdamW(trainable(usual), lr=lr, weight_decay=weight_decay, fused=True)), \
        (flat, FlatAdamW(trainable(flat), lr, weight_decay)), shape


def apart(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("longest", [0.0, 0.1])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_as_adamw_does(name, longest):
    (usual, theirs), (flat, ours), shape = two(name)
    layout = [parameter.stride() for parameter in flat.parameters()]
    expected, norms = train(usual, theirs, shape, longest), train(flat, ours, shape, longest)
    assert torch.allclose(norms, expected, rtol=1e-9) and apart(usual, flat) < 1e-9
    assert (norms > 0.1).any() and (norms < 0.1).any()
    assert [parameter.stride() for parameter in flat.parameters()] == layout


@pytest.mark.parametrize("name", NETWORKS)
def test_either_goes_on_from_the_other_in_a_file(name):
    (usual, theirs), (flat, ours), shape = two(name)
    train(usual, theirs, shape, 1.0)
    train(flat, ours, shape, 1.0)
    states = []
    for optimizer in (theirs, ours):
        torch.save(optimizer.state_dict(), file := io.BytesIO())
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    from_theirs, from_ours = FlatAdamW(trainable(usual), 0.5), torch.optim.AdamW(trainable(flat), fused=True)
    from_theirs.load_state_dict(states[0])
    from_ours.load_state_dict(states[1])
    train(usual, from_theirs, shape, 1.0, first=30)
    train(flat, from_ours, shape, 1.0, first=30)
    assert apart(usual, flat) < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_it_goes_on_to_the_same_bits(name):
    _, (model, optimizer), shape = two(name)
    train(model, optimizer, shape, 1.0)
    state, stopped = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    train(model, optimizer, shape, 1.0, first=30)
    again = FlatAdamW(trainable(stopped))
    again.load_state_dict(state)
    train(stopped, again, shape, 1.0, first=30)
    assert apart(model, stopped) == 0


def test_the_state_of_no_step_is_the_beginning():
    _, (model, optimizer), shape = two("plain")
    empty, stopped = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True).state_dict(), copy.deepcopy(model)
    again = FlatAdamW(stopped.parameters())
    train(stopped, again, shape, 1.0, steps=3)
    stopped.load_state_dict(model.state_dict())
    again.load_state_dict(empty)
    train(stopped, again, shape, 1.0)
    train(model, optimizer, shape, 1.0)
    assert apart(model, stopped) == 0


@pytest.mark.parametrize("name", ["plain", "small and large"])
def test_gradients_that_somebody_has_removed_come_back(name):
    (usual, theirs), (flat, ours), shape = two(name)
    train(usual, theirs, shape, 1.0)
    for first in range(0, 30, 10):
        train(flat, ours, shape, 1.0, first=first, steps=10)
        flat.zero_grad(set_to_none=True)     # The network's, not the optimiser's
    assert apart(usual, flat) < 1e-9


@pytest.mark.parametrize("name", ["plain", "small and large"])
def test_gradients_may_be_removed_by_the_network(name):
    (usual, theirs), (flat, ours), shape = two(name)
    train(usual, theirs, shape, 0.1)
    train(flat, ours, shape, 0.1, between=flat.zero_grad)       # Backpropagation makes new ones, outside the vector
    assert apart(usual, flat) < 1e-9


def test_what_was_set_for_a_step_is_for_that_step():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = FlatAdamW([weight], lr=1.0, weight_decay=0.0)
    weight.grad.fill_(1e3)
    optimizer.clip(1.0)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.grad_scale is None and optimizer.found_inf is None and weight.item() == 0
    optimizer.zero_grad()
    weight.grad.fill_(1.0)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="takes no closure"): optimizer.step(lambda: None)


def test_states_that_can_not_be_its_own_are_refused_and_change_nothing():
    _, (model, optimizer), shape = two("plain")
    train(model, optimizer, shape, 1.0)
    before = copy.deepcopy(optimizer.state_dict())
    for (part, number, name), value, words in ((("state", 0, "step"), torch.tensor(7.0), "different numbers of steps"),
                                               (("param_groups", 0, "maximize"), True, "maximize=True"),
                                               (("param_groups", 0, "amsgrad"), True, "amsgrad=True")):
        other = copy.deepcopy(before)
        other[part][number][name] = value
        with pytest.raises(ValueError, match=words): optimizer.load_state_dict(other)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][k][name], before["state"][k][name]) for k in before["state"] for name in before["state"][k])


def test_a_weight_that_has_no_state_begins_at_zero_and_the_steps_are_kept():
    _, (model, optimizer), shape = two("plain")
    train(model, optimizer, shape, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    last = max(state["state"])
    del state["state"][last]        # As PyTorch's has it for a weight that never had a gradient
    optimizer.load_state_dict(state)
    kept = optimizer.state_dict()["state"]
    assert kept[0]["step"] == 30 and torch.equal(kept[0]["exp_avg"], state["state"][0]["exp_avg"]) and not kept[last]["exp_avg"].any()


def test_weights_that_are_loaded_are_those_that_train():
    _, (model, optimizer), shape = two("plain")
    _, (other, its), _ = two("plain")
    train(other, its, shape, 1.0, steps=5)
    model.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(its.state_dict()))
    train(model, optimizer, shape, 1.0)
    train(other, its, shape, 1.0)
    assert apart(model, other) == 0


@pytest.mark.parametrize("name", ["plain", "small and large", "large"])
def test_a_step_that_is_held_changes_nothing(name):
    _, (model, optimizer), shape = two(name)
    train(model, optimizer, shape, 1.0)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for part in optimizer.gradients(): part.fill_(float("inf"))
    optimizer.clip(1.0)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert apart(model, before) == 0
    for saved, now in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(saved[name], now[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("size", [3, 200_000])
def test_a_weight_that_nothing_depends_on_only_decays(size):
    used, unused = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))
    optimizer = FlatAdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.sum().backward()
    optimizer.clip(0.0)
    optimizer.step()
    assert torch.allclose(unused.detach(), torch.full((size,), 0.95)) and (used < 0.9).all()


def test_tensors_begin_where_pytorch_would_put_them_and_copies_are_independent():
    _, (model, optimizer), shape = two("small and large")
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    other = copy.deepcopy(model)
    train(model, optimizer, shape, 1.0, steps=2)
    assert apart(model, other) > 0


def test_what_does_not_fit_into_one_vector_is_refused():
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    for parameters in (groups, [model.weight, nn.Parameter(torch.ones(2).double())]):
        with pytest.raises(ValueError, match="must be of one type, on one device, in one group"): FlatAdamW(parameters)
    with pytest.raises(ValueError, match="Invalid learning rate"): FlatAdamW(model.parameters(), lr=-1.0)
