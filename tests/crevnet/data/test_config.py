import pytest

from crevnet.data import DataConfig, MovingMNISTConfig, VideosConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, r"^data\.frames must be at least 1, got 0"),
        ({"test_sequences": 0}, r"^data\.test_sequences must be at least 1, got 0"),
        ({"image_size": 0}, r"^data\.image_size must be at least 1, got 0"),
        ({"image_size": (16, 0)}, r"^data\.image_size must be at least 1, got \(16, 0\)"),
        ({"seed": -1}, r"^data\.seed must be 0 to"),
        ({"seed": 2**64}, r"^data\.seed must be 0 to"),
    ],
)
def test_what_all_data_sets_share_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideosConfig(**{"train": "videos"} | arguments)


def test_a_data_set_must_define_everything():
    with pytest.raises(TypeError, match="abstract methods build_test, build_train, build_validation, frame_channels"):
        DataConfig()


def test_without_videos_nothing_is_thinned():
    assert MovingMNISTConfig().thinning() == 1
