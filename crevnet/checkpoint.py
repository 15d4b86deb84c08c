"""Checkpoints that survive crashes, are verified before use, and never run code when read.

A `CheckpointDirectory` holds one folder per saved step, and a pointer to the best one:

    step-00001200/weights.safetensors   the model's tensors
    step-00001200/state.pt              everything else, readable by torch.load(weights_only=True)
    step-00001200/manifest.json         step, and the size and SHA-256 of both files
    best.json                           the step of the best checkpoint

A folder is written under a hidden name, flushed to disk and only then renamed, so a name ``step-…`` always
means a whole checkpoint. Hidden names: ``.saving-…`` is being written, ``.removing-…`` is being deleted, and
``.replaced-step-…`` is the older checkpoint of a step that is being saved again; it counts as that step until
the new one is in place.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
"""Version of the layout above, written into every manifest and pointer."""

_WEIGHTS, _STATE, _MANIFEST, _BEST = "weights.safetensors", "state.pt", "manifest.json", "best.json"
_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"
_STEP_NAME = re.compile(rf"(?:{re.escape(_REPLACED)})?step-(\d{{8,}})")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class DamagedCheckpoint(RuntimeError):  # noqa: N818
    """A checkpoint is not what was saved; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, every tensor on the CPU."""

    step: int
    """The step it was saved at."""
    weights: dict[str, Tensor]
    """The tensors given to `CheckpointDirectory.save`, by name, bit for bit."""
    state: dict[str, Any]
    """The state given to `CheckpointDirectory.save`."""
    path: Path
    """The folder it was read from."""


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

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any], *, best: bool = False) -> Path:
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

        Returns:
            The checkpoint's folder.

        Raises:
            TypeError: `state` would not load with ``weights_only=True``; names the entry, nothing is written.
            ValueError: `step` is negative.
            OSError: say that the disk is full; names the folder. Earlier checkpoints are as they were.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, not {step}")
        files = {_WEIGHTS: _weights_to_bytes(weights), _STATE: _state_to_bytes(state)}
        files[_MANIFEST] = _manifest_to_bytes(step, files)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                self._tidy()
                folder = self._publish(step, files)
                if best:
                    self._point_best_at(step)
                self._prune(step)
        except OSError as error:
            reason = f"could not save the checkpoint of step {step}: {error.strerror or error}"
            raise OSError(error.errno or errno.EIO, reason, str(self.path)) from error
        return folder

    def load(self, step: int | Path) -> Checkpoint:
        """Read and verify one checkpoint, given its step or the path of any checkpoint folder.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            DamagedCheckpoint: it is not what was saved.
        """
        folder = self._folder(step) if isinstance(step, int) else Path(step)
        try:
            return _read(folder)
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
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except FileNotFoundError:
                continue  # another process deleted it since it was listed
            except DamagedCheckpoint as error:
                damage.append(str(error))
                warnings.warn(f"passing over a damaged checkpoint: {error}", RuntimeWarning, stacklevel=2)
        if damage:
            raise DamagedCheckpoint(f"all checkpoints in {self.path} are damaged: " + "; ".join(damage))
        return None

    def best(self) -> Checkpoint | None:
        """Read the checkpoint last saved with ``best=True``; None if there never was one.

        Raises:
            DamagedCheckpoint: it, or the pointer to it, is damaged or missing. There is no falling back.
        """
        step = self._best_step()
        if step is None:
            return None
        try:
            return self.load(step)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{self.path / _BEST}: names step {step}, which is not there") from error

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
            elif entry.name.startswith((_SAVING, _REMOVING)):
                _delete(entry)

    def _publish(self, step: int, files: dict[str, bytes]) -> Path:
        folder = self.path / _step_name(step)
        temporary = self.path / f"{_SAVING}{folder.name}-{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            for name, data in files.items():
                _write(temporary / name, data)
            _sync_folder(temporary)
            self._move_into_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder

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
        _sync_folder(self.path)
        if replaced.is_dir():
            self._remove(replaced)

    def _point_best_at(self, step: int) -> None:
        temporary = self.path / f"{_SAVING}{_BEST}-{uuid.uuid4().hex}"
        try:
            _write(temporary, _to_json({"format": FORMAT, "step": step}))
            os.replace(temporary, self.path / _BEST)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self.path)

    def _best_step(self) -> int | None:
        path = self.path / _BEST
        try:
            pointer = _from_json(path, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from error
        return _step_in(path, pointer)

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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete what is no checkpoint any more; a failure costs disk space, not the save."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        _warn_of_leftover(path, error)


def _warn_of_leftover(path: Path, error: OSError) -> None:
    warnings.warn(f"could not delete {path}, it goes on taking space: {error}", RuntimeWarning, stacklevel=4)


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _from_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path}: is not a JSON object")
    if value.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: has format {value.get('format')!r}, this program reads {FORMAT}")
    return value


def _step_in(path: Path, value: dict[str, Any]) -> int:
    step = value.get("step")
    if type(step) is not int or step < 0:
        raise DamagedCheckpoint(f"{path}: has step {step!r}")
    return step


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest_to_bytes(step: int, files: dict[str, bytes]) -> bytes:
    fingerprints = {name: _fingerprint(data) for name, data in files.items()}
    return _to_json({"format": FORMAT, "step": step, "files": fingerprints})


def _weights_to_bytes(weights: dict[str, Tensor]) -> bytes:
    # safetensors refuses tensors that share memory or have gaps, so each gets memory of its own.
    separate = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    return safetensors.torch.save(separate)


def _state_to_bytes(state: dict[str, Any]) -> bytes:
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict, not a {type(state).__name__}")
    try:
        return _safely_loadable(state)
    except Exception as error:
        culprit, reason = _describe_culprit(state, "state"), _why_refused(error)
        raise TypeError(f"{culprit} cannot be saved so as to load without running code: {reason}") from error


def _safely_loadable(value: Any) -> bytes:
    """Serialize `value`; raises whatever torch does if ``weights_only=True`` would not read it back."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    torch.load(buffer, map_location="cpu", weights_only=True)
    return buffer.getvalue()


