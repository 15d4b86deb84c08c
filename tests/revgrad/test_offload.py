"""Offloading, with a transfer between the device and itself that keeps count; and the real one, where there is CUDA."""

import gc
import weakref
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from revgrad import AdditiveCoupling, ChainState, Inverse, ReversibilityError, ReversibleSequential, StreamError, unroll
from revgrad import offload as module
from revgrad.offload import Keeper, Offloaded, Stowed, keeper_for

pytestmark = pytest.mark.usefixtures("single_thread")

CPU = torch.device("cpu")
STEPS, LAYERS = 5, 3


class Host:
    """A copy that is not on the device, of a tensor that is, until settled."""

    def __init__(self, number, tensor):
        self.number, self.bytes, self.tensor = number, tensor.tolist(), tensor


class Counting:
    """A transfer that knows which of the storages it has been shown are alive, and what it was asked for."""

    def __init__(self):
        self.log, self.hosts, self.peak, self._storages = [], [], 0, set()

    def show(self, *tensors):
        self._storages |= {StorageWeakRef(x.untyped_storage()) for x in tensors}
        self.peak = max(self.peak, self.alive())

    def alive(self):
        self._storages = {x for x in self._storages if not x.expired()}
        return len(self._storages)

    def out(self, tensor):
        host = Host(len(self.hosts), tensor)
        self.hosts.append(weakref.ref(host))
        self.log.append(("out", host.number))
        return host

    def settle(self, handle):
        self.log.append(("settle", handle.number))
        handle.tensor = None

    def prefetch(self, handle):
        self.log.append(("prefetch", handle.number))
        tensor = torch.tensor(handle.bytes, dtype=torch.uint8)
        self.show(tensor)
        return handle.number, tensor

    def back(self, coming):
        self.log.append(("back", coming[0]))
        return coming[1]

    def asked(self, *kinds):
        """What was asked for in a row, as pairs of kind and numbers."""
        log = [entry for entry in self.log if entry[0] in kinds]
        return [(kind, {number for _, number in row}) for kind, row in groupby(log, lambda entry: entry[0])]


@pytest.fixture
def transfer(monkeypatch):
    counting = Counting()
    monkeypatch.setattr(module, "transfer_to_host", lambda device: counting)
    return counting


def watch_states(core, transfer):
    """Show what the transforms of a recurrent core hand on in the forward pass."""
    for layer in core:
        layer.transform.register_forward_hook(
            lambda m, given, made: None if torch.is_grad_enabled() else transfer.show(*made[1])
        )


def runs(make, check, options, *, kind="gated", carries=0, fed=(True, True, False, True, False), double=False):
    """Outputs and all gradients, with and without offloading."""
    entry, core = make.chain("additive", 2), make.recurrent(kind, LAYERS, states=1, carries=carries)
    dtype = torch.float64 if double else torch.float32
    entry, core = entry.to(dtype), core.to(dtype)
    x, state = make.streams(dtype=dtype), make.state(core, dtype=dtype, requires_grad=True)
    leaves = (*x, *state.tensors(), *entry.parameters(), *core.parameters())
    found = []
    for more in ({}, {"offload": True}, {"mode": "stored"}):
        wanted = options if "mode" not in more else {k: v for k, v in options.items() if k == "arithmetic"}
        inputs = [tuple(y * (1 + t) for y in x) if f else None for t, f in enumerate(fed)]
        outputs, final = unroll(core, inputs, state, entry=entry, exit=Inverse(entry), **wanted, **more)
        loss = check.loss(outputs) + check.loss(tuple(final.tensors()))
        found.append(dict(enumerate([*outputs, *torch.autograd.grad(loss, leaves)])))
    return found


OPTIONS = {
    "every state": {},
    "every second": {"keep_states_every": 2},
    "root": {"keep_states_every": "sqrt"},
    "anchors": {"anchor_every": 1},
    "anchors and every second": {"anchor_every": 2, "keep_states_every": 2},
}


# Equality


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("carries", [0, 1])
@pytest.mark.composes("Modes", "offload=True, over time steps and with anchors", "works: the same bits")
def test_the_same_bits_as_without(make, check, transfer, options, carries):
    without, found, stored = runs(make, check, options, carries=carries)
    check.same(found, without)
    check.same(found, stored)
    assert transfer.hosts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float_is_stored_in_double_precision(make, check, transfer, options):
    without, found, stored = runs(make, check, options | {"arithmetic": "float"}, kind="additive", double=True)
    check.same(found, without)
    check.same(found, stored, rtol=1e-10)


@given(data=st.data())
def test_tensors_come_back_as_they_were(data):
    """Views of shared memory, expanded and strided ones, share memory again, and are copied once."""
    base = torch.arange(24.0).view(4, 6)
    views = [base, base.t(), base[:, 1:4], base[1::2], base[:1].expand(5, 6), base[2, 3], base[:0], base.flatten()]
    chosen = data.draw(st.lists(st.sampled_from(views), min_size=1))
    transfer = Counting()
    keeper = Offloaded(transfer, CPU)
    kept = keeper.out(chosen)
    assert all(isinstance(x, Stowed) for x in kept)
    again = keeper.anew().back(kept)
    for x, y in zip(chosen, again, strict=True):
        assert torch.equal(x, y)
        assert (x.stride(), x.storage_offset()) == (y.stride(), y.storage_offset())
        assert y.untyped_storage().data_ptr() == again[0].untyped_storage().data_ptr() != base.data_ptr()
    assert transfer.log == [("out", 0), ("prefetch", 0), ("back", 0)]


