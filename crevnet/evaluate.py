"""`python -m crevnet.evaluate`: MSE, SSIM and PSNR of a trained model on the test set, per predicted frame and
averaged.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import crevnet.extra  # noqa: F401  first

# isort: split
import torch
from torch import Tensor
from tqdm import tqdm

from crevnet.command import as_plain, run_command
from crevnet.data import DataConfig, SequenceSet
from crevnet.files import check_writable, written_whole
from crevnet.metrics import METRICS, VideoMetrics, copy_last_frame
from crevnet.run import load_run, select_device
from crevnet.video_model import VideoModel


def evaluate(
    run: Path,
    *,
    checkpoint: str = "best",
    root: Path | None = None,
    num_digits: int | None = None,
    test: Path | None = None,
    frames: int | None = None,
    test_sequences: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    output: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a trained model on the fixed test set and print the metrics as JSON.

    MSE is the squared error summed over the frame, as in the paper's tables 1 and 2, `mse_per_value` its mean over the
    values of the frame, as in table 3; SSIM and PSNR are for values in 0 .. 1 (data range 1).

    Args:
        run: Folder of a training run.
        checkpoint: `best` (by validation), `last`, or the number of a step.
        root: Folder of the MNIST files, if other than in training.
        num_digits: Digits per sequence, if other than in training.
        test: Folder of the test videos, for a model trained on videos, if other than in training.
        frames: Frames per sequence, those given and those to predict together, if other than in training; what is held
            out of the training data stays the same.
        test_sequences: Sequences of the fixed test set, if other than in training.
        batch_size: Sequences at a time.
        device: `auto`, `cpu` or `cuda`.
        output: JSON file to write as well.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if output is not None:
        check_writable(output)
    where = select_device(device)
    loaded = load_run(run, checkpoint, where)
    config = loaded.config
    if frames is not None and frames <= config.observed:
        raise ValueError(f"--frames must be above the {config.observed} frames that the model is given, got {frames}")
    options = {"root": root, "num_digits": num_digits, "test": test, "test_sequences": test_sequences}
    data = _changed(config.data, options)
    dataset = data.build_test(frames)
    result = score(loaded.model, dataset, config.observed, batch_size=batch_size, device=where, progress=True)
    result |= {"run": str(run), "step": loaded.step, "checkpoint": checkpoint, "data_range": 1.0}
    result |= {"data": data.source(), "tested_on": data.test_source(), "observed": config.observed}
    result["options"] = {k: as_plain(v) for k, v in (options | {"frames": frames}).items() if v is not None}
    text = json.dumps(result, indent=2)
    print(text, flush=True)  # before anything else can fail
    if output is not None:
        with written_whole(output) as part:
            part.write_text(text + "\n")
    return result


def _changed(data: DataConfig, options: dict[str, Any]) -> DataConfig:
    """With those options that are not None."""
    given = {k: v for k, v in options.items() if v is not None}
    unknown = given.keys() - {f.name for f in fields(data)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} does not apply to the data of this run, {data.name}")
    return replace(data, **given)


@torch.no_grad()
def score(
    model: VideoModel,
    dataset: SequenceSet,
    observed: int,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    baseline: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Metrics of a model on a whole data set, and of the copy-last-frame baseline beside it.

    Args:
        model: The model; put into eval mode meanwhile.
        dataset: Sequences; the frames after `observed` are predicted.
        observed: Frames given.
        batch_size: Sequences at a time.
        device: Where to compute.
        rank: This process; it takes every `world_size`-th batch.
        world_size: Number of processes.
        all_reduce: Sums a tensor over the processes.
        baseline: Whether to measure that baseline, too; without it the result has no `copy_last_frame`.
        progress: Whether to show a progress bar.
    """
    training = model.training
    model.eval()
    steps = dataset.frames - observed
    ours, copied = VideoMetrics(steps, device), VideoMetrics(steps, device)
    starts = range(rank * batch_size, len(dataset), batch_size * world_size)
    for start in tqdm(starts, desc="evaluate", disable=not progress or rank > 0, leave=False, file=sys.stderr):
        frames = dataset.batch(range(start, min(start + batch_size, len(dataset)))).to(device)
        given, target = frames[:, :observed], frames[:, observed:]
        ours.update(model.predict(given, steps), target)
        if baseline:
            copied.update(copy_last_frame(given, steps), target)
    model.train(training)
    for metrics in (ours, copied) if baseline else (ours,):
        if all_reduce is not None:
            metrics.reduce(all_reduce)
    result = ours.compute()
    if baseline:
        means = copied.compute()
        result["copy_last_frame"] = {name: means[name] for name in METRICS}
    return result


if __name__ == "__main__":
    run_command(evaluate)
