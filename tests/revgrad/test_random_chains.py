"""Any chain, with any options, computes what it computes in stored mode: outputs, gradients and statistics."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from revgrad import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Concatenate,
    GatedCoupling,
    HamiltonianStep,
    Inverse,
    InvertibleConv1x1,
    LeapfrogStep,
    MomentumStep,
    Permute,
    ReversibleSequential,
    Split,
    Swap,
    VelocityCoupling,
    wrap,
)

pytestmark = pytest.mark.usefixtures("single_thread")

WIDTH = 4
HYPOTHESIS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `check` has no state


class Transform(nn.Module):
    """`[B, W]` to messages, with a normalisation and dropout inside, and a context that not every call has."""

    def __init__(self, messages=1):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
        self.last = nn.Linear(8, messages * WIDTH)
        self.messages = messages

    def forward(self, *sources, context=None):
        y = torch.tanh(self.last(self.mix(sum(sources) if context is None else sum(sources) * context)))
        return y if self.messages == 1 else y.chunk(self.messages, dim=1)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.2))

    def there(self, *streams):
        return tuple(x * self.log.exp() for x in streams)

    def back(self, *streams):
        return tuple(x / self.log.exp() for x in streams)


def scaled():
    scale = Scale()
    return wrap(scale.there, scale.back)


EXACT = {
    "additive": AdditiveCoupling,
    "gated": GatedCoupling,
    "velocity": VelocityCoupling,
    "momentum": MomentumStep,
    "leapfrog": LeapfrogStep,
    "hamiltonian": lambda f: HamiltonianStep(f, Transform(), 0.5),
    "swap": lambda f: Swap(),
    "permute": lambda f: Permute([2, 0, 3, 1]),
}
FLOAT = EXACT | {
    "affine": lambda f: AffineCoupling(f, 1, 0, bound=1.0),
    "inverse of affine": lambda f: Inverse(AffineCoupling(f, bound=1.0)),
    "inverse of additive": lambda f: Inverse(AdditiveCoupling(f, 1, 0)),
    "actnorm": lambda f: ActNorm(WIDTH, target=1),
    "convolution": lambda f: Inverse(InvertibleConv1x1(WIDTH)),
    "scale": lambda f: scaled(),
    "joined and cut": lambda f: ReversibleSequential(Concatenate(), Split()),
}
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "anchor_every": st.integers(1, 3),
        "drift_guard": st.booleans(),
        "memory_budget": st.sampled_from([500, 2000, 5000]),
    },
)


def built(kinds, available):
    """The layers by name; `again` is the layer before, with the same weights."""
    layers = []
    for kind in kinds:
        if kind == "again":
            layers += layers[-1:]
        else:
            layers.append(available[kind](Transform(2 if "affine" in kind or kind == "gated" else 1)))
    return layers


def compare(data, check, available, **tolerance):
    kinds = data.draw(st.lists(st.sampled_from([*available, "again"]), min_size=1, max_size=6), label="layers")
    options = data.draw(OPTIONS, label="options")
    seed, trains, wanted = data.draw(st.tuples(st.integers(0, 99), st.booleans(), st.integers(1, 3)), label="other")
    told = data.draw(st.booleans(), label="told")
    torch.manual_seed(seed)
    arithmetic = "exact" if available is EXACT else "float"
    chain = ReversibleSequential(*built(kinds, available), arithmetic=arithmetic).double().train(trains)
    for p in list(chain.parameters())[seed % 3 :: 5]:
        p.requires_grad_(False)
    x = tuple(torch.randn(3, WIDTH, dtype=torch.float64).requires_grad_(bool(wanted & (1 << i))) for i in (0, 1))
    told = told and chain.accepts("context")
    conditioning = {"context": torch.randn(WIDTH, dtype=torch.float64)} if told else {}
    expected = check.gradients(chain, x, "stored", **conditioning)
    for name, value in options.items():
        setattr(chain, name, value)
    found = check.gradients(chain, x, "reversible", **conditioning)
    check.same(filled(found, expected), filled(expected, found), **tolerance)


def filled(values, other):
    """Zeros where there is no gradient but one in `other`: None and zero are the same."""
    return {k: torch.zeros_like(other[k]) if v is None and other[k] is not None else v for k, v in values.items()}


@HYPOTHESIS
@given(st.data())
def test_float_chain_is_its_stored_twin(check, data):
    compare(data, check, FLOAT, rtol=1e-8, atol=1e-10)  # the bias before a normalisation has no gradient but noise


@HYPOTHESIS
@given(st.data())
def test_exact_chain_is_its_stored_twin_bit_for_bit(check, data):
    compare(data, check, EXACT)
