"""The contracts of the autograd Function, on one chain; time steps are in test_unroll.py, memory in test_memory.py."""

import copy

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    GatedCoupling,
    Inverse,
    ReversibilityError,
    ReversibleLayer,
    ReversibleSequential,
    Swap,
    unroll,
)
from revgrad.function import _order_of_release
from revgrad.program import Program
from revgrad.replay import Snapshot
from revgrad.unroll import chain_links

pytestmark = pytest.mark.usefixtures("single_thread")

KINDS = ["additive", "mixed"]


class Scale(ReversibleLayer):
    """Multiplies by 2, and undoes it with a factor that may be wrong."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def run(self, streams, step):
        return tuple(2 * x for x in streams)

    def undo(self, streams, step):
        return tuple(self.factor * x for x in streams)


class Drifting(nn.Module):
    """A transform that is not deterministic: every evaluation adds a little more."""

    def __init__(self, net, drift):
        super().__init__()
        self.net, self.drift = net, drift

    def forward(self, x):
        y = self.net(x)
        shift = self.drift * self.net.calls
        return y + shift if isinstance(y, torch.Tensor) else tuple(m + shift for m in y)


def backward(chain, x, check):
    check.loss(chain(*x)).backward()


# Parameters and gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Structure", "frozen parameters")
def test_frozen_parameters_get_no_gradient_and_change_no_other(make, check, kind):
    chain, x = make.chain(kind, 4), make.streams()
    everything = check.gradients(chain, x, "reversible")
    chain[0].requires_grad_(False)
    chain[2].transform.last.bias.requires_grad_(False)
    found = check.gradients(chain, x, "reversible")
    for name, value in found.items():
        if "layers.0." in name or name == "gradient of layers.2.transform.last.bias":
            assert value is None
        else:
            assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_frozen_still_gives_the_inputs_gradients(make, check, kind):
    chain, x = make.chain(kind, 4).requires_grad_(False), make.streams()
    arithmetic = {"additive": 1e-5, "mixed": 0}[kind]
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=arithmetic)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Structure", "shared layers and shared weights")
def test_shared_parameters(make, check, mode):
    """The same coupling twice, its inverse in the same chain, and a weight tied across two transforms."""
    a, b, c = (make.coupling("additive", 4, i) for i in range(3))
    c.transform.last.weight = a.transform.last.weight
    gated = GatedCoupling(make.net(4, 2))
    chain = ReversibleSequential(a, b, gated, a, Inverse(b), c, gated, Inverse(a))
    x = make.streams()
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Structure", "parameters that are not used")
def test_unused_parameter_is_no_exception(make, check, kind):
    chain, x = make.chain(kind, 3), make.streams()
    chain[1].transform.register_parameter("unused", nn.Parameter(torch.ones(2)))
    chain[2].register_parameter("also_unused", nn.Parameter(torch.ones(2)))
    found = check.gradients(chain, x, "reversible")
    for name in ("gradient of layers.1.transform.unused", "gradient of layers.2.also_unused"):
        assert found[name] is None or not found[name].any()
    assert all(v is not None for name, v in found.items() if "unused" not in name)


def test_recurrent_layers_of_pytorch_see_the_stand_ins(make, check):
    """nn.GRU keeps a list of its weights beside its parameters."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            return self.gru(x[:, None])[0][:, 0]

    chain = ReversibleSequential(AdditiveCoupling(Recurrent()), AdditiveCoupling(Recurrent(), 1, 0), arithmetic="exact")
    x = make.streams()
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"))


