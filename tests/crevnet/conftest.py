"""Tiny training runs: a few thousand weights on 16 x 16 frames, a few dozen milliseconds per step."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from crevnet.config import TrainConfig
from crevnet.data import MovingMNISTConfig
from crevnet.launch import launch
from crevnet.model import CrevNetConfig
from crevnet.train import main
from crevnet.training import Trainer, train

ROOT = Path(__file__).parents[2]

TINY = {
    "model.cell": "convlstm",
    "model.image_size": 16,
    "model.clip": 2,
    "model.blocks": [1],
    "model.modules": 2,
    "model.clips_at_once": 1,
    "model.mode": "reversible",
    "data.image_size": 16,
    "data.digit_size": 8,
    "data.num_digits": 1,
    "data.frames": 6,
    "data.test_sequences": 5,
    "run.device": "cpu",
    "run.threads": 1,
    "run.log_every": 1,
    "run.checkpoint_every": 2,
    "run.validation_sequences": 4,
    "observed": 3,
    "batch_size": 2,
}

SCHEDULED = {
    "optimiser.learning_rate": 5e-3,
    "optimiser.warmup_steps": 3,
    "optimiser.schedule": "cosine",
    "optimiser.clip_norm": 1.0,
    "feeding.kind": "scheduled",
    "feeding.fall_from": 2,
    "feeding.fall_to": 20,
    "run.validate_every": 10,
    "steps": 24,
}
"""Everything that changes over a run does, so that a resumption has everything to get wrong."""


def arguments(folder, options=None):
    """The command line of a tiny run in a folder."""
    options = TINY | {"run.folder": folder} | (options or {})
    return [f"--{k}={'null' if v is None else v}" for k, v in options.items()]


def config(folder=None, options=None):
    """What the command line makes of `arguments`, without the tenth of a second that parsing takes."""
    parts = {"model": {}, "data": {}, "optimiser": {}, "feeding": {}, "run": {"folder": folder}}
    top = {}
    for name, value in (TINY | (options or {})).items():
        part, _, field = name.rpartition(".")
        (parts[part] if part else top)[field] = tuple(value) if isinstance(value, list) else value
    hints = get_type_hints(TrainConfig) | {"model": CrevNetConfig, "data": MovingMNISTConfig}
    return TrainConfig(**{part: hints[part](**values) for part, values in parts.items()}, **top)


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def state(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), f"{name}: off by {float((x - expected[name]).abs().max()):.3g}"


def column(folder, name, kind="train"):
    """A column of a log, as it stands in the file."""
    header, *rows = [line.split(",") for line in (folder / f"{kind}.csv").read_text().splitlines()]
    return [row[header.index(name)] for row in rows]


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")}
    return inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def start(*arguments, group=False):
    """Start `python -m ...` as a user would; with `group` in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


@pytest.fixture(scope="session")
def tiny():
    """Tiny runs: their command lines and configurations, what they leave, and real processes."""
    return SimpleNamespace(
        arguments=arguments,
        config=config,
        weights=weights,
        state=state,
        column=column,
        assert_equal=assert_equal,
        start=start,
        options=TINY,
        scheduled=SCHEDULED,
    )


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run in one go, in which everything changes that may change over a run; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    try:
        assert main(arguments(folder, SCHEDULED)) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture
def train_tiny(tmp_path, single_thread, monkeypatch):
    """Train in this process, in a new folder (or the one given); returns the folder."""
    count = iter(range(1000))

    def run(options=None, folder=None, pictures=False):
        folder = folder or tmp_path / f"run-{next(count)}"
        with monkeypatch.context() as patch:
            if not pictures:  # they take as long as ten steps
                patch.setattr(Trainer, "_draw", lambda *args: None)
            train(config(folder, options))
        return folder

    return run


@pytest.fixture
def trainer(tiny, tmp_path):
    """A trainer before its first step, in this process."""

    def make(options=None, folder=None):
        config = tiny.config(folder or tmp_path / "run", options)
        return Trainer(config, launch(config), config.run.folder)

    return make
