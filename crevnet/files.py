"""Files that are written whole or not at all."""

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path, with the same ending, to write a file to: it then takes the place of what was there.

    Nothing is left of a write that fails, no other process sees half of one, and a loss of power leaves the new file or
    the one before. Makes the folder.

    Raises:
        OSError: Of a write that fails; names the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        with naming(path, instead_of=part):
            yield part
            # A rename may reach the disk before what was written, and would then put an empty file in place.
            with part.open("rb+") as f:
                os.fsync(f.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Errors of the system name this path where they name none, as those of a write to a full disk, or that one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(instead_of)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can do so for a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise if a file cannot be written, before the work whose result it is to hold. Makes the folder.

    Raises:
        OSError: Names the path.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, name a file in it", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written, choose another place: {error.strerror}", str(path)) from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed `.npz`."""
    with written_whole(path) as part, part.open("wb") as f:
        np.savez_compressed(f, **arrays)  # type: ignore[arg-type]
