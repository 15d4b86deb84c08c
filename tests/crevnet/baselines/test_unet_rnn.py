import numpy as np
import pytest
import torch
from torch import nn

from crevnet.baselines.stacked_rnn import RecurrentStack
from crevnet.baselines.unet_rnn import UNetRNNConfig
from crevnet.convolution import Convolution2d, Convolution3d
from crevnet.model import CrevNetConfig
from revgrad import ReversibleSequential

CELLS = ["convlstm", "stlstm"]
PREDICTORS = ["stacked", "rpm"]
STACKINGS = ["depth", "channels"]


def tiny(**changes):
    options = {"image_size": 8, "clip": 2, "width": 2, "stages": 2, "modules": 3, "channels": 1}
    return UNetRNNConfig(**options | changes)


def rpm(module, cell, source, target, own, memory, oracle):
    """Section 2.2: hidden state, attention, weighted sum."""
    h, own, memory = oracle.cell(cell, module.transform.cell, source, own, memory)
    w1, _, w2 = module.transform.attention
    g = oracle.sigmoid(oracle.conv(w2, np.maximum(oracle.conv(w1, h), 0)))
    return (1 - g) * target + g * h, own, memory


def literal_step(model, oracle):
    """One time step; the UNet is what its own test has compared with loops, the predictor is written out."""
    cell = model.config.cell

    def step(clip, state):
        layers, memory = state
        features, skips = model.unet.encode(torch.from_numpy(clip))
        x, new = oracle.array(features), []
        if model.config.predictor == "stacked":
            for module, own in zip(model.predictor.cells, layers, strict=True):
                x, own, memory = oracle.cell(cell, module, x, own, memory)
                new.append(own)
        else:
            half = x.shape[1] // 2
            first, second = x[:, :half], x[:, half:]
            for i, (module, own) in enumerate(zip(model.predictor, layers, strict=True)):
                if i % 2 == 0:
                    second, own, memory = rpm(module, cell, first, second, own, memory, oracle)
                else:
                    first, own, memory = rpm(module, cell, second, first, own, memory, oracle)
                new.append(own)
            x = np.concatenate([first, second], axis=1)
        return oracle.array(model.unet.decode(torch.from_numpy(x), skips)), (new, memory)

    return step


@pytest.mark.parametrize("fed", [[True, True, True], [True, False, True, False]], ids=["fed", "free running"])
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_the_equations(cell, predictor, stacking, fed, oracle):
    config = tiny(cell=cell, predictor=predictor, stacking=stacking)
    model = oracle.randomise(config.build(), scale=0.3)
    clips = oracle.clips(config, 3)
    size = (2, 2, 2) if stacking == "depth" else (2, 2)
    zero = np.zeros((2, 8 if predictor == "stacked" else 4, *size))
    expected = oracle.run(literal_step(model, oracle), clips, fed, ([(zero, zero)] * 3, zero))
    found = model(clips, fed=fed, steps=len(fed))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize(("stacking", "kind"), [("depth", Convolution3d), ("channels", Convolution2d)])
@pytest.mark.parametrize(("clip", "channels"), [(3, 1), (1, 3)])
def test_two_and_three_dimensions(cell, predictor, stacking, kind, clip, channels):
    config = tiny(cell=cell, predictor=predictor, stacking=stacking, clip=clip, channels=channels)
    model = config.build()
    assert {type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))} == {kind}
    clips = torch.rand(2, 2, *config.clip_shape())
    assert model(clips, steps=4).shape == (2, 4, *config.clip_shape())
    assert model.predict(torch.rand(2, 4, channels, 8, 8), 3).shape == (2, 3, channels, 8, 8)


@pytest.mark.parametrize("clip", [1, 3])
@pytest.mark.parametrize("stacking", STACKINGS)
def test_by_default_the_predictor_reads_what_it_reads_in_crevnet(stacking, clip):
    """Per frame of a clip in depth, 2 x 32 channels of 8 x 8 for a 64 x 64 frame."""
    model = UNetRNNConfig(stacking=stacking, clip=clip).build()
    theirs = CrevNetConfig(stacking="depth" if clip > 1 else stacking, clip=clip).build()
    assert model.width == theirs.width == 32
    assert model.size == (theirs.size if stacking == "depth" else theirs.size[-2:])
    assert isinstance(model.predictor, ReversibleSequential)
    assert len(model.predictor) == len(theirs.predictor) == 8


def test_the_predictors():
    assert isinstance(tiny(predictor="stacked").build().predictor, RecurrentStack)
    rpm = tiny(predictor="rpm").build().predictor
    assert [(m.source, m.target) for m in rpm] == [(0, 1), (1, 0), (0, 1)]
    assert (rpm.mode, rpm.arithmetic) == ("stored", "float")


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_the_reversible_predictor_gives_the_same_gradients_in_every_mode(mode):
    """In double precision: the float inverse of a weighted sum divides by one minus the gate."""
    gradients = []
    clips = torch.rand(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for each in ("stored", mode):
        torch.manual_seed(0)
        model = tiny().build().double()
        model.predictor.mode = each
        model.loss(clips, fed=[True, True, False]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("stacking", STACKINGS)
def test_every_weight_gets_a_gradient(cell, predictor, stacking):
    model = tiny(cell=cell, predictor=predictor, stacking=stacking, width=4).build()
    model.loss(torch.rand(2, 4, *model.config.clip_shape())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize(("cell", "stacking"), [("convlstm", "channels"), ("stlstm", "channels"), ("stlstm", "depth")])
def test_learns_one_batch_by_heart(predictor, cell, stacking, learn):
    config = UNetRNNConfig(
        image_size=12, clip=2, stages=1, modules=2, predictor=predictor, cell=cell, stacking=stacking
    )
    assert learn(config.build(), steps=50, learning_rate=1e-2) < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 4}, "model.image_size 8 is not a multiple of 16, by which model.stages 4 folds it"),
        ({"modules": 0}, "model.modules must be at least 1, got 0"),
        ({"width": 0}, "model.width must be at least 1, got 0"),
        ({"stages": 0}, "model.stages must be at least 1, got 0"),
        ({"cell": "gru"}, r"model.cell must be one of \['convlstm', 'stlstm'\], got 'gru'"),
        ({"predictor": "lstm"}, r"model.predictor must be one of \['stacked', 'rpm'\], got 'lstm'"),
        ({"name": "unet"}, r"model.name must be one of \['unet-rnn'\]"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
