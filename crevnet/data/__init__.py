"""Moving MNIST, generated on the fly from MNIST or from digits that need no download; and people's own videos."""

from crevnet.data.config import DataConfig
from crevnet.data.digit_images import DigitImages
from crevnet.data.digits import load_digits
from crevnet.data.errors import DataError
from crevnet.data.loader import StepSampler, WorkerDied, train_batches, worker_deaths
from crevnet.data.mnist import Split, load_mnist
from crevnet.data.mnist_config import MovingMNISTConfig
from crevnet.data.moving_mnist import MovingMNIST
from crevnet.data.resizing import resize
from crevnet.data.sequence_set import SequenceSet
from crevnet.data.splitting import hold_out
from crevnet.data.video_files import load_video
from crevnet.data.video_search import find_videos
from crevnet.data.videos import Video, VideoWindows, to_tensor
from crevnet.data.videos_config import VideosConfig

__all__ = [
    "DataConfig",
    "DataError",
    "DigitImages",
    "MovingMNIST",
    "MovingMNISTConfig",
    "SequenceSet",
    "Split",
    "StepSampler",
    "Video",
    "VideoWindows",
    "VideosConfig",
    "WorkerDied",
    "find_videos",
    "hold_out",
    "load_digits",
    "load_mnist",
    "load_video",
    "resize",
    "to_tensor",
    "train_batches",
    "worker_deaths",
]
