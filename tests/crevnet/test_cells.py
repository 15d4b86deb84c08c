"""The cells against appendix A written out: one convolution per gate and tensor, in loops."""

import numpy as np
import pytest
import torch
from torch import nn

from crevnet.cells import CELL, CELLS, ConvLSTMCell, STLSTMCell
from revgrad import update_cell

CHANNELS = 2
SIZES = [(3, 4), (2, 3, 2)]


def make(kind, size, kernel_size=3, seed=0):
    """A cell in float64 whose parameters are all of order one, peephole included."""
    generator = torch.Generator().manual_seed(seed)
    cell = kind(CHANNELS, size, kernel_size).double()
    for p in cell.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
    return cell


def tensors(count, size, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, CHANNELS, *size, generator=generator, dtype=torch.float64) for _ in range(count)]


def state_of(kind, size):
    return tuple(tensors(kind.states + kind.carries, size, seed=2))


def conv(weight, x):
    """Cross-correlation of `x [B, I, ...]` with `weight [O, I, ...]` and zero padding, element by element."""
    kernel = weight.shape[2:]
    pad = [k // 2 for k in kernel]
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in pad)])
    out = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for b, o, *position in np.ndindex(*out.shape):
        window = padded[(b, slice(None), *(slice(i, i + k) for i, k in zip(position, kernel, strict=True)))]
        out[(b, o, *position)] = (window * weight[o]).sum()
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates_of(layer, names):
    """Cut a fused convolution into one weight per gate and tensor read, and one bias per gate."""
    weight = layer.weight.detach().numpy()
    outputs, inputs, biases = *names, {}
    weights = {}
    for i, gate in enumerate(outputs):
        rows = slice(i * CHANNELS, (i + 1) * CHANNELS)
        for j, read in enumerate(inputs):
            weights[read, gate] = weight[rows, j * CHANNELS : (j + 1) * CHANNELS]
        if layer.bias is not None:
            column = layer.bias.detach().numpy()[rows]
            biases[gate] = column.reshape(1, -1, *(1,) * (weight.ndim - 2))
    assert weight.shape[:2] == (len(outputs) * CHANNELS, len(inputs) * CHANNELS)
    return weights, biases


def conv_lstm(cell, x, h, c):
    w, b = gates_of(cell.gates, ("ifco", "xh"))
    w_co = cell.peephole.detach().numpy()
    i = sigmoid(conv(w["x", "i"], x) + conv(w["h", "i"], h) + b["i"])
    f = sigmoid(conv(w["x", "f"], x) + conv(w["h", "f"], h) + b["f"])
    c = f * c + i * np.tanh(conv(w["x", "c"], x) + conv(w["h", "c"], h) + b["c"])
    o = sigmoid(conv(w["x", "o"], x) + conv(w["h", "o"], h) + w_co * c + b["o"])
    return o * np.tanh(c), c


def st_lstm(cell, x, h, c, m):
    w, b = gates_of(cell.cell_gates, ("ifco", "xh"))
    v, d = gates_of(cell.memory_gates, ("ifm", "xm"))
    u, _ = gates_of(cell.output_gate, ("o", "cm"))
    i = sigmoid(conv(w["x", "i"], x) + conv(w["h", "i"], h) + b["i"])
    f = sigmoid(conv(w["x", "f"], x) + conv(w["h", "f"], h) + b["f"])
    c = f * c + i * np.tanh(conv(w["x", "c"], x) + conv(w["h", "c"], h) + b["c"])
    i2 = sigmoid(conv(v["x", "i"], x) + conv(v["m", "i"], m) + d["i"])
    f2 = sigmoid(conv(v["x", "f"], x) + conv(v["m", "f"], m) + d["f"])
    m = f2 * m + i2 * np.tanh(conv(v["x", "m"], x) + conv(v["m", "m"], m) + d["m"])
    o = sigmoid(conv(w["x", "o"], x) + conv(w["h", "o"], h) + conv(u["c", "o"], c) + conv(u["m", "o"], m) + b["o"])
    both = conv(cell.fuse.weight.detach().numpy(), np.concatenate([c, m], axis=1))
    return o * np.tanh(both), c, m


