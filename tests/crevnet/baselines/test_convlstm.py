"""ConvLSTM against equation 3 of Shi et al. (2015), written out number by number."""

import numpy as np
import pytest
import torch
from torch import nn

from crevnet.baselines.convlstm import ConvLSTMConfig, PeepholeConvLSTMCell
from crevnet.models import MODELS


def tiny(**changes):
    return ConvLSTMConfig(**{"image_size": 8, "patch": 2, "hidden": (3, 2), "kernel_size": 3} | changes)


def literal_step(model, literal, oracle):
    """One time step; the state is h and c of each layer."""
    sigmoid = oracle.sigmoid

    def step(frame, state):
        (x,) = literal.gates(model.embedding, 1, literal.fold(frame, model.config.patch))
        after = []
        for cell, (h, c) in zip(model.cells, state, strict=True):
            w_ci, w_cf, w_co = oracle.array(cell.peepholes)
            i, f, g, o = literal.gates(cell.gates, 4, x, h)
            i, f = sigmoid(i + w_ci * c), sigmoid(f + w_cf * c)
            c = f * c + i * np.tanh(g)
            x = sigmoid(o + w_co * c) * np.tanh(c)
            after.append((x, c))
        (prediction,) = literal.gates(model.output, 1, x)
        return literal.unfold(prediction, model.config.patch), after

    return step


@pytest.mark.parametrize(
    ("changes", "fed"),
    [
        ({}, [True, True, True]),
        ({}, [True, True, False, False]),
        ({}, [True, False, True]),
        ({"patch": 1, "image_size": 4, "hidden": (2,), "channels": 2}, [True, False, False]),
        ({"kernel_size": 5, "hidden": (1, 2, 3)}, [True, False]),
    ],
)
def test_matches_the_equations(changes, fed, literal, oracle):
    config = tiny(**changes)
    model = oracle.randomise(config.build())
    clips = oracle.clips(config, len(fed))
    zeros = [np.zeros((2, c, *config.folded_size)) for c in config.hidden]
    expected = oracle.run(literal_step(model, literal, oracle), clips, fed, [(z, z) for z in zeros])
    found = model(clips, fed=fed).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


class TestThePaper:
    """The defaults, on single pixels, are what table 1 counts."""

    def test_flops(self, flops):
        per_pixel = 4 * 25 * (128 + 128) * (4 * 128) + 1 * 128 + 128 * 1
        assert flops(ConvLSTMConfig(patch=1)) == 2 * per_pixel * 64 * 64
        assert 2 * per_pixel * 64 * 64 == pytest.approx(107.4e9, rel=3e-4)

    def test_flops_on_patches(self, flops):
        per_pixel = 4 * 25 * (128 + 128) * (4 * 128) + 16 * 128 + 128 * 16
        assert flops(ConvLSTMConfig()) == 2 * per_pixel * 16 * 16

    @pytest.mark.parametrize(("patch", "parameters"), [(1, 19_401_089), (4, 13_506_704)])
    def test_parameters(self, patch, parameters):
        with torch.device("meta"):
            model = ConvLSTMConfig(patch=patch).build()
        assert sum(p.numel() for p in model.parameters()) == parameters

    def test_the_default_configuration(self):
        config = ConvLSTMConfig()
        assert (config.hidden, config.kernel_size, config.patch) == ((128,) * 4, 5, 4)
        assert MODELS["convlstm"] is ConvLSTMConfig


def test_gates_that_share_their_inputs_are_one_convolution():
    model = tiny().build()
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 1, 1, 8, 8))
    assert len(calls) == 1 + len(model.config.hidden) + 1


def test_each_peephole_starts_closed_and_reads_its_own_element(oracle):
    fresh = PeepholeConvLSTMCell(2, 3, (4, 4), 3)
    assert fresh.peepholes.shape == (3, 3, 4, 4)
    assert not fresh.peepholes.any()
    cell = oracle.randomise(fresh)
    x, h, c = (torch.randn(2, n, 4, 4, dtype=torch.float64) for n in (2, 3, 3))
    before = cell(x, h, c)
    for gate, moves_the_cell_state in enumerate([True, True, False]):
        with torch.no_grad():
            cell.peepholes[gate, 1, 2, 3] += 1
        after = cell(x, h, c)
        element = [[b, 1, 2, 3] for b in range(2)]
        assert (before[0] != after[0]).nonzero().tolist() == element
        assert (before[1] != after[1]).nonzero().tolist() == (element if moves_the_cell_state else [])
        before = after


@pytest.mark.parametrize(("channels", "patch", "batch"), [(1, 4, 1), (3, 2, 3), (2, 1, 2)])
def test_shapes_of_states(channels, patch, batch):
    model = tiny(channels=channels, patch=patch).build()
    state = model.initial_state(torch.rand(batch, channels, 8, 8, dtype=torch.float64))
    side = 8 // patch
    assert [[tuple(t.shape) for t in layer] for layer in state] == [[(batch, c, side, side)] * 2 for c in (3, 2)]
    assert {t.dtype for layer in state for t in layer} == {torch.float64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": ()}, r"model.hidden must name 1 or more layers"),
        ({"hidden": (4, -1)}, r"each of at least one channel, got \(4, -1\)"),
        ({"kernel_size": 2}, r"model.kernel_size must be odd, got 2"),
        ({"kernel_size": 0}, r"model.kernel_size must be at least 1, got 0"),
        ({"patch": 3}, r"model.image_size 8 is not a multiple of model.patch 3"),
        ({"clip": 3}, r"model.clip must be 1 .* for convlstm"),
        ({"name": "predrnn"}, r"model.name must be one of \['convlstm'\]"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
