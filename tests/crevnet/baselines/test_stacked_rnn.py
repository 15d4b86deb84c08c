from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from crevnet.baselines.stacked_rnn import RecurrentStack, StackedRNNConfig
from crevnet.cells import zero_states
from crevnet.convolution import Convolution2d, Convolution3d

CELLS = ["convlstm", "stlstm"]
STACKINGS = ["depth", "channels"]


def tiny(**changes):
    options = {"image_size": 8, "clip": 2, "layers": 2, "hidden": 3, "patch": 2, "channels": 2}
    return StackedRNNConfig(**options | changes)


def fold(x, n):
    """Pixel (i, j) of each patch of channel c becomes channel c n^2 + i n + j."""
    return np.stack([x[:, c, ..., i::n, j::n] for c in range(x.shape[1]) for i in range(n) for j in range(n)], axis=1)


def unfold(x, n):
    out = np.zeros((x.shape[0], x.shape[1] // n**2, *x.shape[2:-2], x.shape[-2] * n, x.shape[-1] * n))
    for c, i, j in np.ndindex(out.shape[1], n, n):
        out[:, c, ..., i::n, j::n] = x[:, c * n * n + i * n + j]
    return out


def literal_step(model, oracle):
    """One time step written out; the state is h and c per layer and the memory."""
    config = model.config

    def step(clip, state):
        layers, memory = state
        x = oracle.conv(model.embed, fold(clip, config.patch))
        new = []
        for cell, own in zip(model.stack.cells, layers, strict=True):
            x, own, memory = oracle.cell(config.cell, cell, x, own, memory)
            new.append(own)
        return unfold(oracle.conv(model.head, x), config.patch), (new, memory)

    return step


@pytest.mark.parametrize("fed", [[True, True, True], [True, True, False, False]], ids=["fed", "free running"])
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_the_equations(cell, stacking, fed, oracle):
    config = tiny(cell=cell, stacking=stacking)
    model = oracle.randomise(config.build())
    clips = oracle.clips(config, 3)
    zero = np.zeros((2, 3, *((2, 4, 4) if stacking == "depth" else (4, 4))))
    expected = oracle.run(literal_step(model, oracle), clips, fed, ([(zero, zero)] * 2, zero))
    found = model(clips[:, : sum(fed)], fed=fed, steps=len(fed))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("stacking", "kind"), [("depth", Convolution3d), ("channels", Convolution2d)])
@pytest.mark.parametrize(("clip", "channels", "kernel_size"), [(3, 1, 3), (1, 3, 5)])
def test_two_and_three_dimensions(cell, stacking, kind, clip, channels, kernel_size):
    config = tiny(cell=cell, stacking=stacking, clip=clip, channels=channels, kernel_size=kernel_size)
    model = config.build()
    assert {type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))} == {kind}
    clips = torch.rand(2, 2, *config.clip_shape())
    assert model(clips, steps=4).shape == (2, 4, *config.clip_shape())
    assert model.predict(torch.rand(2, 4, channels, 8, 8), 3).shape == (2, 3, channels, 8, 8)


def test_the_default_is_as_wide_and_deep_as_the_two_dimensional_rows():
    model = StackedRNNConfig().build()
    assert [type(c).__name__ for c in model.stack.cells] == ["STLSTMCell"] * 4
    gates = model.stack.cells[0].cell_gates
    assert (gates.in_channels, gates.out_channels, gates.kernel_size) == (2 * 128, 4 * 128, (3, 3, 3))
    assert model.size == (3, 16, 16)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stacking", STACKINGS)
def test_every_weight_gets_a_gradient(cell, stacking):
    model = tiny(cell=cell, stacking=stacking).build()
    model.loss(torch.rand(2, 4, *model.config.clip_shape())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("cell", CELLS)
def test_the_stack_reads_layer_upon_layer_and_leaves_its_states_alone(cell):
    stack = RecurrentStack(cell, 3, 2, (4, 4))
    zero = torch.zeros(1, 2, 4, 4)
    before = zero_states(cell, 3, zero)
    read = []
    for module in stack.cells:
        module.register_forward_hook(lambda _, args, out: read.append((args[0], out[0])))
    x = torch.rand(1, 2, 4, 4)
    hidden, after = stack(x, before)
    assert read[0][0] is x
    assert [inp is out for (_, out), (inp, _) in pairwise(read)] == [True, True]
    assert hidden is read[-1][1]
    assert not zero.any()
    assert [len(s) for s in after.layers] == [2, 2, 2]
    assert len(after.carry) == (1 if cell == "stlstm" else 0)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stacking", STACKINGS)
def test_learns_one_batch_by_heart(cell, stacking, learn):
    config = tiny(image_size=12, cell=cell, stacking=stacking, hidden=12, channels=1)
    assert learn(config.build(), steps=50, learning_rate=1e-2) < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "model.image_size 8 is not a multiple of model.patch 3, by which frames are folded"),
        ({"kernel_size": 4}, "model.kernel_size must be odd, got 4"),
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"hidden": -1}, "model.hidden must be at least 1, got -1"),
        ({"cell": "gru"}, r"model.cell must be one of \['convlstm', 'stlstm'\], got 'gru'"),
        ({"name": "crevnet"}, r"model.name must be one of \['stacked-rnn'\]"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_clips_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) given, but the model is built for \(2, 2, 8, 8\)"):
        tiny().build()(torch.rand(1, 2, 2, 3, 8, 8))
