"""The folder of a run: its configuration and its checkpoints, and the model in it."""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from crevnet.checkpoint import Checkpoint
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import as_plain, load_config
from crevnet.config import TrainConfig
from crevnet.video_model import VideoModel

_LENGTH_HINT = (
    "; with optimiser.schedule cosine the learning rate of every step depends on steps: a run that is to be made "
    "longer needs optimiser.schedule constant from its first step"
)
_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9]\d?))?")


@dataclass
class LoadedRun:
    """A trained model and where it comes from."""

    config: TrainConfig
    model: VideoModel
    step: int


def run_folder(config: TrainConfig) -> Path:
    """The configured folder, or a new one named by the time."""
    return config.run.folder or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise if the folder holds a run with another configuration.

    A longer one with the same weights is the same run. With `optimiser.schedule: cosine` there is none: once a step is
    taken, its learning rate was that of the old number of steps.

    Raises:
        ValueError: Names the options that differ.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    old, new = _flat(as_plain(load_config(path))), _flat(as_plain(config))
    looks = ("folder", "workers", "threads", "device", "strategy", "memory", "log_every", "keep")
    free = {"data.cache", *(f"run.{name}" for name in looks)}
    if not _depends_on_its_length(config, folder):
        free.add("steps")
    different = [k for k in new if k not in free and old.get(k) != new[k]]
    if different:
        listing = ", ".join(f"{k} was {old.get(k)}, is {new[k]}" for k in different)
        hint = _LENGTH_HINT if "steps" in different else ""
        raise ValueError(f"{folder} holds a run with other options ({listing}); choose another run.folder{hint}")


def load_run(folder: Path, checkpoint: str, device: torch.device) -> LoadedRun:
    """Load the model of a run.

    Args:
        folder: Folder of the run.
        checkpoint: `best` (the last one where none was validated), `last`, or the number of a step.
        device: Where to put the model.

    Raises:
        FileNotFoundError: No run or no such checkpoint there.
        DamagedCheckpoint: The checkpoint is damaged.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has no config.yaml (python -m crevnet.train makes one)"
        )
    config = load_config(path)
    found = find_checkpoint(CheckpointDirectory(folder / "checkpoints"), checkpoint)
    if found is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    model = config.model.build()
    model.load_state_dict(found.weights)
    return LoadedRun(config, model.to(device).eval(), found.step)


def find_checkpoint(directory: CheckpointDirectory, which: str) -> Checkpoint | None:
    """The checkpoint named `best`, `last` or by its step.

    Raises:
        ValueError: Another name.
    """
    if which == "last":
        return directory.latest()
    if which == "best":
        return directory.best() or directory.latest()
    if not which.isdecimal():
        raise ValueError(f"checkpoint must be 'best', 'last' or the number of a step, got {which!r}")
    return directory.load(int(which))


def select_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one.

    Raises:
        ValueError: Another kind of device; CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: PyTorch sees no CUDA device here; use device cpu")
    return torch.device(name)


def _depends_on_its_length(config: TrainConfig, folder: Path) -> bool:
    """Whether steps were taken that would have been others in a run of another length."""
    taken = any(step > 0 for step in CheckpointDirectory(folder / "checkpoints").steps())
    return taken and config.optimiser.schedule == "cosine"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, branch in tree.items() for k, v in _flat(branch, f"{prefix}{name}.").items()}
