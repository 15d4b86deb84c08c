"""MNIST from its published files, verified, and downloaded on request.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", CC BY-SA 3.0.
"""

import hashlib
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from crevnet.data.digit_images import DigitImages
from crevnet.data.errors import DataError
from crevnet.data.idx import parse_idx, read_content
from crevnet.files import written_whole

Split = Literal["train", "test"]

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
"""The public mirror that torchvision downloads from, too."""

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of the uncompressed content of each published file."""

_PREFIX = {"train": "train", "test": "t10k"}


def load_mnist(
    root: str | Path,
    split: Split,
    download: bool = False,
    *,
    base_url: str = MNIST_URL,
    timeout: float = 30.0,
) -> DigitImages:
    """Read one split of MNIST from `root` or `root/MNIST/raw` (torchvision's layout), plain or gzip.

    Args:
        root: the folder with the four published files.
        split: "train" (60,000 digits) or "test" (10,000 digits).
        download: fetch into `root` whichever file of this split is missing.
        base_url: where to fetch from.
        timeout: seconds of silence from the server after which a download is given up.

    Returns:
        Images [N, 28, 28] and labels [N].

    Raises:
        DataError: a file is missing, damaged, or not the published one; or the download failed.
        ValueError: `split` is neither "train" nor "test".
    """
    if split not in _PREFIX:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    contents: list[bytes] = []
    for name in (f"{_PREFIX[split]}-images-idx3-ubyte", f"{_PREFIX[split]}-labels-idx1-ubyte"):
        path = _find(Path(root), name)
        if path is None and download:
            path = _download(Path(root), name, base_url, timeout)
        if path is None:
            raise DataError(
                f"{Path(root) / name}: no such file, nor {name}.gz, nor either of them in MNIST/raw below; "
                "put the MNIST files there, pass download=True (on the command line --data.download true), or use "
                "root=None for the embedded digits"
            )
        contents.append(_verified_content(path, name))
    images, labels = map(parse_idx, contents)
    return DigitImages(images, labels, f"MNIST {split}")


def _find(root: Path, name: str) -> Path | None:
    for folder in (root, root / "MNIST" / "raw"):
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def _verified_content(path: Path, name: str, fix: str = "delete the file and fetch it again") -> bytes:
    content = read_content(path)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MD5[name]:
        raise DataError(
            f"{path}: not the published {name}: MD5 of its uncompressed content is {found}, expected {MD5[name]}; {fix}"
        )
    return content


def _download(root: Path, name: str, base_url: str, timeout: float) -> Path:
    url = f"{base_url.rstrip('/')}/{name}.gz"
    target = root / f"{name}.gz"
    try:
        with written_whole(target) as partial:
            with urllib.request.urlopen(url, timeout=timeout) as response, partial.open("wb") as file:
                shutil.copyfileobj(response, file)
            _verified_content(partial, name, fix="the server has another file")
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"{target}: download from {url} failed ({error}); check the network, or, offline, copy {name}.gz "
            f"into {root} by hand, or use root=None for the embedded digits"
        ) from error
    return target
