"""Memory in exact numbers of bytes: of the counter, and of the engine by it."""

import gc
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from revgrad import ChainState, LiveMemory, Residue, unroll
from revgrad.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("single_thread")

BATCH, WIDTH = 512, 4
STREAM = BATCH * WIDTH * 4
FINGERPRINT = 3 * 8  # per stream
ROW = 4 * (WIDTH * 2 * WIDTH + 2 * WIDTH + 2 * WIDTH * WIDTH + WIDTH)  # parameters of a Net with one message


@pytest.fixture
def no_collector():
    """What is freed must be freed by reference counts alone."""
    for precise in (True, False):
        fingerprint((torch.zeros(1),), precise)  # its weights are made once and stay
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# The counter


def test_counts_storages_once_and_forgets_them(no_collector):
    outside = torch.zeros(100)
    with LiveMemory() as memory:
        assert (memory.live, memory.peak) == (0, 0)
        a = torch.zeros(10)
        assert memory.live == 40
        views = [a.view(2, 5), a[3:], a.detach(), outside[:5]]
        assert memory.live == 40
        b = a + 1
        assert (memory.live, memory.peak) == (80, 80)
        a.add_(1)
        outside.mul_(2)
        del a
        assert memory.live == 80  # the views hold it
        del views
        assert (memory.live, memory.peak) == (40, 80)
        memory.reset_peak()
        assert memory.peak == 40
        c = b.to(torch.float64)
        assert (memory.live, memory.peak) == (120, 120)
    del b, c
    assert memory.live == 0  # still known after the context
    torch.zeros(10)
    assert memory.peak == 120  # but no longer counted


def test_counts_a_peak_between_two_lines(no_collector):
    with LiveMemory() as memory:
        x = (torch.zeros(25) + 1) * 2
        # A new tensor is made while the one before is alive: two at a time, never three.
        assert (memory.live, memory.peak) == (100, 200)
        del x


def test_counts_what_autograd_saves_and_the_backward_pass(no_collector):
    w = torch.ones(10, requires_grad=True)
    with LiveMemory() as memory:
        y = w.exp().sum()
        assert memory.live == 40 + 4  # exp saves its result
        y.backward()
        assert memory.live == 40 + 4  # freed, and the gradient has come
        assert memory.peak >= 80
        del y
        assert memory.live == 40
        w.grad = None
        assert memory.live == 0


def test_counts_tensors_of_every_output(no_collector):
    with LiveMemory() as memory:
        values, indices = torch.zeros(6).sort()
        assert memory.live == 24 + 48
        del values, indices
        assert memory.live == 0


def test_a_view_of_a_real_tensor_is_nothing_new_under_fake_tensors():
    real = torch.zeros(100)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        part = real[:10]
        assert memory.peak == 0
        _ = part + 1
    assert memory.peak == 40


def test_counts_fake_tensors_of_any_size():
    with FakeTensorMode(), LiveMemory() as memory:
        x = torch.empty(2**20, 2**20)
        assert memory.live == 2**42
        del x
        assert memory.live == 0


# The engine


def held_and_peak(model, x, check):
    """Bytes alive after the forward pass, the peak of forward and backward, and what is left after."""
    with LiveMemory() as memory:
        y = model(*x)
        held = memory.live
        loss = check.loss(y)
        del y
        loss.backward()
        peak = memory.peak
        del loss
        left = memory.live
    return held, peak, left


def test_forward_holds_outputs_and_nothing_else(make, no_collector):
    x = make.streams(BATCH, WIDTH)
    for depth in (2, 9):
        model = make.chain("additive", depth, WIDTH)
        with LiveMemory() as memory:
            y = model(*x)
            assert memory.live == 2 * STREAM + 2 * FINGERPRINT
            del y
            assert memory.live == 0


def test_exact_forward_holds_outputs_and_the_residue(make, no_collector):
    x = make.streams(BATCH, WIDTH)
    model = make.chain("gated", 12, WIDTH)
    residue = Residue()
    with torch.no_grad():
        model(*x, residue=residue)
    assert residue.bits % 8 == 0
    with LiveMemory() as memory:
        y = model(*x)
        assert memory.live == 2 * STREAM + residue.bits // 8 + 2 * FINGERPRINT
        del y
        assert memory.live == 0


def test_without_gradients_nothing_is_held(make, no_collector):
    for mode in ("reversible", "checkpoint", "stored"):
        model = make.chain("gated", 12, WIDTH, mode=mode)
        x = make.streams(BATCH, WIDTH)
        with LiveMemory() as memory, torch.no_grad():
            y = model(*x)
            assert memory.live == 2 * STREAM
            del y


