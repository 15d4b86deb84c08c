"""E3D-LSTM against its equations in loops: 3D convolutions over a window, attention over past memories, the zigzag."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crevnet.baselines.e3d_lstm import E3DLSTMConfig, WindowConvolution, recall
from crevnet.models import MODELS
from revgrad import LiveMemory

PLANS = [[True, True, True], [True, True, False, False], [True, False, True, False]]


def tiny(**changes):
    options = {"image_size": 6, "channels": 2, "patch": 2, "hidden": (3, 3), "kernel_size": 3}
    return E3DLSTMConfig(**options | changes)


def conv(oracle, layer, x):
    """A 3D convolution that keeps the size; of the `t - 1` frames of padding the greater half follows."""
    weight = oracle.array(layer.weight)
    t, k = weight.shape[2:4]
    before = (t - 1) // 2
    padded = np.pad(x, [(0, 0), (0, 0), (before, t - 1 - before), (k // 2, k // 2), (k // 2, k // 2)])
    out = np.zeros((len(x), len(weight), *x.shape[2:]))
    for o, f, i, j in np.ndindex(*out.shape[1:]):
        window = padded[:, :, f : f + t, i : i + k, j : j + k]
        out[:, o, f, i, j] = (window * weight[o]).sum(axis=(1, 2, 3, 4))
    return out if layer.bias is None else out + oracle.array(layer.bias)[:, None, None, None]


def attention(query, memories):
    """Every position and time of the query, against every position and time of every memory."""
    out = np.zeros_like(query)
    for b, *at in np.ndindex(len(query), *query.shape[2:]):
        q = query[(b, slice(None), *at)]
        values = [m[(b, slice(None), *other)] for m in memories for other in np.ndindex(*query.shape[2:])]
        weights = np.exp([float(q @ v) for v in values])
        out[(b, slice(None), *at)] = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
    return out


def layer_norm(oracle, norm, x):
    scale, shift = oracle.array(norm.weight), oracle.array(norm.bias)
    out = np.empty_like(x)
    for b in range(len(x)):
        out[b] = (x[b] - x[b].mean()) / np.sqrt(x[b].var() + norm.eps)
    return out * scale[:, None, None, None] + shift[:, None, None, None]


def e3d_lstm(oracle, cell, x, h, cells, m):
    sigmoid = oracle.sigmoid
    r, i, g, o, i2, f2, g2 = np.split(conv(oracle, cell.from_input, x), 7, axis=1)
    rh, ih, gh, oh = np.split(conv(oracle, cell.from_hidden, h), 4, axis=1)
    im, fm, gm = np.split(conv(oracle, cell.from_memory, m), 3, axis=1)
    found = attention(sigmoid(r + rh), cells)
    c = sigmoid(i + ih) * np.tanh(g + gh) + layer_norm(oracle, cell.norm, cells[-1] + found)
    m = sigmoid(i2 + im) * np.tanh(g2 + gm) + sigmoid(f2 + fm) * m
    both = np.concatenate([c, m], axis=1)
    o = sigmoid(o + oh + conv(oracle, cell.output_gate, both))
    return o * np.tanh(conv(oracle, cell.fuse, both)), c, m


def network(oracle, model):
    """One time step of the whole model: a function of a frame and the state, and the first state."""
    config = model.config
    zero = np.zeros((2, config.hidden[0], config.window, *config.folded_size))
    blank = np.zeros((2, config.folded_channels, *config.folded_size))

    def fold(x):
        return config.fold(torch.from_numpy(x)).numpy()

    def step(frame, state):
        frames, hidden, cells, m = state
        frames = [*frames, fold(frame)]
        x = np.stack(frames, axis=2)
        new_hidden, new_cells = [], []
        for layer, h, past in zip(model.layers, hidden, cells, strict=True):
            recalled = past if config.recall is None else past[-config.recall :]
            x, c, m = e3d_lstm(oracle, layer, x, h, recalled, m)
            new_hidden.append(x)
            new_cells.append([*past, c])
        weight = oracle.array(model.output.weight)
        out = np.einsum("bcthw,octxy->bohw", x, weight) + oracle.array(model.output.bias)[:, None, None]
        return config.unfold(torch.from_numpy(out)).numpy(), (frames[1:], new_hidden, new_cells, m)

    layers = len(model.layers)
    return step, ([blank] * (config.window - 1), [zero] * layers, [[zero]] * layers, zero)


@pytest.mark.parametrize("fed", PLANS)
def test_matches_the_equations(oracle, fed):
    model = oracle.randomise(tiny().build())
    clips = oracle.clips(model.config, len(fed))
    step, state = network(oracle, model)
    found = model(clips, fed=fed).detach().numpy()
    np.testing.assert_allclose(found, oracle.run(step, clips, fed, state), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 3},
        {"window": 1},
        {"temporal_kernel_size": 3},
        {"temporal_kernel_size": 1},
        {"recall": 1},
        {"recall": 2},
    ],
)
def test_matches_the_equations_with_other_windows_kernels_and_recalls(oracle, changes):
    model = oracle.randomise(tiny(**changes, hidden=(2, 2), channels=1).build())
    clips = oracle.clips(model.config, 4)
    step, state = network(oracle, model)
    found = model(clips).detach().numpy()
    np.testing.assert_allclose(found, oracle.run(step, clips, [True] * 4, state), rtol=0, atol=1e-11)


def test_only_so_many_memories_are_kept(oracle):
    clips = oracle.clips(tiny(), 4)
    for limit, kept in [(None, 5), (1, 1), (3, 3), (9, 5)]:
        model = tiny(recall=limit).build().double()
        state = model.initial_state(clips[:, 0])
        for t in range(4):
            _, state = model.step(clips[:, t], state)
        assert [len(cells) for cells in state.cells] == [kept, kept]


def test_recall_finds_the_memory_that_resembles_the_query():
    memories = [torch.eye(3).view(1, 3, 1, 1, 3) * scale for scale in (1.0, 30.0)]
    query = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1, 1) * 10
    found = recall(query, memories).flatten()
    assert torch.allclose(found, torch.tensor([0.0, 30.0, 0.0]), atol=1e-4)


@pytest.mark.parametrize(("temporal", "reach"), [(1, (0, 0)), (2, (0, 1)), (3, (-1, 1)), (4, (-1, 2))])
def test_the_longer_half_of_an_even_kernel_reads_ahead(temporal, reach):
    layer = WindowConvolution(1, 1, temporal, 3, bias=False)
    x = torch.zeros(1, 1, 7, 5, 5, requires_grad=True)
    layer(x)[0, 0, 3].sum().backward()
    read = x.grad[0, 0].abs().sum(dim=(1, 2)).nonzero().flatten() - 3
    assert (int(read.min()), int(read.max())) == reach


def test_states_are_not_changed_in_place(oracle):
    model = oracle.randomise(tiny().build())
    clips = oracle.clips(model.config, 2)
    _, state = model.step(clips[:, 0], model.initial_state(clips[:, 0]))
    tensors = [*state.frames, *state.hidden, *(c for cells in state.cells for c in cells), state.memory]
    before = [x.clone() for x in tensors]
    model.step(clips[:, 1], state)
    assert [len(cells) for cells in state.cells] == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_all_weights_learn(oracle):
    model = oracle.randomise(tiny().build())
    model.loss(oracle.clips(model.config, 4), fed=[True, False, True]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_shapes():
    model = E3DLSTMConfig(image_size=8, hidden=(4,)).build()
    assert model(torch.rand(3, 2, 1, 8, 8), steps=4).shape == (3, 4, 1, 8, 8)
    assert model.predict(torch.rand(3, 2, 1, 8, 8), 3).shape == (3, 3, 1, 8, 8)


@pytest.mark.parametrize(("patch", "convolutions", "attention"), [(1, 192.2e9, 68.7e9), (4, 12.36e9, 0.268e9)])
def test_published_configuration(patch, convolutions, attention):
    """Per layer 7 gates over x, 4 over h, 3 over m, one over c' and m', 2 x 5 x 5 each, and a 1 x 1 x 1 convolution."""
    n, folded, positions = 64, patch**2, 2 * (64 // patch) ** 2
    over_x = [7 * n * i for i in (folded, n, n, n)]
    kernels = 50 * (sum(over_x) + 4 * (4 + 3 + 2) * n**2)
    pointwise = 4 * 2 * n**2 + n * folded  # of the output, which has half as many positions but two times
    weights = kernels + 4 * (2 * n**2 + 7 * n + 2 * n) + 2 * n * folded + folded
    with FakeTensorMode():
        model = E3DLSTMConfig(patch=patch).build()
        # Fused kernels of attention are not in the counter's books.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 1, 1, 64, 64), steps=2)
    counts = counter.get_flop_counts()["Global"]
    assert sum(p.numel() for p in model.parameters()) == weights
    assert counts[torch.ops.aten.convolution] == 2 * 2 * positions * (kernels + pointwise)
    assert counts[torch.ops.aten.convolution] / 2 == pytest.approx(convolutions, rel=1e-3)
    # One memory to recall at the first step, two at the second; each is compared and then mixed.
    one = 4 * 2 * 2 * n * positions**2
    assert counter.get_total_flops() - counts[torch.ops.aten.convolution] == 3 * one
    assert one == pytest.approx(attention, rel=2e-3)


def test_learns_one_batch_by_heart(learn):
    config = E3DLSTMConfig(image_size=16, hidden=(8, 8), kernel_size=3)
    assert learn(config.build(), steps=60, learning_rate=1e-2) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": ()}, r"model.hidden must name 1 or more layers"),
        ({"hidden": (3, 4)}, r"model.hidden must be the same for all layers, .* got \(3, 4\)"),
        ({"kernel_size": 4}, "model.kernel_size must be odd, got 4"),
        ({"window": 0}, "model.window must be at least 1, got 0"),
        ({"temporal_kernel_size": 0}, "model.temporal_kernel_size must be at least 1, got 0"),
        ({"recall": 0}, "model.recall must be null or at least 1, got 0"),
        ({"patch": 4}, "model.image_size 6 is not a multiple of model.patch 4"),
        ({"stacking": "depth"}, "model.stacking 'channels' for e3d-lstm"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_clips_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 8, 8\) given, but the model is built for \(2, 6, 6\)"):
        tiny().build()(torch.rand(1, 2, 2, 8, 8))


def test_by_name():
    assert MODELS["e3d-lstm"] is E3DLSTMConfig


def test_no_attention_matrix_is_kept():
    with FakeTensorMode(), LiveMemory() as memory:
        model = E3DLSTMConfig(patch=1, hidden=(8,)).build()
        before = memory.live
        model.loss(torch.empty(1, 4, 1, 64, 64))
        matrix = 4 * (2 * 64**2) ** 2
        assert memory.peak - before < matrix
