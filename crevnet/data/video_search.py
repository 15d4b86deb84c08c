"""Which files and folders are videos, and where they lie."""

from collections.abc import Iterator
from pathlib import Path

from crevnet.data.errors import DataError

ARRAYS = (".npy", ".npz")
FILMS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = "a .npy, .npz, .gif or film file, or a folder of images"


def find_videos(root: Path) -> list[Path]:
    """The videos at or below a path, in the order of their names.

    Args:
        root: A file, or a folder that is searched with all folders in it. A folder that holds images is one video;
            what begins with a dot is passed over.

    Raises:
        DataError: Nothing there, or no video in it.
    """
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    found = sorted(_videos_in(root))
    if not found:
        raise DataError(f"{root}: holds no video, which is {KINDS}")
    return found


def images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, in the order of their names; what begins with a dot is passed over."""
    return sorted(p for p in folder.iterdir() if _is_image(p))


def _videos_in(folder: Path) -> Iterator[Path]:
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if any(map(_is_image, inside)):
        yield folder
    for path in inside:
        if path.is_dir():
            yield from _videos_in(path)
        elif path.suffix.lower() in (*ARRAYS, *FILMS, ".gif"):
            yield path


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGES and not path.name.startswith(".")