def test_peak_is_flat_in_depth_up_to_parameter_gradients(make, check, no_collector):
    x = make.streams(BATCH, WIDTH)

    def measure(depth, frozen, mode):
        for t in x:
            t.grad = None
        model = make.chain("additive", depth, WIDTH, mode=mode).requires_grad_(not frozen)
        return held_and_peak(model, x, check)

    for frozen in (True, False):
        short, long = measure(4, frozen, "reversible"), measure(16, frozen, "reversible")
        assert long[0] == short[0] == 2 * STREAM + 2 * FINGERPRINT
        assert long[1] - short[1] == (0 if frozen else 12 * ROW)
        assert short[2] == 2 * STREAM + (0 if frozen else 4 * ROW)
        assert long[2] == 2 * STREAM + (0 if frozen else 16 * ROW)
    short, long = measure(4, False, "stored"), measure(16, False, "stored")
    # What stored autograd keeps per layer: the updated stream, the hidden activation of twice the width.
    assert long[0] - short[0] == 12 * 3 * STREAM
    assert long[1] - short[1] >= 12 * 3 * STREAM
    assert measure(16, False, "reversible")[1] < long[1] / 2


def test_peak_is_flat_in_depth_where_gradients_are_added_up(make, check, no_collector):
    """Whoever adds up gradients over several batches has them already: no second set is made."""
    x = make.streams(BATCH, WIDTH)
    peaks = {}
    for depth in (16, 64, 256):
        model = make.chain("additive", depth, WIDTH)
        for p in (*model.parameters(), *x):
            p.grad = torch.zeros_like(p)
        peaks[depth] = held_and_peak(model, x, check)[1]
    assert peaks[16] == peaks[64] == peaks[256]


def test_peak_of_the_backward_pass_is_streams_gradients_and_one_graph(make, no_collector):
    """Of the outputs and of the gradients that came in, nothing stays alive."""
    x = make.streams(BATCH, WIDTH)
    weight = torch.randn(BATCH, WIDTH)
    for depth in (2, 3, 8):
        model = make.chain("additive", depth, WIDTH).requires_grad_(False)
        with LiveMemory() as memory:
            loss = sum((y * weight).sum() for y in model(*x))
            memory.reset_peak()
            loss.backward()
            # Two streams and their gradients; of the transform, what tanh saved and two gradients as large.
            assert (4 + 3 * 2) * STREAM <= memory.peak < 10.1 * STREAM
            del loss


def test_an_error_between_two_layers_frees_everything(make, no_collector):
    x = make.streams(BATCH, WIDTH)
    model = make.chain("additive", 16, WIDTH)

    def fail(p):
        raise RuntimeError("from a hook")

    for p in (*model.parameters(), *x):
        p.grad = torch.zeros_like(p)
    model[8].transform.first.weight.register_post_accumulate_grad_hook(fail)
    with LiveMemory() as memory:
        loss = sum(y.sum() for y in model(*x))
        try:
            loss.backward()
        except RuntimeError as error:
            error.__traceback__ = None
            error.__cause__ = error.__context__ = None
        del loss
        torch.ones((), requires_grad=True).backward()  # autograd forgets what was left in its queue when it next runs
        assert memory.live == 0
    assert model[0].transform.first.weight.grad.any() == 0


def test_peak_of_gated_chains_grows_by_the_words_alone(make, check, no_collector):
    x = make.streams(BATCH, WIDTH)
    words, held = {}, {}
    for depth in (4, 24):
        torch.manual_seed(0)
        model = make.chain("gated", depth, WIDTH).requires_grad_(False)
        residue = Residue()
        with torch.no_grad():
            model(*x, residue=residue)
        words[depth] = residue.bits // 8
        held[depth] = held_and_peak(model, x, check)[0]
    assert held[24] - held[4] == words[24] - words[4]
    # About 1.4 bits an update and element, of gates around one half.
    assert 0 < words[24] - words[4] < 20 * BATCH * WIDTH * 2 / 8


@pytest.mark.parametrize("kind", ["additive", "gated"])
def test_everything_is_freed_after_backward(make, check, no_collector, kind):
    x = make.streams(BATCH, WIDTH)
    model = make.chain(kind, 4, WIDTH)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    with LiveMemory() as memory:
        y = model(*x)
        outputs = [weakref.ref(t) for t in y]
        check.loss(y).backward()
        # Outputs are ours, gradients are the caller's: nothing else is alive while y still is.
        assert memory.live == 2 * STREAM + 2 * FINGERPRINT + 2 * STREAM + parameters
        node = weakref.ref(y[0].grad_fn)
        del y
        assert memory.live == 2 * STREAM + parameters
    assert all(ref() is None for ref in outputs)
    assert node() is None


@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.composes("Autograd", "an output dropped without backward", "works: frees its memory at once")
def test_no_reference_cycles_even_without_a_backward_pass(make, no_collector, kind):
    x = make.streams(BATCH, WIDTH)
    core = make.recurrent(kind, 2, WIDTH)
    state = make.state(core, BATCH, WIDTH)
    with LiveMemory() as memory:
        for every in (1, 2):
            outputs, new = unroll(core, [x, None, x], state, keep_states_every=every)
            node = weakref.ref(outputs[0].grad_fn)
            del outputs, new
            assert memory.live == 0
            assert node() is None


