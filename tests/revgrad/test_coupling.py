import re

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
    Residue,
    ReversibilityError,
    ReversibleSequential,
    Step,
    StreamError,
    snap,
)
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
        kept, merged = coupling.run((source, x), Step())
        assert kept is source
        torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(coupling.undo((source, merged), Step())[1], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 2.0**-16), (torch.float64, 2.0**-32)])
def test_exact_merges_are_their_formulas_on_the_grid(dtype, step):
    x, a, h = snap(torch.randn(300, dtype=dtype)), torch.randn(300, dtype=dtype), torch.randn(300, dtype=dtype)
    source = torch.zeros(300, dtype=dtype)
    merged = AdditiveCoupling(Fixed(h)).run((source, x), Step(residue=Residue()))[1]
    assert torch.equal(merged, x + snap(h))
    merged = GatedCoupling(Fixed(a, h)).run((source, x), Step(residue=Residue()))[1]
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
        y = layer.run(x, Step(residue=residue))
        back = Inverse(layer).run(y, Step(residue=residue))
        residue.check_undone_to()
    else:
        layer = Inverse(layer) if inverse else layer
        y = layer.run(x, Step(residue=residue))
        back = layer.undo(y, Step(residue=residue))
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


def test_exact_gradient_passes_straight_through_the_rounding():
    """It is the gradient of the unrounded formula with the gate that was used."""
    x, a, h = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(3))
    source = torch.zeros(50, dtype=torch.float64)
    grad = torch.randn(50, dtype=torch.float64)
    merged = GatedCoupling(Fixed(a, h)).run((source, snap(x)), Step(residue=Residue()))[1]
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
        self.calls = 0

    def forward(self, *sources):
        self.calls += 1
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


def test_changed_sources_are_noticed_wherever_they_are():
    class Second(nn.Module):
        def forward(self, a, b):
            return a + b.mul_(2)

    chain = ReversibleSequential(AdditiveCoupling(nn.Identity(), 0, 2), AdditiveCoupling(Second(), (0, 2), 1))
    with pytest.raises(StreamError, match=r"layer 1 .* the transform changed its input in place"):
        chain(*torch.randn(3, 2, 4).unbind())


# Errors


def test_source_and_target_must_differ(make):
    with pytest.raises(StreamError, match="AdditiveCoupling: source and target are both stream 1"):
        AdditiveCoupling(make.net(4), 1, 1)


@pytest.mark.parametrize(("source", "target"), [(-1, 0), (0, -1), ((0, -1), 1)])
def test_streams_are_counted_from_the_front(make, source, target):
    with pytest.raises(
        StreamError, match=re.escape(f"streams are counted from 0, got source={source} and target={target}")
    ):
        AdditiveCoupling(make.net(4), source, target)


def test_stream_that_is_not_there(make):
    with pytest.raises(
        StreamError, match=r"layer 0 \(AdditiveCoupling\): couples stream 0 to stream 1, .* is one stream; put a Split"
    ):
        ReversibleSequential(AdditiveCoupling(make.net(4)))(torch.zeros(2, 4))
    with pytest.raises(StreamError, match=r"couples stream 0 to stream 2, but there are 2 streams, 0 to 1$"):
        ReversibleSequential(AdditiveCoupling(make.net(4), 0, 2))(*make.streams())


MISFITS = {
    "shape": (
        AdditiveCoupling,
        Fixed(torch.zeros(3, 5)),
        r"message of shape \(3, 5\), but the target stream 1 has shape \(3, 4\)",
    ),
    "broadcast": (
        AdditiveCoupling,
        Fixed(torch.zeros(3, 1)),
        r"message of shape \(3, 1\), but .* shape \(3, 4\); messages are not broadcast: return y.expand_as",
    ),
    "in one tensor": (
        AffineCoupling,
        Fixed(torch.zeros(3, 8)),
        r"needs a message of 2 tensor\(s\) from .* returned a tensor of shape \(3, 8\): cut it, y.chunk\(2, dim=1\)",
    ),
    "too many": (AdditiveCoupling, Fixed(*[torch.zeros(3, 4)] * 2), r"needs a message of 1 tensor\(s\)"),
    "too few": (GatedCoupling, Fixed(torch.zeros(3, 4)), r"needs a message of 2 tensor\(s\)"),
    "no tensor": (AdditiveCoupling, Fixed(None), r"needs a message of 1 tensor\(s\)"),
    "a number": (AffineCoupling, Fixed(torch.zeros(3, 4), 1.0), r"needs a message of 2 tensor\(s\)"),
}


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.composes("Misuse", "a message of the wrong shape", "error, with the layer's name")
def test_message_that_does_not_fit_names_the_layer(make, mode, misfit):
    cls, transform, message = MISFITS[misfit]
    chain = ReversibleSequential(AdditiveCoupling(make.net(4), 1, 0), cls(transform), mode=mode, arithmetic="float")
    with pytest.raises(StreamError, match=rf"layer 1 \({cls.__name__}\): .*{message}"):
        chain(*make.streams())


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
def test_a_recurrent_transform_that_is_given_no_state_says_what_it_needs(make, mode):
    chain = ReversibleSequential(AdditiveCoupling(make.cell(4, 1)), mode=mode, arithmetic="float")
    with pytest.raises(TypeError) as caught:
        chain(*make.streams())
    assert any("also needs state" in note and "stateful=True" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError) as caught:
        make.chain("additive", 1)(*make.streams(width=5))
    assert all("also needs" not in note for note in caught.value.__notes__)


