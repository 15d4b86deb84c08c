"""The newest checkpoint of a run in little space, for another machine to go on from.

Half the bytes: weights in float16, Adam's moments in bfloat16, which has the range of float32; each in a file of its
own. Without the files of the moments a run goes on as well; Adam then begins to average anew.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.reporting import write_file
from crevnet.checkpoint_directory import CheckpointDirectory

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PLAIN = ("step", "seconds", "best_mse", "peak_activation_bytes", "way")


def shrink(run: Path, folder: Path) -> None:
    """Write the state of a run in `run` that has a checkpoint.

    Args:
        run: Folder of the run.
        folder: For `weights.safetensors`, `exp_avg.safetensors`, `exp_avg_sq.safetensors` and `state.json`.
    """
    found = CheckpointDirectory(run / "checkpoints").latest()
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    optimiser = found.state["optimiser"]
    _write(folder / "weights.safetensors", found.weights, torch.float16)
    for name in _MOMENTS:
        moments = {str(i): own[name] for i, own in optimiser["state"].items()}
        _write(folder / f"{name}.safetensors", moments, torch.bfloat16)
    plain = {name: found.state[name] for name in _PLAIN}
    updates = {str(i): float(own["step"]) for i, own in optimiser["state"].items()}
    groups = [{name: _number(value) for name, value in group.items()} for group in optimiser["param_groups"]]
    state = plain | {"updates": updates, "param_groups": groups}
    write_file(folder / "state.json", json.dumps(state).encode())


def grow(folder: Path, run: Path) -> None:
    """Make a run go on from what `shrink` has written, unless it has checkpoints already.

    Args:
        folder: What `shrink` wrote.
        run: Folder of the run.

    Raises:
        FileNotFoundError: There is no state in `folder`.
    """
    directory = CheckpointDirectory(run / "checkpoints")
    if directory.steps():
        return
    state = json.loads((folder / "state.json").read_text())
    weights = _read(folder / "weights.safetensors")
    files = [folder / f"{name}.safetensors" for name in _MOMENTS]
    moments: dict[int, dict[str, Any]] = {}
    if all(file.exists() for file in files):
        first, second = map(_read, files)
        moments = {
            int(i): {"step": torch.tensor(updates), "exp_avg": first[i], "exp_avg_sq": second[i]}
            for i, updates in state["updates"].items()
        }
    optimiser = {"state": moments, "param_groups": state["param_groups"]}
    plain = {name: state[name] for name in _PLAIN}
    rng = {"rng": torch.get_rng_state(), "cuda_rng": None}
    directory.save(state["step"], weights, {"optimiser": optimiser, **plain, **rng}, best=True)


def _number(value: Any) -> Any:
    """An option of the optimiser: a step that is replayed from a CUDA graph has its learning rate in a tensor."""
    return value.item() if isinstance(value, Tensor) else value


def _write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    small = {name: x.to(dtype).contiguous() if x.is_floating_point() else x for name, x in tensors.items()}
    write_file(path, safetensors.torch.save(small))


def _read(path: Path) -> dict[str, Tensor]:
    tensors = safetensors.torch.load_file(path)
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