ORACLES = {ConvLSTMCell: conv_lstm, STLSTMCell: st_lstm}
KINDS = list(ORACLES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_matches_the_equations_over_three_time_steps(kind, size, kernel_size):
    cell = make(kind, size, kernel_size)
    state = state_of(kind, size)
    expected = tuple(s.numpy() for s in state)
    for x in tensors(3, size):
        hidden, state = cell(x, state)
        expected = ORACLES[kind](cell, x.numpy(), *expected)
        assert hidden is state[0]
        for found, wanted in zip(state, expected, strict=True):
            np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_an_update_from_outside_takes_the_place_of_the_cells_own(kind, size):
    cell, state, (x,) = make(kind, size), state_of(kind, size), tensors(1, size)
    given = []

    def update(before, decay, increment):
        given.append(before)
        return update_cell(before, decay, increment)

    found, expected = cell(x, state, update)[1], cell(x, state)[1]
    assert given[0] is state[CELL]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    doubled = cell(x, state, lambda *args: 2 * update_cell(*args))[1]
    torch.testing.assert_close(doubled[CELL], 2 * expected[CELL], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients(kind, size):
    cell = make(kind, size)
    names = [name for name, _ in cell.named_parameters()]
    inputs = [*tensors(1, size), *state_of(kind, size), *(p.detach() for p in cell.parameters())]
    n = 1 + kind.states + kind.carries

    def call(x, *rest):
        parameters = dict(zip(names, rest[n - 1 :], strict=True))
        return torch.func.functional_call(cell, parameters, (x, rest[: n - 1]))[1]

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("size", [(2, 2), (1, 2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_input_and_state_entry_by_entry(kind, size):
    cell = make(kind, size)
    inputs = [x[:1].requires_grad_() for x in (*tensors(1, size), *state_of(kind, size))]
    assert torch.autograd.gradcheck(lambda x, *state: cell(x, state)[1], inputs)


@pytest.mark.parametrize(("kind", "convolutions"), [(ConvLSTMCell, 1), (STLSTMCell, 4)])
def test_gates_that_share_their_inputs_are_one_convolution(kind, convolutions):
    calls = []
    cell = make(kind, (3, 4))
    for module in cell.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    cell(*tensors(1, (3, 4)), state_of(kind, (3, 4)))
    assert len(calls) == convolutions


def test_only_the_gates_have_biases():
    cell = STLSTMCell(CHANNELS, (3, 4))
    biased = {name for name, _ in cell.named_parameters() if name.endswith("bias")}
    assert biased == {"cell_gates.bias", "memory_gates.bias"}


def test_the_peephole_reads_each_element_of_the_new_cell_state_with_its_own_weight():
    cell = make(ConvLSTMCell, (2, 3, 4))
    assert cell.peephole.shape == (CHANNELS, 2, 3, 4)
    assert not ConvLSTMCell(CHANNELS, (2, 3, 4)).peephole.any(), "starts closed"
    (x,), state = tensors(1, (2, 3, 4)), state_of(ConvLSTMCell, (2, 3, 4))
    before, _ = cell(x, state)
    with torch.no_grad():
        cell.peephole[1, 0, 2, 3] += 1
    after, _ = cell(x, state)
    changed = (before != after).nonzero()
    assert changed.tolist() == [[b, 1, 0, 2, 3] for b in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_states_are_not_changed_in_place(kind, size):
    (x,), state = tensors(1, size), state_of(kind, size)
    copies = [t.clone() for t in (x, *state)]
    with torch.no_grad():
        make(kind, size)(x, state)
    assert all(torch.equal(a, b) for a, b in zip((x, *state), copies, strict=True))


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (1, 4)])
def test_conv_lstm_names_both_sizes_when_the_input_does_not_fit_its_peephole(size):
    cell = make(ConvLSTMCell, (3, 4))
    with pytest.raises(ValueError, match=rf"input \(2, 2, {size[0]}, {size[1]}\) .* peephole \(2, 3, 4\)"):
        cell(*tensors(1, size), tuple(tensors(2, size)))


def test_st_lstm_takes_any_size():
    cell = make(STLSTMCell, (3, 4))
    for size in [(3, 4), (5, 2), (1, 1)]:
        hidden, _ = cell(*tensors(1, size), state_of(STLSTMCell, size))
        assert hidden.shape == (2, CHANNELS, *size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_size_is_refused(kind):
    with pytest.raises((ValueError, RuntimeError), match=r"[Ss]izes of tensors|shape"):
        make(kind, (3, 4))(*tensors(1, (3, 4)), state_of(kind, (3, 5)))


def test_the_cells_by_name():
    assert {"convlstm": ConvLSTMCell, "stlstm": STLSTMCell} == CELLS
