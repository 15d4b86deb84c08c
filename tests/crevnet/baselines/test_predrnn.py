"""PredRNN against equations 2 and 3 of Wang et al. (2017), written out number by number."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from crevnet.baselines.predrnn import PredRNNConfig
from crevnet.models import MODELS


def tiny(**changes):
    return PredRNNConfig(**{"image_size": 8, "patch": 2, "hidden": (2, 2), "kernel_size": 3} | changes)


def literal_step(model, literal, oracle):
    """One time step; the state is h and c of each layer, and the memory."""
    sigmoid = oracle.sigmoid

    def step(frame, state):
        x = literal.fold(frame, model.config.patch)
        layers, m = state
        after = []
        for cell, (h, c) in zip(model.cells, layers, strict=True):
            i, f, g, o = literal.gates(cell.cell_gates, 4, x, h)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            i, f, g = literal.gates(cell.memory_gates, 3, x, m)
            m = sigmoid(f) * m + sigmoid(i) * np.tanh(g)
            (o_cm,) = literal.gates(cell.output_gate, 1, c, m)
            (both,) = literal.gates(cell.fuse, 1, c, m)
            x = sigmoid(o + o_cm) * np.tanh(both)
            after.append((x, c))
        (prediction,) = literal.gates(model.output, 1, x)
        return literal.unfold(prediction, model.config.patch), (after, m)

    return step


@pytest.mark.parametrize(
    ("changes", "fed"),
    [
        ({}, [True, True, True]),
        ({}, [True, True, False, False]),
        ({}, [True, False, True]),
        ({"patch": 1, "image_size": 4, "hidden": (2,), "channels": 3}, [True, False, False]),
        ({"kernel_size": 5, "hidden": (2, 2, 2)}, [True, False]),
    ],
)
def test_matches_the_equations(changes, fed, literal, oracle):
    config = tiny(**changes)
    model = oracle.randomise(config.build())
    clips = oracle.clips(config, len(fed))
    zero = np.zeros((2, config.hidden[0], *config.folded_size))
    expected = oracle.run(literal_step(model, literal, oracle), clips, fed, ([(zero, zero)] * len(config.hidden), zero))
    found = model(clips, fed=fed).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def macs_per_pixel(frame):
    """Multiplications per pixel (or patch) of the paper's setting, where the frame has so many channels."""
    n, taps = 128, 25
    layers = 0
    for inputs in (frame, n, n, n):
        cell = taps * (inputs + n) * 4 * n
        memory = taps * (inputs + n) * 3 * n
        output = taps * 2 * n * n
        layers += cell + memory + output + 2 * n * n
    return layers + n * frame


class TestThePaper:
    """The defaults, on single pixels, are what table 1 counts."""

    def test_flops(self, flops):
        expected = 2 * macs_per_pixel(1) * 64 * 64
        assert flops(PredRNNConfig(patch=1)) == expected
        assert expected == pytest.approx(192.5e9, rel=3e-4)
        assert expected == pytest.approx(192.9e9, rel=3e-3), "table 1"

    def test_flops_on_patches(self, flops):
        assert flops(PredRNNConfig()) == 2 * macs_per_pixel(16) * 16 * 16

    @pytest.mark.parametrize(("patch", "parameters"), [(1, 23_504_385), (4, 23_842_320)])
    def test_parameters(self, patch, parameters):
        with torch.device("meta"):
            model = PredRNNConfig(patch=patch).build()
        assert sum(p.numel() for p in model.parameters()) == parameters

    def test_the_default_configuration(self):
        config = PredRNNConfig()
        assert (config.hidden, config.kernel_size, config.patch) == ((128,) * 4, 5, 4)
        assert MODELS["predrnn"] is PredRNNConfig


def test_gates_that_share_their_inputs_are_one_convolution():
    model = tiny().build()
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 1, 1, 8, 8))
    assert len(calls) == 4 * len(model.config.hidden) + 1


def test_the_memory_zigzags_through_the_layers(oracle):
    model = oracle.randomise(tiny(hidden=(2, 2, 2)).build())
    memories = []
    for cell in model.cells:
        cell.register_forward_hook(lambda _, args, out: memories.append((args[1][2], out[1][2])))
    model(oracle.clips(model.config, 3))
    assert not memories[0][0].any()
    assert [left is read for (_, left), (read, _) in pairwise(memories)] == [True] * 8


@pytest.mark.parametrize(("channels", "patch", "batch"), [(1, 4, 1), (3, 2, 3), (2, 1, 2)])
def test_shapes_of_states(channels, patch, batch):
    model = tiny(channels=channels, patch=patch).build()
    layers, memory = model.initial_state(torch.rand(batch, channels, 8, 8, dtype=torch.float64))
    assert [len(layer) for layer in layers] == [2, 2]
    states = [*layers[0], *layers[1], memory]
    assert {(t.shape, t.dtype) for t in states} == {((batch, 2, 8 // patch, 8 // patch), torch.float64)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": ()}, r"model.hidden must name 1 or more layers"),
        ({"hidden": (0, 0)}, r"each of at least one channel, got \(0, 0\)"),
        ({"hidden": (4, 2)}, r"model.hidden must be the same for all layers, .* got \(4, 2\)"),
        ({"kernel_size": 2}, r"model.kernel_size must be odd, got 2"),
        ({"patch": 3}, r"model.image_size 8 is not a multiple of model.patch 3"),
        ({"stacking": "depth"}, r"model.stacking 'channels' for predrnn"),
        ({"name": "convlstm"}, r"model.name must be one of \['predrnn'\]"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
