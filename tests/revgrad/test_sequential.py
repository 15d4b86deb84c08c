import copy
import inspect
import itertools
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    Concatenate,
    GatedCoupling,
    Inverse,
    Permute,
    PixelUnshuffle,
    Residue,
    ReversibilityError,
    ReversibleSequential,
    Split,
    StreamError,
    Swap,
    snap,
)

pytestmark = pytest.mark.usefixtures("single_thread")

MODES = ["stored", "checkpoint", "reversible"]


class Normal(nn.Module):
    """Messages whose logits are spread like N(0, 1.5): ordinary gates."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x):
        a, h = self.linear(x).chunk(2, dim=1)
        return 1.5 * a / a.std(), torch.tanh(h)


def gated_chain(depth, width=64, **options):
    return ReversibleSequential(*(GatedCoupling(Normal(width), i % 2, 1 - i % 2) for i in range(depth)), **options)


# Modes


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.parametrize("kind", ["additive", "gated", "mixed"])
def test_exact_modes_agree_bit_for_bit(make, check, kind, mode):
    chain = make.chain(kind, 7, arithmetic="exact")
    x = make.streams()
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"))


@pytest.mark.parametrize("kind", ["additive", "affine", "gated", "mixed"])
def test_float_modes_agree_with_a_float64_oracle(make, check, kind):
    chain = make.chain(kind, 6, arithmetic="float")
    x = make.streams()
    oracle = check.gradients(
        copy.deepcopy(chain).double(), tuple(t.detach().double().requires_grad_() for t in x), "stored"
    )
    found = {mode: check.gradients(chain, x, mode) for mode in MODES}
    for mode in MODES:
        check.same(found[mode], oracle, rtol=2e-5)
    check.same(found["checkpoint"], found["stored"])
    for name in ("output 0", "output 1"):
        assert torch.equal(found["reversible"][name], found["stored"][name])


def test_gradient_in_exact_arithmetic_is_close_to_the_true_one(make, check):
    chain = make.chain("mixed", 8)
    x = make.streams()
    oracle = copy.deepcopy(chain).double()
    oracle.arithmetic = "float"
    expected = check.gradients(oracle, tuple(t.detach().double().requires_grad_() for t in x), "stored")
    check.same(check.gradients(chain, x, "reversible"), expected, rtol=1e-3)


def test_mode_can_be_changed_at_any_time(make, check):
    chain = make.chain("mixed", 4)
    x = make.streams()
    for mode, other in itertools.permutations(MODES, 2):
        chain.mode = mode
        chain(*x)
        check.same(check.gradients(chain, x, other), check.gradients(chain, x, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Systems", "deepcopy and state_dict, between the three modes")
def test_deepcopy_and_state_dict_across_modes(make, check, mode):
    chain = make.chain("mixed", 4, mode="reversible")
    chain(*make.streams())
    expected = check.gradients(chain, x := make.streams(), "stored")
    check.same(check.gradients(copy.deepcopy(chain), x, mode), expected)
    torch.manual_seed(99)
    other = make.chain("mixed", 4, mode=mode)
    other.load_state_dict(chain.state_dict())
    check.same(check.gradients(other, x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_pixels_to_pixels_through_a_shared_encoder(check, make, mode):
    """Encoder, gated module, and the inverse of the same encoder with the same weights."""

    def conv(messages=1):
        class Conv(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(4, 4 * messages, 3, padding=1)

            def forward(self, x):
                y = torch.tanh(self.conv(x))
                return y if messages == 1 else y.chunk(messages, dim=1)

        return Conv()

    encoder = ReversibleSequential(
        PixelUnshuffle(2),
        Permute(list(range(0, 8, 2)) + list(range(1, 8, 2))),
        Split(2),
        AdditiveCoupling(conv()),
        Swap(),
        AdditiveCoupling(conv()),
    )
    chain = ReversibleSequential(encoder, GatedCoupling(conv(2)), Inverse(encoder))
    x = (torch.rand(2, 2, 4, 6, requires_grad=True),)
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"))
    assert chain(*x).shape == x[0].shape
    assert len(list(chain.parameters())) == 6


# Structure


def test_feels_like_a_sequential(make):
    layers = [make.coupling("additive", 4, i) for i in range(3)]
    chain = ReversibleSequential(*layers)
    assert len(chain) == 3
    assert list(chain) == layers
    assert chain[1] is layers[1]
    assert [name for name, _ in chain.named_children()] == ["layers"]


def test_a_slice_is_a_chain_of_the_same_layers(make, check):
    chain, x = make.chain("mixed", 6, arithmetic="float"), make.streams()
    first, second = chain[:2], chain[2:]
    assert list(first) + list(second) == list(chain)
    assert list(chain[::-2]) == list(chain)[::-2]
    assert list(chain[-1:]) == [chain[-1]]
    expected = torch.autograd.grad(check.loss(chain(*x)), [*x, *chain.parameters()])
    found = torch.autograd.grad(check.loss(second(*first(*x))), [*x, *chain.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_slice_has_the_options_of_its_chain(make):
    chosen = {
        "mode": "reversible",
        "arithmetic": "float",
        "anchor_every": 2,
        "drift_guard": 3,
        "memory_budget": "1 MiB",
        "offload": True,
    }
    options = [p for p in inspect.signature(ReversibleSequential).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {p.name for p in options} == chosen.keys()
    chain = make.chain("additive", 4, **chosen).eval()
    assert {name: getattr(chain[1:], name) for name in chosen} == chosen
    assert not chain[1:].training
    chain.mode = "stored"
    assert chain[:1].mode == "stored"
    assert chain[:1].chosen_options() == chosen | {"mode": "stored"}
    assert make.chain("additive", 4)[:1].chosen_options() == {}


def test_lone_stream_comes_bare_and_several_as_a_tuple(make):
    x = torch.randn(2, 8, requires_grad=True)
    assert isinstance(ReversibleSequential(Swap())(x), torch.Tensor)
    y = ReversibleSequential(Split(2), make.coupling("additive"))(x)
    assert isinstance(y, tuple)
    assert len(y) == 2
    assert isinstance(ReversibleSequential(Split(2), make.coupling("additive"), Concatenate(2))(x), torch.Tensor)


@pytest.mark.parametrize("mode", MODES)
def test_empty_chain_is_the_identity(mode):
    x = torch.randn(2, 8, requires_grad=True)
    y = ReversibleSequential(mode=mode)(x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(2, 8))


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(
    ("option", "value"), [("mode", "stored"), ("arithmetic", "exact"), ("anchor_every", 2), ("memory_budget", "1 MiB")]
)
def test_options_of_a_chain_inside_another_are_not_ignored(make, option, value, inverted):
    inner = make.chain("additive", 2)
    chain = ReversibleSequential(make.coupling("additive"), Inverse(inner) if inverted else inner)
    setattr(inner, option, value)
    with pytest.raises(StreamError, match=rf"layer 1 is a chain with {option}='?{value}'?, which would be ignored"):
        chain(*make.streams())
    setattr(chain, option, value)
    chain(*make.streams())
    inner.mode = "reversible"  # a default says nothing
    chain(*make.streams())


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_nested_chains_are_the_flat_chain(make, check, arithmetic):
    a, b, c, d = (make.coupling("additive", 4, i) for i in range(4))
    flat = ReversibleSequential(a, b, Inverse(d), Inverse(c), a, b, c, arithmetic=arithmetic)
    nested = ReversibleSequential(
        ReversibleSequential(a, b),
        Inverse(ReversibleSequential(c, Inverse(Inverse(ReversibleSequential(d))))),
        Inverse(Inverse(ReversibleSequential(a, ReversibleSequential(b)))),
        Inverse(Inverse(c)),
        arithmetic=arithmetic,
    )
    x = make.streams()
    for mode in ("reversible", "checkpoint"):
        found, expected = (list(check.gradients(m, x, mode).values()) for m in (nested, flat))
        # The same parameters by other names, those of c and d in the other order.
        assert len(found) == len(expected) == 4 + 16
        assert all(map(torch.equal, found, expected[:12] + expected[16:] + expected[12:16]))


@pytest.mark.parametrize("kind", ["additive", "gated"])
def test_double_inverse_of_a_chain_is_the_chain(make, check, kind):
    inner = make.chain(kind, 3)
    chain = ReversibleSequential(Inverse(Inverse(inner)))
    x = make.streams()
    found = list(check.gradients(chain, x, "reversible").values())
    assert all(map(torch.equal, found, check.gradients(inner, x, "reversible").values()))
    calls = [layer.transform.count[0] for layer in inner]
    y = chain(*x)
    (y[0].sum() + y[1].square().sum()).backward()
    assert [layer.transform.count[0] - before for layer, before in zip(inner, calls, strict=True)] == [2, 2, 2]


def test_errors_name_the_place_in_nested_chains(make):
    inner = ReversibleSequential(Swap(), AdditiveCoupling(nn.Linear(4, 5)))
    with pytest.raises(StreamError, match=r"layer 1\.1 \(AdditiveCoupling\): the transform returned a message"):
        ReversibleSequential(Swap(), inner)(*make.streams())
    with pytest.raises(StreamError, match=r"inverse of layer 1\.1 \(AdditiveCoupling\): the transform returned"):
        ReversibleSequential(Swap(), Inverse(inner))(*make.streams())
    with pytest.raises(StreamError, match=r"layer 0 \(Inverse\(AdditiveCoupling\)\): the transform returned"):
        ReversibleSequential(Inverse(inner[1]))(*make.streams())


def test_layer_that_is_not_reversible():
    with pytest.raises(StreamError, match=r"layer 1 is a Linear, not a reversible layer: put it inside a coupling"):
        ReversibleSequential(Swap(), nn.Linear(2, 2))
    with pytest.raises(StreamError, match="layer 0 is a Sequential, not a reversible layer: put it inside a coupling"):
        ReversibleSequential(nn.Sequential(Swap(), nn.ReLU()))
    for several in ([Swap(), Swap()], nn.ModuleList([Swap()])):
        with pytest.raises(StreamError, match=r"not a reversible layer: unpack it, ReversibleSequential\(\*layers\)"):
            ReversibleSequential(several)


# Calling


def test_auto_is_exact_where_there_is_a_gated_coupling(make):
    x = make.streams()
    off_grid = x[0] + 2.0**-20
    for chain, exact in [
        (make.chain("additive", 2), False),
        (make.chain("affine", 2), False),
        (make.chain("gated", 2), True),
        (ReversibleSequential(Inverse(make.chain("additive", 2)), make.chain("mixed", 4)), True),
    ]:
        y = chain(off_grid, x[1])
        assert all(torch.equal(t, snap(t)) for t in y) == exact


def test_residue_is_for_no_grad_only(make):
    with pytest.raises(StreamError, match=r"residue= is for .* torch\.no_grad"):
        make.chain("gated", 2)(*make.streams(), residue=Residue())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.composes("Modes", "inference under no_grad or inference_mode", "works: the input is left intact")
def test_without_gradients_the_input_stays_intact(make, mode, arithmetic):
    chain = make.chain("mixed", 4, mode=mode, arithmetic=arithmetic)
    x = make.streams()
    kept = [t.detach().clone() for t in x]
    expected = chain(*x)
    for contexts in ([torch.no_grad], [torch.inference_mode], [torch.inference_mode, torch.enable_grad]):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            y = chain(*x)
        assert all(map(torch.equal, y, expected))
        assert not any(t.requires_grad for t in y)
        assert all(map(torch.equal, x, kept))


@pytest.mark.parametrize("mode", MODES)
def test_wrong_streams(make, mode):
    chain = make.chain("additive", 2, mode=mode)
    with pytest.raises(StreamError, match="the streams must be tensors, at least one; got none"):
        chain()
    with pytest.raises(StreamError, match="the streams must be tensors, at least one; got a NoneType"):
        chain(torch.zeros(2, 4), None)
    with pytest.raises(StreamError, match="the streams must be tensors, at least one; got a list"):
        chain(torch.zeros(2, 4), [1.0])
    with pytest.raises(StreamError, match="inverse: the streams must be tensors, at least one; got a str"):
        chain.inverse("x")


@pytest.mark.parametrize("mode", MODES)
def test_wrong_states(make, mode):
    chain = make.recurrent("gated", 2, mode=mode)
    x, state = make.streams(), make.state(chain)
    with pytest.raises(StreamError, match=r"layer 0 \(GatedCoupling\) is stateful, but no state was given"):
        chain(*x)
    with pytest.raises(StreamError, match="the states must be a ChainState, got a tuple"):
        chain(*x, states=(state.layers[0],))
    with pytest.raises(StreamError, match=r"no state was given for it: states=ChainState\(\(\(h,\), \(h,\)\)\)"):
        chain(*x)
    with pytest.raises(StreamError, match=r"its state must be a tuple of tensors, got a Tensor: ChainState\(\("):
        chain(*x, states=ChainState(tuple(own[0] for own in state.layers)))
    with pytest.raises(StreamError, match=r"ChainState\(\(\(h,\), \(h,\), \(h,\), \.\.\.\)\)"):
        make.recurrent("gated", 5, mode=mode)(*x)
    with pytest.raises(StreamError, match=r"ChainState\(\(\(h,\),\)\)"):
        make.recurrent("gated", 1, mode=mode)(*x)
    with pytest.raises(StreamError, match="the chain has 2 layers, but the state has 1 entries"):
        chain(*x, states=ChainState(state.layers[:1]))
    plain = make.chain("additive", 2, mode=mode)
    with pytest.raises(StreamError, match=r"layer 0 \(AdditiveCoupling\) takes no state, but 1 tensor"):
        plain(*x, states=state)
    zigzag = make.recurrent("gated", 2, carries=1, mode=mode)
    good = make.state(zigzag)
    with pytest.raises(
        StreamError, match=r"layer 0 \(GatedCoupling\): takes a carry of 1 tensor\(s\), but .* carries 0"
    ):
        zigzag(*x, states=ChainState(good.layers))


def test_wrong_mode_and_arithmetic(make):
    with pytest.raises(StreamError, match="mode must be 'stored', 'checkpoint' or 'reversible', got 'fast'"):
        make.chain("additive", 2, mode="fast")
    with pytest.raises(StreamError, match="arithmetic must be 'auto', 'exact' or 'float', got 'int'"):
        make.chain("additive", 2, arithmetic="int")
    chain = make.chain("additive", 2, mode="stored", arithmetic="exact")
    with pytest.raises(StreamError, match="mode must be"):
        chain.mode = "fast"
    with pytest.raises(StreamError, match="arithmetic must be"):
        chain.arithmetic = "int"
    for same in (chain, copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert (same.mode, same.arithmetic) == ("stored", "exact")


@pytest.mark.parametrize("mode", MODES)
def test_dtype_without_a_grid(make, mode):
    with pytest.raises(StreamError, match=r"float32 or float64, not torch\.bfloat16"):
        make.chain("gated", 2, mode=mode).bfloat16()(*make.streams(dtype=torch.bfloat16))


@pytest.mark.parametrize("mode", MODES)
def test_leaving_the_grid_names_where(make, mode):
    class Large(nn.Module):
        def forward(self, x):
            return x * 0 + 200

    chain = ReversibleSequential(
        Swap(), AdditiveCoupling(Large()), AdditiveCoupling(Large()), mode=mode, arithmetic="exact"
    )
    with pytest.raises(ReversibilityError, match=r"layer 2 \(AdditiveCoupling\): the stream reached 1\.[56]"):
        chain(*make.streams())
    with pytest.raises(ReversibilityError, match="the input: the stream is not finite"):
        chain(torch.full((2, 4), torch.nan), torch.zeros(2, 4))


def test_options_that_are_set_later_are_checked_at_once(make):
    model = make.chain("additive", 2, mode="stored")
    for name, wrong, message in (
        ("memory_budget", "much", "memory_budget"),
        ("drift_guard", "yes", "drift_guard must be True, False or a number of forward passes"),
    ):
        before = getattr(model, name)
        with pytest.raises(StreamError, match=message):
            setattr(model, name, wrong)
        assert getattr(model, name) == before


def test_a_wrong_number_of_anchors_is_refused_when_it_is_set(make):
    chain = make.chain("additive", 4)
    with pytest.raises(StreamError, match="anchor_every must be at least 1 and whole, got 0"):
        chain.anchor_every = 0
    assert chain.anchor_every is None
    chain(*make.streams())
