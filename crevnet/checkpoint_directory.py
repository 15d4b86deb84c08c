"""The checkpoints of a run: saving that survives crashes, what is kept, and finding one to go on from.

A `CheckpointDirectory` holds one folder per saved step, and a pointer to the best one:

    step-00001200/   the files of one checkpoint, see `checkpoint.py`
    best.json        the step of the best checkpoint

A folder is written under a hidden name, flushed to disk and only then renamed, so a name ``step-…`` always
means a whole checkpoint. Hidden names: ``.saving-…`` is being written, ``.removing-…`` is being deleted, and
``.replaced-step-…`` is the older checkpoint of a step that is being saved again; it counts as that step until
the new one is in place. ``.best.…`` is the pointer being written.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from crevnet.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_files,
    pointer,
    read_checkpoint,
    step_pointed_at,
)
from crevnet.files import sync_folder, written_whole

_BEST = "best.json"
_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"
_POINTING = ".best."  # as `written_whole` begins the name of what it writes
_STEP_NAME = re.compile(rf"(?:{re.escape(_REPLACED)})?step-(\d{{8,}})")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class CheckpointDirectory:
    """The checkpoints of one training run.

    One process of the run saves; meanwhile any number may read other steps than the one being saved. The
    folder is created by the first save.

    Args:
        path: the folder of the run's checkpoints.
        keep: how many of the newest checkpoints to keep; the best one is kept besides.

    Raises:
        ValueError: if `keep` is less than 1.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.path = Path(path)
        self.keep = keep

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any], *, best: bool = False) -> None:
        """Write a checkpoint, wholly or not at all.

        A crash at any moment leaves all earlier checkpoints. One of the same step is replaced. Afterwards all
        but the newest `keep` and the best are deleted; checkpoints of later steps than this one, left by a
        run that went further, are neither counted nor deleted.

        Args:
            step: the number of finished training steps.
            weights: tensors by name, on any device, strided however; tensors that share memory are each
                written out in full, and come back equal but separate.
            state: what else a run needs to go on: tensors, numbers, strings and containers of these.
            best: whether `best` shall return this checkpoint from now on.

        Raises:
            TypeError: `state` would not load with ``weights_only=True``; names the entry, nothing is written.
            ValueError: `step` is negative.
            OSError: say that the disk is full; names the folder. Earlier checkpoints are as they were.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, not {step}")
        files = checkpoint_files(step, weights, state)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                self._tidy()
                self._publish(step, files)
                if best:
                    self._point_best_at(step)
                self._prune(step)
        except OSError as error:
            reason = f"could not save the checkpoint of step {step}: {error.strerror or error}"
            raise OSError(error.errno or errno.EIO, reason, str(self.path)) from error

    def load(self, step: int) -> Checkpoint:
        """Read and verify the checkpoint of a step.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            DamagedCheckpoint: it is not what was saved.
        """
        folder = self._folder(step)
        try:
            return read_checkpoint(folder, step)
        except (OSError, DamagedCheckpoint):
            if folder.is_dir():
                raise
        reason = f"no such checkpoint, there are steps {self.steps()}"
        raise FileNotFoundError(errno.ENOENT, reason, str(folder))

    def latest(self) -> Checkpoint | None:
        """Read the newest undamaged checkpoint; None if there is none at all.

        Each damaged checkpoint that is passed over is left where it is, and reported by a RuntimeWarning that
        names the file and what is wrong with it.

        Raises:
            DamagedCheckpoint: there are checkpoints, and all are damaged; lists them.
        """
        damage = []
        passed: set[int] = set()
        # Listed again each time: another process may have saved a newer one, and then deleted the last one listed.
        while left := set(self.steps()) - passed:
            step = max(left)
            passed.add(step)
            try:
                return self.load(step)
            except FileNotFoundError:
                continue  # another process deleted it since it was listed
            except DamagedCheckpoint as error:
                damage.append(str(error))
                _report(error)
        if damage:
            raise DamagedCheckpoint(f"all checkpoints in {self.path} are damaged: " + "; ".join(damage))
        return None

    def best(self) -> Checkpoint | None:
        """Read the checkpoint last saved with ``best=True``; None if there never was one.

        Raises:
            DamagedCheckpoint: it, or the pointer to it, is damaged or missing. There is no falling back.
        """
        step = self._best_step()
        while step is not None:
            try:
                return self.load(step)
            except FileNotFoundError as error:
                # Another process may have saved a better one meanwhile, and deleted this one.
                named, step = step, self._best_step()
                if step == named:
                    raise DamagedCheckpoint(f"{self.path / _BEST}: names step {step}, which is not there") from error
        return None

    def intact_best(self) -> Checkpoint | None:
        """Read the checkpoint last saved with ``best=True``; None if there never was one, or it is damaged.

        A damaged one is left where it is, and reported as `latest` does.
        """
        try:
            return self.best()
        except DamagedCheckpoint as error:
            _report(error)
            return None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged or not, in ascending order."""
        return sorted({step for folder in self._entries() if (step := _step_of(folder)) is not None})

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.path.iterdir())
        except FileNotFoundError:
            return []

    def _folder(self, step: int) -> Path:
        folder = self.path / _step_name(step)
        replaced = self.path / f"{_REPLACED}{folder.name}"
        return replaced if replaced.is_dir() and not folder.is_dir() else folder

    def _tidy(self) -> None:
        """Clear up after saves that died; the lock is held, so nothing hidden is in use."""
        for entry in self._entries():
            if entry.name.startswith(_REPLACED):
                original = entry.with_name(entry.name.removeprefix(_REPLACED))
                if original.is_dir():
                    self._remove(entry)
                else:
                    os.rename(entry, original)
            elif entry.name.startswith((_SAVING, _REMOVING, _POINTING)):
                _delete(entry)

    def _publish(self, step: int, files: dict[str, bytes]) -> None:
        folder = self.path / _step_name(step)
        temporary = self.path / f"{_SAVING}{folder.name}-{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            for name, data in files.items():
                _write(temporary / name, data)
            sync_folder(temporary)
            self._move_into_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _move_into_place(self, temporary: Path, folder: Path) -> None:
        """Rename `temporary` to `folder`; no rename replaces a full folder, so an older one steps aside."""
        replaced = self.path / f"{_REPLACED}{folder.name}"
        try:
            if folder.is_dir():
                os.rename(folder, replaced)
            os.rename(temporary, folder)
        except BaseException:
            if replaced.is_dir() and not folder.is_dir():
                os.rename(replaced, folder)
            raise
        sync_folder(self.path)
        if replaced.is_dir():
            self._remove(replaced)

    def _point_best_at(self, step: int) -> None:
        with written_whole(self.path / _BEST) as part:
            part.write_bytes(pointer(step))

    def _best_step(self) -> int | None:
        path = self.path / _BEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from error
        return step_pointed_at(path, data)

    def _prune(self, saved: int) -> None:
        try:
            best = self._best_step()
        except DamagedCheckpoint as error:
            message = f"deleting no old checkpoint, one of them may be the best: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return
        older = [step for step in self.steps() if step <= saved]
        for step in older[: -self.keep]:
            if step != best:
                self._remove(self._folder(step))

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint by way of a hidden name, so that no crash leaves half of it looking damaged."""
        hidden = self.path / f"{_REMOVING}{uuid.uuid4().hex}"
        try:
            os.rename(folder, hidden)
        except OSError as error:
            _warn_of_leftover(folder, error)
        else:
            _delete(hidden)


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _report(error: DamagedCheckpoint) -> None:
    warnings.warn(f"passing over a damaged checkpoint: {error}", RuntimeWarning, stacklevel=3)


def _step_of(folder: Path) -> int | None:
    """Return the step that a folder's name says it holds, None for any other name."""
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder.name.endswith(_step_name(int(match[1]))) else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one save at a time into the folder; the system gives the lock back when a process dies."""
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks; there the one writer is up to the caller.
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _delete(path: Path) -> None:
    """Delete what is no checkpoint any more; a failure costs disk space, not the save."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        _warn_of_leftover(path, error)


def _warn_of_leftover(path: Path, error: OSError) -> None:
    warnings.warn(f"could not delete {path}, it goes on taking space: {error}", RuntimeWarning, stacklevel=4)
