import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.data import DataError, Video, VideoWindows, to_tensor, train_batches
from crevnet.data.videos import FEW, hold_out_videos

HUNDRED = 100
"""Frame t of video v shows the number 100 v + t, in two channels of a byte each."""


def videos(*lengths):
    def frames(v, length):
        numbers = HUNDRED * v + np.arange(length)
        both = np.stack([numbers // 256, numbers % 256], axis=1).astype(np.uint8)
        return np.broadcast_to(both[:, :, None, None], (length, 2, 3, 4)).copy()

    return [Video(f"video {v}", frames(v, length)) for v, length in enumerate(lengths)]


def numbers(sequences):
    """What the frames of `[B, T, 2, H, W]` show, `[B, T]`."""
    high, low = (sequences[:, :, :, 0, 0] * 255).round().long().unbind(2)
    return 256 * high + low


@pytest.mark.filterwarnings("ignore:some. .* have fewer than")
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 5))
def test_in_order_every_window_of_every_video_is_there_once(lengths, frames):
    windows = [
        [HUNDRED * v + start + t for t in range(frames)]
        for v, length in enumerate(lengths)
        for start in range(length - frames + 1)
    ]
    if not windows:
        with pytest.raises(DataError, match=rf"no video has the {frames} frames.*the longest has {max(lengths)};"):
            VideoWindows(videos(*lengths), frames, "some", size=9)
        return
    dataset = VideoWindows(videos(*lengths), frames, "some", size=10**6)
    assert len(dataset) == len(windows)
    assert numbers(dataset.batch(range(len(dataset)))).tolist() == windows


@pytest.mark.parametrize(
    ("stride", "starts"), [(2, [0, 2, 4, 6, 100, 102, 104]), (3, [0, 3, 6, 100, 103]), (9, [0, 100])]
)
def test_windows_may_begin_further_apart(stride, starts):
    dataset = VideoWindows(videos(9, 8), 3, "some", size=99, stride=stride)
    assert numbers(dataset.batch(range(len(dataset)))).tolist() == [[n, n + 1, n + 2] for n in starts]


@pytest.mark.filterwarnings("ignore:some. .* have fewer than")
def test_a_video_shorter_than_a_window_has_none_however_far_they_are_apart():
    dataset = VideoWindows(videos(2, 3, 2), 3, "some", size=99, stride=50)
    assert numbers(dataset.batch(range(len(dataset)))).tolist() == [[100, 101, 102]]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_fewer_sequences_are_spread_evenly(size):
    dataset = VideoWindows(videos(9, 8), 3, "some", size=size)  # 7 and 6 windows
    places = [n if n < HUNDRED else n - HUNDRED + 7 for n in numbers(dataset.batch(range(size)))[:, 0].tolist()]
    assert places == [i * 13 // size for i in range(size)]


@pytest.mark.filterwarnings("ignore:some. .* have fewer than")
def test_random_windows_are_equally_likely_and_stay_within_a_video():
    dataset = VideoWindows(videos(4, 2, 6), 3, "some", size=2**40, seed=0)  # 2, 0 and 4 windows
    shown = numbers(dataset.batch(range(6000)))
    assert (shown.diff(dim=1) == 1).all()
    starts, counts = shown[:, 0].unique(return_counts=True)
    assert starts.tolist() == [0, 1, 200, 201, 202, 203]
    assert ((counts - 1000).abs() < 5 * (6000 * 5 / 36) ** 0.5).all()


def test_a_random_sequence_is_a_function_of_seed_and_index():
    one, again, other = (VideoWindows(videos(90), 3, "some", size=2**40, seed=s) for s in (1, 1, 2))
    order = [7, 2**39, 0, 7]
    assert torch.equal(one.batch(order), torch.stack([again[i] for i in order]))
    assert not torch.equal(one.batch(range(20)), other.batch(range(20)))
    assert torch.equal(one.batch(range(4)), next(train_batches(one, 4)))
    assert torch.equal(one.batch(range(4, 8)), next(train_batches(one, 4, start_step=1, workers=1)))
    assert torch.equal(pickle.loads(pickle.dumps(one)).batch(order), one.batch(order))


def test_half_of_the_random_windows_are_mirrored_left_to_right_and_none_in_order():
    frames = np.arange(40 * 3, dtype=np.uint8).reshape(40, 1, 1, 3)
    plain, mirrored = (VideoWindows([Video("one", frames)], 3, "some", size=2**40, seed=0, mirror=m) for m in (0, 1))
    x, y = plain.batch(range(4000)), mirrored.batch(range(4000))
    turned = (x != y).flatten(1).any(1)
    assert torch.equal(y, torch.where(turned.view(-1, 1, 1, 1, 1), x.flip(-1), x))
    assert abs(int(turned.sum()) - 2000) < 5 * 1000**0.5
    assert torch.equal(y[7], mirrored[7])
    starts = (x[:, 0, 0, 0, 0] * 255 / 3).round()
    assert abs(float(torch.corrcoef(torch.stack([starts, turned.float()]))[0, 1])) < 5 / 4000**0.5
    in_order = VideoWindows([Video("one", frames)], 3, "some", size=9, mirror=True)
    assert torch.equal(in_order[0], plain.batch([0]).new_tensor(frames[:3] / 255))


def test_bytes_become_floats_and_floats_stay():
    values = np.random.default_rng(0).random((4, 1, 2, 2), np.float32)
    dataset = VideoWindows([Video("floats", values)], 4, "some", size=1)
    assert torch.equal(dataset[0], torch.from_numpy(values))
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_tensor(bytes_), torch.arange(256).view(1, 1, 16, 16) / 255)


