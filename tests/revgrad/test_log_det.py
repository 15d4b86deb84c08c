"""Log-determinants against the dense Jacobian, and their gradients against stored autograd, for all layers."""

import copy

import pytest
import torch
from torch import nn

from revgrad import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    ChainState,
    Concatenate,
    Coupling,
    GatedCoupling,
    HamiltonianStep,
    Inverse,
    InvertibleConv1x1,
    LayerCall,
    LeapfrogStep,
    LiveMemory,
    MomentumStep,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    ReversibleLayer,
    ReversibleSequential,
    Split,
    Swap,
    wrap,
)

MODES = ["stored", "checkpoint", "reversible"]


class Spline(Coupling):
    """A coupling whose derivative depends on its target: `x + tanh(m) sin(x) / 2`, undone by iteration."""

    def merge(self, target, *message):
        return target + torch.tanh(message[0]) * target.sin() / 2

    def unmerge(self, merged, *message):
        x = merged
        for _ in range(60):
            x = merged - torch.tanh(message[0]) * x.sin() / 2
        return x

    def log_derivative(self, target, *message):
        return (1 + torch.tanh(message[0]) * target.cos() / 2).log()


class LeakyReLU(ReversibleLayer):
    """A layer of a user, with a parameter that the log-determinant depends on as well."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def run(self, streams, call):
        return tuple(torch.where(x > 0, x, self.slope * x) for x in streams)

    def undo(self, streams, call):
        return tuple(torch.where(y > 0, y, y / self.slope) for y in streams)

    def log_det(self, streams, call):
        return sum((x < 0).flatten(1).sum(1) for x in streams) * self.slope.log()


def trained(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    layer.initialised = True
    return layer


def pair(cls, **options):
    """Two couplings, one for each of two streams `[B, 3]`."""
    return lambda make: [cls(make.net(3, cls.tensors_in_message), i, 1 - i, **options) for i in (0, 1)]


TWO = [(2, 3), (2, 3)]
# Name: layers, shapes of their input streams.
CASES = {
    "additive": (pair(AdditiveCoupling), TWO),
    "affine": (pair(AffineCoupling), TWO),
    "affine, bounded": (pair(AffineCoupling, bound=0.7), TWO),
    "gated": (pair(GatedCoupling), TWO),
    "spline": (pair(Spline), TWO),
    "momentum": (lambda make: [MomentumStep(make.net(3), 0.7), MomentumStep(make.net(3), 0.2)], TWO),
    "hamiltonian": (lambda make: [HamiltonianStep(make.net(3), make.net(3)), LeapfrogStep(make.net(3))], TWO),
    "actnorm": (lambda make: [trained(ActNorm(3)), trained(ActNorm(2, target=1))], [(2, 3, 2), (2, 2)]),
    "convolution": (lambda make: [trained(InvertibleConv1x1(3, target=1))], [(2, 2), (2, 3, 1, 2)]),
    "rearrangements": (
        lambda make: [PixelUnshuffle(2), Permute([2, 0, 3, 1]), Split(), Swap(), Concatenate(), PixelShuffle(2)],
        [(2, 1, 2, 4)],
    ),
    "users": (lambda make: [LeakyReLU(), *pair(AffineCoupling)(make), LeakyReLU()], TWO),
    "wrapped": (
        lambda make: [wrap(lambda x, y: (x.exp(), y), lambda x, y: (x.log(), y), lambda x, y: x.flatten(1).sum(1))],
        TWO,
    ),
    "three streams": (
        lambda make: [AffineCoupling(Sum(make.net(3, 2)), (0, 2), 1), AffineCoupling(make.net(3, 2), 1, 2)],
        [(2, 3)] * 3,
    ),
    "glow": (
        lambda make: [
            trained(ActNorm(4)),
            trained(InvertibleConv1x1(4)),
            Split(),
            AffineCoupling(make.net(2, 2), bound=1),
            Concatenate(),
        ],
        [(3, 4)],
    ),
}


class Sum(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, a, b):
        return self.net(a + b)


@pytest.fixture(params=CASES)
def case(request, make):
    build, shapes = CASES[request.param]
    layers = build(make)
    x = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return ReversibleSequential(*layers, arithmetic="float").double(), x


def dense(chain, x):
    """`log |det|` of each sample's whole Jacobian."""
    widths = [t[0].numel() for t in x]

    def flat(v):
        y = chain.run(tuple(p.view(1, *t.shape[1:]) for p, t in zip(v.split(widths), x, strict=True)), LayerCall())
        return torch.cat([t.flatten() for t in y])

    found = []
    for i in range(len(x[0])):
        v = torch.cat([t[i].detach().flatten() for t in x])
        found.append(torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, v)).logabsdet)
    return torch.stack(found)


