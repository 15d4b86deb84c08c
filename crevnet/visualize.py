"""Pictures of predictions and of training: PNG grids, animated GIFs and loss curves.

Shape legend: B sequences, T frames, C channels (1 or 3), H rows, W columns of pixels. Frames are images in
[0, 1]; values outside are clamped.

The same inputs give the same bytes with the same versions of Pillow and Matplotlib. A file is written under a
temporary name and renamed, so no viewer meets half a picture, and its folder is created where it is missing.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from einops import repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crevnet.files import written_whole

DRAWN_CHANNELS = (1, 3)
"""Numbers of channels that can be drawn: grey and RGB."""

_Pixels = npt.NDArray[np.uint8]  # [H, W, 3]

_GRID_FRAME, _GIF_FRAME = 64, 128  # pixels; smaller frames are enlarged by a whole factor
_MARGIN, _LABEL_COLUMN, _LABEL_ROW = 12, 64, 18  # pixels
_GAP, _PAIR_GAP, _PHASE_GAP = 2, 12, 14  # pixels: between frames, sequences, and observed and predicted
_BORDER = 3  # pixels, around the frames of an animation
_LAST_FRAME_HOLD = 3  # how many times longer the last frame of an animation stays
_DIMMED = 0.35  # opacity of observed frames in the row of predictions
_FEW_COLOURS = 2048
_MARKED_POINTS = 50  # a loss curve with more is a plain line
_BACKGROUND, _TEXT, _FAINT = (250, 250, 252), (60, 60, 70), (150, 150, 160)
_OBSERVED, _PREDICTED = (37, 99, 205), (217, 95, 2)  # blue and orange: apart for colour-blind viewers too


def prediction_grid(
    observed: Tensor, target: Tensor, prediction: Tensor, *, path: str | os.PathLike[str], rows: int = 4
) -> Path:
    """Draw sequences as a PNG: for each, the true frames above and the predicted ones below.

    Time runs to the right, with the number of every frame on top. An orange line parts the observed frames
    from the predicted ones; left of it the lower row repeats the observed frames, faded.

    Args:
        observed: frames [B, T0, C, H, W] that the model saw.
        target: true frames [B, T1, C, H, W] that follow.
        prediction: predicted frames [B, T1, C, H, W].
        path: the file to write.
        rows: how many sequences to draw at most, the first ones.

    Returns:
        `path`.

    Raises:
        ValueError: for shapes that do not fit together, channels other than 1 or 3, integers, NaN, no rows.
    """
    truth, model, split = _to_pixels(observed, target, prediction, rows, _GRID_FRAME)
    _, frames, height, width, _ = truth.shape
    first = _MARGIN + _LABEL_COLUMN
    lefts = [first + i * (width + _GAP) + (_PHASE_GAP - _GAP) * (i >= split) for i in range(frames)]
    tops = [_MARGIN + 2 * _LABEL_ROW + i * (2 * height + _GAP + _PAIR_GAP) for i in range(len(truth))]
    canvas = _canvas(lefts[-1] + width + _MARGIN, tops[-1] + 2 * height + _GAP + _MARGIN)
    for row, top in enumerate(tops):
        for frame, left in enumerate(lefts):
            shown = model[row, frame] if frame >= split else _faded(model[row, frame])
            _paste(canvas, truth[row, frame], left, top)
            _paste(canvas, shown, left, top + height + _GAP)
    image = Image.fromarray(canvas)
    _label_grid(image, lefts, tops, (width, height), split)
    return _write_image(Path(path), image)


def prediction_gif(
    observed: Tensor,
    target: Tensor,
    prediction: Tensor,
    *,
    path: str | os.PathLike[str],
    rows: int = 4,
    fps: float = 6,
) -> Path:
    """Play sequences side by side in an endless GIF: the truth above, the prediction below.

    While the observed frames play, both halves show them, the lower one in a blue border; then the lower half
    shows the predictions, in an orange border. The last frame stays three times as long.

    Args:
        observed: frames [B, T0, C, H, W] that the model saw.
        target: true frames [B, T1, C, H, W] that follow.
        prediction: predicted frames [B, T1, C, H, W].
        path: the file to write.
        rows: how many sequences to show at most, the first ones.
        fps: frames per second, at most 50; a GIF rounds the time of a frame to 10 ms.

    Returns:
        `path`.

    Raises:
        ValueError: as `prediction_grid`, and for `fps` outside (0, 50].
    """
    if not 0 < fps <= 50:
        raise ValueError(f"fps must be in (0, 50], not {fps}")
    truth, model, split = _to_pixels(observed, target, prediction, rows, _GIF_FRAME)
    total = truth.shape[1]
    images = [
        _animation_frame(truth[:, i], model[:, i], f"{i + 1} / {total}", predicting=i >= split) for i in range(total)
    ]
    duration = 10 * round(100 / fps)
    durations = [duration] * (len(images) - 1) + [duration * _LAST_FRAME_HOLD]
    return _write_gif(Path(path), images, durations)


def loss_curve(steps: Sequence[int], losses: Sequence[float], *, path: str | os.PathLike[str]) -> Path:
    """Draw the loss over the training steps as a PNG, with a logarithmic axis for the loss.

    Losses that are not finite and positive have no place on that axis and leave a gap.

    Args:
        steps: the training step of each loss.
        losses: the losses.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        ValueError: if there are not as many steps as losses, or no loss can be drawn.
    """
    x, y = _drawable(steps, losses)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The object interface leaves pyplot's figures and back end, which belong to the caller, alone.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    # A line alone would not show a single loss, nor one between two gaps.
    axes.plot(x, y, marker="o" if x.size <= _MARKED_POINTS else None, markersize=4, color="#2563cd", linewidth=1.2)
    axes.set(xlabel="training step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(_short_minor_labels(axes.get_ylim()))
    axes.grid(True, which="major", color="#dcdce4", linewidth=0.8)
    axes.grid(True, which="minor", color="#eeeef2", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return _write(Path(path), buffer.getvalue())


def _short_minor_labels(limits: tuple[float, float]) -> str:
    """Return the format of labels between powers of ten: none where the powers themselves give the scale."""
    return "{x:g}" if limits[1] < 10 * limits[0] else ""


def _to_pixels(
    observed: Tensor, target: Tensor, prediction: Tensor, rows: int, size: int
) -> tuple[_Pixels, _Pixels, int]:
    """Return what truly happened and what the model saw and foretold, and how many frames it saw.

    Both are bytes [B, T, H, W, 3] of the first `rows` sequences, enlarged to at least `size` pixels.
    """
    _check(observed, target, prediction, rows)
    seen, truth, foretold = (_enlarged(frames[:rows], size) for frames in (observed, target, prediction))
    return np.concatenate([seen, truth], 1), np.concatenate([seen, foretold], 1), seen.shape[1]


def _check(observed: Tensor, target: Tensor, prediction: Tensor, rows: int) -> None:
    named = {"observed": observed, "target": target, "prediction": prediction}
    shapes = ", ".join(f"{name} {tuple(frames.shape)}" for name, frames in named.items())
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if any(frames.ndim != 5 or frames.numel() == 0 for frames in named.values()):
        raise ValueError(f"frames must be [B, T, C, H, W] and not empty: {shapes}")
    if target.shape != prediction.shape or _but_time(observed) != _but_time(target):
        raise ValueError(f"shapes do not fit together: {shapes}")
    if observed.shape[2] not in DRAWN_CHANNELS:
        raise ValueError(f"frames must have 1 or 3 channels: {shapes}")
    for name, frames in named.items():
        if not frames.is_floating_point():
            raise ValueError(f"{name} is {frames.dtype}, frames must be floating point in [0, 1]")
        if frames[:rows].isnan().any():
            raise ValueError(f"{name} holds NaN")


def _but_time(frames: Tensor) -> tuple[int, ...]:
    return (frames.shape[0], *frames.shape[2:])


def _enlarged(frames: Tensor, size: int) -> _Pixels:
    pixels = (frames.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = frames.shape[-2:]
    factor = -(-size // min(height, width))
    pixels = pixels.expand(-1, -1, 3, -1, -1)
    return repeat(pixels, "b t c h w -> b t (h down) (w right) c", down=factor, right=factor).cpu().numpy()


def _faded(pixels: _Pixels) -> _Pixels:
    mixed = _DIMMED * pixels + (1 - _DIMMED) * np.array(_BACKGROUND)
    return mixed.round().astype(np.uint8)


def _canvas(width: int, height: int) -> _Pixels:
    return np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)


def _paste(canvas: _Pixels, pixels: _Pixels, left: int, top: int) -> None:
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], anchor: str) -> None:
    draw.text(at, text, fill=colour, font=ImageFont.load_default(12), anchor=anchor)


def _label_grid(image: Image.Image, lefts: list[int], tops: list[int], frame: tuple[int, int], split: int) -> None:
    """Write the frames' numbers, the rows' names and the line where prediction begins."""
    draw = ImageDraw.Draw(image)
    width, height = frame
    for index, left in enumerate(lefts):
        colour = _PREDICTED if index >= split else _OBSERVED
        _text(draw, (left + width // 2, tops[0] - 5), str(index + 1), colour, anchor="ms")
    _text(draw, (lefts[0], tops[0] - 5 - _LABEL_ROW), "observed", _OBSERVED, anchor="ls")
    _text(draw, (lefts[split], tops[0] - 5 - _LABEL_ROW), "predicted", _PREDICTED, anchor="ls")
    for top in tops:
        _row_labels(draw, top, height)
    line = lefts[split] - _PHASE_GAP // 2
    draw.line([(line, _MARGIN), (line, tops[-1] + 2 * height + _GAP)], fill=_PREDICTED, width=2)


def _row_labels(draw: ImageDraw.ImageDraw, top: int, height: int) -> None:
    for row, label in enumerate(("truth", "prediction")):
        middle = top + height // 2 + row * (height + _GAP)
        _text(draw, (_MARGIN + _LABEL_COLUMN - 6, middle), label, _TEXT, anchor="rm")


def _animation_frame(truth: _Pixels, model: _Pixels, number: str, *, predicting: bool) -> Image.Image:
    """Draw one moment of all sequences, [B, H, W, 3] each, the truth above and the model below."""
    sequences, height, width, _ = truth.shape
    across, down = width + 2 * _BORDER + _GAP, height + 2 * _BORDER + _GAP
    left, top = _MARGIN + _LABEL_COLUMN, _MARGIN + _LABEL_ROW
    colour = _PREDICTED if predicting else _OBSERVED
    canvas = _canvas(left + sequences * across - _GAP + _MARGIN, top + 2 * down - _GAP + _MARGIN)
    for column in range(sequences):
        x = left + column * across
        _paste(canvas, _framed(truth[column], _FAINT), x, top)
        _paste(canvas, _framed(model[column], colour), x, top + down)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    caption = "predicted" if predicting else "observed"
    _text(draw, (left, top - 6), f"{number}   {caption}", colour, anchor="ls")
    _row_labels(draw, top, height + 2 * _BORDER)
    return image


def _framed(pixels: _Pixels, colour: tuple[int, int, int]) -> _Pixels:
    height, width, _ = pixels.shape
    framed = np.full((height + 2 * _BORDER, width + 2 * _BORDER, 3), colour, dtype=np.uint8)
    _paste(framed, pixels, _BORDER, _BORDER)
    return framed


def _write_image(path: Path, image: Image.Image) -> Path:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _write(path, buffer.getvalue())


def _write_gif(path: Path, images: list[Image.Image], durations: list[int]) -> Path:
    buffer = io.BytesIO()
    paletted = [_paletted(image) for image in images]
    paletted[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=paletted[1:],
        duration=durations,
        loop=0,
        disposal=1,
        optimize=False,
    )
    return _write(path, buffer.getvalue())


def _paletted(image: Image.Image) -> Image.Image:
    """Choose the 256 colours of one moment of an animation."""
    # Maximum coverage is nearly exact for grey frames, but takes seconds where there are many colours.
    few = image.getcolors(_FEW_COLOURS) is not None
    method = Image.Quantize.MAXCOVERAGE if few else Image.Quantize.MEDIANCUT
    # No dithering: its noise would differ from frame to frame, and flicker.
    return image.quantize(256, method, dither=Image.Dither.NONE)


def _drawable(steps: Sequence[int], losses: Sequence[float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"steps {x.shape} and losses {y.shape} must be lists of the same length")
    fits = np.isfinite(y) & (y > 0)
    if not fits.any():
        raise ValueError(f"none of {y.size} losses is finite and positive")
    return x, np.where(fits, y, np.nan)


def _write(path: Path, data: bytes) -> Path:
    with written_whole(path) as part:
        part.write_bytes(data)
    return path
