"""Oracles of the baselines: layers and cells as loops in NumPy, and one small batch that any model must learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def array(x):
    return x.detach().numpy()


def conv(layer, x):
    """A convolution of `x [B, I, ...]` with zero padding, output by output."""
    weight = array(layer.weight)
    kernel = weight.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *((k // 2, k // 2) for k in kernel)])
    out = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for o, *position in np.ndindex(*out.shape[1:]):
        window = padded[(slice(None), slice(None), *(slice(i, i + k) for i, k in zip(position, kernel, strict=True)))]
        bias = 0 if layer.bias is None else array(layer.bias)[o]
        out[(slice(None), o, *position)] = (window * weight[o]).reshape(len(x), -1).sum(axis=1) + bias
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def conv_lstm(cell, x, h, c):
    """Appendix A; the gates of one fused convolution are i, f, c, o."""
    i, f, g, o = np.split(conv(cell.gates, np.concatenate([x, h], axis=1)), 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o + array(cell.peephole) * c) * np.tanh(c), c


def st_lstm(cell, x, h, c, m):
    """Appendix A; the memory's gates are i', f', m."""
    i, f, g, o = np.split(conv(cell.cell_gates, np.concatenate([x, h], axis=1)), 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    i, f, g = np.split(conv(cell.memory_gates, np.concatenate([x, m], axis=1)), 3, axis=1)
    m = sigmoid(f) * m + sigmoid(i) * np.tanh(g)
    both = np.concatenate([c, m], axis=1)
    return sigmoid(o + conv(cell.output_gate, both)) * np.tanh(conv(cell.fuse, both)), c, m


def apply_cell(name, cell, x, own, memory):
    """A cell by name, with the states of its layer and the memory of the layer before: hidden, own states, memory."""
    if name == "convlstm":
        own = conv_lstm(cell, x, *own)
        return own[0], own, memory
    h, c, m = st_lstm(cell, x, *own, memory)
    return h, (h, c), m


def randomise(model, scale=0.5, seed=0):
    """The model in float64, all weights of order one, peepholes included."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
    return model


def clips_for(config, count, batch=2, seed=1):
    """Random clips `[B, count, ...]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, count, *config.clip_shape(), generator=generator, dtype=torch.float64)


def free_running(step, clips, fed, state):
    """What a recurrent model predicts: it is given a true clip where `fed` says so, else what it predicted last."""
    predictions = []
    for t, given in enumerate(fed):
        prediction, state = step(array(clips[:, t]) if given else predictions[-1], state)
        predictions.append(prediction)
    return np.stack(predictions, axis=1)


def moving_squares(config, frames=6, side=4):
    """Clips of two sequences of a bright square that moves by a pixel per frame, each in its own direction."""
    from crevnet.clips import frames_to_clips

    video = torch.zeros(2, frames, config.channels, config.image_size, config.image_size)
    for t in range(frames):
        video[0, t, :, 2 + t : 2 + t + side, 3 : 3 + side] = 1
        video[1, t, :, 5 : 5 + side, 2 + t : 2 + t + side] = 1
    return frames_to_clips(video, config.clip, config.stacking)


def overfit(model, steps, learning_rate):
    """Loss on one small batch after some steps of Adam, relative to the first one or, if less, to that of copying."""
    clips = moving_squares(model.config)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model.loss(clips)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    copying = float((clips[:, 1:] - clips[:, :-1]).square().mean())
    return losses[-1] / min(losses[0], copying)


@pytest.fixture(scope="session")
def oracle():
    """Layers and cells in NumPy."""
    return SimpleNamespace(
        array=array, conv=conv, sigmoid=sigmoid, cell=apply_cell, randomise=randomise, clips=clips_for, run=free_running
    )


@pytest.fixture(scope="session")
def learn():
    """Overfits a model to one small batch; returns the last loss over the first, or over that of copying."""
    return overfit


def cross_correlation(weight, x):
    """`x [B, I, H, W]` with `weight [O, I, K, K]` and zero padding, one product at a time."""
    _, inputs, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    out = np.zeros((len(x), outputs, height, width))
    for b, o, row, column in np.ndindex(*out.shape):
        for i, down, right in np.ndindex(inputs, kernel, kernel):
            y, z = row + down - kernel // 2, column + right - kernel // 2
            if 0 <= y < height and 0 <= z < width:
                out[b, o, row, column] += weight[o, i, down, right] * x[b, i, y, z]
    return out


def gates_of(layer, count, *read):
    """The gates that one convolution computes, each from its own weights for each tensor that it reads."""
    weight = array(layer.weight)
    channels = len(weight) // count
    assert weight.shape[1] == sum(x.shape[1] for x in read)
    gates = []
    for rows in np.split(np.arange(len(weight)), count):
        total = np.zeros((len(read[0]), channels, *read[0].shape[2:]))
        if layer.bias is not None:
            total += array(layer.bias)[rows].reshape(1, channels, 1, 1)
        first = 0
        for x in read:
            total += cross_correlation(weight[rows, first : first + x.shape[1]], x)
            first += x.shape[1]
        gates.append(total)
    return gates


def fold_pixels(x, n):
    """Frames `[B, C, H, W]`: the pixel at row i, column j of a patch becomes channel c n^2 + i n + j."""
    out = np.zeros((x.shape[0], x.shape[1] * n * n, x.shape[2] // n, x.shape[3] // n))
    for b, c, row, column in np.ndindex(*x.shape):
        out[b, c * n * n + row % n * n + column % n, row // n, column // n] = x[b, c, row, column]
    return out


def unfold_pixels(x, n):
    out = np.zeros((x.shape[0], x.shape[1] // n**2, x.shape[2] * n, x.shape[3] * n))
    for b, c, row, column in np.ndindex(*out.shape):
        out[b, c, row, column] = x[b, c * n * n + row % n * n + column % n, row // n, column // n]
    return out


def flops_of_a_frame(config):
    """Operations (two per multiplication) of one time step, batch 1, counted without computing anything."""
    with FakeTensorMode():
        model = config.build()
        frame = torch.rand(1, *config.clip_shape())
        state = model.initial_state(frame)
        with FlopCounterMode(display=False) as counter:
            model.step(frame, state)
    return counter.get_total_flops()


@pytest.fixture(scope="session")
def literal():
    """Two-dimensional convolutions gate by gate and folding, in loops over single numbers."""
    return SimpleNamespace(gates=gates_of, fold=fold_pixels, unfold=unfold_pixels)


@pytest.fixture(scope="session")
def flops():
    """FLOPs of one predicted frame."""
    return flops_of_a_frame
