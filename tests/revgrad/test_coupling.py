import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from revgrad import (
    AdditiveCoupling,
    AffineCoupling,
    ChainState,
    Coupling,
    GatedCoupling,
    Inverse,
    LayerCall,
    Residue,
    ReversibleSequential,
    StreamError,
    snap,
)
from revgrad.hamiltonian import ReflectionCoupling
from revgrad.momentum import VelocityCoupling
from revgrad.residue import quantise_gate

KINDS = ["additive", "affine", "gated"]
EXACT_KINDS = ["additive", "gated"]


class Fixed(nn.Module):
    """A transform that returns what it was given."""

    def __init__(self, *message, state=None):
        super().__init__()
        self.message, self.state = message, state

    def forward(self, x, state=None):
        message = self.message[0] if len(self.message) == 1 else self.message
        return message if self.state is None else (message, self.state)


class Doubling(Coupling):
    """A coupling of a user: not one of ours, with the default gradients and no exact form."""

    def merge(self, target, *message):
        return 2 * target + message[0] ** 3

    def unmerge(self, merged, *message):
        return (merged - message[0] ** 3) / 2


# Formulas


def test_float_merges_are_their_formulas():
    x, a, b = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    g = torch.sigmoid(a)
    for coupling, expected in [
        (AdditiveCoupling(Fixed(a)), x + a),
        (AffineCoupling(Fixed(a, b)), x * torch.exp(a) + b),
        (GatedCoupling(Fixed(a, b)), (1 - g) * x + g * b),
    ]:
        source = torch.randn(3, 4, dtype=torch.float64)
        kept, merged = coupling.run((source, x), LayerCall())
        assert kept is source
        torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(coupling.undo((source, merged), LayerCall())[1], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 2.0**-16), (torch.float64, 2.0**-32)])