def test_what_is_returned_is_nobody_elses():
    values = np.zeros((3, 1, 2, 2), np.float32)
    values.flags.writeable = False
    dataset = VideoWindows([Video("floats", values)], 3, "some", size=1)
    dataset[0].add_(1)
    assert not dataset[0].any()


def test_an_empty_batch_has_the_shape_of_no_sequences():
    assert VideoWindows(videos(5), 3, "some", size=1).batch([]).shape == (0, 3, 2, 3, 4)


# --- holding out ---


def shown(found):
    return [(video.frames[:, 0, 0, 0].astype(int) * 256 + video.frames[:, 1, 0, 0]).tolist() for video in found]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=25), st.integers(1, 8), st.sampled_from([0.1, 0.3]))
def test_no_frame_is_on_both_sides_and_none_is_lost(lengths, frames, fraction):
    found = videos(*lengths)
    kept, held = hold_out_videos(found, fraction, frames)
    assert sorted(chain(*shown(kept), *shown(held))) == sorted(chain(*shown(found)))


def test_of_many_videos_the_last_ones_are_held_out():
    found = videos(*[5] * 24)
    kept, held = hold_out_videos(found, 0.1, 3)
    assert [v.name for v in kept] == [v.name for v in found[:22]]
    assert [v.name for v in held] == [v.name for v in found[22:]]
    assert len(hold_out_videos(videos(*[5] * FEW), 0.01, 3)[1]) == 1


def test_of_few_videos_the_end_of_each_that_is_long_enough():
    kept, held = hold_out_videos(videos(90, 8, 7), 0.1, 4)
    assert shown(kept) == [list(range(81)), list(range(100, 104)), list(range(200, 207))]
    assert shown(held) == [list(range(81, 90)), list(range(104, 108))]
    assert [v.name for v in held] == ["video 0, end", "video 1, end"]


def test_short_videos_are_told_of_and_none_may_be_all():
    with pytest.warns(RuntimeWarning, match="some: 2 of 3 videos have fewer than the 3 frames .* such as video 1"):
        VideoWindows(videos(5, 2, 1), 3, "some", size=9)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        VideoWindows(videos(5), 3, "some", size=0)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        VideoWindows(videos(5), 0, "some", size=1)
    with pytest.raises(DataError, match=r"some: no video has the 3 frames of a sequence, the longest has 2; do this$"):
        VideoWindows(videos(2), 3, "some", size=1, advice="do this")


def test_a_video_is_decoded_when_its_frames_are_asked_for_and_once():
    asked = []
    video = Video("lazy", lambda: asked.append(1) or np.zeros((3, 1, 2, 2), np.uint8))
    assert asked == []
    assert video.frames is video.frames
    assert asked == [1]
    kept, held = hold_out_videos([Video(str(i), pytest.fail) for i in range(FEW)], 0.1, 3)
    assert (len(kept), len(held)) == (FEW - 1, 1)
