"""Predictors in packages of their own: loading and calling what `python -m crevnet.export` writes.

A package is a program, and loading it may run code that it holds, like importing a Python module: load only those
whose origin you trust.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from crevnet.frame_size import FrameSize, height_width

DESCRIPTION = "predictor.json"
"""Where a package holds its `Signature`."""

Frames = TypeVar("Frames", Tensor, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a packaged predictor takes and returns: `[B, observed, C, H, W]` to `[B, steps, C, H, W]`, for any B."""

    model: str
    """Name of the model, as in `crevnet.models.MODELS`."""
    observed: int
    """Frames given."""
    steps: int
    """Frames predicted."""
    channels: int
    """Channels of a frame."""
    image_size: FrameSize
    """Height and width of a frame in pixels; one number where they are equal."""
    compiled_for: str | None = None
    """The kind of device that the package was compiled for; None for one that runs on any."""

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # as JSON has it
            object.__setattr__(self, "image_size", tuple(self.image_size))


class PackagedPredictor:
    """A trained model without its source: observed frames in, the frames that follow out.

    Attributes:
        signature: What goes in and comes out.
        device: Where it computes.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], signature: Signature, device: torch.device) -> None:
        self._run = run
        self.signature = signature
        self.device = device

    @torch.no_grad()
    def __call__(self, frames: Frames) -> Frames:
        """Predict the frames that follow.

        Args:
            frames: `[B, observed, C, H, W]`, floats in 0 .. 1, at least one sequence: a tensor on any device, or an
                array.

        Returns:
            `[B, steps, C, H, W]`, float32, not clamped to 0 .. 1: a tensor on the predictor's device, or an array.

        Raises:
            ValueError: Frames of another shape, or that are not floats.
        """
        given = torch.from_numpy(np.array(frames, order="C")) if isinstance(frames, np.ndarray) else frames
        height, width = height_width(self.signature.image_size)
        expected = (self.signature.observed, self.signature.channels, height, width)
        if given.ndim != 5 or given.shape[1:] != expected or not len(given):
            raise ValueError(
                f"this predictor takes frames [batch, time, channels, height, width] of shape "
                f"[B, {', '.join(map(str, expected))}] with B at least 1, got {list(given.shape)}"
            )
        if not given.is_floating_point():
            raise ValueError(f"frames must be floats in 0 .. 1, got {given.dtype}; divide bytes by 255")
        # Compiled code takes the memory layout for granted.
        predicted = self._run(given.to(self.device, torch.float32).contiguous())
        return predicted.cpu().numpy() if isinstance(frames, np.ndarray) else predicted


def load_predictor(path: Path | str, device: torch.device | str = "cpu") -> PackagedPredictor:
    """Load a predictor; what it was made from is not needed.

    Args:
        path: What `python -m crevnet.export` has written.
        device: Where to compute; a compiled predictor computes on the kind of device that it was compiled for.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, holds no predictor, or one for another device or version of PyTorch.
    """
    path, device = Path(path), torch.device(device)
    names = _checked_names(path)
    compiled = any("/data/aotinductor/" in name for name in names)
    try:
        run, description = (_load_compiled if compiled else _load_exported)(path, device)
        if not description:
            raise ValueError(f"it has no {DESCRIPTION}, which python -m crevnet.export writes")
        signature = Signature(**json.loads(description))
    except Exception as error:  # PyTorch's loaders raise almost anything
        raise ValueError(f"{path} holds no predictor that PyTorch {torch.__version__} can load: {error}") from error
    if compiled and signature.compiled_for != device.type:
        raise ValueError(
            f"{path} was compiled for {signature.compiled_for} and cannot run on {device}: export it once more with "
            f"--device {device.type}, or without --aot for all devices"
        )
    return PackagedPredictor(run, signature, device)


def _checked_names(path: Path) -> list[str]:
    """The files in a package, all of which are as they were written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except Exception as error:  # damage makes the decoder raise almost anything
        raise ValueError(f"{path} is damaged, or no package: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it is not what was written")
    return names


def _load_exported(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    files = {DESCRIPTION: ""}
    program = torch.export.load(path, extra_files=files)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module(), files[DESCRIPTION]


def _load_compiled(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    run = torch._inductor.aoti_load_package(str(path), device_index=-1 if device.index is None else device.index)
    return run, run.get_metadata().get(DESCRIPTION, "")
