"""What a checkpoint's files hold: verified before use, and read without running code.

weights.safetensors   the model's tensors
state.pt              everything else, readable by torch.load(weights_only=True)
manifest.json         step, and the size and SHA-256 of both files
"""

import hashlib
import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
"""Version of this layout, written into every manifest and pointer."""

_WEIGHTS, _STATE, _MANIFEST = "weights.safetensors", "state.pt", "manifest.json"


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


def checkpoint_files(step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> dict[str, bytes]:
    """The contents of a checkpoint's files by name.

    Raises:
        TypeError: `state` would not load with ``weights_only=True``; names the entry.
    """
    files = {_WEIGHTS: _weights_to_bytes(weights), _STATE: _state_to_bytes(state)}
    return files | {_MANIFEST: _manifest_to_bytes(step, files)}


def read_checkpoint(folder: Path, named: int | None) -> Checkpoint:
    """Read and verify the checkpoint in a folder.

    Args:
        folder: where its files are.
        named: the step that the folder's name says it holds; None if it says none.

    Raises:
        DamagedCheckpoint: it is not what was saved, or not of that step.
    """
    path = folder / _MANIFEST
    manifest = _from_json(path, _read_bytes(path))
    step = _step_in(path, manifest)
    if named not in (None, step):
        raise DamagedCheckpoint(f"{path}: has step {step}, its folder is of step {named}")
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != {_WEIGHTS, _STATE}:
        raise DamagedCheckpoint(f"{path}: does not list {_WEIGHTS} and {_STATE}")
    # What is parsed are the very bytes that were verified, not the file read a second time.
    data = {name: _verified(folder / name, fingerprint) for name, fingerprint in files.items()}
    weights = _weights_from_bytes(folder / _WEIGHTS, data[_WEIGHTS])
    return Checkpoint(step, weights, _state_from_bytes(folder / _STATE, data[_STATE]))


def is_checkpoint(folder: Path) -> bool:
    """Whether any file of a checkpoint is in a folder, however damaged."""
    return any((folder / name).exists() for name in (_WEIGHTS, _STATE, _MANIFEST))


def pointer(step: int) -> bytes:
    """A file that names a checkpoint."""
    return _to_json({"format": FORMAT, "step": step})


def step_pointed_at(path: Path, data: bytes) -> int:
    """The step that a file of such contents names.

    Raises:
        DamagedCheckpoint: it is no pointer.
    """
    return _step_in(path, _from_json(path, data))


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