@pytest.mark.composes("Autograd", "torch.autograd.grad for inputs and weights", "works: .grad stays empty")
def test_autograd_grad_leaves_grad_alone(make, check):
    chain, x = make.chain("mixed", 4), make.streams()
    expected = check.gradients(chain, x, "stored")
    torch.manual_seed(3)
    loss = check.loss(chain(*x))
    weight = chain[2].transform.first.weight
    found = torch.autograd.grad(loss, (x[0], weight))
    assert torch.equal(found[0], expected["gradient of input 0"])
    assert torch.equal(found[1], expected["gradient of layers.2.transform.first.weight"])
    assert all(t.grad is None for t in (*x, *chain.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Hooks", "hooks of parameters and post-accumulate-grad hooks", "fire once, on the final gradient")
def test_hooks_fire_once_on_the_final_gradient(make, check, kind):
    shared = make.coupling("additive")
    chain = ReversibleSequential(shared, *make.chain(kind, 4), shared)
    x = make.streams()
    plain = check.gradients(chain, x, "reversible")
    name = "layers.0.transform.first.weight"
    weight = dict(chain.named_parameters())[name]
    fired, accumulated = [], []
    weight.register_hook(lambda grad: fired.append(grad.clone()) or grad * 0.5)
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    x[0].register_hook(lambda grad: fired.append("input"))
    torch.manual_seed(3)
    backward(chain, x, check)
    expected = plain[f"gradient of {name}"]
    assert len(fired) == 2
    assert torch.equal(next(g for g in fired if not isinstance(g, str)), expected)
    assert len(accumulated) == 1
    assert torch.equal(weight.grad, expected * 0.5)


@pytest.mark.composes("Hooks", "gradients added up over several passes")
def test_gradients_accumulate_over_backward_passes(make, check):
    chain, x = make.chain("mixed", 4), make.streams()
    backward(chain, x, check)
    once = [p.grad.clone() for p in chain.parameters()]
    backward(chain, x, check)
    for p, g in zip(chain.parameters(), once, strict=True):
        assert torch.equal(p.grad, g + g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Autograd", "retain_graph and a second backward")
def test_retain_graph_gives_the_same_gradient_again(make, check, kind):
    chain, x = make.chain(kind, 5), make.streams()
    loss = check.loss(chain(*x))
    wanted = (*x, *chain.parameters())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    third = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [(False, False), (True, False), (False, True)])
@pytest.mark.composes("Autograd", "inputs without gradient")
def test_inputs_without_gradient(make, check, kind, which):
    chain = make.chain(kind, 4, arithmetic="exact")
    x = tuple(t.requires_grad_(w) for t, w in zip(make.streams(requires_grad=False), which, strict=True))
    found = check.gradients(chain, x, "reversible")
    check.same(found, check.gradients(chain, x, "stored"))
    assert (found["gradient of input 0"] is None) == (not which[0])


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.composes("Autograd", "half of the output unused")
def test_only_part_of_the_outputs_used(make, used, depth):
    chain = make.chain("mixed", depth, arithmetic="exact")
    x = make.streams()
    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        y = chain(*x)[used]
        found[mode] = torch.autograd.grad(y.square().sum(), (*x, *chain.parameters()), allow_unused=True)
    for a, b in zip(found["reversible"], found["stored"], strict=True):
        zero = torch.zeros(1)
        assert torch.equal(zero if a is None else a, zero if b is None else b) or not (a if b is None else b).any()


def test_stream_that_nothing_touches_is_no_alias_of_the_input(make):
    x = make.streams()
    chain = ReversibleSequential(make.coupling("additive"))
    y = chain(*x)
    assert torch.equal(y[0], x[0])
    assert y[0].data_ptr() != x[0].data_ptr()
    (grad,) = torch.autograd.grad(y[0].sum() + y[1].sum() * 0, x[:1])
    assert torch.equal(grad, torch.ones(3, 4))


def test_state_that_is_also_a_stream(make):
    """A transform may hand on the very tensor that it was given."""

    class Pass(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, state):
            return torch.tanh(self.linear(x) + state[0]), (x,)

    chain = ReversibleSequential(make.coupling("additive", 4, 1), AdditiveCoupling(Pass(), stateful=True))
    chain.arithmetic = "exact"
    x, h = make.streams(), torch.randn(3, 4, requires_grad=True)
    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        y, state = chain(*x, states=ChainState(((), (h,))))
        loss = (1.5 * y[0]).sum() + y[1].square().sum() + (3 * state.layers[1][0]).square().sum()
        found[mode] = torch.autograd.grad(loss, (*x, h, *chain.parameters()))
    assert all(map(torch.equal, found["stored"], found["reversible"]))


@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.parametrize("carries", [0, 1])
def test_gradients_of_conditioning_states(make, check, kind, carries):
    chain = make.recurrent(kind, 4, states=2, carries=carries, arithmetic="exact")
    x, state = make.streams(), make.state(chain, requires_grad=True)
    found = {}
    for mode in ("stored", "checkpoint", "reversible"):
        chain.mode = mode
        y, new = chain(*x, states=state)
        assert len(new.carry) == carries
        loss = check.loss(y) + check.loss(tuple(new.tensors()))
        found[mode] = [*y, *new.tensors(), *torch.autograd.grad(loss, (*x, *state.tensors(), *chain.parameters()))]
    for mode in ("checkpoint", "reversible"):
        assert all(map(torch.equal, found[mode], found["stored"]))


def test_carry_goes_from_layer_to_layer():
    """Each layer multiplies the carry by its own factor: the carry sees the product."""

    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x, state):
            own, carry = state
            return x, (own + carry, carry * self.factor)

    chain = ReversibleSequential(
        *(AdditiveCoupling(Times(f), i % 2, 1 - i % 2, stateful=True, carries=1) for i, f in enumerate((2, 3, 5)))
    )
    one, zero = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1)
    _, new = chain(zero, zero, states=ChainState(((zero,),) * 3, (one,)))
    assert new.carry[0].item() == 30
    assert [own[0].item() for own in new.layers] == [1, 2, 6]
    (grad,) = torch.autograd.grad(new.carry[0] + 100 * new.layers[2][0], one)
    assert grad.item() == 30 + 600


