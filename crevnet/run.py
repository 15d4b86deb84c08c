"""The folder of a run: its configuration and its checkpoints, and the model in it."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crevnet.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import as_plain, load_config, save_config
from crevnet.config import TrainConfig
from crevnet.convolution import use_channels_last
from crevnet.run_lock import sole_training
from crevnet.video_model import VideoModel

_LENGTH_HINT = (
    "; with optimiser.schedule cosine the learning rate of every step depends on steps: a run that is to be made "
    "longer needs optimiser.schedule constant or step from its first step"
)
_FREE = {
    "data.cache",
    "data.download",
    "data.test_sequences",
    "run.checkpoint_every",
    "run.device",
    "run.folder",
    "run.keep",
    "run.log_every",
    "run.memory",
    "run.strategy",
    "run.threads",
    "run.validate_every",
    "run.workers",
}
"""Options that leave the weights of every step alone, and what is measured of them while training. Not
`run.validation_sequences`: errors on other sequences do not tell which weights are the best.
"""
_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9]\d?))?")


@dataclass
class LoadedRun:
    """A trained model and where it comes from."""

    config: TrainConfig
    model: VideoModel
    step: int


@contextmanager
def opened(config: TrainConfig) -> Iterator[Path]:
    """The folder of a run, for this process alone, and `config.yaml` in it.

    Raises:
        ValueError: Another process trains there, or it holds another run.
        OSError: It cannot be written to.
    """
    folder = run_folder(config)
    with sole_training(folder):
        check_same_run(config, folder)
        save_config(with_whole_paths(config), folder / "config.yaml")
        yield folder


def run_folder(config: TrainConfig) -> Path:
    """Make the configured folder if it is missing, or a new one named by the time, which no other run has.

    Raises:
        OSError: It cannot be made.
    """
    if config.run.folder is not None:
        config.run.folder.mkdir(parents=True, exist_ok=True)
        return config.run.folder
    first = Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    first.parent.mkdir(exist_ok=True)
    folder, number = first, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:  # another run has begun in the same second
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        else:
            return folder


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """With the paths of what is read from the root on, so that they are found from other folders than this one."""
    values = {f.name: getattr(config.data, f.name) for f in fields(config.data)}
    paths: dict[str, Any] = {name: value.resolve() for name, value in values.items() if isinstance(value, Path)}
    # Links are not followed: a run goes on where the one that it began with is gone.
    init = None if config.run.init is None else Path(os.path.abspath(config.run.init))
    return replace(config, data=replace(config.data, **paths), run=replace(config.run, init=init))


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise if the folder holds checkpoints of another configuration, or later ones than the run is to reach.

    A longer run with the same weights is the same run. With `optimiser.schedule: cosine` there is none: once a step is
    taken, its learning rate was that of the old number of steps.

    Raises:
        ValueError: Names the options that differ, or the step.
    """
    path = folder / "config.yaml"
    steps = CheckpointDirectory(folder / "checkpoints").steps()
    if not steps or not path.exists():
        return
    old, new = (_flat(as_plain(with_whole_paths(c))) for c in (load_config(path), config))
    free = set(_FREE)
    if steps[-1] == 0 or config.optimiser.schedule != "cosine":
        free.add("steps")
    different = [k for k in new if k not in free and old.get(k) != new[k]]
    if different:
        listing = ", ".join(f"{k} was {old.get(k)}, is {new[k]}" for k in different)
        hint = _LENGTH_HINT if "steps" in different else ""
        raise ValueError(f"{folder} holds a run with other options ({listing}); choose another run.folder{hint}")
    if config.steps < steps[-1]:
        raise ValueError(
            f"{folder} holds a run that has reached step {steps[-1]}, and steps is {config.steps}; set steps to "
            f"{steps[-1]} or more, or choose another run.folder"
        )


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
    use_channels_last(model)  # as in training, which then has validated what is predicted now, to the last bit
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


def initial_weights(source: Path) -> Checkpoint:
    """What a run with `run.init` begins with: the best checkpoint of another one (the last where none was validated),
    or the one that is named.

    Raises:
        FileNotFoundError: Neither a run nor a checkpoint is there.
        DamagedCheckpoint: The checkpoint is damaged.
    """
    if is_checkpoint(source):
        return read_checkpoint(source, None)
    directory = CheckpointDirectory(source / "checkpoints")
    if not directory.path.is_dir():
        raise FileNotFoundError(f"run.init {source} is neither the folder of a run nor that of a checkpoint")
    found = find_checkpoint(directory, "best")
    if found is None:
        raise FileNotFoundError(f"run.init {source} has no checkpoint yet")
    return found


def check_same_architecture(weights: Mapping[str, Tensor], model: Mapping[str, Tensor], source: Path) -> None:
    """Raise if weights are not those of a model.

    Args:
        weights: By name.
        model: Those of the model, sharded or not.
        source: Where the weights are from.

    Raises:
        ValueError: Names the first tensor that differs, and both shapes.
    """
    for name in {**model, **weights}:
        here, there = (list(own[name].shape) if name in own else "missing" for own in (model, weights))
        if here != there:
            raise ValueError(
                f"run.init {source} is of another architecture: {name} is {there} there and {here} here; give the "
                "options of model with which it was trained"
            )


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


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, branch in tree.items() for k, v in _flat(branch, f"{prefix}{name}.").items()}