def test_which_couplings_have_an_exact_form(make):
    forms = {kind: make.coupling(kind).has_exact_form() for kind in ("additive", "gated", "affine")}
    assert forms == {"additive": True, "gated": True, "affine": False}
    assert not Doubling(make.net(4)).has_exact_form()
    assert Inverse(make.coupling("gated")).has_exact_form()
    assert not Inverse(make.coupling("affine")).has_exact_form()


STATES = {
    "not a pair": Fixed(torch.zeros(3, 4)),
    "a list": Fixed(torch.zeros(3, 4), state=[torch.zeros(3, 4)]),
    "one more": Fixed(torch.zeros(3, 4), state=(torch.zeros(3, 4),) * 2),
    "one less": Fixed(torch.zeros(3, 4), state=()),
    "no tensor": Fixed(torch.zeros(3, 4), state=(None,)),
}


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
@pytest.mark.parametrize("misfit", STATES)
def test_state_that_does_not_fit_names_the_layer(make, mode, misfit):
    chain = ReversibleSequential(
        AdditiveCoupling(make.net(4), 1, 0), AdditiveCoupling(STATES[misfit], stateful=True), mode=mode
    )
    state = ChainState(((), (torch.zeros(3, 4),)))
    with pytest.raises(StreamError, match=r"layer 1 \(AdditiveCoupling\): .*(new_state|must return as many)"):
        chain(*make.streams(), states=state)


@pytest.mark.parametrize("mode", ["reversible", "stored"])
def test_affine_has_no_exact_form(make, mode):
    chain = make.chain("affine", 2, mode=mode, arithmetic="exact")
    with pytest.raises(StreamError, match="AffineCoupling has no exact form; choose arithmetic='float'"):
        chain(*make.streams())


def test_inverse_of_a_gated_coupling_alone_cannot_be_exact(make):
    with pytest.raises(ReversibilityError, match="needs the residue of the forward pass"):
        ReversibleSequential(Inverse(make.coupling("gated")))(*make.streams())


def test_gated_coupling_and_its_inverse_are_the_identity(make):
    layer = make.coupling("gated")
    x = make.streams()
    y = ReversibleSequential(layer, Inverse(layer))(*x)
    assert all(map(torch.equal, y, map(snap, x)))
    grads = torch.autograd.grad(y, x, (torch.zeros(3, 4), torch.ones(3, 4)))
    torch.testing.assert_close(grads[1], torch.ones(3, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.composes("Misuse", "a transform that changes its input in place", "error: *changed its input in place*")
def test_transform_that_changes_its_input(make):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    for mode in ("reversible", "stored"):
        chain = ReversibleSequential(AdditiveCoupling(make.net(4), 1, 0), AdditiveCoupling(InPlace()), mode=mode)
        with pytest.raises(
            StreamError, match=r"layer 1 \(AdditiveCoupling\): the transform changed its input in place"
        ):
            chain(*make.streams())


def test_coupling_without_formulas_says_so(make):
    with pytest.raises(TypeError, match=r"Coupling does not define merge\(target, \*message\)"):
        Coupling(make.net(4)).run(make.streams(), Step())
    with pytest.raises(TypeError, match=r"Coupling does not define unmerge\(merged, \*message\)"):
        Coupling(make.net(4)).undo(make.streams(), Step())
    with pytest.raises(StreamError, match="Doubling has no exact form"):
        Doubling(make.net(4)).run(make.streams(), Step(residue=Residue()))


# Evaluations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda c: c, Inverse, lambda c: Inverse(Inverse(c))])
def test_backward_evaluates_every_transform_once(make, kind, wrap):
    layers = [make.coupling(kind, 4, i) for i in range(4)]
    chain = ReversibleSequential(*map(wrap, layers), arithmetic="float")
    y = chain(*make.streams())
    assert [layer.transform.calls for layer in layers] == [1] * 4
    (y[0].sum() + y[1].square().sum()).backward()
    assert [layer.transform.calls for layer in layers] == [2] * 4


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["logits", "candidate"])
def test_message_that_is_not_finite_names_the_layer(make, which, bad, mode):
    """A diverged network must not become an index out of bounds or a silently finite stream."""
    a, h = torch.zeros(3, 4), torch.ones(3, 4)
    (a if which == "logits" else h)[1, 2] = bad
    chain = ReversibleSequential(make.coupling("gated", 4, 1), GatedCoupling(Fixed(a, h)), mode=mode)
    if which == "logits" and bad in (float("inf"), -float("inf")):
        chain(*make.streams())  # a gate of exactly 1 or 0 is a gate
        return
    with pytest.raises(ReversibilityError, match=r"layer 1 \(GatedCoupling\): the stream is not finite"):
        chain(*make.streams())


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.composes(
    "Conditioning", "a closure over a tensor with a gradient", "error: *the transform reads a tensor*"
)
def test_a_tensor_from_outside_raises_instead_of_losing_its_gradient(computed):
    outside = torch.ones(4, requires_grad=True)
    weight = outside.exp() if computed else outside

    class Closure(nn.Module):
        def forward(self, x):
            return x * weight

    chain = ReversibleSequential(AdditiveCoupling(Closure()))
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(
        ReversibilityError, match=r"layer 0 \(AdditiveCoupling\): the transform reads a tensor of shape \(4,\)"
    ):
        chain(x, x)[1].sum().backward()
    chain.mode = "stored"
    chain(x, x)[1].sum().backward()
    assert outside.grad is not None