# What cannot work says so


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
        def undo(self, streams, step):
            back = tuple(0.5 * x for x in streams)
            off = torch.zeros_like(back[0])
            off[0, 0] = 2.0**-16
            return (back[0] + off, *back[1:])

    with pytest.raises(ReversibilityError, match="an inverse does not invert"):
        backward(ReversibleSequential(Off(0.5), arithmetic="exact"), make.streams(), check)


def test_differences_that_cancel_in_the_weighted_sum_are_seen_in_exact_arithmetic(check):
    from revgrad.chain import _weights

    w = (_weights(torch.device("cpu"), torch.float64)[:2] * 2**15).round().long().tolist()

    class Sly(Scale):
        def undo(self, streams, step):
            (x,) = streams
            # w0 (x0 + w1 u) + w1 (x1 - w0 u) = w0 x0 + w1 x1
            return (0.5 * x + torch.tensor([w[1], -w[0]]) * 2.0**-16,)

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(ReversibilityError, match="an inverse does not invert"):
        backward(ReversibleSequential(Sly(0.5), arithmetic="exact"), (x,), check)


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
@pytest.mark.composes("Misuse", "a transform that gives other values the second time", "error: *differs*")
def test_transform_that_is_not_deterministic(make, check, kind, arithmetic):
    # In float a difference below the tolerance cannot be told from rounding.
    chain = make.chain(kind, 4, arithmetic=arithmetic)
    chain[1].transform = Drifting(chain[1].transform, 0.3 if arithmetic == "float" else 1e-4)
    with pytest.raises(ReversibilityError, match=r"(recovered in the backward pass differs|residue)"):
        backward(chain, make.streams(20), check)
    assert all(p.grad is None for p in chain.parameters())


def test_gates_that_drift_without_a_trace_in_the_streams_are_seen_in_the_residue(make):
    """Nothing is lost of a zero, whatever the gate: only the level of the reservoir tells one gate from another."""

    class Gate(nn.Module):
        def __init__(self, drift):
            super().__init__()
            self.drift, self.calls = drift, 0

        def forward(self, x):
            self.calls += 1
            return 0.01 * x + self.drift * self.calls, torch.zeros_like(x)

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

        def run(self, streams, step):
            return self.layer.run(streams, step)

        def undo(self, streams, step):
            return self.layer.undo(streams, step)

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

        def undo(self, streams, step):
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
        def undo(self, streams, step):
            return (0.5 * streams[0] + self.factor * tolerance * direction,)

    # A weighted sum sees a fraction of an error in one place, but the size of an error there is no less.
    large = 20 if error in ("one element", "random") else 3
    with pytest.raises(ReversibilityError):
        backward(ReversibleSequential(Off(large)), (x,), check)
    backward(ReversibleSequential(Off(0.01)), (x,), check)


# Gradients that are added to


def with_gradients(chain):
    """A gradient of one everywhere, as if from a batch before."""
    for p in chain.parameters():
        p.grad = torch.ones_like(p)
    return chain


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_exist_are_added_to(make, check, kind):
    chain, x = make.chain(kind, 5), make.streams()
    expected = check.gradients(chain, x, "reversible")
    with_gradients(chain)[1].transform.first.weight.grad = None
    torch.manual_seed(3)
    backward(chain, x, check)
    for name, p in chain.named_parameters():
        found = expected[f"gradient of {name}"]
        assert torch.equal(p.grad, found if name == "layers.1.transform.first.weight" else 1 + found), name
    for i, t in enumerate(x):
        assert torch.equal(t.grad, expected[f"gradient of input {i}"])