def pulled(chain, x, mode, *, outputs=True):
    """Log-determinant and gradients of a loss of it, and of the outputs as well if wanted."""
    chain.mode = mode
    y, log_det = chain(*x, log_det=True)
    y = (y,) if isinstance(y, torch.Tensor) else y
    loss = (torch.arange(1.0, 1 + len(log_det)) * log_det + log_det.square()).sum()
    if outputs:
        loss = loss + sum((i + 1) * t.sin().sum() for i, t in enumerate(y))
    wanted = (*x, *chain.parameters())
    grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    return {
        "log_det": log_det.detach(),
        **{f"output {i}": t.detach() for i, t in enumerate(y)},
        **{
            f"gradient {i}": torch.zeros_like(w) if g is None else g
            for i, (w, g) in enumerate(zip(wanted, grads, strict=True))
        },
    }


@pytest.mark.parametrize("mode", MODES)
def test_is_that_of_the_dense_jacobian(case, mode):
    chain, x = case
    for layer in (chain, ReversibleSequential(Inverse(copy.deepcopy(chain)), arithmetic="float")):
        layer.mode = mode
        inside = tuple(t.detach().sigmoid() + 0.1 for t in x)  # where a logarithm is defined
        torch.testing.assert_close(layer(*inside, log_det=True)[1], dense(layer, inside), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Log-determinants", "gradients in reversible and checkpoint mode, through Inverse, repeated")
def test_gradients_are_those_of_stored_autograd(case, check, mode, outputs):
    chain, x = case
    inner = copy.deepcopy(chain)
    for layers in ([*chain], [Inverse(inner)], [inner, inner]):
        layer = ReversibleSequential(*layers, arithmetic="float")
        inside = tuple((t.detach().sigmoid() + 0.1).requires_grad_() for t in x)
        check.same(
            pulled(layer, inside, mode, outputs=outputs), pulled(layer, inside, "stored", outputs=outputs), rtol=1e-9
        )


@pytest.mark.parametrize("option", [{"drift_guard": True}, {"anchor_every": 1}, {"memory_budget": 150}])
@pytest.mark.composes("Log-determinants", "`drift_guard=`, `anchor_every=`, `memory_budget=`")
def test_options_do_not_look_at_what_no_rewind_recovers(make, check, option):
    layers = [*pair(AffineCoupling)(make), *pair(AffineCoupling)(make)]
    x = make.streams(2, 3)
    expected = pulled(ReversibleSequential(*layers), x, "stored")
    check.same(pulled(ReversibleSequential(*layers, **option), x, "reversible"), expected, rtol=1e-5)


def test_inverse_gives_the_opposite(case):
    chain, x = case
    y, log_det = chain(*x, log_det=True)
    y = (y,) if isinstance(y, torch.Tensor) else y
    back, opposite = chain.inverse(*y, log_det=True)
    torch.testing.assert_close(opposite, -log_det, rtol=1e-9, atol=1e-9)
    back = (back,) if isinstance(back, torch.Tensor) else back
    for a, b in zip(back, x, strict=True):
        torch.testing.assert_close(a, b)


def test_volume_preserving_chains_give_zero(make):
    chain = ReversibleSequential(*pair(AdditiveCoupling)(make), Swap(), HamiltonianStep(make.net(3), make.net(3)))
    y, log_det = chain(*make.streams(5, 3), log_det=True)
    assert torch.equal(log_det, torch.zeros(5))
    (y[0].sum() + log_det.sum()).backward()


@pytest.mark.composes("Log-determinants", "exact arithmetic", "works: that of the unrounded map")
def test_exact_arithmetic_has_the_determinants_of_the_unrounded_map(make, check):
    chain = ReversibleSequential(*(MomentumStep(make.net(4), 0.5) for _ in range(3)), make.coupling("gated"))
    x = make.streams(dtype=torch.float64)
    chain.double()
    check.same(pulled(chain, x, "reversible"), pulled(chain, x, "stored"), rtol=1e-12)
    exact = chain(*x, log_det=True)[1]
    chain.arithmetic = "float"
    torch.testing.assert_close(exact, chain(*x, log_det=True)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.composes("Log-determinants", "conditioning states")
def test_states_come_between_result_and_log_determinant(make):
    chain = make.recurrent("affine", 3, states=2, carries=1).double()
    x, state = make.streams(dtype=torch.float64), make.state(chain, dtype=torch.float64, requires_grad=True)
    found = {}
    for mode in MODES:
        chain.mode = mode
        y, new, log_det = chain(*x, states=state, log_det=True)
        assert isinstance(new, ChainState)
        assert len(new.layers) == 3
        plain, same = chain(*x, states=state)
        assert all(map(torch.equal, (*y, *new.tensors()), (*plain, *same.tensors())))
        loss = log_det.square().sum() + sum(t.sum() for t in new.tensors())
        found[mode] = torch.autograd.grad(loss, (*x, *state.tensors(), *chain.parameters()), allow_unused=True)
    for mode in ("checkpoint", "reversible"):
        for a, b in zip(found[mode], found["stored"], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Log-determinants", "autocast", "works: summed in the streams' precision")
def test_under_autocast_it_is_summed_in_the_streams_precision(make, mode):
    chain = ReversibleSequential(ActNorm(3), *pair(AffineCoupling, bound=1.0)(make), ActNorm(3, target=1))
    x = make.streams(4, 3)
    chain(*x)
    found = {}
    for chain.mode in ("stored", mode):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, log_det = chain(*x, log_det=True)
        assert log_det.dtype == torch.float32
        grads = torch.autograd.grad(log_det.square().sum() + y[0].sum(), (*x, *chain.parameters()), allow_unused=True)
        found[chain.mode] = [log_det, *(torch.zeros(1) if g is None else g for g in grads)]
    for a, b in zip(found[mode], found["stored"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.composes("Log-determinants", "conditioning, common and per layer")
def test_transforms_are_told_what_the_chain_is_told(check):
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 6)

        def forward(self, x, *, context):
            return torch.tanh(self.net(torch.cat([x, context], 1))).chunk(2, 1)

    layers = [AffineCoupling(Told(), 0, 1), LeakyReLU(), Inverse(AffineCoupling(Told(), 1, 0))]
    chain = ReversibleSequential(*layers).double()
    *x, context = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = {}
    for chain.mode in MODES:
        y, log_det = chain(*x, context=context, log_det=True, per_layer=[None, None, {"context": context.sin()}])
        found[chain.mode] = torch.autograd.grad(
            log_det.square().sum() + check.loss(y), (*x, context, *chain.parameters())
        )
    for mode in ("checkpoint", "reversible"):
        for a, b in zip(found[mode], found["stored"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    back, opposite = chain.inverse(
        *y, context=context, log_det=True, per_layer=[None, None, {"context": context.sin()}]
    )
    torch.testing.assert_close(opposite, -log_det)
    torch.testing.assert_close(back, tuple(x))


def test_backward_evaluates_every_transform_once(make):
    layers = [*pair(AffineCoupling)(make), *map(Inverse, pair(AffineCoupling)(make))]
    y, log_det = ReversibleSequential(*layers)(*make.streams(2, 3), log_det=True)
    (y[0].sum() + log_det.sum()).backward()
    nets = [m for layer in layers for m in layer.modules() if isinstance(m, make.net)]
    assert [net.count[0] for net in nets] == [2] * 4


def test_memory_does_not_grow_with_depth(make):
    def held(depth):
        chain = make.chain("affine", depth, 16)
        x = make.streams(64, 16)
        with LiveMemory() as memory:
            kept = chain(*x, log_det=True)
        assert kept[1].requires_grad
        return memory.live

    assert held(12) <= held(2) + 12 * 64 * 4  # one total per layer would be all right, an activation would not
