"""Moving MNIST, generated on the fly from MNIST or from digits that need no download."""

from crevnet.data.config import DataConfig
from crevnet.data.digit_images import DigitImages
from crevnet.data.digits import load_digits
from crevnet.data.errors import DataError
from crevnet.data.idx import read_idx
from crevnet.data.loader import StepSampler, train_batches
from crevnet.data.mnist import Split, load_mnist
from crevnet.data.moving_mnist import MovingMNIST
from crevnet.data.resizing import resize
from crevnet.data.splitting import hold_out

__all__ = [
    "DataConfig",
    "DataError",
    "DigitImages",
    "MovingMNIST",
    "Split",
    "StepSampler",
    "hold_out",
    "load_digits",
    "load_mnist",
    "read_idx",
    "resize",
    "train_batches",
]
