"""`python -m crevnet.predict`: a trained model and a sequence of frames in, the frames that follow out."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import crevnet.extra  # noqa: F401  first
from crevnet.command import run_command
from crevnet.data import DataConfig, DataError, SequenceSet, load_video, to_tensor
from crevnet.files import check_writable, write_arrays
from crevnet.run import load_run, select_device
from crevnet.visualize import prediction_gif, prediction_grid


def predict(
    run: Path,
    output: Path,
    *,
    sequence: Path | None = None,
    every: int | None = None,
    index: int | None = None,
    count: int = 1,
    observed: int | None = None,
    steps: int | None = None,
    checkpoint: str = "best",
    device: str = "auto",
) -> None:
    """Predict the frames that follow the first ones of a sequence, or of several.

    Args:
        run: Folder of a training run.
        output: File to write: `.gif` (ground truth above prediction), `.png` (the same as a grid) or `.npz` (arrays
            `observed`, `prediction` and, where the sequence goes on, `target`; values in 0 .. 1; of one sequence
            `[T, C, H, W]`, of several `[count, T, C, H, W]`).
        sequence: `.npy` or `.npz` with frames `[T, H, W]` (W not 3 or 4), `[T, C, H, W]` or `[T, H, W, C]` (uint8, or
            floats in 0 .. 1), a `.gif`, a film, or a folder of images in the order of their names, numbers in them by
            value; cropped about the centre and resized to the size that the model was trained with. By default a
            sequence of the run's test set.
        every: Keep one of so many frames of `sequence`; by default as of the run's test videos, so that the model sees
            the frame rate that it was trained for.
        index: Which sequence of the test set; by default the first.
        count: How many sequences of the test set, from `index` on, are shown together.
        observed: Frames to give to the model; by default as in training, the rest is compared with.
        steps: Frames to predict; by default as in training. Sequences of the test set are made, or cut from videos, as
            long as that takes; where videos end before, so does the ground truth.
        checkpoint: `best` (by validation), `last`, or the number of a step.
        device: `auto`, `cpu` or `cuda`.
    """
    if output.suffix not in (".gif", ".png", ".npz"):
        raise ValueError(f"{output}: the output must be a .gif, .png or .npz file")
    if sequence is not None and (index is not None or count != 1):
        raise ValueError("index and count are for sequences of the run's test set: leave them out with --sequence")
    if sequence is None and every is not None:
        raise ValueError("every is for the frames of a sequence of your own: give --sequence too")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    check_writable(output)
    where = select_device(device)
    loaded = load_run(run, checkpoint, where)
    config = loaded.config
    observed = config.observed if observed is None else observed
    steps = config.predicted if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if observed < config.model.clip:
        raise ValueError(f"observed must be at least the model's clip ({config.model.clip}), got {observed}")
    if sequence is None:
        test = _test_set(config.data, observed + steps)
        first = index or 0
        if not 0 <= first < len(test):
            raise ValueError(f"index must be 0 to {len(test) - 1}, got {first}")
        if first + count > len(test):
            raise ValueError(f"count must be at most {len(test) - first} from index {first} on, got {count}")
        frames = test.batch(range(first, first + count))
    else:
        every = config.data.thinning() if every is None else every
        size = config.model.frame_size
        frames = to_tensor(load_video(sequence, config.model.channels, size, every, limit=observed + steps))[None]
    if observed > frames.shape[1]:
        kept = f", one of {every} kept" if every is not None and every > 1 else ""
        raise ValueError(f"observed must be at most the {frames.shape[1]} frames of the sequence{kept}, got {observed}")
    given, target = frames[:, :observed], frames[:, observed : observed + steps]
    prediction = loaded.model.predict(given.to(where), steps).cpu().clamp(0, 1)
    if output.suffix == ".npz":
        arrays = {"observed": given, "prediction": prediction} | ({"target": target} if target.shape[1] else {})
        write_arrays(output, {k: np.asarray(v if count > 1 else v[0]) for k, v in arrays.items()})
    else:
        draw = prediction_gif if output.suffix == ".gif" else prediction_grid
        draw(given, _padded(target, steps), prediction, path=output, rows=count)
    print(f"{steps} frames predicted from {observed}: {output}")


def _test_set(data: DataConfig, frames: int) -> SequenceSet:
    """The test set, of longer sequences than in training if so many frames are asked for and there are."""
    if frames > data.frames:
        with suppress(DataError):  # videos may end before
            return data.build_test(frames)
    return data.build_test()


def _padded(target: Tensor, steps: int) -> Tensor:
    """The ground truth, black where the sequence has ended."""
    missing = steps - target.shape[1]
    return torch.cat([target, target.new_zeros(len(target), missing, *target.shape[2:])], dim=1) if missing else target


if __name__ == "__main__":
    run_command(predict)
