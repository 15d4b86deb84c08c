"""One training at a time in the folder of a run."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def sole_training(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a folder that is there.

    The system gives it back when this process ends, however it does. The lock is one of POSIX, which no other process
    inherits: with one of `flock`, workers that outlive a killed training by seconds would keep the next one out.

    Raises:
        ValueError: Another process trains there.
        OSError: The folder cannot be written to.
    """
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise ValueError(
                    f"another process trains in {folder}: wait for it, or choose another run.folder"
                ) from error
            # Some network file systems have no locks; there it is up to the user.
        yield
