"""Which files and folders are videos, and where they lie."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from crevnet.data.errors import DataError

ARRAYS = (".npy", ".npz")
FILMS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = "a .npy, .npz, .gif or film file, or a folder of images"

_NUMBER = re.compile("([0-9]+)")


def find_videos(root: Path) -> list[Path]:
    """The videos at or below a path, in the order of their names, numbers in them by value: 2 before 10.

    Args:
        root: A file, or a folder that is searched with all folders in it. A folder that holds images is one video;
            what begins with a dot is passed over, and so are folders of training runs, with their pictures. What links
            lead to a second time is left out.

    Raises:
        DataError: Nothing there, or no video in it.
    """
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    found = list(_videos_in(root, set()))
    if not found:
        raise DataError(f"{root}: holds no video, which is {KINDS}")
    return found


def images_in(folder: Path) -> list[Path]:
    """The images in a folder itself, in the order of their names as in `find_videos`; none that begins with a dot."""
    return sorted((p for p in folder.iterdir() if _is_image(p)), key=_by_name)


def is_searched(place: Path, root: Path, *, by_name: bool = False) -> bool:
    """Whether `find_videos(root)` looks into a place.

    Args:
        place: File or folder, which need not be there yet.
        root: File or folder.
        by_name: Judge by the two names alone, which gives the same answer in every working folder.
    """
    plain = os.path.normpath if by_name else os.path.realpath
    place, root = Path(plain(place)), Path(plain(root))
    return place.is_relative_to(root) and not any(part.startswith(".") for part in place.relative_to(root).parts)


def _videos_in(folder: Path, seen: set[str]) -> Iterator[Path]:
    """In order, but for what was seen already, as paths without links."""
    if _seen(folder, seen):
        return
    inside = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=_by_name)
    if any(map(_is_image, inside)):
        yield folder
    for path in inside:
        if path.is_dir():
            if not _is_run(path):
                yield from _videos_in(path, seen)
        elif path.suffix.lower() in (*ARRAYS, *FILMS, ".gif") and not _seen(path, seen):
            yield path


def _seen(path: Path, seen: set[str]) -> bool:
    real = os.path.realpath(path)  # unlike Path.resolve, it takes a link to itself
    if real in seen:
        return True
    seen.add(real)
    return False


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGES and not path.name.startswith(".")


def _by_name(path: Path) -> tuple[list[str | int], str]:
    """Texts and numbers take turns, so that like is compared with like; 01 and 1 are told apart by the name."""
    parts = _NUMBER.split(path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
