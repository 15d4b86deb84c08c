"""What modules keep in attributes is found by the second evaluation as by the first."""

import random
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from revgrad import AdditiveCoupling, ReversibilityError, ReversibleSequential

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Counting(nn.Module):
    """Counts its calls, and scales by their number and by a mean that it replaces."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0
        self.mean = torch.ones(4)

    def forward(self, x):
        self.calls += 1
        self.mean = 0.5 * self.mean + x.detach().mean(0)
        return self.calls * self.inner(x) + self.mean


def streams():
    torch.manual_seed(0)
    return [torch.randn(3, 4, requires_grad=True) for _ in range(2)]


def chain_of(make, **options):
    torch.manual_seed(1)
    module = make()
    return ReversibleSequential(AdditiveCoupling(module), AdditiveCoupling(module, 1, 0), **options), module


@pytest.mark.composes("Structure", "modules that count their calls, or replace tensors in attributes")
@pytest.mark.parametrize("steps", [1, 2])
def test_counters_and_replaced_tensors_are_as_under_stored_autograd(steps):
    found = {}
    for mode in ("stored", "checkpoint", "reversible"):
        chain, module = chain_of(Counting, mode=mode)
        for _ in range(steps):
            sum(y.square().sum() for y in chain(*streams())).backward()
        found[mode] = (module.inner.weight.grad, module.mean, torch.tensor(module.calls))
    for stored, *others in zip(*found.values(), strict=True):
        for other in others:
            torch.testing.assert_close(other, stored, rtol=1e-4, atol=1e-4)


def test_a_budget_measures_and_leaves_everything_as_it_was():
    class Remembering(Counting):
        def __init__(self):
            super().__init__()
            self.seen, self.last, self.names, self.average = [], deque(maxlen=1), {"n": 0}, torch.zeros(4)

        def forward(self, x):
            self.seen.append(1)
            self.last.append(len(self.seen))
            self.names["n"] += 1
            return super().forward(x) * len(self.seen) + self.names["n"] + self.last[0] + random.random()

    outputs = []
    for options in ({"mode": "stored"}, {"memory_budget": "1 GB"}):
        random.seed(0)
        chain, module = chain_of(Remembering, **options)
        seen = module.seen
        outputs.append(torch.cat(chain(*streams())))
        assert (module.seen is seen, len(seen), module.names, list(module.last)) == (True, 2, {"n": 2}, [2])
    assert torch.equal(*outputs)


# --- what raises ---


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.tanh(self.weight)
        return x @ self.cache


def test_a_value_computed_from_a_parameter_and_kept_has_no_gradient():
    chain, _ = chain_of(Caching)
    with pytest.raises(ReversibilityError, match=r"Caching keeps a tensor .* in its attribute 'cache'"):
        chain(*streams())[1].sum().backward()


OTHER = nn.Parameter(torch.ones(4))


class Foreign(nn.Linear):
    """Puts aside a loss that depends on none of its own parameters."""

    def __init__(self, put):
        super().__init__(4, 4)
        self.losses, self.put = [], put

    def forward(self, x):
        self.put(self, OTHER.square().sum())
        return super().forward(x)


@pytest.mark.parametrize(
    "put", [lambda module, loss: setattr(module, "loss", loss), lambda module, loss: module.losses.append(loss)]
)
def test_a_loss_of_foreign_parameters_put_aside_raises(put):
    chain, _ = chain_of(lambda: Foreign(put))
    with pytest.raises(ReversibilityError, match=r"Foreign keeps a tensor .* in its attribute 'loss"):
        chain(*streams())[1].sum().backward()


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.average = torch.zeros(4)
        self.moving = True

    def forward(self, x):
        if self.moving:
            self.average.lerp_(x.detach().mean(0), 0.1)
        return x * self.average


def test_a_tensor_changed_in_place_is_named():
    chain, module = chain_of(Averaging)
    with pytest.raises(ReversibilityError, match=r"Averaging keeps .* 'average' .* in place during the forward pass"):
        chain(*streams())
    module.moving = False
    loss = chain(*streams())[1].sum()
    module.average.add_(1)
    with pytest.raises(ReversibilityError, match=r"'average' .* in place since the forward pass"):
        loss.backward()


def test_a_loss_put_aside_raises_though_the_module_has_a_hook():
    class Aside(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.loss = y.square().mean()
            return y

    chain, module = chain_of(lambda: Aside(4, 4))
    module.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ReversibilityError, match="in its attribute 'loss'"):
        chain(*streams())[1].sum().backward()


# --- weights that hooks compute ---

HOOKED = {
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.3),
    "weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval(),
}


@pytest.mark.composes("Hooks", "a penalty on a weight that pruning, weight norm or spectral norm computes")
@pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)
def test_a_penalty_on_a_weight_that_a_hook_computes_has_its_gradient(make):
    found = []
    for mode in ("stored", "reversible"):
        chain, module = chain_of(make, mode=mode)
        for _ in range(2):
            y = chain(*streams())
            (y[1].square().sum() + 3 * module.weight.square().sum()).backward()
        found.append([p.grad for p in chain.parameters()])
    for stored, reversible in zip(*found, strict=True):
        torch.testing.assert_close(reversible, stored, rtol=1e-4, atol=1e-4)
