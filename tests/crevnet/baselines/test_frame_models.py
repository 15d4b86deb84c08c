"""What holds for every baseline that reads frame by frame through recurrent layers of its own."""

from dataclasses import is_dataclass

import pytest
import torch
from torch.utils._pytree import tree_leaves

from crevnet.baselines.convlstm import ConvLSTMConfig
from crevnet.baselines.predrnn import PredRNNConfig
from crevnet.baselines.predrnn_plus_plus import PredRNNPlusPlusConfig

TINY = {"image_size": 8, "patch": 2, "kernel_size": 3}
SMALL = {
    ConvLSTMConfig: {"hidden": (3, 2)},
    PredRNNConfig: {"hidden": (2, 2)},
    PredRNNPlusPlusConfig: {"hidden": (3, 2), "highway": 4},
}
SMALLEST = {
    ConvLSTMConfig: {"hidden": (2, 2)},
    PredRNNConfig: {},
    PredRNNPlusPlusConfig: {"hidden": (2, 2, 1), "highway": 2},
}
LEARNING = {
    ConvLSTMConfig: ({"hidden": (16, 16)}, 80),
    PredRNNConfig: ({"hidden": (12, 12)}, 60),
    PredRNNPlusPlusConfig: ({"hidden": (16, 12), "highway": 16}, 60),
}


@pytest.fixture(params=SMALL, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture
def tiny(kind):
    """A model of the kind, with some options changed."""

    def build(**changes):
        return kind(**TINY | SMALL[kind] | changes).build()

    return build


def test_free_running_feeds_the_own_predictions(tiny, oracle):
    model = oracle.randomise(tiny())
    clips = oracle.clips(model.config, 2)
    predictions = model(clips, steps=5)
    assert predictions.shape == (2, 5, 1, 8, 8)
    own = torch.cat([clips, predictions[:, 1:-1]], dim=1)
    torch.testing.assert_close(model(own), predictions, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("channels", "patch", "batch"), [(1, 4, 1), (3, 2, 3), (2, 1, 2)])
def test_shapes_of_predictions(tiny, channels, patch, batch):
    model = tiny(channels=channels, patch=patch)
    clips = torch.rand(batch, 2, channels, 8, 8)
    assert model(clips, steps=3).shape == (batch, 3, channels, 8, 8)
    assert model.predict(clips, 4).shape == (batch, 4, channels, 8, 8)


def test_a_step_leaves_what_it_was_given_as_it_is(tiny, oracle):
    model = oracle.randomise(tiny())
    frame = oracle.clips(model.config, 1)[:, 0]
    with torch.no_grad():
        _, state = model.step(frame, model.initial_state(frame))
        given = [frame, *tree_leaves(vars(state) if is_dataclass(state) else state)]
        assert all(isinstance(x, torch.Tensor) for x in given)
        copies = [x.clone() for x in given]
        model.step(frame, state)
    assert all(map(torch.equal, given, copies))


def test_gradients(kind, tiny, oracle):
    model = oracle.randomise(tiny(image_size=4, **SMALLEST[kind]))
    clips = oracle.clips(model.config, 3, batch=1)
    names, parameters = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def predict(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (clips,))

    assert torch.autograd.gradcheck(predict, parameters, fast_mode=True)


def test_trains_in_mixed_precision(tiny):
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(torch.rand(2, 4, 1, 8, 8), fed=[True, True, False]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_learns_one_batch_by_heart(kind, tiny, learn):
    changes, steps = LEARNING[kind]
    assert learn(tiny(image_size=16, **changes), steps=steps, learning_rate=1e-2) < 0.1


def test_frames_of_another_size_are_refused(tiny):
    with pytest.raises(ValueError, match=r"\(1, 8, 6\) given, but the model is built for \(1, 8, 8\)"):
        tiny()(torch.rand(1, 2, 1, 8, 6))
