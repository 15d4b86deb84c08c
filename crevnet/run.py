"""The folder of a run: its configuration and its checkpoints, and the model in it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from crevnet.checkpoint import Checkpoint, CheckpointDirectory
from crevnet.command import load_config
from crevnet.config import TrainConfig
from crevnet.video_model import VideoModel


@dataclass
class LoadedRun:
    """A trained model and where it comes from."""

    config: TrainConfig
    model: VideoModel
    step: int


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
        ValueError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: PyTorch sees no CUDA device here; use device cpu")
    return torch.device(name)
