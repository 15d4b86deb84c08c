"""Configuration of sequences cut from people's own videos, which builds the three sets."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from crevnet.data.config import HELD_OUT, TRAIN_SIZE, DataConfig
from crevnet.data.video_cache import cached_video
from crevnet.data.video_search import find_videos
from crevnet.data.videos import Video, VideoWindows, hold_out_videos
from crevnet.frame_size import height_width


@dataclass(kw_only=True)
class VideosConfig(DataConfig):
    """Which videos to cut sequences from, and how; builds the training, validation and test sets.

    A video is a `.npy`, `.npz` or `.gif` file, a film such as `.mp4`, or a folder of images in the order of their
    names. Frames are cropped about their centre to the proportions of `image_size` and resized to it, as Lotter et al.
    (2016) did with KITTI and Caltech Pedestrian.

    Raises:
        ValueError: a value is out of range.
    """

    name: Literal["videos"] = "videos"
    """Which data set this is."""
    train: Path
    """Folder of the videos to train on, searched with all folders in it; or one video."""
    validation: Path | None = None
    """Folder of the videos to validate on; None holds the last tenth of `train` out: whole videos, or the end of each
    where there are fewer than ten.
    """
    test: Path | None = None
    """Folder of the videos to test on; None holds a tenth of `train` out as well."""
    channels: int = 3
    """Channels of a frame: 1 for grey, 3 for RGB, any number for array files."""
    every: int = 1
    """Keep one of so many frames of a video."""
    test_every: int | None = None
    """The same of the videos in `test`, such as 3 for 30 frames per second after training on 10; None for `every`."""
    cache: Path | None = None
    """Folder for decoded frames, which later runs read instead of the videos; None decodes them into memory at every
    start.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "every", "test_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def frame_channels(self) -> int:
        """As in `DataConfig`."""
        return self.channels

    def source(self) -> str:
        """As in `DataConfig`."""
        return f"videos in {self.train}"

    def test_source(self) -> str:
        """As in `DataConfig`."""
        return f"Test videos, {self.test or f'held out of {self.train}'}"

    def build_train(self) -> VideoWindows:
        """As in `DataConfig`; windows are drawn at random."""
        videos, _ = self._training_videos()
        return VideoWindows(videos, self.frames, f"{self.train} (to train on)", size=TRAIN_SIZE, seed=self.seed)

    def build_validation(self, size: int) -> VideoWindows:
        """As in `DataConfig`."""
        _, videos = self._training_videos()
        return VideoWindows(videos, self.frames, self._named(self.validation, "validation"), size=size)

    def build_test(self) -> VideoWindows:
        """As in `DataConfig`."""
        if self.test is not None:
            videos = self._load(self.test, self.test_every)
        else:
            _, videos = hold_out_videos(self._load(self.train), HELD_OUT, self.frames)
        return VideoWindows(videos, self.frames, self._named(self.test, "test"), size=self.test_sequences)

    def _named(self, root: Path | None, option: str) -> str:
        return str(root) if root else f"what is held out of {self.train} for want of data.{option}"

    def _training_videos(self) -> tuple[list[Video], list[Video]]:
        """To train and to validate on, without what is tested on."""
        videos = self._load(self.train)
        if self.test is None:
            videos, _ = hold_out_videos(videos, HELD_OUT, self.frames)
        if self.validation is None:
            return hold_out_videos(videos, HELD_OUT, self.frames)
        return videos, self._load(self.validation)

    def _load(self, root: Path, every: int | None = None) -> list[Video]:
        how = (self.channels, height_width(self.image_size), every or self.every, self.cache)
        return [Video(str(path), partial(cached_video, path, *how)) for path in find_videos(root)]