def test_exact_merges_are_their_formulas_on_the_grid(dtype, step):
    x, a, h = snap(torch.randn(300, dtype=dtype)), torch.randn(300, dtype=dtype), torch.randn(300, dtype=dtype)
    source = torch.zeros(300, dtype=dtype)
    merged = AdditiveCoupling(Fixed(h)).run((source, x), LayerCall(residue=Residue()))[1]
    assert torch.equal(merged, x + snap(h))
    merged = GatedCoupling(Fixed(a, h)).run((source, x), LayerCall(residue=Residue()))[1]
    keep = quantise_gate(torch.sigmoid(a)).double() / 2**16
    # One step from the scaling, half a one from rounding g h, and the float's own rounding.
    assert ((merged.double() - keep * x.double() - (1 - keep) * h.double()).abs() < 1.6 * step).all()
    assert torch.equal(merged / step, torch.round(merged / step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", EXACT_KINDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_exact_run_and_undo_restore_every_bit(make, kind, dtype, inverse):
    layer = make.coupling(kind, 5).to(dtype)
    residue = Residue()
    x = tuple(map(snap, make.streams(41, 5, dtype=dtype, requires_grad=False)))
    if inverse and kind == "gated":
        # An inverse undoes what was done: it needs a residue to take from.
        y = layer.run(x, LayerCall(residue=residue))
        back = Inverse(layer).run(y, LayerCall(residue=residue))
        residue.check_undone_to()
    else:
        layer = Inverse(layer) if inverse else layer
        y = layer.run(x, LayerCall(residue=residue))
        back = layer.undo(y, LayerCall(residue=residue))
    assert not torch.equal(y[1], x[1])
    assert all(map(torch.equal, back, x))


# Gradients


def in_float64(make, kind, inverse):
    layers = [make.coupling(kind, 2, i) for i in range(3)]
    layers.append(make.coupling(kind, 2, 1))
    if inverse:
        layers = [Inverse(layer) for layer in layers]
    return ReversibleSequential(*layers, mode="reversible", arithmetic="float").double()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_streams_and_parameters(make, kind, inverse):
    chain = in_float64(make, kind, inverse)
    names, values = zip(*chain.named_parameters(), strict=True)
    x = make.streams(2, 2, dtype=torch.float64)

    def call(*tensors):
        return torch.func.functional_call(chain, dict(zip(names, tensors[2:], strict=True)), tensors[:2])

    assert torch.autograd.gradcheck(call, (*x, *(v.detach().clone().requires_grad_() for v in values)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_states(make, kind):
    chain = make.recurrent(kind, depth=3, width=2, states=2, carries=1, arithmetic="float").double()
    x = make.streams(2, 2, dtype=torch.float64)
    state = make.state(chain, 2, 2, torch.float64, requires_grad=True)

    def call(*tensors):
        outputs, new = chain(*tensors[:2], states=state.replace(tensors[2:]))
        return (*outputs, *new.tensors())

    assert torch.autograd.gradcheck(call, (*x, *state.tensors()))


@pytest.mark.parametrize("wrap", [lambda c: c, Inverse])
def test_coupling_of_a_user_gets_its_gradients_for_free(make, check, wrap):
    chain = ReversibleSequential(wrap(Doubling(make.net(3))), wrap(Doubling(make.net(3), 1, 0))).double()
    x = make.streams(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(chain, x)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "streams"), [(AdditiveCoupling, 0), (VelocityCoupling, 0), (ReflectionCoupling, 0), (GatedCoupling, 3)]
)
def test_stored_exact_merges_keep_target_and_message_only_where_they_are_read(kind, streams):
    message = [torch.randn(64, 4, requires_grad=True) for _ in range(2 if kind is GatedCoupling else 1)]
    chain = ReversibleSequential(kind(Fixed(*message)), mode="stored", arithmetic="exact")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        outputs = chain(torch.randn(64, 4), torch.randn(64, 4, requires_grad=True))
    assert sum(saved) == streams * 64 * 4
    grads = torch.autograd.grad(outputs[1], message, torch.ones(64, 4))
    assert all(g.shape == (64, 4) for g in grads)


def test_a_gradient_of_ones_own_gets_the_values():
    class Own(AdditiveCoupling):
        def merge_vjp(self, grad, exact, target, *message):
            return grad, grad * message[0]

    chain = ReversibleSequential(Own(Fixed(torch.full((3, 4), 2.0, requires_grad=True))), arithmetic="exact")
    x = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    for mode in ("stored", "checkpoint"):
        chain.mode = mode
        message = chain[0].transform.message[0]
        (grad,) = torch.autograd.grad(chain(*x)[1].sum(), message)
        assert torch.equal(grad, torch.full((3, 4), 2.0))


def test_exact_gradient_passes_straight_through_the_rounding():
    """It is the gradient of the unrounded formula with the gate that was used."""
    x, a, h = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(3))
    source = torch.zeros(50, dtype=torch.float64)
    grad = torch.randn(50, dtype=torch.float64)
    merged = GatedCoupling(Fixed(a, h)).run((source, snap(x)), LayerCall(residue=Residue()))[1]
    found = torch.autograd.grad(merged, (x, a, h), grad)
    s = torch.sigmoid(a).detach()
    gate = 1 - quantise_gate(s).double() / 2**16
    expected = (grad * (1 - gate), (h - snap(x)) * grad * s * (1 - s), grad * gate)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_message_in_another_dtype_is_merged_in_the_streams(make, kind):
    class Half(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)
            return y.bfloat16() if isinstance(y, torch.Tensor) else tuple(m.bfloat16() for m in y)

    cls = {"additive": AdditiveCoupling, "gated": GatedCoupling}[kind]
    for arithmetic in ("exact", "float"):
        chain = ReversibleSequential(cls(Half(make.net(4, cls.tensors_in_message))), arithmetic=arithmetic)
        x = make.streams()
        outputs = {}
        for mode in ("stored", "reversible"):
            chain.mode = mode
            chain.zero_grad()
            y = chain(*x)
            assert y[1].dtype == torch.float32
            (y[1] * torch.arange(4)).sum().backward()
            outputs[mode] = [y[1], *(p.grad for p in chain.parameters())]
        assert all(map(torch.equal, outputs["stored"], outputs["reversible"]))


# Several sources


class Mixing(nn.Module):
    """Reads any number of streams of any widths: the sum of a linear map of each."""

    def __init__(self, widths, out, messages=1):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(w, out * messages) for w in widths)
        self.messages = messages
        self.count = [0]

    def forward(self, *sources):
        self.count[0] += 1
        y = torch.tanh(sum(f(x) for f, x in zip(self.maps, sources, strict=True)))
        return y if self.messages == 1 else y.chunk(self.messages, 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # which only compares
@given(data=st.data())
@pytest.mark.composes("Structure", "couplings that read several streams, of any widths")
def test_any_sources_of_any_widths(check, data):
    """Chains over two to five streams, each coupling reading some of them and updating another."""
    torch.manual_seed(data.draw(st.integers(0, 999)))
    widths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    kind = data.draw(st.sampled_from(["additive", "affine", "gated"]))
    layers = []
    for _ in range(data.draw(st.integers(1, 5))):
        order = data.draw(st.permutations(range(len(widths))))
        target, *sources = order[: data.draw(st.integers(2, len(widths)))]
        cls = {"additive": AdditiveCoupling, "affine": AffineCoupling, "gated": GatedCoupling}[kind]
        net = Mixing([widths[i] for i in sources], widths[target], cls.tensors_in_message)
        layer = cls(net, tuple(sources), target)
        layers.append(Inverse(layer) if kind != "gated" and data.draw(st.booleans()) else layer)
    arithmetic = "float" if kind == "affine" else "exact"
    chain = ReversibleSequential(*layers, arithmetic=arithmetic).double()
    x = tuple(torch.randn(3, w, dtype=torch.float64, requires_grad=True) for w in widths)
    stored = check.gradients(chain, x, "stored")
    for mode in ("checkpoint", "reversible"):
        check.same(check.gradients(chain, x, mode), stored, rtol=0 if arithmetic == "exact" else 1e-10)


@pytest.mark.composes("Structure", "a stream of integers (the edges of a graph)", "works: read, compared, no gradient")
def test_source_of_integers_is_read_and_has_no_gradient(make, check):
    """The edges of a graph as a stream."""

    class Gather(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, edges):
            out = torch.zeros_like(x)
            return out.index_add(0, edges[1], self.net(x)[edges[0]])

    layers = [AdditiveCoupling(Gather(make.net(4)), source=(i % 2, 2), target=1 - i % 2) for i in range(4)]
    chain = ReversibleSequential(*layers).double()
    edges = torch.tensor([[0, 1, 2, 4], [1, 2, 0, 3]])
    x = (*make.streams(5, dtype=torch.float64), edges)

    def call(a, b):
        return chain(a, b, edges)[:2]

    assert torch.autograd.gradcheck(call, x[:2])
    assert torch.equal(chain(*x)[2], edges)
    for arithmetic in ("float", "exact"):
        chain.arithmetic = arithmetic
        grads = {}
        for chain.mode in ("stored", "checkpoint", "reversible"):
            y = chain(*x)
            grads[chain.mode] = torch.autograd.grad(check.loss(y[:2]), (*x[:2], *chain.parameters()))
        for mode in ("checkpoint", "reversible"):
            for a, b in zip(grads[mode], grads["stored"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("single_thread")
def test_every_source_is_read_again_in_its_own_layout(check):
    """A view with gaps is made dense, and a layout that later layers change is restored."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.strides = []

        def forward(self, a, b):
            self.strides.append((a.stride(), b.stride()))
            return a * b

    class Contiguous(nn.Module):
        def forward(self, x):
            return torch.tanh(x).contiguous()

    reads = Reads()
    chain = ReversibleSequential(
        AdditiveCoupling(reads, (0, 2), 1),
        AdditiveCoupling(Contiguous(), 1, 0),
        AdditiveCoupling(Contiguous(), 1, 2),
        arithmetic="exact",
    )
    a, b = torch.randn(2, 2, 3, 4, 4).unbind()
    x = [t.requires_grad_() for t in (a.to(memory_format=torch.channels_last), b, torch.randn(2, 6, 4, 4)[:, ::2])]
    chain(*x)[1].sum().backward()
    assert reads.strides[0] == reads.strides[1]
    assert reads.strides[0][0] == x[0].stride()


def test_stateful_coupling_of_several_sources(check):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, a, b, state):
            h = torch.tanh(self.mix(a * b + state[0]))
            return h.sin(), (h,)

    chain = ReversibleSequential(AdditiveCoupling(Cell(), (2, 0), 1, stateful=True)).double()
    x, h = torch.randn(4, 2, 3, dtype=torch.float64).split([3, 1])
    inputs = [t.clone().requires_grad_() for t in (*x, h[0])]

    def call(a, b, c, h):
        y, new = chain(a, b, c, states=ChainState(((h,),)))
        return *y, *new.tensors()

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("source", [(), (0, 0), (1, 2, 1)])
def test_sources_are_named_once(make, source):
    with pytest.raises(StreamError, match="must name one stream or several, each once"):
        AdditiveCoupling(make.net(4), source, 3)


@pytest.mark.parametrize("streams", [(nn.Linear(2, 2),), ((0, "1"), 2), (0, nn.Linear(2, 2)), (True, 0), (0, None)])
def test_streams_are_numbers(make, streams):
    with pytest.raises(StreamError, match="source and target are numbers of streams"):
        AdditiveCoupling(make.net(4), *streams)


def test_changed_sources_are_noticed_wherever_they_are():
    class Second(nn.Module):
        def forward(self, a, b):
            return a + b.mul_(2)

    chain = ReversibleSequential(AdditiveCoupling(nn.Identity(), 0, 2), AdditiveCoupling(Second(), (0, 2), 1))
    with pytest.raises(StreamError, match=r"layer 1 .* the transform changed its input in place"):
        chain(*torch.randn(3, 2, 4).unbind())


# Evaluations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda c: c, Inverse, lambda c: Inverse(Inverse(c))])
def test_backward_evaluates_every_transform_once(make, kind, wrap):
    layers = [make.coupling(kind, 4, i) for i in range(4)]
    chain = ReversibleSequential(*map(wrap, layers), arithmetic="float")
    y = chain(*make.streams())
    assert [layer.transform.count[0] for layer in layers] == [1] * 4
    (y[0].sum() + y[1].square().sum()).backward()
    assert [layer.transform.count[0] for layer in layers] == [2] * 4