def test_failed_backward_frees_everything(make, no_collector):
    x = make.streams(BATCH, WIDTH)
    model = make.chain("additive", 4, WIDTH)
    with LiveMemory() as memory:
        loss = sum(y.sum() for y in model(*x))
        with torch.no_grad():
            model[3].transform.last.weight.data.add_(1)
        try:
            loss.backward()
        except RuntimeError as error:
            # The traceback holds the frames, as any would.
            error.__traceback__ = None
            error.__cause__ = error.__context__ = None
        del loss
        assert memory.live == 0


def test_states_are_what_an_unroll_holds(make, no_collector):
    """T outputs, one state per layer and time step, the final state, and the residue: a formula."""
    steps, layers = 6, 3
    x = make.streams(BATCH, WIDTH)
    core = make.recurrent("additive", layers, WIDTH, states=2)
    state = make.state(core, BATCH, WIDTH)
    with LiveMemory() as memory:
        outputs, final = unroll(core, [x] + [None] * (steps - 1), state)
        # The initial state is the caller's; each later step reads a new one, the last one is handed on.
        states = steps * layers * 2 * STREAM
        assert memory.live == steps * 2 * STREAM + states + steps * 2 * FINGERPRINT
        del outputs, final
        assert memory.live == 0


def test_keeping_states_less_often_holds_fewer(make, no_collector):
    steps, layers = 6, 3
    x = make.streams(BATCH, WIDTH)
    core = make.recurrent("additive", layers, WIDTH, states=2)
    state = make.state(core, BATCH, WIDTH)
    for every in (2, 3):
        with LiveMemory() as memory:
            outputs, final = unroll(core, [x] + [None] * (steps - 1), state, keep_states_every=every)
            # Per later segment the state at its start and the features it goes on from; and the final state.
            later = steps // every - 1
            expected = later * (layers * 2 + 2) * STREAM + layers * 2 * STREAM
            assert memory.live == steps * 2 * STREAM + expected + steps * 2 * FINGERPRINT
            del outputs, final
            assert memory.live == 0


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (16, 4), (64, 8), (60, 8)])
def test_states_at_the_root_of_the_time_steps(make, no_collector, steps, every):
    """What is kept grows as the root of T, outputs aside: T = 64 keeps twice as many segments as T = 16 and one."""
    layers = 2
    x = make.streams(BATCH, WIDTH)
    core = make.recurrent("additive", layers, WIDTH, states=2)
    state = make.state(core, BATCH, WIDTH)
    with LiveMemory() as memory:
        outputs, final = unroll(core, [x] + [None] * (steps - 1), state, keep_states_every="sqrt")
        later = -(-steps // every) - 1
        starts = later * (layers * 2 + 2) * STREAM
        assert memory.live == steps * 2 * (STREAM + FINGERPRINT) + starts + layers * 2 * STREAM
        held = memory.live
        memory.reset_peak()
        sum(y.sum() for y in outputs).backward()
        # In backward come the states of one segment, and the working set of one time step.
        assert memory.peak - held < every * layers * 2 * STREAM + 40 * STREAM
        del outputs, final
        assert memory.live == sum(p.numel() * 4 for p in core.parameters()) + 2 * STREAM


def test_backward_frees_states_as_it_goes(make, check, no_collector):
    """The peak of backward is what forward held plus the working set of one step, however many steps there are."""
    x = make.streams(BATCH, WIDTH)
    core = make.recurrent("gated", 2, WIDTH, states=4).requires_grad_(False)
    state = make.state(core, BATCH, WIDTH)
    above = {}
    for steps in (3, 12):
        for t in x:
            t.grad = None
        with LiveMemory() as memory:
            outputs, _ = unroll(core, [x] + [None] * (steps - 1), state)
            loss = sum(y.sum() for y in outputs)
            del outputs, _
            held = memory.live
            memory.reset_peak()
            loss.backward()
            above[steps] = memory.peak - held
            del loss
    # Eight state tensors go with every step that has been left.
    assert above[12] <= above[3]


def test_state_without_tensors_is_free(make, no_collector):
    assert ChainState(((), ())).tensors() == []


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize(("convert", "compressed"), [("to_sparse", 0), ("to_sparse_csr", 9), ("to_sparse_csc", 9)])
def test_counts_values_and_indices_of_sparse_tensors(no_collector, convert, compressed):
    dense = torch.eye(8)
    with LiveMemory() as memory:
        x = getattr(dense, convert)()
        assert memory.live == 8 * 4 + (2 * 8 + compressed) * 8  # all make the two rows of indices first
        y = x @ dense
        del x
        assert memory.live == 64 * 4
    assert y.shape == (8, 8)
