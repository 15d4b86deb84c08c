"""Videos read once: decoded and resized frames, shared within a process and, where wanted, kept in files."""

import hashlib
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.video_files import load_video
from crevnet.files import written_whole

DECODING = 2
"""Version of what is decoded from the same file; bumped whenever decoding, cropping or resizing changes, so that no
frames of an older one are read.
"""

_IN_USE: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()


def cached_video(path: Path, channels: int, size: tuple[int, int], every: int, cache: Path | None) -> np.ndarray:
    """What `load_video` returns: from memory if it is in use there, else from a file that an earlier call has written.

    Args:
        path: As in `load_video`.
        channels: As in `load_video`.
        size: As in `load_video`.
        every: As in `load_video`.
        cache: Folder of the files, which are mapped to memory, so that processes share it; None for none.

    Raises:
        DataError: As in `load_video`; or a file in `cache` is damaged or holds something else.
    """
    key = _key(path, channels, size, every)
    frames = _IN_USE.get(key)
    if frames is None:
        if cache is None:
            frames = load_video(path, channels, size, every)
        else:
            file = cache / f"{key}.npy"
            if not file.exists():
                with written_whole(file) as part:
                    np.save(part, load_video(path, channels, size, every))
            frames = _mapped(file, channels, size)
        _IN_USE[key] = frames
    return frames


def _key(path: Path, channels: int, size: tuple[int, int], every: int) -> str:
    """Changes with the files, as far as their sizes and times tell."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stats = [(file.name, *((s := file.stat()).st_size, s.st_mtime_ns)) for file in files]
    return hashlib.sha256(repr((DECODING, str(path.resolve()), stats, channels, size, every)).encode()).hexdigest()[:32]


def _mapped(file: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    try:
        frames = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(frames, np.ndarray):
            raise ValueError("it is an archive")
        if frames.ndim != 4 or len(frames) == 0 or frames.shape[1:] != (channels, *size):
            raise ValueError(f"frames {[channels, *size]} are wanted, an array of shape {frames.shape} is there")
        if frames.dtype not in (np.uint8, np.float32):
            raise ValueError(f"it holds {frames.dtype}")
    except Exception as error:  # damage makes NumPy raise almost anything: EOFError for an empty file, BadZipFile
        raise DataError(f"{file}: damaged; delete it, and it is made again ({error})") from error
    return frames
