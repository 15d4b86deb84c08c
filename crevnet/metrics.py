"""Frame metrics of video predictions, and their exact accumulation over batches and processes.

Shape legend: B sequences, T frames, C channels, H rows, W columns of pixels.

Every metric treats frames as images in [0, 1]. A prediction is clamped to [0, 1] before it is measured, as it
would be to be shown; a target is not, and one outside that range is refused, because it was scaled wrongly.

Arithmetic is in float64 whatever the inputs are: SSIM subtracts nearly equal moments, and a float32
convolution may run as TF32 or, under autocast, as bfloat16. No gradient flows through these functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

MAX_PSNR_DB = 100.0
"""PSNR of a perfect frame, and the cap of every other (decibels): an infinity would drown an average."""

SSIM_WINDOW = 11
"""Side of the Gaussian SSIM window (pixels), with a standard deviation of 1.5 pixels."""

METRICS = ("mse", "mse_per_value", "ssim", "psnr")
"""What `VideoMetrics` gives the means of; `mse` is summed over the values of a frame, `mse_per_value` their mean."""

_FRAMES_PER_CHUNK = 64
"""Bounds the five float64 copies of every frame that SSIM makes."""
_CPU_VALUES_PER_CHUNK = 4096
"""There a convolution in float64 lays out its input once for every pixel of the window. Blocks of more than 32 MiB are
made anew by the system each time, all in zeros, which takes longer than the convolution."""
_RANGE_SLACK = 1e-4  # what resizing may overshoot


def mse_per_frame(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over the channels and pixels of each frame, as the CrevNet paper reports "MSE".

    It is a sum, not a mean: it grows with the frame size, and has the unit intensity² × pixels. The paper's
    table 3 alone has the mean over channels and pixels.

    Args:
        prediction: frames [B, T, C, H, W], clamped to [0, 1] here.
        target: frames [B, T, C, H, W] in [0, 1].

    Returns:
        float64 [B, T].

    Raises:
        ValueError: for shapes that differ or are not 5-D, for empty, integer, NaN or infinite inputs, and for
            a target outside [0, 1].
    """
    return _squared_error(*_checked(prediction, target))


