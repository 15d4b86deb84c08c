"""What the autograd Function notices, and says, instead of giving a wrong gradient."""

import copy

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    GatedCoupling,
    Inverse,
    ReversibilityError,
    ReversibleLayer,
    ReversibleSequential,
    Swap,
    unroll,
)
from tests.revgrad.test_function import KINDS, backward

pytestmark = pytest.mark.usefixtures("single_thread")


class Scale(ReversibleLayer):
    """Multiplies by 2, and undoes it with a factor that may be wrong."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def run(self, streams, call):
        return tuple(2 * x for x in streams)

    def undo(self, streams, call):
        return tuple(self.factor * x for x in streams)


class Drifting(nn.Module):
    """A transform that is not deterministic: every evaluation adds a little more."""

    def __init__(self, net, drift):
        super().__init__()
        self.net, self.drift = net, drift

    def forward(self, x):
        y = self.net(x)
        shift = self.drift * self.net.count[0]
        return y + shift if isinstance(y, torch.Tensor) else tuple(m + shift for m in y)


@pytest.mark.composes(
    "Misuse", "an output modified in place before backward", "error: *modified by an inplace operation*"
)
def test_output_modified_in_place(make):
    chain = make.chain("mixed", 2)
    y = chain(*make.streams())
    with torch.no_grad():
        y[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y[0].sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes(
    "Misuse", "weights changed between forward and backward", "error: *modified by an inplace operation*"
)
def test_weights_modified_before_backward(make, check, kind):
    chain, x = make.chain(kind, 2), make.streams()
    y = chain(*x)
    with torch.no_grad():
        chain[0].transform.first.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check.loss(y).backward()
    # Around the version counter: the recovered input tells.
    y = chain(*x)
    chain[0].transform.first.weight.data.add_(1)
    with pytest.raises(ReversibilityError):
        check.loss(y).backward()


def test_state_modified_before_backward(make, check):
    chain = make.recurrent("gated", 2)
    x, state = make.streams(), make.state(chain)
    y, _ = chain(*x, states=state)
    state.layers[0][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check.loss(y).backward()


@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("factor", [0.4, -0.5, 0.0, float("nan"), 0.5])
@pytest.mark.composes("Misuse", "a layer whose inverse does not invert", "error: *an inverse does not invert*")
def test_layer_that_does_not_invert(make, check, factor, arithmetic, input_gradient):
    chain = ReversibleSequential(make.coupling("additive"), Scale(factor), Swap(), arithmetic=arithmetic)
    x = make.streams(requires_grad=input_gradient)
    if factor == 0.5:
        check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-5)
        return
    with pytest.raises(ReversibilityError, match=r"an inverse does not invert.*check_invertible"):
        backward(chain, x, check)
    assert all(p.grad is None for p in chain.parameters())


def test_exact_arithmetic_takes_the_smallest_difference_for_an_error(make, check):
    class Off(Scale):
        def undo(self, streams, call):
            back = tuple(0.5 * x for x in streams)
            off = torch.zeros_like(back[0])
            off[0, 0] = 2.0**-16
            return (back[0] + off, *back[1:])

    with pytest.raises(ReversibilityError, match="an inverse does not invert"):
        backward(ReversibleSequential(Off(0.5), arithmetic="exact"), make.streams(), check)


def test_differences_that_cancel_in_the_weighted_sum_are_seen_in_exact_arithmetic(check):
    from revgrad.fingerprint import _weights

    w = (_weights(torch.device("cpu"), torch.float64)[:2] * 2**15).round().long().tolist()

    class Sly(Scale):
        def undo(self, streams, call):
            (x,) = streams
            # w0 (x0 + w1 u) + w1 (x1 - w0 u) = w0 x0 + w1 x1
            return (0.5 * x + torch.tensor([w[1], -w[0]]) * 2.0**-16,)

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(ReversibilityError, match="an inverse does not invert"):
        backward(ReversibleSequential(Sly(0.5), arithmetic="exact"), (x,), check)


@pytest.mark.usefixtures("unnoted")
@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)])
@pytest.mark.composes("Structure", "streams of zeros")
def test_streams_of_zeros_are_compared_and_not_divided_by_their_size(make, check, zeros):
    """A velocity that starts at zero, or a batch of padding: what is recovered is a rounding away from zero."""
    chain = make.chain("additive", 8)
    x = tuple(t.detach() * (i not in zeros) for i, t in enumerate(make.streams()))
    x = tuple(t.requires_grad_() for t in x)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-4, atol=1e-5)
    chain[1].transform = Drifting(chain[1].transform, 0.3)
    with pytest.raises(ReversibilityError, match=r"recovered in the backward pass differs .* by 0\.\d+ of its size"):
        backward(chain, x, check)


@pytest.mark.parametrize(
    ("kind", "arithmetic"),
    [("additive", "float"), ("affine", "float"), ("gated", "float"), ("additive", "exact"), ("gated", "exact")],
)
@pytest.mark.composes("Misuse", "a transform that gives other values the second time", "error: *another message*")
def test_transform_that_is_not_deterministic(make, check, kind, arithmetic):
    # In float a difference below the tolerance cannot be told from rounding.
    chain = make.chain(kind, 4, arithmetic=arithmetic)
    chain[1].transform = Drifting(chain[1].transform, 0.3 if arithmetic == "float" else 1e-4)
    with pytest.raises(
        ReversibilityError, match=r"(returned another message|recovered in the backward pass differs|residue)"
    ):
        backward(chain, make.streams(20), check)
    assert all(p.grad is None for p in chain.parameters())


@pytest.mark.usefixtures("unnoted")
def test_gates_that_drift_without_a_trace_in_the_streams_are_seen_in_the_residue(make):
    """Nothing is lost of a zero, whatever the gate: only the level of the reservoir tells one gate from another."""

    class Gate(nn.Module):
        def __init__(self, drift):
            super().__init__()
            self.drift, self.count = drift, [0]

        def forward(self, x):
            self.count[0] += 1
            return 0.01 * x + self.drift * self.count[0], torch.zeros_like(x)

    x = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4)
    ReversibleSequential(GatedCoupling(Gate(0.0)))(*x)[1].sum().backward()
    with pytest.raises(ReversibilityError, match="the residue is not used up"):
        ReversibleSequential(GatedCoupling(Gate(-0.1)))(*x)[1].sum().backward()


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_transform_that_changes_a_buffer(make, arithmetic):
    class Counting(nn.Module):
        def __init__(self, replace):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.replace = replace

        def forward(self, x):
            if self.replace:
                self.steps = self.steps + 1
            else:
                self.steps += 1
            return x * self.steps

    for replace in (False, True):
        chain = ReversibleSequential(AdditiveCoupling(Counting(replace)), arithmetic=arithmetic)
        with pytest.raises(ReversibilityError, match=r"Counting changed its buffer 'steps' .* choose mode='stored'"):
            chain(*make.streams())
        chain.mode = "stored"
        chain(*make.streams())


def test_infinite_input_is_not_blamed_on_the_inverse(make, check):
    x = make.streams()
    with torch.no_grad():
        x[0][0, 0] = float("inf")
    backward(make.chain("additive", 2, arithmetic="float"), x, check)


def test_failed_backward_leaves_the_module_as_it_was(make, check):
    chain = ReversibleSequential(make.coupling("additive"), Scale(0.4)).train()
    before = [(id(p), p) for p in chain.parameters()]
    y = chain(*make.streams())
    chain.eval()
    with pytest.raises(ReversibilityError):
        check.loss(y).backward()
    assert [(id(p), p) for p in chain.parameters()] == before
    assert not any(m.training for m in chain.modules())


def test_user_layer_around_a_gated_coupling_shares_the_residue(make, check):
    """The default rewind runs a layer twice; what the second run forgets must not stay in the residue."""

    class Wrapped(ReversibleLayer):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def run(self, streams, call):
            return self.layer.run(streams, call)

        def undo(self, streams, call):
            return self.layer.undo(streams, call)

    layers = [make.coupling("gated", 4, i) for i in range(4)]
    chain = ReversibleSequential(layers[0], Wrapped(layers[1]), layers[2], Wrapped(layers[3]))
    x = make.streams()
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"))


def test_error_at_a_step_without_input_is_seen(make):
    """Each step starts over from its own output, so each must be checked."""

    class Once(Scale):
        def __init__(self, wrong):
            super().__init__(0.5)
            self.wrong, self.undone = wrong, 0

        def undo(self, streams, call):
            self.undone += 1
            return tuple(0.5 * x + (self.undone == self.wrong) for x in streams)

    for wrong in (1, 2, 3, None):
        outputs, _ = unroll(Once(wrong), [torch.randn(3, 4, requires_grad=True), None, None])
        if wrong is None:
            outputs[0].sum().backward()
            continue
        with pytest.raises(ReversibilityError, match="an inverse does not invert"):
            outputs[0].sum().backward()


def test_core_is_checked_where_the_entry_is_frozen(make, check):
    entry = make.chain("additive", 2).requires_grad_(False)
    core = ReversibleSequential(make.coupling("additive"), Scale(0.4))
    outputs, _ = unroll(core, [make.streams(requires_grad=False)], entry=entry, exit=Inverse(entry))
    with pytest.raises(ReversibilityError, match="an inverse does not invert"):
        check.loss(outputs).backward()


def test_entry_that_does_not_invert_is_seen_where_it_is_evaluated(make, check):
    core, x = make.chain("additive", 2), make.streams()
    outputs, _ = unroll(core, [x, None, x], entry=Scale(0.4))
    with pytest.raises(ReversibilityError, match="an inverse does not invert"):
        check.loss(outputs).backward()
    # Nobody wants what lies before the core: the entry is not undone, and its inverse does not matter.
    x = make.streams(requires_grad=False)
    outputs, _ = unroll(core, [x, None, x], entry=Scale(0.4))
    check.loss(outputs).backward()


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factors = [factor]

    def forward(self, x):
        return x * self.factors[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_closure_of_an_entry_that_is_not_undone_raises_too(make, check, wanted):
    entry = ReversibleSequential(AdditiveCoupling(Times(torch.ones(4, requires_grad=wanted))))
    inputs, core = [make.streams(requires_grad=False), None], make.chain("additive", 2)
    if wanted:
        with pytest.raises(ReversibilityError, match="the entry: the transform reads a tensor"):
            unroll(core, inputs, entry=entry, exit=Inverse(entry))
        return
    check.loss(unroll(core, inputs, entry=entry, exit=Inverse(entry))[0]).backward()


def test_copies_of_a_module_do_not_share_passes(make, check):
    chain, x = make.chain("mixed", 2), make.streams()
    y = chain(*x)
    other = copy.deepcopy(chain)
    check.loss(y).backward()
    assert all(p.grad is None for p in other.parameters())
    assert all(p.grad is not None for p in chain.parameters())


@pytest.mark.parametrize("error", ["everywhere", "one element", "scale", "random", "negated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_every_kind_are_seen_and_smaller_ones_let_pass(check, error, dtype):
    """In float, an error of twice the tolerance relative to the stream's size raises; one of a hundredth does not."""
    tolerance = {torch.float32: 1e-2, torch.float64: 1e-4}[dtype]
    x = torch.randn(50, 41, dtype=dtype, requires_grad=True)
    direction = {
        "everywhere": torch.ones_like(x),
        "one element": torch.zeros_like(x).index_put((torch.tensor(7), torch.tensor(3)), torch.ones((), dtype=dtype)),
        "scale": x.detach(),
        "random": torch.randn_like(x),
        "negated": -2 * x.detach(),
    }[error]
    direction = direction * (x.detach().norm() / direction.norm())

    class Off(Scale):
        def undo(self, streams, call):
            return (0.5 * streams[0] + self.factor * tolerance * direction,)

    # A weighted sum sees a fraction of an error in one place, but the size of an error there is no less.
    large = 20 if error in ("one element", "random") else 3
    with pytest.raises(ReversibilityError):
        backward(ReversibleSequential(Off(large)), (x,), check)
    backward(ReversibleSequential(Off(0.01)), (x,), check)
