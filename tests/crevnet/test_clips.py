import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.clips import frames_to_clips, newest_frames
from revgrad import LiveMemory

STACKINGS = ["depth", "channels"]


def frames(batch=2, time=5, channels=3, height=2, width=4):
    return torch.randn(batch, time, channels, height, width)


def literal_clips(x, length, stacking):
    """Clip t as a list of its frames, put together in the plainest way."""
    clips = []
    for t in range(x.shape[1] - length + 1):
        held = [x[:, t + k] for k in range(length)]
        clips.append(torch.stack(held, dim=2) if stacking == "depth" else torch.cat(held, dim=1))
    return torch.stack(clips, dim=1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 6),
    channels=st.integers(1, 3),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    stacking=st.sampled_from(STACKINGS),
    data=st.data(),
)
def test_contents(batch, time, channels, height, width, stacking, data):
    length = data.draw(st.integers(1, time))
    x = frames(batch, time, channels, height, width)
    clips = frames_to_clips(x, length, stacking)
    held = (channels, length) if stacking == "depth" else (length * channels,)
    assert clips.shape == (batch, time - length + 1, *held, height, width)
    assert torch.equal(clips, literal_clips(x, length, stacking))
    newest = newest_frames(clips, channels, stacking)
    assert torch.equal(newest, x[:, length - 1 :])


def test_depth_stacking_takes_no_memory():
    x = frames()
    with LiveMemory() as memory:
        clips = frames_to_clips(x, 3, "depth")
        newest = newest_frames(clips, 3, "depth")
    assert memory.peak == 0
    assert clips.untyped_storage().data_ptr() == newest.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("stacking", STACKINGS)
def test_gradients_add_up_over_the_clips_that_hold_a_frame(stacking):
    x = frames(time=5).requires_grad_()
    frames_to_clips(x, 3, stacking).sum().backward()
    assert x.grad[0, :, 0, 0, 0].tolist() == [1, 2, 3, 2, 1]


@pytest.mark.parametrize("stacking", STACKINGS)
def test_too_few_frames_are_refused(stacking):
    with pytest.raises(ValueError, match="a clip has 4 frames, but only 3 were given"):
        frames_to_clips(frames(time=3), 4, stacking)


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (1, 5, 1, 3, 8, 8)])
def test_frames_of_another_number_of_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[batch, time, channels, height, width\], got shape"):
        frames_to_clips(torch.zeros(shape), 2, "depth")
