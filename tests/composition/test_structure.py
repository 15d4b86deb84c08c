"""What a chain may be made of. Frozen and shared parameters are in tests/revgrad/test_function.py."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from revgrad import AdditiveCoupling, AffineCoupling, PixelUnshuffle, ReversibleSequential, Split, snap

pytestmark = pytest.mark.usefixtures("single_thread")

MODES = ["checkpoint", "reversible"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "transforms without parameters (the identity)")
def test_identity_as_transform(small, make, as_stored, mode):
    chain = small.of(nn.Identity, 3)
    as_stored(chain, make.streams(), mode)
    # One of them with parameters, the others without.
    chain[1].transform = small.net()
    as_stored(chain, make.streams(), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "in-place operations inside a transform")
def test_in_place_inside(small, make, as_stored, mode):
    def block():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.ReLU(inplace=True))

    as_stored(small.of(block), make.streams(), mode)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.tuples(*[st.integers(1, 7)] * 2),
    sizes=st.lists(st.integers(1, 5), max_size=2),
    mode=st.sampled_from(MODES),
)
@pytest.mark.composes("Structure", "odd and unequal stream widths, any number of dimensions")
def test_unequal_widths(as_stored, widths, sizes, mode):
    torch.manual_seed(0)
    a, b = widths
    chain = ReversibleSequential(
        AdditiveCoupling(nn.Linear(a, b), 0, 1),
        AffineCoupling(Pair(b, a), 1, 0),
        AdditiveCoupling(nn.Linear(a, b), 0, 1),
    )
    as_stored(chain, tuple(torch.randn(2, *sizes, w, requires_grad=True) for w in widths), mode)


class Pair(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, 2 * out)

    def forward(self, x):
        return torch.tanh(self.linear(x)).chunk(2, dim=-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "a Split of odd width, streams as views")
def test_odd_split(as_stored, mode):
    chain = ReversibleSequential(
        Split((2, 5)), AdditiveCoupling(nn.Linear(2, 5), 0, 1), AdditiveCoupling(nn.Linear(5, 2), 1, 0)
    )
    as_stored(chain, (torch.randn(3, 7, requires_grad=True),), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "three streams, of which some are read, some updated, some neither")
def test_three_streams(small, make, as_stored, mode):
    places = [(0, 1), (1, 2), (2, 0), (0, 2), (2, 1)]
    as_stored(ReversibleSequential(*(AdditiveCoupling(small.net(), *p) for p in places)), make.streams(count=4), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "downsampling inside the sequence")
def test_downsampling_inside(as_stored, mode):
    def block(channels):
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh())

    stages = []
    for channels in (1, 4, 16):
        stages += [AdditiveCoupling(block(channels), 0, 1), AdditiveCoupling(block(channels), 1, 0), PixelUnshuffle(2)]
    chain = ReversibleSequential(Split(2), *stages[:-1])
    found = as_stored(chain, (torch.randn(2, 2, 8, 12, requires_grad=True),), mode)
    assert found["output 0"].shape == (2, 16, 2, 3)


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.composes("Structure", "64 layers, there and back by the public API")
def test_inverse_of_64_layers(small, make, arithmetic):
    chain = small.chain(64, arithmetic=arithmetic)
    x = make.streams(50, requires_grad=False)
    if arithmetic == "exact":
        x = tuple(map(snap, x))
    with torch.no_grad():
        back = chain.inverse(*chain(*x))
    for a, b in zip(back, x, strict=True):
        if arithmetic == "exact":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.composes("Structure", "64 layers, gradients")
def test_gradients_of_64_layers(small, make, as_stored):
    as_stored(small.chain(64), make.streams(), rtol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "an empty batch")
def test_empty_batch(small, make, as_stored, mode):
    as_stored(small.chain(), make.streams(0), mode, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "a chain inside the transform of a chain")
def test_chain_within_a_transform(small, make, as_stored, mode):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = small.chain(2)

        def forward(self, x):
            return torch.tanh(self.chain(x, x.sin())[1])

    as_stored(small.of(Inner), make.streams(), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Structure", "weights computed anew in every forward pass (weight norm)")
def test_parametrized_weights(small, make, check, mode):
    def block():
        net = small.net()
        torch.nn.utils.parametrizations.weight_norm(net.first)
        return net

    chain, x = small.of(block).double(), make.streams(dtype=torch.float64)
    found = {}
    for m in ("stored", mode):
        chain.mode = m
        found[m] = dict(enumerate(torch.autograd.grad(check.loss(chain(*x)), (*x, *chain.parameters()))))
    check.same(found[mode], found["stored"], rtol=1e-9)


@pytest.mark.composes(
    "Structure",
    "weights whose norm is estimated on the way (spectral norm)",
    "error in train mode: *changed its buffer*",
)
def test_spectral_norm(small, make, check):
    def block():
        net = small.net()
        torch.nn.utils.parametrizations.spectral_norm(net.first)
        return net

    chain, x = small.of(block).double(), make.streams(dtype=torch.float64)
    for chain.mode in MODES:
        with pytest.raises(RuntimeError, match=r"_SpectralNorm changed its buffer '_u'.*mode='stored'"):
            chain(*x)
    chain.eval()
    found = torch.autograd.grad(check.loss(chain(*x)), (*x, *chain.parameters()))
    chain.mode = "stored"
    for a, b in zip(found, torch.autograd.grad(check.loss(chain(*x)), (*x, *chain.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.composes("Structure", "complex streams")
def test_complex_streams(small, check):
    chain = small.chain().to(torch.complex128)
    x = tuple(torch.randn(3, 4, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        loss = sum((y * y.conj()).real.sum() + y.imag.sin().sum() for y in chain(*x))
        found[mode] = dict(enumerate(map(torch.view_as_real, torch.autograd.grad(loss, (*x, *chain.parameters())))))
    check.same(found["reversible"], found["stored"], rtol=1e-9)


@pytest.mark.composes("Structure", "streams of different dtypes")
def test_streams_of_different_dtypes(small, make, check):
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small.net()

        def forward(self, x):
            return self.net(x.float())

    chain, x = small.of(Rounding), make.streams(dtype=torch.float64)
    x = x[0], x[1].detach().float().requires_grad_()
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-5)


@pytest.mark.composes("Structure", "one tensor for two streams, views of one tensor, a memory format")
def test_streams_that_share_memory(small, make, check):
    chain, x = small.chain().double(), torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    last = torch.randn(2, 4, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    ways = [
        lambda: (x[..., 0], x[..., 0]),
        lambda: (x[..., 1], x[..., 2]),
        lambda: (x[:1, :, 3].expand(3, 4), x[..., 4]),
        lambda: last.permute(0, 2, 3, 1).chunk(2),
    ]
    for way in ways:
        found = []
        for mode in ("reversible", "stored"):
            chain.mode = mode
            grads = torch.autograd.grad(check.loss(chain(*way())), (x, last, *chain.parameters()), allow_unused=True)
            found.append(dict(enumerate(grads)))
        check.same(*found, rtol=1e-9)