def _why_refused(error: Exception) -> str:
    """Return torch's reason without its advice, which is to load without the safeguard."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        return str(error.__context__).split(" Please use ")[0]
    return str(error)


def _describe_culprit(value: Any, name: str) -> str:
    """Name the innermost entry that `_safely_loadable` refuses."""
    for key, child in _children(value):
        if not _survives(child):
            return _describe_culprit(child, f"{name}[{key!r}]")
    return f"{name}, a {type(value).__module__}.{type(value).__qualname__},"


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _survives(value: Any) -> bool:
    try:
        _safely_loadable(value)
    except Exception:
        return False
    return True


def _read(folder: Path) -> Checkpoint:
    path = folder / _MANIFEST
    manifest = _from_json(path, _read_bytes(path))
    step, named = _step_in(path, manifest), _step_of(folder)
    if named not in (None, step):
        raise DamagedCheckpoint(f"{path}: has step {step}, its folder is of step {named}")
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != {_WEIGHTS, _STATE}:
        raise DamagedCheckpoint(f"{path}: does not list {_WEIGHTS} and {_STATE}")
    # What is parsed are the very bytes that were verified, not the file read a second time.
    data = {name: _verified(folder / name, fingerprint) for name, fingerprint in files.items()}
    weights = _weights_from_bytes(folder / _WEIGHTS, data[_WEIGHTS])
    return Checkpoint(step, weights, _state_from_bytes(folder / _STATE, data[_STATE]), folder)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path}: is missing") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from error


def _verified(path: Path, expected: Any) -> bytes:
    data = _read_bytes(path)
    actual = _fingerprint(data)
    for key, value in actual.items():
        recorded = expected.get(key) if isinstance(expected, dict) else None
        if recorded != value:
            raise DamagedCheckpoint(f"{path}: {key} is {value}, {_MANIFEST} says {recorded}")
    return data


def _weights_from_bytes(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: is no safetensors file: {error}") from error


def _state_from_bytes(path: Path, data: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _why_refused(error)
        raise DamagedCheckpoint(f"{path}: refused by torch.load(weights_only=True): {reason}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path}: holds a {type(state).__name__}, not a dict")
    return state