# What is on the device


def test_never_more_than_two_steps_of_states(make, check, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    watch_states(core, transfer)
    outputs, final = unroll(core, [x] * STEPS, make.state(core), offload=True)
    assert transfer.peak == 2 * LAYERS
    del final
    assert transfer.alive() == 0
    transfer.peak = 0
    check.loss(outputs).backward()
    assert transfer.peak == 2 * LAYERS
    assert transfer.alive() == 0


def test_states_come_back_one_step_ahead(make, check, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    outputs, _ = unroll(core, [x] * STEPS, make.state(core), offload=True)
    for layer in core:
        layer.transform.register_forward_hook(lambda *_: transfer.log.append(("run", None)))
    steps = [set(range(t * LAYERS, (t + 1) * LAYERS)) for t in range(STEPS)]
    assert transfer.asked("out", "settle") == [(kind, step) for step in steps for kind in ("out", "settle")]
    check.loss(outputs).backward()
    last, *earlier = reversed(steps)
    # The last one is asked for before the exit is rewound, each other one before the one behind it is used.
    expected = [("prefetch", last)]
    for step, before in zip([last, *earlier], [*earlier, None], strict=True):
        expected += [("back", step)] + ([("prefetch", before)] if before else []) + [("run", {None})]
    assert transfer.asked("prefetch", "back", "run") == expected


def test_starts_of_segments_come_back_one_segment_ahead(make, check, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    outputs, _ = unroll(core, [x, *[None] * 5], make.state(core), keep_states_every=2, offload=True)
    # Three segments. Streams that the core hands on start the second and the third, besides the states.
    first, second, third = set(range(3)), set(range(3, 8)), set(range(8, 13))
    assert {number for _, number in transfer.log} == first | second | third
    check.loss(outputs).backward()
    expected = [("prefetch", third), ("back", third), ("prefetch", second), ("back", second), ("prefetch", first)]
    assert transfer.asked("prefetch", "back") == [*expected, ("back", first)]


def test_anchors_come_back_one_ahead(make, check, transfer):
    model, x = make.chain("additive", 8, anchor_every=2, offload=True), make.streams()
    y = model(*x)
    # In front of layers 2, 4 and 6, two streams each.
    anchors = [{0, 1}, {2, 3}, {4, 5}]
    assert transfer.asked("out", "settle") == [(kind, a) for a in anchors for kind in ("out", "settle")]
    transfer.peak = 0
    check.loss(y).backward()
    expected = [("prefetch", anchors[2]), ("back", anchors[2]), ("prefetch", anchors[1]), ("back", anchors[1])]
    assert transfer.asked("prefetch", "back") == [*expected, ("prefetch", anchors[0]), ("back", anchors[0])]
    assert transfer.peak <= 2 * 2


def test_shared_tensors_are_copied_once(make, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    zero = torch.zeros(3, 4)
    unroll(core, [x] * STEPS, ChainState(tuple((zero,) for _ in core)), offload=True)
    assert len(transfer.hosts) == 1 + (STEPS - 1) * LAYERS


def test_inputs_and_parameters_are_not_copied(make, transfer):
    layers = [make.coupling("additive", 4, 0) for _ in range(4)]  # the first stream passes through
    model, x = ReversibleSequential(*layers, anchor_every=1, offload=True), make.streams()
    model(*x)
    assert len(transfer.hosts) == 3  # in front of three layers, the second stream
    core = make.recurrent("gated", LAYERS)
    learned = torch.nn.Parameter(torch.zeros(3, 4))
    unroll(core, [x], ChainState(tuple((learned,) for _ in core)), offload=True)
    assert len(transfer.hosts) == 3


def test_calls_in_a_loop_offload_what_they_read(make, check, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    found = []
    for offload in (False, True):
        core.offload, total = offload, 0
        torch.manual_seed(1)
        state = make.state(core)
        for _ in range(3):
            y, state = core(*x, states=state)
            total = total + check.loss(y)
        found.append(torch.autograd.grad(total, (*x, *core.parameters())))
    assert all(map(torch.equal, *found))
    assert len(transfer.hosts) == 3 * LAYERS


# Graphs


def test_two_backward_passes_through_one_graph(make, check, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    outputs, _ = unroll(core, [x] * 3, make.state(core), offload=True, anchor_every=2)
    leaves = (*x, *core.parameters())
    first = torch.autograd.grad(check.loss(outputs), leaves, retain_graph=True)
    second = torch.autograd.grad(check.loss(outputs), leaves)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(check.loss(outputs), leaves)


def test_nothing_is_left_of_an_output_that_is_dropped(make, check, transfer):
    core, x = make.recurrent("gated", LAYERS), make.streams()
    gc.collect()
    gc.disable()
    try:
        outputs, final = unroll(core, [x] * 3, make.state(core), offload=True, anchor_every=1)
        assert all(host() is not None for host in transfer.hosts)
        del outputs, final
        assert not any(host() for host in transfer.hosts)
    finally:
        gc.enable()


def test_a_backward_pass_that_fails_leaves_nothing_on_the_device(make, check, transfer):
    class Wrong(AdditiveCoupling):
        def unmerge(self, merged, *message):
            return merged - 1.1 * message[0]

    core = make.recurrent("additive", LAYERS)
    core = ReversibleSequential(Wrong(core[0].transform, 0, 1, stateful=True), *list(core)[1:])
    state = ChainState(tuple((torch.zeros(3, 4),) for _ in core))
    outputs, _ = unroll(core, [make.streams()] * 3, state, offload=True, drift_guard=True)
    loss = check.loss(outputs)
    gc.collect()
    with pytest.raises(ReversibilityError, match="recovered in the backward pass differs"):
        loss.backward()
    assert [kind for kind, _ in transfer.asked("prefetch", "back")] == ["prefetch", "back", "prefetch"]
    assert transfer.alive() == 0


# Errors


@pytest.mark.parametrize("options", [{}, {"keep_states_every": 2}])
def test_a_state_changed_before_backward_is_noticed(make, check, transfer, options):
    (
        core,
        x,
    ) = make.recurrent("gated", LAYERS), make.streams()
    state = make.state(core)
    outputs, _ = unroll(core, [x] * 3, state, offload=True, **options)
    state.layers[1][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: a state or stream of shape"):
        check.loss(outputs).backward()
    assert all(p.grad is None for p in core.parameters())


def test_a_state_changed_by_a_view_between_two_reads_is_copied_again(transfer):
    keeper, x = Offloaded(transfer, CPU), torch.zeros(3)
    before = keeper.out((x,))
    x.view(-1).add_(1)
    assert len(transfer.hosts) == 1
    keeper.out((x,))
    assert len(transfer.hosts) == 2
    with pytest.raises(ReversibilityError, match="is at version 1; expected version 0"):
        before[0].check()


def test_second_derivatives_say_what_they_need(make, check, transfer):
    core, x = make.recurrent("additive", LAYERS, arithmetic="float", offload=True), make.streams()
    y, _ = core(*x, states=make.state(core))
    with pytest.raises(ReversibilityError, match="not available with offload=True"):
        torch.autograd.grad(check.loss(y), x, create_graph=True)


@pytest.mark.parametrize("mode", ["stored", "checkpoint"])
def test_other_modes_are_refused(make, mode):
    x, message = make.streams(), f"offload=True goes with mode='reversible', not '{mode}'"
    with pytest.raises(StreamError, match=message):
        ReversibleSequential(mode=mode, offload=True)
    with pytest.raises(StreamError, match=message):
        unroll(make.chain(), [x], mode=mode, offload=True)
    model = make.chain(offload=True)
    model.mode = mode
    with pytest.raises(StreamError, match=message):
        model(*x)


# Where nothing is offloaded


def test_on_a_cpu_nothing_is_copied(make, check):
    assert type(keeper_for(True, CPU, ())) is Keeper
    without, found, stored = runs(make, check, {})
    check.same(found, without)
    check.same(found, stored)


def test_what_is_elsewhere_or_no_plain_tensor_stays(transfer):
    keeper = Offloaded(transfer, CPU)
    stay = (
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64).conj(),
        torch.zeros(2).to_sparse(),
        torch.nn.Parameter(torch.zeros(2)),
    )
    assert all(a is b for a, b in zip(keeper.out(stay), stay, strict=True))
    assert all(a is b for a, b in zip(keeper.back(stay), stay, strict=True))
    assert not transfer.log


# CUDA


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("carries", [0, 1])
@pytest.mark.composes("Modes", "offload=True on CUDA", "should work; the test needs a GPU and has not been run")
def test_on_cuda_the_same_bits_and_less_memory(make, check, options, carries):
    core, entry = make.recurrent("gated", LAYERS, 256, carries=carries).cuda(), make.chain("additive", 2, 256).cuda()
    x = tuple(y.detach().cuda().requires_grad_() for y in make.streams(4096, 256))
    state = make.state(core, 4096, 256)
    state = state.replace([y.cuda() for y in state.tensors()])
    expected, peak, held = [], {}, {}
    for offload in (False, True, True):  # the second time pinned memory is used again
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        outputs, _ = unroll(core, [x] * 12, state, entry=entry, exit=Inverse(entry), offload=offload, **options)
        held[offload] = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), (*x, *core.parameters()))
        peak[offload] = torch.cuda.max_memory_allocated()
        expected = expected or [y.cpu() for y in (*outputs, *grads)]
        assert all(torch.equal(a.cpu(), b) for a, b in zip((*outputs, *grads), expected, strict=True))
        del outputs, grads
    assert held[True] < held[False]
    assert peak[True] < peak[False]