def psnr_per_frame(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in decibels, for a peak of 1.0.

    It is -10 log10 of the squared error averaged over the frame's channels and pixels, capped at
    `MAX_PSNR_DB`.

    Args:
        prediction: frames [B, T, C, H, W], clamped to [0, 1] here.
        target: frames [B, T, C, H, W] in [0, 1].

    Returns:
        float64 [B, T].

    Raises:
        ValueError: as `mse_per_frame`.
    """
    prediction, target = _checked(prediction, target)
    return _psnr(_squared_error(prediction, target), pixels=target[0, 0].numel())


def ssim_per_frame(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each frame, at most 1, for a data range of 1.0.

    The window is a Gaussian of 11 × 11 pixels and σ = 1.5, the frame is mirrored at its border, and the
    similarity is averaged over all pixels and channels. Other programs differ in all three, so compare like
    with like.

    Args:
        prediction: frames [B, T, C, H, W], clamped to [0, 1] here.
        target: frames [B, T, C, H, W] in [0, 1].

    Returns:
        float64 [B, T].

    Raises:
        ValueError: as `mse_per_frame`, and for frames smaller than the window.
    """
    return _ssim(*_checked(prediction, target))


def copy_last_frame(observed: Tensor, steps: int) -> Tensor:
    """Predict that nothing moves: the baseline that any model has to beat.

    Args:
        observed: frames [B, T, C, H, W].
        steps: how many frames to predict.

    Returns:
        The last observed frame repeated, [B, steps, C, H, W], in memory of its own.

    Raises:
        ValueError: if `observed` is not 5-D or has no frame, or `steps` is not positive.
    """
    if observed.ndim != 5 or observed.shape[1] == 0:
        raise ValueError(f"observed must be [B, T, C, H, W] with T >= 1, not {tuple(observed.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return observed[:, -1:].repeat(1, steps, 1, 1, 1)


class VideoMetrics:
    """Means of MSE, SSIM and PSNR over all sequences, for each predicted frame and over all of them.

    Only sums and a count are held, in float64, so that the result depends neither on how the sequences were
    cut into batches nor on how they were spread over processes.

    Args:
        frames: T, of every sequence; the same in all processes, also in one that gets no sequence.
        device: where the sums live; in distributed runs a device that the process group can reduce.
    """

    def __init__(self, frames: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(len(METRICS), frames, dtype=torch.float64, device=device)
        self._sequences = 0
        self._reduced = False

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of predicted frames and what they should have been, both [B, T, C, H, W].

        Raises:
            ValueError: as `ssim_per_frame`, and for another T.
            RuntimeError: after `reduce`.
        """
        self._refuse_if_reduced()
        prediction, target = _checked(prediction, target)
        sequences, frames = target.shape[:2]
        if frames != self._sums.shape[1]:
            raise ValueError(f"this batch has {frames} frames to a sequence, not {self._sums.shape[1]}")
        values = target[0, 0].numel()
        mse = _squared_error(prediction, target)
        found = torch.stack([mse, mse / values, _ssim(prediction, target), _psnr(mse, values)])
        self._sums += found.sum(dim=1).to(self._sums.device)
        self._sequences += sequences

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up what all processes have accumulated. Every process must call it, once, with or without data.

        Args:
            all_reduce: takes a float64 tensor on `device` and returns its sum over all processes.

        Raises:
            RuntimeError: if called twice, which would count every sequence again.
        """
        self._refuse_if_reduced()
        self._reduced = True
        total = all_reduce(torch.cat([self._sums.flatten(), self._sums.new_tensor([self._sequences])]))
        self._sums = total[:-1].reshape_as(self._sums)
        self._sequences = round(total[-1].item())

    def compute(self) -> dict[str, Any]:
        """Return the means of everything added so far.

        Returns:
            The names in `METRICS`: floats, means over sequences and frames; ``"per_frame"``: the same names,
            each with a list of T floats, means over sequences; ``"sequences"``: their number.
            The PSNR is a mean of the frames' PSNR, not the PSNR of the mean error.

        Raises:
            RuntimeError: if nothing was added.
        """
        if self._sequences == 0:
            raise RuntimeError("no sequence was added, so there is no mean: call update first")
        per_frame = dict(zip(METRICS, (self._sums / self._sequences).tolist(), strict=True))
        means = {name: sum(values) / len(values) for name, values in per_frame.items()}
        return {**means, "per_frame": per_frame, "sequences": self._sequences}

    def _refuse_if_reduced(self) -> None:
        if self._reduced:
            raise RuntimeError("these metrics were already reduced over all processes: start new ones")


def _checked(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what cannot be measured; return both in float64, detached, the prediction clamped to [0, 1]."""
    shapes = f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}"
    if prediction.shape != target.shape:
        raise ValueError(f"shapes differ: {shapes}")
    if prediction.ndim != 5 or prediction.numel() == 0:
        raise ValueError(f"frames must be [B, T, C, H, W] and not empty: {shapes}")
    for name, frames in (("prediction", prediction), ("target", target)):
        if not frames.is_floating_point():
            raise ValueError(f"{name} is {frames.dtype}, frames must be floating point in [0, 1]")
        if not frames.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
    low, high = (bound.item() for bound in target.aminmax())
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ValueError(f"target spans [{low:g}, {high:g}], frames must be in [0, 1]")
    return prediction.detach().double().clamp(0, 1), target.detach().double()


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum(dim=(2, 3, 4))


def _psnr(squared_error: Tensor, pixels: int) -> Tensor:
    floor = 10 ** (-MAX_PSNR_DB / 10)
    return -10 * (squared_error / pixels).clamp(min=floor).log10()


def _ssim(prediction: Tensor, target: Tensor) -> Tensor:
    batch, frames, _, height, width = target.shape
    if min(height, width) < SSIM_WINDOW:
        window = f"{SSIM_WINDOW} x {SSIM_WINDOW}"
        raise ValueError(f"frames of {height} x {width} pixels are smaller than the {window} SSIM window")
    predicted, wanted = prediction.flatten(0, 1), target.flatten(0, 1)
    size = max(1, _CPU_VALUES_PER_CHUNK // wanted[0].numel()) if wanted.is_cpu else _FRAMES_PER_CHUNK
    chunks = [slice(start, start + size) for start in range(0, len(wanted), size)]
    return torch.cat([_ssim_of_images(predicted[chunk], wanted[chunk]) for chunk in chunks]).reshape(batch, frames)


def _ssim_of_images(prediction: Tensor, target: Tensor) -> Tensor:
    similarity = structural_similarity_index_measure(
        prediction,
        target,
        gaussian_kernel=True,
        sigma=1.5,
        kernel_size=SSIM_WINDOW,
        reduction="none",
        data_range=1.0,
    )
    assert isinstance(similarity, Tensor)
    return similarity.reshape(-1)
