from pathlib import Path

import numpy as np
import pytest
import torch

from crevnet.data import DigitImages, MovingMNISTConfig, mnist_config

SMALL = {"image_size": 16, "digit_size": 8, "frames": 3, "test_sequences": 6}


@pytest.fixture
def numbered(monkeypatch):
    """Digits told apart by brightness: 1..100 are the training split, 101..150 the test split."""

    def load(root, split, download):
        levels = np.arange(1, 101) if split == "train" else np.arange(101, 151)
        images = np.broadcast_to(levels[:, None, None], (len(levels), 8, 8)).astype(np.uint8)
        return DigitImages(images, (levels % 10).astype(np.uint8), split)

    monkeypatch.setattr(mnist_config, "load_digits", load)


def levels_shown(dataset) -> set[int]:
    shown = dataset.batch(range(min(len(dataset), 2000)))
    return set((shown * 255).round().int().flatten().tolist()) - {0}


def test_the_three_sets_are_made_of_different_digits(numbered):
    built = MovingMNISTConfig(**SMALL | {"num_digits": 1, "test_sequences": 2000})
    assert levels_shown(built.build_train()) == set(range(1, 91))
    assert levels_shown(built.build_validation(2000)) == set(range(91, 101))
    assert levels_shown(built.build_test()) == set(range(101, 151))


def test_no_two_sets_move_alike_even_with_the_same_seed(numbered):
    built = MovingMNISTConfig(**SMALL, seed=mnist_config.FIXED_SEED)
    sets = (built.build_train(), built.build_validation(6), built.build_test())
    paths = [dataset.trajectories(range(6))[1].tobytes() for dataset in sets]
    assert len(set(paths)) == 3


def test_seed_changes_training_only():
    first, second = MovingMNISTConfig(**SMALL, seed=1), MovingMNISTConfig(**SMALL, seed=2)
    assert not torch.equal(first.build_train().batch(range(6)), second.build_train().batch(range(6)))
    assert torch.equal(first.build_validation(6).batch(range(6)), second.build_validation(6).batch(range(6)))
    assert torch.equal(first.build_test().batch(range(6)), second.build_test().batch(range(6)))


def test_defaults_build_the_paper_set_up_from_embedded_digits():
    built = MovingMNISTConfig()
    train, test, validation = built.build_train(), built.build_test(), built.build_validation(7)
    assert train.batch([0, 2**40 - 1]).shape == (2, 20, 1, 64, 64)
    assert (len(train), len(test), len(validation)) == (2**40, 5000, 7)
    assert train.num_digits == 2
    assert test.name == "embedded digits test"


def test_the_speed_can_be_chosen():
    built = MovingMNISTConfig(**SMALL, speed=(1.0, 2.5))
    assert {s.speed for s in (built.build_train(), built.build_validation(2), built.build_test())} == {(1.0, 2.5)}
    assert MovingMNISTConfig(**SMALL).build_test().speed == pytest.approx((0.8, 0.8))


def test_a_shorter_test_set_is_the_start_of_a_longer_one():
    short, long = (MovingMNISTConfig(**SMALL | {"test_sequences": n}).build_test() for n in (3, 6))
    assert torch.equal(short.batch(range(3)), long.batch(range(3)))


def test_test_sequences_may_have_another_length():
    built = MovingMNISTConfig(**SMALL)
    longer = MovingMNISTConfig(**SMALL | {"frames": 5}).build_test()
    assert torch.equal(built.build_test(5).batch(range(6)), longer.batch(range(6)))
    assert built.build_test().frames == 3
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        built.build_test(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_digits": 0}, r"^data\.num_digits must be at least 1"),
        ({"image_size": 0}, r"^data\.image_size must be at least 1"),
        ({"digit_size": 0}, r"^data\.digit_size must be at least 1"),
        ({"frames": 0}, r"^data\.frames must be at least 1"),
        ({"test_sequences": 0}, r"^data\.test_sequences must be at least 1"),
        (
            {"digit_size": 65},
            r"^data\.digit_size 65 exceeds data\.image_size 64; lower data\.digit_size or raise data\.image_size$",
        ),
        ({"seed": -1}, r"^data\.seed must be 0 to"),
        ({"speed": (2.0, 1.0)}, r"^data\.speed must be finite"),
        ({"download": True}, r"^data\.download needs data\.root"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        MovingMNISTConfig(**arguments)


def test_root_and_download_are_passed_on(monkeypatch, tmp_path):
    asked = []

    def load(*args):
        asked.append(args)
        return DigitImages(np.arange(20, dtype=np.uint8)[:, None, None], np.zeros(20, np.uint8), "stub")

    monkeypatch.setattr(mnist_config, "load_digits", load)
    built = MovingMNISTConfig(root=Path(tmp_path), download=True)
    built.build_train()
    built.build_validation(1)
    built.build_test()
    assert asked == [(tmp_path, "train", True), (tmp_path, "train", True), (tmp_path, "test", True)]
