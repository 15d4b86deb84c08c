import numpy as np
import pytest
import torch

from crevnet.data import DataError, VideosConfig, load_video, video_cache


@pytest.fixture
def folder(tmp_path):
    """Fills a folder with grey videos of these lengths; frame t of video v is all 20 v + t."""

    def fill(*lengths, name="train"):
        (tmp_path / name).mkdir()
        for v, length in enumerate(lengths):
            values = np.arange(20 * v, 20 * v + length, dtype=np.uint8)[:, None, None]
            np.save(tmp_path / name / f"{v:02}.npy", np.broadcast_to(values, (length, 8, 8)))
        return tmp_path / name

    return fill


def levels(dataset, count=None):
    """All grey levels that some sequences show."""
    sequences = dataset.batch(range(len(dataset) if count is None else count))
    return set((sequences * 255).round().unique().int().tolist())


def config(train, **options):
    return VideosConfig(**{"train": train, "channels": 1, "image_size": (8, 8), "frames": 3} | options)


def test_three_sets_of_one_folder_share_no_frame(folder):
    made = config(folder(20, 20))
    train, validation, test = made.build_train(), made.build_validation(99), made.build_test()
    found = [levels(train, 500), levels(validation), levels(test)]
    assert found == [{*range(14), *range(20, 34)}, {14, 15, 16, 34, 35, 36}, {17, 18, 19, 37, 38, 39}]


def test_of_ten_videos_and_more_whole_ones_are_held_out(folder):
    made = config(folder(*[3] * 12))
    assert [len(made.build_test()), len(made.build_validation(99))] == [1, 1]
    assert levels(made.build_test()) == {220, 221, 222}
    assert levels(made.build_validation(9)) == {200, 201, 202}
    assert len(levels(made.build_train(), 400)) == 30


def test_only_what_a_set_is_made_of_is_decoded(folder, monkeypatch):
    decoded = []

    def load(path, *how):
        decoded.append(path.name)
        return load_video(path, *how)

    monkeypatch.setattr(video_cache, "load_video", load)
    made = config(folder(*[3] * 12))
    made.build_test()
    assert decoded == ["11.npy"]
    made.build_validation(9)
    assert decoded == ["11.npy", "10.npy"]
    made.build_train()
    assert sorted(decoded[2:]) == [f"{v:02}.npy" for v in range(10)]


def test_folders_of_their_own(folder):
    train, validation, test = folder(9), folder(5, name="validation"), folder(4, 4, name="test")
    made = config(train, validation=validation, test=test)
    assert levels(made.build_train(), 200) == set(range(9))
    assert levels(made.build_validation(99)) == set(range(5))
    assert levels(made.build_test()) == {*range(4), *range(20, 24)}
    assert len(made.build_validation(2)) == 2
    assert len(config(train, test=test, test_sequences=3).build_test()) == 3
    # What is tested on elsewhere need not be held out here.
    assert levels(config(train, test=test).build_train(), 200) == set(range(6))


def test_windows_of_the_test_set_need_not_overlap(folder):
    made = config(folder(9), test=folder(13, name="test"), test_overlap=False)
    for frames, starts in ((None, [0, 3, 6, 9]), (5, [0, 5])):
        sequences = made.build_test(frames).batch(range(len(starts)))
        assert (sequences[:, 0, 0, 0, 0] * 255).round().tolist() == starts
        assert len(made.build_test(frames)) == len(starts)
    assert len(made.build_train()) > 9
    assert len(config(made.train, validation=made.test, test_overlap=False).build_validation(99)) == 11


def test_frames_are_resized_and_thinned(folder):
    made = config(folder(30), image_size=16, every=3)
    sequences = made.build_train().batch(range(100))
    assert sequences.shape == (100, 3, 1, 16, 16)
    assert (sequences[:, 1:] - sequences[:, :-1] - 3 / 255).abs().max() < 1e-6


def test_the_test_videos_may_be_thinned_otherwise(folder):
    made = config(folder(30), test=folder(9, name="test"), every=2, test_every=3)
    assert levels(made.build_test()) == {0, 3, 6}
    assert levels(made.build_validation(9)) == {24, 26, 28}


def test_the_seed_is_that_of_training_alone(folder):
    train = folder(60)
    one, other = config(train), config(train, seed=1)
    assert not torch.equal(one.build_train().batch(range(9)), other.build_train().batch(range(9)))
    assert torch.equal(one.build_test().batch(range(4)), other.build_test().batch(range(4)))


def test_mirroring_is_for_training_alone(folder):
    ramp = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4).repeat(60, 0)
    train = folder()
    np.save(train / "ramp.npy", ramp)
    one, other = config(train, image_size=4), config(train, image_size=4, mirror=True)
    x, y = (made.build_train().batch(range(20)) for made in (one, other))
    assert not torch.equal(x, y)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(x, y, strict=True))
    for build in ("build_test", "build_validation"):
        x, y = (getattr(made, build)(*[4] * (build == "build_validation")) for made in (one, other))
        assert torch.equal(x.batch(range(2)), y.batch(range(2)))


def test_short_videos_are_told_of(folder):
    train = folder(20, 2, 1)
    with pytest.warns(RuntimeWarning, match=r"train \(to train on\): 2 of 3 videos have fewer .* such as .*01\.npy"):
        config(train).build_train()