def test_gradients_are_released_layer_by_layer_last_first(make, check):
    shared = make.coupling("additive")
    layers = [shared, *make.chain("additive", 3)]
    chain = with_gradients(ReversibleSequential(*layers, shared))
    order = []
    for i, layer in enumerate(layers):
        parameters = list(layer.parameters())

        def released(p, i=i, layer=layer, parameters=parameters):
            order.append(i)
            # A hook sees the module as its owner knows it, without stand-ins.
            assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
            assert [x.transform.calls - 1 for x in layers[1:]] == [int(i <= j) for j in (1, 2, 3)]

        for p in parameters:
            p.register_post_accumulate_grad_hook(released)
    backward(chain, make.streams(), check)
    assert order == [i for i in (3, 2, 1, 0) for _ in range(4)]


@pytest.mark.parametrize(("layers", "expected"), [(0, [0, 1, 2, 3, 4, 5]), (1.5, [0, 2, 4]), (100, [0])])
def test_gradients_wait_until_they_are_a_portion(make, layers, expected):
    chain = with_gradients(make.chain("additive", 6))
    size = sum(p.numel() * p.element_size() for p in chain[0].parameters())
    program = Program((), chain_links(chain), (), (True,), False)
    stages, waiting = _order_of_release(program, Snapshot(chain), int(layers * size))
    assert [application for application, _ in stages] == expected
    assert sorted(i for _, indices in stages for i in indices) == list(range(24))
    assert waiting == []


@pytest.mark.composes("Hooks", "an optimizer step in the backward pass")
def test_weights_may_be_changed_as_soon_as_their_gradient_is_there(make, check):
    """An optimizer in the backward pass: what comes before in the chain has another transform's weights."""
    chain, x = make.chain("additive", 4, arithmetic="exact"), make.streams()
    expected = check.gradients(chain, x, "stored")
    before = {name: p.detach().clone() for name, p in with_gradients(chain).named_parameters()}

    def update(p):
        p.sub_(p.grad)

    for p in chain.parameters():
        p.grad.zero_()
        p.register_post_accumulate_grad_hook(update)
    torch.manual_seed(3)
    backward(chain, x, check)
    for name, p in chain.named_parameters():
        assert torch.equal(p, before[name] - expected[f"gradient of {name}"]), name


@pytest.mark.parametrize("layer", [0, 1])
def test_asked_for_late_weights_alone_an_inverse_that_is_wrong_is_still_seen(make, check, layer):
    chain = ReversibleSequential(make.coupling("additive"), Scale(0.4), make.coupling("additive"))
    weight = with_gradients(chain)[2 * layer].transform.first.weight
    for x in (make.streams(), make.streams(requires_grad=False)):
        with pytest.raises(ReversibilityError, match="an inverse does not invert"):
            torch.autograd.grad(check.loss(chain(*x)), weight)


def test_asked_for_some_weights_alone_these_are_the_same(make, check):
    chain, x = with_gradients(make.chain("mixed", 6, arithmetic="exact")), make.streams()
    expected = check.gradients(chain, x, "stored")
    torch.manual_seed(3)
    loss = check.loss(chain(*x))
    for i in (5, 2, 0, 3):
        (found,) = torch.autograd.grad(loss, chain[i].transform.first.weight, retain_graph=True)
        assert torch.equal(found, expected[f"gradient of layers.{i}.transform.first.weight"])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in chain.parameters())


def test_two_backward_passes_through_one_graph_do_not_meet(make, check):
    """The second begins inside of the first, in a hook between two layers."""
    chain, x = with_gradients(make.chain("mixed", 4, arithmetic="exact")), make.streams()
    expected = check.gradients(chain, x, "stored")
    torch.manual_seed(3)
    loss, inner = check.loss(chain(*x)), []

    def again(grad):
        if not inner:
            inner.append(None)
            inner[0] = torch.autograd.grad(loss, x, retain_graph=True)

    chain[2].transform.first.weight.register_hook(again)
    loss.backward(retain_graph=True)
    for i, t in enumerate(x):
        assert torch.equal(inner[0][i], expected[f"gradient of input {i}"])
        assert torch.equal(t.grad, inner[0][i])
    for name, p in chain.named_parameters():
        assert torch.equal(p.grad, 1 + expected[f"gradient of {name}"]), name
