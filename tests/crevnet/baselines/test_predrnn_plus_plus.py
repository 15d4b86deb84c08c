"""PredRNN++ against equations 2 to 4 of Wang et al. (2018), written out number by number."""

import numpy as np
import pytest
import torch
from torch import nn

from crevnet.baselines.predrnn_plus_plus import GradientHighwayUnit, PredRNNPlusPlusConfig
from crevnet.models import MODELS


def tiny(**changes):
    options = {"image_size": 8, "patch": 2, "hidden": (3, 2), "highway": 4, "kernel_size": 3}
    return PredRNNPlusPlusConfig(**options | changes)


def literal_step(model, literal, oracle):
    """One time step; the state is h and c of each layer, the memory and the highway."""
    sigmoid, gates = oracle.sigmoid, literal.gates

    def step(frame, state):
        x = literal.fold(frame, model.config.patch)
        layers, m, z = state
        after = []
        for number, (cell, (h, c)) in enumerate(zip(model.cells, layers, strict=True), start=1):
            i, f, g = gates(cell.cell_gates, 3, x, h, c)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            i, f, g = gates(cell.memory_gates, 3, x, c, m)
            (before,) = gates(cell.memory_transition, 1, m)
            m = sigmoid(f) * np.tanh(before) + sigmoid(i) * np.tanh(g)
            (o,) = gates(cell.output_gate, 1, x, c, m)
            (both,) = gates(cell.fuse, 1, c, m)
            x = np.tanh(o) * np.tanh(both)
            after.append((x, c))
            if number == 1:
                p, s = gates(model.highway.gates, 2, x, z)
                x = z = sigmoid(s) * np.tanh(p) + (1 - sigmoid(s)) * z
        (prediction,) = gates(model.output, 1, x)
        return literal.unfold(prediction, model.config.patch), (after, m, z)

    return step


@pytest.mark.parametrize(
    ("changes", "fed"),
    [
        ({}, [True, True, True]),
        ({}, [True, True, False, False]),
        ({}, [True, False, True]),
        ({"patch": 1, "image_size": 4, "channels": 2}, [True, False, False]),
        ({"kernel_size": 5, "hidden": (2, 1, 3, 2)}, [True, False]),
    ],
)
def test_matches_the_equations(changes, fed, literal, oracle):
    config = tiny(**changes)
    model = oracle.randomise(config.build())
    clips = oracle.clips(config, len(fed))

    def zeros(channels):
        return np.zeros((2, channels, *config.folded_size))

    state = [(zeros(c), zeros(c)) for c in config.hidden], zeros(config.hidden[-1]), zeros(config.highway)
    expected = oracle.run(literal_step(model, literal, oracle), clips, fed, state)
    found = model(clips, fed=fed).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def macs_per_pixel(frame, kernel_size=5):
    """Multiplications per pixel (or patch) of the published configuration, where the frame has so many channels."""
    taps = kernel_size**2
    highway = taps * (128 + 128) * 2 * 128
    layers = 0
    for inputs, memory, n in [(frame, 64, 128), (128, 128, 64), (64, 64, 64), (64, 64, 64)]:
        cell = taps * (inputs + n + n) * 3 * n
        second = taps * (inputs + n + memory) * 3 * n + memory * n
        output = taps * (inputs + n + n) * n + 2 * n * n
        layers += cell + second + output
    return layers + highway + 64 * frame


class TestThePaper:
    """The defaults are the published configuration; table 1 counts 106.8 GFLOPs, which it does not give."""

    def test_flops(self, flops):
        expected = 2 * macs_per_pixel(1) * 64 * 64
        assert flops(PredRNNPlusPlusConfig(patch=1)) == expected
        assert expected == pytest.approx(117.46e9, rel=1e-4)

    def test_flops_on_patches(self, flops):
        assert flops(PredRNNPlusPlusConfig()) == 2 * macs_per_pixel(16) * 16 * 16

    @pytest.mark.parametrize(("patch", "parameters"), [(1, 14_341_121), (4, 14_678_096)])
    def test_parameters(self, patch, parameters):
        with torch.device("meta"):
            model = PredRNNPlusPlusConfig(patch=patch).build()
        assert sum(p.numel() for p in model.parameters()) == parameters

    def test_the_default_configuration(self):
        config = PredRNNPlusPlusConfig()
        assert (config.hidden, config.highway, config.kernel_size, config.patch) == ((128, 64, 64, 64), 128, 5, 4)
        assert MODELS["predrnn++"] is PredRNNPlusPlusConfig


def test_gates_that_share_their_inputs_are_one_convolution():
    model = tiny(hidden=(3, 2, 2)).build()
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 1, 1, 8, 8))
    assert len(calls) == 3 * 5 + 1 + 1


def test_a_closed_highway_keeps_its_state_and_an_open_one_takes_the_input():
    unit = GradientHighwayUnit(2, 3, 3).double()
    nn.init.zeros_(unit.gates.weight)
    x, z = torch.rand(1, 2, 4, 4, dtype=torch.float64), torch.rand(1, 3, 4, 4, dtype=torch.float64)
    for switch, expected in [(-100.0, z), (100.0, torch.full_like(z, 0.5).tanh())]:
        with torch.no_grad():
            unit.gates.bias.copy_(torch.tensor([0.5] * 3 + [switch] * 3))
        torch.testing.assert_close(unit(x, z), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("channels", "patch", "batch"), [(1, 4, 1), (3, 2, 3), (2, 1, 2)])
def test_shapes_of_states(channels, patch, batch):
    model = tiny(channels=channels, patch=patch, hidden=(3, 2, 5)).build()
    frame = torch.rand(batch, channels, 8, 8)
    before = model.initial_state(frame.double())
    _, after = model.step(frame, model.initial_state(frame))
    side = 8 // patch
    for state, dtype in [(before, torch.float64), (after, torch.float32)]:
        tensors = [*(t for layer in state.layers for t in layer), state.memory, state.highway]
        assert [tuple(t.shape) for t in tensors] == [(batch, c, side, side) for c in (3, 3, 2, 2, 5, 5, 5, 4)]
        assert {t.dtype for t in tensors} == {dtype}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (4,)}, r"model.hidden must name 2 or more layers"),
        ({"hidden": (4, 0)}, r"each of at least one channel, got \(4, 0\)"),
        ({"highway": 0}, r"model.highway must be at least 1, got 0"),
        ({"kernel_size": 2}, r"model.kernel_size must be odd, got 2"),
        ({"patch": 3}, r"model.image_size 8 is not a multiple of model.patch 3"),
        ({"clip": 2}, r"model.clip must be 1 .* for predrnn\+\+"),
        ({"name": "predrnn"}, r"model.name must be one of \['predrnn\+\+'\]"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
