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


def test_short_videos_are_told_of(folder):
    train = folder(20, 2, 1)
    with pytest.warns(RuntimeWarning, match=r"train \(to train on\): 2 of 3 videos have fewer .* such as .*01\.npy"):
        config(train).build_train()


def test_too_little_to_hold_out_names_the_option(folder):
    made = config(folder(5))
    assert len(levels(made.build_train(), 50)) == 5
    with pytest.raises(DataError, match=r"held out of .*train for want of data\.test: no video has the 3 frames"):
        made.build_test()
    with pytest.raises(DataError, match=r"for want of data\.validation"):
        made.build_validation(4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        made.build_validation(0)


def test_too_short_to_train_on(folder):
    with pytest.raises(DataError, match=r"train \(to train on\): no video has the 3 frames"):
        config(folder(2)).build_train()


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="none: no such file or folder"):
        config(tmp_path / "none").build_train()


@pytest.mark.parametrize("name", ["channels", "every", "test_every", "frames"])
def test_values_are_checked(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        config(tmp_path, **{name: 0})


def test_words(tmp_path):
    made = config(tmp_path / "a")
    assert made.source() == f"videos in {tmp_path / 'a'}"
    assert made.test_source() == f"Test videos, held out of {tmp_path / 'a'}"
    assert config(tmp_path / "a", test=tmp_path / "b").test_source() == f"Test videos, {tmp_path / 'b'}"
    assert made.frame_channels() == 1