@pytest.mark.parametrize(
    ("lengths", "named", "message"),
    [
        ([8, 5], [], "9 frames for a sequence of 3 each to train, validate and test on, the longest has 8; lower"
         " data.frames, or name other videos in data.validation and data.test"),
        ([5, 4], ["test"], "6 frames for a sequence of 3 each to train and validate on, the longest has 5; lower"
         " data.frames, or name other videos in data.validation"),
        ([5, 4], ["validation"], "6 frames for a sequence of 3 each to train and test on, the longest has 5; lower"
         " data.frames, or name other videos in data.test"),
        ([5] * 10, [], "6 frames for a sequence of 3 each to train and validate on, the longest has 5; lower"
         " data.frames, or name other videos in data.validation"),
    ],
)  # fmt: skip
def test_too_little_to_hold_out_tells_what_for(folder, lengths, named, message):
    made = config(folder(*lengths), **{name: folder(5, name=name) for name in named})
    made.build_train()
    with pytest.raises(DataError, match=f"train: no video has the {message}$"):
        made.build_test() if "validation" in named else made.build_validation(4)


def test_a_validation_set_has_a_size(folder):
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        config(folder(9)).build_validation(0)


# --- other lengths to test on ---


@pytest.mark.parametrize("lengths", [[20], [40], [20] * 12])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_another_length_of_test_sequences_leaves_the_split_alone(folder, lengths, frames):
    made = config(folder(*lengths))
    others = levels(made.build_train(), 2000) | levels(made.build_validation(999))
    test = made.build_test(frames)
    assert test.batch([0]).shape == (1, frames, 1, 8, 8)
    assert not levels(test) & others
    assert levels(test) == levels(made.build_test())


def test_what_is_held_out_may_be_too_short_for_another_length(folder):
    made = config(folder(40, 30))
    message = (
        r"held out of .*train for want of data\.test: no video has the 5 frames of a sequence, the longest has 4; "
    )
    message += r"lower --frames \(training held this out for sequences of 3\), or name other videos with --test"
    with pytest.raises(DataError, match=message):
        made.build_test(5)
    other = config(folder(9, name="a"), test=folder(4, name="b"))
    with pytest.raises(DataError, match=r"b: no video has the 5 frames of a sequence, the longest has 4; lower --fra"):
        other.build_test(5)
    assert len(other.build_test(4)) == 1
    for frames in (0, -1):
        with pytest.raises(ValueError, match=f"frames must be at least 1, got {frames}"):
            other.build_test(frames)


# --- sets that share something ---


@pytest.mark.parametrize("option", ["validation", "test"])
def test_sets_that_share_a_video(folder, option):
    train = folder(9, 9)
    (train / "sub").mkdir()
    np.save(train / "sub" / "x.npy", np.zeros((9, 8, 8), np.uint8))
    made = config(train, **{option: train / "sub"})
    for build in (made.build_train, made.build_test, lambda: made.build_validation(9)):
        with pytest.raises(DataError, match=rf"sub/x\.npy is in data\.train and in data\.{option}; move it"):
            build()


def test_a_cache_among_the_videos(folder):
    train = folder(20)
    for build in ("build_train", "build_test"):
        with pytest.raises(
            DataError, match=r"data\.cache .*train/cache lies within data\.train .*train, where its files"
        ):
            getattr(config(train, cache=train / "cache"), build)()
    assert not (train / "cache").exists()


@pytest.mark.parametrize("option", ["train", "validation", "test"])
def test_a_run_among_the_videos(option, tmp_path):
    made = config(**{"train": tmp_path / "a", option: tmp_path / "films"})
    made.check_run_folder(tmp_path / "run")
    made.check_run_folder(None)
    with pytest.raises(ValueError, match=rf"run\.folder .*films/run lies within data\.{option} .*films, where its pic"):
        made.check_run_folder(tmp_path / "films" / "run")
    with pytest.raises(ValueError, match=r"run\.folder runs lies within data\.train \., where its pictures"):
        config(".").check_run_folder(None)


def test_too_short_to_train_on(folder):
    with pytest.raises(DataError, match=r"train \(to train on\): no video has the 3 frames"):
        config(folder(2)).build_train()


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="none: no such file or folder"):
        config(tmp_path / "none").build_train()


@pytest.mark.parametrize("name", ["channels", "every", "test_every", "frames"])
def test_values_are_checked(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^data\.{name} must be at least 1, got 0"):
        config(tmp_path, **{name: 0})


def test_the_thinning_of_test_videos_needs_test_videos(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.test_every is for the videos in data\.test: set that too, or data\.eve"
    ):
        config(tmp_path, test_every=3)


def test_thinning_is_that_of_test_videos(tmp_path):
    assert config(tmp_path).thinning() == 1
    assert config(tmp_path, every=2).thinning() == 2
    assert config(tmp_path, every=2, test=tmp_path / "b", test_every=3).thinning() == 3


def test_spilled_words(tmp_path):
    made = config(tmp_path / "a")
    assert made.source() == f"videos in {tmp_path / 'a'}"
    assert made.test_source() == f"Test videos, held out of {tmp_path / 'a'}"
    assert config(tmp_path / "a", test=tmp_path / "b").test_source() == f"Test videos, {tmp_path / 'b'}"
    assert made.frame_channels() == 1
