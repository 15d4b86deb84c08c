import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    Inverse,
    ReversibleSequential,
    Split,
    StreamError,
    unroll,
)

pytestmark = pytest.mark.usefixtures("single_thread")

WAYS = {
    "checkpoint": {"mode": "checkpoint"},
    "reversible": {"mode": "reversible"},
    "every second": {"mode": "reversible", "keep_states_every": 2},
    "every third": {"mode": "reversible", "keep_states_every": 3},
    "only the first": {"mode": "reversible", "keep_states_every": 99},
    "root": {"mode": "reversible", "keep_states_every": "sqrt"},
}
FED = {
    "teacher forcing": (True, True, True, True),
    "free running": (True, False, False, False, False),
    "both": (True, True, False, True, False, False, True),
    "one step": (True,),
}


class Model:
    """A recurrent chain between an encoder and its inverse, and everything that `unroll` needs."""

    def __init__(self, make, fed, carries=0, kind="gated", entry_depth=2, requires_grad=True):
        self.entry = make.chain("additive", entry_depth)
        self.core = make.recurrent(kind, 3, states=1, carries=carries)
        self.inputs = [make.streams(requires_grad=requires_grad) if f else None for f in fed]
        self.state = make.state(self.core, requires_grad=requires_grad)

    def run(self, check, **options):
        """Outputs and every gradient, by name."""
        outputs, state = unroll(
            self.core, self.inputs, self.state, entry=self.entry, exit=Inverse(self.entry), **options
        )
        leaves = [x for streams in self.inputs if streams for x in streams]
        leaves += [*self.state.tensors(), *self.entry.parameters(), *self.core.parameters()]
        leaves = [x for x in leaves if x.requires_grad]
        loss = check.loss(outputs) + check.loss(tuple(state.tensors()))
        grads = torch.autograd.grad(loss, leaves)
        return dict(enumerate([*outputs, *state.tensors(), *grads]))

    def calls(self):
        return [[layer.transform.count[0] for layer in part] for part in (self.entry, self.core)]


