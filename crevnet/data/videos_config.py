"""Configuration of sequences cut from people's own videos, which builds the three sets."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from crevnet.data.apart import check_apart
from crevnet.data.config import HELD_OUT, TRAIN_SIZE, DataConfig
from crevnet.data.errors import DataError
from crevnet.data.video_cache import cached_video
from crevnet.data.video_search import find_videos, is_searched
from crevnet.data.videos import FEW, Video, VideoWindows, hold_out_videos
from crevnet.frame_size import height_width


@dataclass(kw_only=True)
class VideosConfig(DataConfig):
    """Which videos to cut sequences from, and how; builds the training, validation and test sets.

    A video is a `.npy`, `.npz` or `.gif` file, a film such as `.mp4`, or a folder of images in the order of their
    names, numbers in them by value. Frames are cropped about their centre to the proportions of `image_size` and
    resized to it, as Lotter et al. (2016) did with KITTI and Caltech Pedestrian.

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
    test_overlap: bool = True
    """Whether windows of the test set may overlap; `false` tests on sequences that share no frame, as PredNet was."""
    mirror: bool = False
    """Train on half of the sequences, by chance, mirrored left to right: twice the views, for scenes that look alike
    either way.
    """
    cache: Path | None = None
    """Folder for decoded frames, outside those of the videos, which later runs read instead; None decodes the videos
    into memory at every start.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "every", "test_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.test_every is not None and self.test is None:
            raise ValueError("data.test_every is for the videos in data.test: set that too, or data.every instead")

    def frame_channels(self) -> int:
        """As in `DataConfig`."""
        return self.channels

    def source(self) -> str:
        """As in `DataConfig`."""
        return f"videos in {self.train}"

    def test_source(self) -> str:
        """As in `DataConfig`."""
        return f"Test videos, {self.test or f'held out of {self.train}'}"

    def thinning(self) -> int:
        """As in `DataConfig`."""
        return self.test_every or self.every

    def check_run_folder(self, folder: Path | None) -> None:
        """Raise if a run would lie among the videos.

        Judges by the names alone: a run is also loaded in working folders other than that of training.

        Args:
            folder: Folder of the run; None makes a new one under `runs`.

        Raises:
            ValueError: It lies in a folder that is searched for videos.
        """
        for option, root in self._roots().items():
            if is_searched(folder or Path("runs"), root, by_name=True):
                raise ValueError(
                    f"run.folder {folder or 'runs'} lies within data.{option} {root}, where its pictures would be read "
                    "as videos; choose another run.folder"
                )

    def build_train(self) -> VideoWindows:
        """As in `DataConfig`; windows are drawn at random."""
        check_apart(self._roots(), self.cache)
        videos, _ = self._training_videos()
        name = f"{self.train} (to train on)"
        return VideoWindows(videos, self.frames, name, size=TRAIN_SIZE, seed=self.seed, mirror=self.mirror)

    def build_validation(self, size: int) -> VideoWindows:
        """As in `DataConfig`."""
        check_apart(self._roots(), self.cache)
        _, videos = self._training_videos()
        if not videos:
            raise self._too_short()
        return VideoWindows(videos, self.frames, self._named(self.validation, "validation"), size=size)

    def build_test(self, frames: int | None = None) -> VideoWindows:
        """As in `DataConfig`."""
        check_apart(self._roots(), self.cache)
        advice = "lower data.frames" if frames is None else "lower --frames"
        if self.test is not None:
            videos = self._load(self.test, self.test_every)
        else:
            # By the frames of training, whatever is asked for now: else what was trained on would be tested on.
            _, videos = hold_out_videos(self._load(self.train), HELD_OUT, self.frames)
            if not videos:
                raise self._too_short()
            if frames is not None:
                advice += f" (training held this out for sequences of {self.frames}), or name other videos with --test"
        frames = self.frames if frames is None else frames
        stride = 1 if self.test_overlap else frames
        name = self._named(self.test, "test")
        return VideoWindows(videos, frames, name, size=self.test_sequences, stride=stride, advice=advice)

    def _roots(self) -> dict[str, Path]:
        """What the user named, by option."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {option: Path(root) for option, root in given.items() if root is not None}

    def _too_short(self) -> DataError:
        """What to say where no video is long enough to hold a sequence out of."""
        videos = self._load(self.train)
        uses = {"validation": "validate", "test": "test"}
        # Of many videos whole ones are held out, first to test on, after which they may be few.
        missing = [name for name in uses if name not in self._roots() and not (name == "test" and len(videos) >= FEW)]
        return DataError(
            f"{self.train}: no video has the {self.frames * (1 + len(missing))} frames for a sequence of {self.frames} "
            f"each to train{', ' if len(missing) > 1 else ' and '}{' and '.join(uses[name] for name in missing)} on, "
            f"the longest has {max(len(video.frames) for video in videos)}; lower data.frames, or name other videos in "
            f"{' and '.join(f'data.{name}' for name in missing)}"
        )

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
