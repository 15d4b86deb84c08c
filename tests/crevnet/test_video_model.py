"""The interface of all models, tried on models small enough to predict by hand."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn

from crevnet.clips import frames_to_clips
from crevnet.video_model import RecurrentModel, VideoConfig, VideoModel

SIDE = 4
STACKINGS = ["depth", "channels"]


@dataclass(kw_only=True)
class SumConfig(VideoConfig):
    name: Literal["sum"] = "sum"
    image_size: int = SIDE
    width: int = 2
    rate: float = 0.0
    depths: tuple[int, ...] = (0,)
    kind: Literal["plain", "fancy"] = "plain"

    def build(self):
        return Sum(self)


class Sum(RecurrentModel):
    """Predicts `scale` times the sum of all that it has read."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.read = []

    def initial_state(self, like):
        return torch.zeros_like(like)

    def step(self, clip, state):
        self.read.append(clip)
        state = state + clip
        return self.scale * state, state


def make(**changes):
    return SumConfig(**changes).build()


def clips_for(model, count, batch=2):
    return torch.rand(batch, count, *model.config.clip_shape())


# --- configurations ---


@pytest.mark.parametrize(
    ("stacking", "channels", "clip", "shape"),
    [
        ("channels", 1, 1, (1, 4, 4)),
        ("channels", 3, 2, (6, 4, 4)),
        ("depth", 3, 2, (3, 2, 4, 4)),
        ("depth", 1, 1, (1, 1, 4, 4)),
    ],
)
def test_the_shape_of_a_clip_is_that_of_the_clips_made_of_frames(stacking, channels, clip, shape):
    config = SumConfig(stacking=stacking, channels=channels, clip=clip)
    assert config.clip_shape() == shape
    assert frames_to_clips(torch.zeros(1, 5, channels, SIDE, SIDE), clip, stacking).shape == (1, 6 - clip, *shape)


@pytest.mark.parametrize("name", ["channels", "image_size", "clip", "width"])
@pytest.mark.parametrize("value", [0, -3])
def test_whole_numbers_are_at_least_one(name, value):
    with pytest.raises(ValueError, match=f"^model.{name} must be at least 1, got {value}$"):
        SumConfig(**{name: value})


def test_only_whole_numbers_are():
    assert SumConfig(rate=-1.5, depths=(0, -1)).rate == -1.5


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("kind", "other", r"\['plain', 'fancy'\]"),
        ("stacking", "time", r"\['depth', 'channels'\]"),
        ("name", "product", r"\['sum'\]"),
        ("kind", None, r"\['plain', 'fancy'\]"),
    ],
)
def test_a_choice_is_one_of_those_offered(name, value, choices):
    with pytest.raises(ValueError, match=rf"^model.{name} must be one of {choices}, got {value!r}$"):
        SumConfig(**{name: value})


def test_what_a_subclass_does_not_define_is_named():
    with pytest.raises(NotImplementedError, match="VideoConfig does not say how to build its model"):
        VideoConfig().build()
    with pytest.raises(NotImplementedError, match="VideoModel does not define forward"):
        VideoModel(VideoConfig())(torch.rand(1, 1, 1, 64, 64))
    with pytest.raises(NotImplementedError, match="RecurrentModel does not define initial_state"):
        RecurrentModel(VideoConfig()).initial_state(torch.rand(1, 1, 64, 64))
    with pytest.raises(NotImplementedError, match="RecurrentModel does not define step"):
        RecurrentModel(VideoConfig()).step(torch.rand(1, 1, 64, 64), None)


# --- feeding ---


@pytest.mark.parametrize(
    ("given", "fed", "steps", "expected"),
    [
        (3, None, None, [True, True, True]),
        (2, None, 4, [True, True, False, False]),
        (3, None, 2, [True, True]),
        (3, [True, False, True], None, [True, False, True]),
        (2, (True, False, False), 3, [True, False, False]),
        (3, [True], 1, [True]),
    ],
)
def test_by_default_the_given_clips_are_fed_and_then_none(given, fed, steps, expected):
    model = make()
    assert model.feeding(clips_for(model, given), fed, steps) == expected


