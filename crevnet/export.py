"""`python -m crevnet.export`: a trained model as a package that predicts with PyTorch alone."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

import crevnet.extra  # noqa: F401  first
from crevnet.baselines.vpn import VPNConfig
from crevnet.command import run_command
from crevnet.files import check_writable, written_whole
from crevnet.model import CrevNetConfig
from crevnet.packaged import DESCRIPTION, Signature
from crevnet.run import load_run, select_device
from crevnet.video_model import VideoModel


def export(
    run: Path,
    *,
    output: Path = Path("predictor.pt2"),
    observed: int | None = None,
    steps: int | None = None,
    checkpoint: str = "best",
    aot: bool = False,
    device: str = "auto",
) -> None:
    """Write a trained model as a package that `crevnet.packaged.load_predictor` loads.

    Args:
        run: Folder of a training run.
        output: The `.pt2` file to write.
        observed: Frames that the predictor is given; by default as in training.
        steps: Frames that it predicts; by default as in training.
        checkpoint: `best` (by validation), `last`, or the number of a step.
        aot: Whether to compile it ahead of time, which needs a C++ compiler and takes minutes for a large model.
        device: `auto`, `cpu` or `cuda`: what to compile it for. Without `aot` the package runs on any.
    """
    if output.suffix != ".pt2":
        raise ValueError(f"{output}: the output must be a .pt2 file")
    check_writable(output)
    where = select_device(device)  # checked where it has no use, too
    compile_for = where if aot else None
    loaded = load_run(run, checkpoint, torch.device("cpu"))
    observed = loaded.config.observed if observed is None else observed
    steps = loaded.config.predicted if steps is None else steps
    save_predictor(loaded.model, output, observed, steps, compile_for)
    print(f"{steps} frames predicted from {observed}: {output}")


def save_predictor(
    model: VideoModel, path: Path, observed: int, steps: int, compile_for: torch.device | None = None
) -> None:
    """Export a model and write it as a package, whole or not at all.

    Args:
        model: The model.
        path: A `.pt2` file.
        observed: As in `export_predictor`.
        steps: As in `export_predictor`.
        compile_for: Device to compile it for ahead of time. None leaves that out.

    Raises:
        ValueError: As `export_predictor`; or it cannot be compiled.
    """
    program = export_predictor(model, observed, steps)
    config = model.config
    signature = Signature(
        model=config.name,
        observed=observed,
        steps=steps,
        channels=config.channels,
        image_size=config.image_size,
        compiled_for=compile_for.type if compile_for is not None else None,
    )
    description = json.dumps(asdict(signature))
    with written_whole(path) as part:
        if compile_for is None:
            torch.export.save(program, part, extra_files={DESCRIPTION: description})
        else:
            _compile(move_to_device_pass(program, compile_for), part, description)


def export_predictor(model: VideoModel, observed: int, steps: int) -> ExportedProgram:
    """The prediction of frames as a graph of PyTorch's own operators, all time steps written out.

    It computes what `model.predict` computes in eval mode; of a CrevNet in float arithmetic, since nothing is undone in
    a prediction, and exact arithmetic would need operators that PyTorch does not have.

    Args:
        model: The model; left as it is.
        observed: Frames given.
        steps: Frames predicted.

    Returns:
        A program on the CPU from `[B, observed, C, H, W]` to `[B, steps, C, H, W]`, float32, for any B.

    Raises:
        ValueError: Fewer frames given than one clip, none to predict, or a model that generates pixel by pixel.
    """
    config = model.config
    if observed < config.clip or steps < 1:
        raise ValueError(
            f"observed must be at least the model's clip ({config.clip}) and steps at least 1, got {observed} and "
            f"{steps}"
        )
    if isinstance(config, VPNConfig):
        raise ValueError("vpn generates pixel by pixel, for which its graph would hold a copy of it per pixel")
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    if isinstance(config, CrevNetConfig):
        model.config = replace(config, arithmetic="float", cell_states="kept")
    # Two sequences, because one would be taken for a fixed number.
    frames = torch.zeros(2, observed, config.channels, *config.frame_size)
    with torch.no_grad():
        program = torch.export.export(_Prediction(model, steps), (frames,), dynamic_shapes=({0: Dim("batch")},))
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _compile(program: ExportedProgram, path: Path, description: str) -> None:
    options = {"aot_inductor.metadata": {DESCRIPTION: description}}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except RuntimeError as error:
        raise ValueError(
            f"the model cannot be compiled ahead of time here, leave out --aot: {type(error).__name__}: {error}"
        ) from error


class _Prediction(nn.Module):
    """`model.predict` as a forward pass."""

    def __init__(self, model: VideoModel, steps: int) -> None:
        super().__init__()
        self.model = model
        self.steps = steps

    def forward(self, frames: Tensor) -> Tensor:
        return self.model.predict(frames, self.steps)


if __name__ == "__main__":
    run_command(export)