# Equality


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("carries", [0, 1])
@pytest.mark.composes("Conditioning", "recurrent states over time steps, weights tied")
def test_exact_is_stored_bit_for_bit(make, check, fed, way, carries):
    model = Model(make, FED[fed], carries)
    check.same(model.run(check, **WAYS[way]), model.run(check, mode="stored"))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_time_steps_may_begin_anywhere_in_memory(make, check, batch):
    """A product of matrices may be added up in another order there."""
    core, x = make.chain("gated", 4, width=31), make.streams(batch, 31)
    inputs = (*x, *core.parameters())
    found = []
    for mode in ("stored", "reversible"):
        outputs, _ = unroll(core, [x, None, None, None, None], mode=mode)
        found.append((*outputs, *torch.autograd.grad(check.loss(outputs), inputs)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fed", FED)
def test_float_is_close_to_stored(make, check, fed, way):
    model = Model(make, FED[fed], kind="additive")
    expected = model.run(check, mode="stored", arithmetic="float")
    found = model.run(check, **WAYS[way], arithmetic="float")
    check.same(found, expected, rtol=1e-5)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("way", WAYS)
def test_stateless_core_and_single_stream(make, check, way):
    core = ReversibleSequential(*make.chain("mixed", 4))
    x = make.streams()
    leaves = (*x, *core.parameters())
    found = [
        torch.autograd.grad(check.loss(unroll(core, [x, None, x], **w)[0]), leaves)
        for w in (WAYS[way], {"mode": "stored"})
    ]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("way", ["checkpoint", "reversible", "every second"])
def test_gradients_reach_only_what_wants_them(make, check, way):
    model = Model(make, FED["both"], requires_grad=False)
    model.entry.requires_grad_(False)
    model.core[1].requires_grad_(False)
    check.same(model.run(check, **WAYS[way]), model.run(check, mode="stored"))


def test_a_time_step_is_the_chain(make):
    """Time unrolled by hand, one `ReversibleSequential` call per step, is the same function."""
    model = Model(make, (True, True, True), kind="additive")
    outputs, final = unroll(model.core, model.inputs, model.state)
    state = model.state
    for t, x in enumerate(model.inputs):
        y, state = model.core(*x, states=state)
        assert torch.equal(outputs[0][t], y[0])
        assert torch.equal(outputs[1][t], y[1])
    assert all(map(torch.equal, final.tensors(), state.tensors()))


def test_step_without_input_reads_the_steps_own_output(make):
    """Figure 1: to skip the exit and entry is to feed the output back, since the exit undoes the entry."""
    model = Model(make, (True, False))
    parts = {"entry": model.entry, "exit": Inverse(model.entry)}
    with torch.no_grad():
        (y0, y1), _ = unroll(model.core, model.inputs, model.state, **parts)
        fed_back, _ = unroll(model.core, [model.inputs[0], (y0[0], y1[0])], model.state, **parts)
    assert torch.equal(fed_back[0], y0)
    assert torch.equal(fed_back[1], y1)


@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("way", WAYS)
def test_encoder_from_one_stream_to_two_and_back(make, check, way, fed):
    """Outputs are fewer than the core's streams, as in CrevNet."""
    entry = ReversibleSequential(Split(2), *(make.coupling("additive", 4, i) for i in range(3)))
    core = make.recurrent("gated", 3)
    state = make.state(core, requires_grad=True)
    x = torch.randn(3, 8, requires_grad=True)
    leaves = (x, *state.tensors(), *entry.parameters(), *core.parameters())
    found = []
    for options in ({"mode": "stored"}, WAYS[way]):
        inputs = [x * (1 + t) if f else None for t, f in enumerate(FED[fed])]
        outputs, _ = unroll(core, inputs, state, entry=entry, exit=Inverse(entry), **options)
        assert [y.shape for y in outputs] == [(len(inputs), 3, 8)]
        found.append([*outputs, *torch.autograd.grad(check.loss(outputs), leaves)])
    assert all(map(torch.equal, *found))


def test_retain_graph(make, check):
    for way in ("reversible", "every second"):
        model = Model(make, FED["both"])
        outputs, _ = unroll(model.core, model.inputs, model.state, **WAYS[way])
        leaves = (*model.inputs[0], *model.state.tensors(), *model.core.parameters())
        first = torch.autograd.grad(check.loss(outputs), leaves, retain_graph=True)
        second = torch.autograd.grad(check.loss(outputs), leaves)
        assert all(map(torch.equal, first, second))


def test_loss_on_the_last_step_or_the_state_alone(make):
    model = Model(make, FED["both"], carries=1)
    leaves = (*model.inputs[0], *model.state.tensors(), *model.core.parameters())
    for pick in (lambda y, s: y[0][-1].square().sum(), lambda y, s: s.carry[0].sum(), lambda y, s: y[1][2].sum()):
        found = []
        for options in ({"mode": "stored"}, {}, {"keep_states_every": 3}):
            loss = pick(*unroll(model.core, model.inputs, model.state, **options))
            found.append(
                [torch.zeros(1) if g is None else g for g in torch.autograd.grad(loss, leaves, allow_unused=True)]
            )
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b) or not (a.any() or b.any())


@pytest.mark.parametrize("way", ["reversible", "every second"])
def test_inputs_modified_before_backward(make, check, way):
    model = Model(make, (True, True, True), requires_grad=False)
    outputs, _ = unroll(model.core, model.inputs, model.state, **WAYS[way])
    (model.inputs[0] if way == "every second" else model.state.layers[0])[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check.loss(outputs).backward()


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
def test_without_gradients(make, mode):
    model = Model(make, FED["both"])
    expected, _ = unroll(model.core, model.inputs, model.state, mode=mode)
    with torch.no_grad():
        found, state = unroll(model.core, model.inputs, model.state, mode=mode)
    assert all(map(torch.equal, found, expected))
    assert not any(x.requires_grad for x in (*found, *state.tensors()))


# Evaluations


@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_evaluations_are_counted(make, check, fed, every):
    fed = FED[fed]
    model = Model(make, fed)
    steps, given = len(fed), sum(fed)
    outputs, _ = unroll(
        model.core,
        model.inputs,
        model.state,
        entry=model.entry,
        exit=Inverse(model.entry),
        keep_states_every=every,
    )
    # The encoder once per given input, and once per output, as the decoder.
    assert model.calls() == [[given + steps] * 2, [steps] * 3]
    check.loss(outputs).backward()
    again = every > 1
    assert model.calls() == [[2 * (given + steps) + again * given] * 2, [(2 + again) * steps] * 3]


def test_entry_that_nobody_asks_for_is_not_evaluated(make, check):
    model = Model(make, (True, True), requires_grad=False)
    model.entry.requires_grad_(False)
    outputs, _ = unroll(model.core, model.inputs, model.state, entry=model.entry)
    check.loss(outputs).backward()
    assert model.calls() == [[2, 2], [4, 4, 4]]


# Errors


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
def test_wrong_calls(make, mode):
    core, x = make.chain("additive", 2), make.streams()
    recurrent = make.recurrent()
    cases = [
        (lambda: unroll(core, [], mode=mode), "the first time step must be given an input"),
        (lambda: unroll(core, [None, x], mode=mode), "the first time step must be given an input"),
        (lambda: unroll(core, [x, x[:1]], mode=mode), r"different numbers of streams: \[1, 2\]"),
        (lambda: unroll(core, [x, ()], mode=mode), "unroll: the streams must be tensors, at least one; got none"),
        (lambda: unroll(core, [("a", "b")], mode=mode), "unroll: the streams must be tensors, at least one; got a str"),
        (lambda: unroll(core, [x], mode=mode, keep_states_every=0), "keep_states_every must be at least 1 and whole"),
        (lambda: unroll(core, [x], mode=mode, keep_states_every="root"), "a whole number or 'sqrt', got 'root'"),
        (lambda: unroll(core, [x], mode=mode, anchor_every=0), "anchor_every must be at least 1 and whole, got 0"),
        (lambda: unroll(core, [x], mode=mode, arithmetic="int"), "arithmetic must be"),
        (lambda: unroll([nn.ReLU()], [x], mode=mode), "layer 0 is a ReLU, not a reversible layer"),
        (lambda: unroll(recurrent, [x], mode=mode), r"layer 0 \(GatedCoupling\) is stateful, but no state was given"),
        (lambda: unroll(core, [x], ChainState(()), mode=mode), "the chain has 2 layers, but the state has 0 entries"),
        (
            lambda: unroll(core, [x], entry=recurrent, mode=mode),
            r"layer 0 \(GatedCoupling\) of entry or exit is stateful",
        ),
        (
            lambda: unroll(core, [x], entry=make.chain("gated", 1), mode=mode, arithmetic="exact"),
            r"layer 0 \(GatedCoupling\) of entry or exit forgets .*, .* in the core only",
        ),
        (
            lambda: unroll(core, [x], exit=Inverse(make.chain("gated", 1)), mode=mode, arithmetic="exact"),
            r"inverse of layer 0 \(GatedCoupling\): undoes a layer that forgets",
        ),
    ]
    for call, message in cases:
        with pytest.raises(StreamError, match=message):
            call()
    with pytest.raises(StreamError, match="mode must be 'stored', 'checkpoint' or 'reversible', got 'lazy'"):
        unroll(core, [x], mode="lazy")


def test_options_of_the_core_are_not_ignored(make):
    x = make.streams()
    cases = [
        ({"mode": "stored"}, {}),
        ({"mode": "stored"}, {"mode": "checkpoint"}),
        ({"arithmetic": "exact"}, {"arithmetic": "float"}),
        ({"anchor_every": 2}, {"anchor_every": 1}),
        ({"drift_guard": True}, {}),
        ({"offload": True}, {}),
    ]
    for own, given in cases:
        (name,) = own
        core = make.chain("additive", 2, **own)
        for chain in (core, Inverse(core)):
            with pytest.raises(StreamError, match=f"the core is a chain with {name}=.*pass the same to unroll"):
                unroll(chain, [x], **given)
        unroll(core, [x], **own)
        unroll(list(core), [x], **given)
    with pytest.raises(
        StreamError, match="memory_budget='1 KiB', which would be ignored: unroll has no such option; take"
    ):
        unroll(make.chain("additive", 2, memory_budget="1 KiB"), [x])
    unroll(make.chain("additive", 2), [x], mode="stored", arithmetic="exact", anchor_every=1, drift_guard=True)


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_auto_is_the_arithmetic_of_the_core(make, arithmetic):
    x = make.streams()
    core = make.chain("mixed", 4, arithmetic=arithmetic)
    outputs, _ = unroll(core, [x])
    assert all(torch.equal(y[0], expected) for y, expected in zip(outputs, core(*x), strict=True))
    other, _ = unroll(list(core), [x], arithmetic="float" if arithmetic == "exact" else "exact")
    assert not torch.equal(outputs[1], other[1])


def test_gated_entry_in_float(make, check):
    entry, core, x = make.chain("gated", 2), make.chain("additive", 2), make.streams()
    leaves = (*x, *entry.parameters(), *core.parameters())
    found = [
        torch.autograd.grad(
            check.loss(unroll(core, [x, None], entry=entry, exit=Inverse(entry), mode=mode, arithmetic="float")[0]),
            leaves,
        )
        for mode in ("stored", "reversible")
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_drift_guard_of_first_passes_is_counted_by_the_core(make, monkeypatch, inverse):
    chain = make.chain("additive", 4, drift_guard=2)
    core, x = Inverse(chain) if inverse else chain, make.streams()
    watched = []
    monkeypatch.setattr("revgrad.unrolling.run_reversible", lambda program, *a, **k: watched.append(program.guarded))
    for _ in range(3):
        unroll(core, [x, x], drift_guard=2)
    with torch.no_grad():
        chain.drift_guard = 1
        unroll(core, [x], drift_guard=1)
    unroll(core, [x], drift_guard=1)
    assert watched == [True, True, False, True]
    for wrong in (2, -1, "yes"):
        with pytest.raises(StreamError, match=r"drift_guard must be True or False, got .*ReversibleSequential"):
            unroll(list(chain), [x], drift_guard=wrong)


@pytest.mark.composes("Structure", "stateful layers with and without a carry in one chain", "works")
@pytest.mark.parametrize("carries", [(1, 0, 1), (0, 1, 0), (0, 1, 1)], ids=str)
def test_layers_with_and_without_a_carry(make, check, carries):
    layers = [
        AdditiveCoupling(make.cell(4, 1, 1 + c), i % 2, 1 - i % 2, stateful=True, carries=c)
        for i, c in enumerate(carries)
    ]
    core = ReversibleSequential(*layers).double()
    state = ChainState(
        tuple((torch.randn(3, 4, dtype=torch.float64, requires_grad=True),) for _ in core),
        (torch.randn(3, 4, dtype=torch.float64, requires_grad=True),),
    )
    x = make.streams(dtype=torch.float64)
    leaves = [*core.parameters(), *x, *state.tensors()]
    found = {}
    for mode in ("stored", "reversible"):
        outputs, final = unroll(core, [x, None, x], state, mode=mode)
        found[mode] = torch.autograd.grad(check.loss((*outputs, *final.tensors())), leaves)
        core.mode = mode
        outputs, final = core(*x, states=state)
        found[mode] += torch.autograd.grad(check.loss((*outputs, *final.tensors())), leaves)
        core.mode = "reversible"
    for one, other in zip(found["reversible"], found["stored"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.double()], ids=["shape", "dtype"])
def test_time_steps_of_other_shapes_or_dtypes_raise(make, change):
    a = make.streams()
    with pytest.raises(StreamError, match=r"the output of time step 1 is .*give all time steps inputs of one shape"):
        unroll([AdditiveCoupling(nn.Tanh())], [a, tuple(map(change, a))])