@pytest.mark.parametrize(
    ("given", "fed", "steps"),
    [
        (2, [False, True], None),  # nothing at first
        (2, [True], None),  # too few
        (2, [True, True, True], None),  # too many
        (2, [True, True], 3),
        (2, [True, True, True], 3),  # a clip that is not given
        (2, None, 0),
        (2, [], 0),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(given, fed, steps):
    model = make()
    wanted = given if steps is None else steps
    with pytest.raises(ValueError, match=rf"each of {wanted} steps whether one of the {given} clips is given"):
        model(clips_for(model, given), fed=fed, steps=steps)


@pytest.mark.parametrize(
    ("stacking", "shape"),
    [("channels", (2, 2, 4, 8)), ("channels", (2, 1, 4, 4)), ("channels", (1, 2, 4, 4)), ("depth", (2, 4, 4))],
)
def test_clips_of_another_shape_are_refused_with_both_shapes(stacking, shape):
    model = make(stacking=stacking, clip=2)
    expected = model.config.clip_shape()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        model(torch.rand(2, 3, *shape))
    assert str(error.value) == f"Sum: clips of shape {shape} given, but the model is built for {expected}"
    with pytest.raises(ValueError, match="the model is built for"):
        model.check_clip(torch.rand(2, *shape))
    model.check_clip(torch.rand(7, *expected))


# --- a recurrent model ---


@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("fed", [[True] * 3, [True, False, False, False], [True, False, True, False]])
def test_a_recurrent_model_reads_the_clip_or_its_own_prediction(fed, stacking):
    model = make(stacking=stacking, clip=2)
    clips = clips_for(model, 3)
    expected, read, state = [], [], torch.zeros_like(clips[:, 0])
    for t, given in enumerate(fed):
        read.append(clips[:, t] if given else expected[-1])
        state = state + read[-1]
        expected.append(0.5 * state)
    assert torch.equal(model(clips, fed=fed, steps=len(fed)), torch.stack(expected, dim=1))
    assert all(torch.equal(a, b) for a, b in zip(model.read, read, strict=True))


def test_gradients_reach_through_its_own_predictions():
    model = make()
    clip = torch.full((1, 1, 1, SIDE, SIDE), 2.0)
    model(clip, steps=2)[:, 1].sum().backward()  # scale (clip + scale clip)
    assert model.scale.grad == (1 + 2 * 0.5) * 2 * SIDE**2


# --- loss and predictions ---


@pytest.mark.parametrize("fed", [None, [True, True, False]])
def test_the_loss_is_the_mean_squared_error_of_all_predictions(fed):
    model = make()
    clips = clips_for(model, 4)
    predictions = model(clips[:, :-1], fed=fed)
    loss = model.loss(clips, fed)
    assert loss.shape == ()
    torch.testing.assert_close(loss, ((predictions - clips[:, 1:]) ** 2).sum() / clips[:, 1:].numel())
    loss.backward()
    assert model.scale.grad is not None


def test_the_loss_keeps_no_storage_but_its_own():
    loss = make().loss(torch.rand(2, 4, 1, SIDE, SIDE))
    assert loss.untyped_storage().nbytes() == loss.element_size()


@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize(("clip", "channels"), [(1, 1), (2, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("steps", [1, 3])
def test_predictions_are_the_newest_frames_after_the_observed_ones(stacking, clip, channels, steps):
    model = make(stacking=stacking, clip=clip, channels=channels)
    frames = torch.rand(2, 5, channels, SIDE, SIDE)
    found = model.predict(frames, steps)
    assert found.shape == (2, steps, channels, SIDE, SIDE)
    # of the newest frame of every clip, which each position of a clip sums on its own
    read = list(frames[:, clip - 1 :].unbind(1))
    expected = []
    while len(expected) < steps:
        expected.append(0.5 * torch.stack(read).sum(dim=0))
        read.append(expected[-1])
    torch.testing.assert_close(found, torch.stack(expected, dim=1))
    assert not found.requires_grad


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_frame_is_predicted(steps):
    with pytest.raises(ValueError, match=f"^steps must be at least 1, got {steps}$"):
        make().predict(torch.rand(1, 3, 1, SIDE, SIDE), steps)


def test_at_least_one_clip_is_observed():
    with pytest.raises(ValueError, match="a clip has 3 frames, but only 2 were given"):
        make(clip=3).predict(torch.rand(1, 2, 1, SIDE, SIDE), 1)
