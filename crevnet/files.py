"""Files that are written whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path, with the same ending, to write a file to: it then takes the place of what was there.

    Nothing is left of a write that fails, and no other process sees half of one. Makes the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed `.npz`."""
    with written_whole(path) as part, part.open("wb") as f:
        np.savez_compressed(f, **arrays)  # type: ignore[arg-type]
