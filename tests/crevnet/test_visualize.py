import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from crevnet import visualize
from crevnet.visualize import loss_curve, prediction_gif, prediction_grid

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
PICTURES = [(prediction_grid, "picture.png"), (prediction_gif, "picture.gif")]


def video(batch=2, frames=3, channels=1, height=16, width=16, value=0.0):
    return torch.full((batch, frames, channels, height, width), value)


def coloured(frames, colours):
    """A black RGB video, some of its frames, by (sequence, frame), filled with a colour."""
    result = video(2, frames, 3)
    for (sequence, frame), colour in colours.items():
        result[sequence, frame] = torch.tensor(colour)[:, None, None] / 255
    return result


def box_of(pixels, colour):
    """Where a colour is, as (left, top, width, height); every pixel in that box must have it."""
    rows, columns = np.nonzero((pixels == colour).all(axis=-1))
    assert rows.size, f"no pixel is {colour}"
    left, top = columns.min(), rows.min()
    width, height = columns.max() - left + 1, rows.max() - top + 1
    assert rows.size == width * height, f"{colour} is scattered"
    return int(left), int(top), int(width), int(height)


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def read_gif(path):
    with Image.open(path) as image:
        frames = [(np.array(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
        return [pixels for pixels, _ in frames], [duration for _, duration in frames]


# --- grid ---


def grid_with(tmp_path, observed=None, target=None, prediction=None):
    parts = [coloured(4, observed or {}), coloured(3, target or {}), coloured(3, prediction or {})]
    return read(prediction_grid(*parts, path=tmp_path / "grid.png"))


def test_grid_frames_are_where_they_belong(tmp_path):
    """Time runs to the right; the prediction is below the truth, the next sequence below both."""
    first = box_of(grid_with(tmp_path, observed={(0, 0): RED, (0, 1): GREEN}), RED)
    assert first[2:] == (64, 64)

    def offset(**frames):
        left, top, width, height = box_of(grid_with(tmp_path, **frames), RED)
        assert (width, height) == (64, 64)
        return left - first[0], top - first[1]

    step, lower = offset(observed={(0, 1): RED})[0], offset(prediction={(0, 0): RED})[1]
    assert 64 < step <= 68
    assert 64 < lower <= 68
    assert offset(observed={(0, 3): RED}) == (3 * step, 0)
    across = offset(target={(0, 0): RED})[0]
    assert across - 4 * step >= 8, "the gap before the predicted frames is plainly wider than the others"
    assert offset(target={(0, 2): RED}) == (across + 2 * step, 0)
    assert offset(prediction={(0, 2): RED}) == (across + 2 * step, lower)
    down = offset(observed={(1, 0): RED})[1]
    assert down > 2 * lower
    assert offset(prediction={(1, 1): RED}) == (across + step, down + lower)


def test_grid_repeats_observed_frames_faded_in_the_lower_row(tmp_path):
    pixels = grid_with(tmp_path, observed={(0, 2): RED})
    left, top, _, _ = box_of(pixels, RED)
    faded = pixels[top + 66 : top + 130, left : left + 64].reshape(-1, 3)
    assert (faded == faded[0]).all()
    red, green, blue = (int(value) for value in faded[0])
    assert red > green > 120
    assert red > blue > 120


def test_grid_draws_a_line_between_observed_and_predicted(tmp_path):
    pixels = grid_with(tmp_path, observed={(0, 3): RED}, target={(0, 0): GREEN})
    before, after = box_of(pixels, RED)[0] + 64, box_of(pixels, GREEN)[0]
    line = [x for x in range(before, after) if (pixels[40:-20, x] == visualize._PREDICTED).all()]
    assert len(line) == 2
    assert before + 2 < line[0] < after - 4


def test_pixels_are_enlarged_without_blur(tmp_path):
    target = video(1, 1, 1, 16, 32)
    target[0, 0, 0, 3, 5] = 1.0
    pixels = read(prediction_grid(target, target * 0, target * 0, path=tmp_path / "a.png"))
    left, top, width, height = box_of(pixels, WHITE)
    assert (width, height) == (4, 4)
    pixels[top : top + 4, left : left + 4] = 0
    frame = pixels[top - 12 : top + 52, left - 20 : left + 108]
    assert frame.shape == (64, 128, 3)
    assert (frame == 0).all()


@pytest.mark.parametrize(("size", "enlarged"), [(1, 64), (40, 80), (64, 64), (65, 65), (100, 100)])
def test_frames_are_enlarged_by_a_whole_factor_to_at_least_64_pixels(tmp_path, size, enlarged):
    white = video(1, 1, 1, size, size, 1.0)
    pixels = read(prediction_grid(white * 0, white, white * 0, path=tmp_path / "a.png"))
    assert box_of(pixels, WHITE)[2:] == (enlarged, enlarged)


def test_rows_limit_the_number_of_sequences(tmp_path):
    def height(batch, rows):
        frames = video(batch, 2)
        return read(prediction_grid(frames, frames, frames, path=tmp_path / "a.png", rows=rows)).shape[0]

    assert height(5, 2) == height(2, 4) == height(2, 2)
    assert height(5, 3) - height(5, 2) == height(2, 4) - height(1, 4) > 128


def test_grey_levels_and_clamping(tmp_path):
    levels = [-5.0, 0.0, 0.25, 0.5, 1.0, math.inf]
    frames = torch.tensor(levels).reshape(1, 6, 1, 1, 1).expand(1, 6, 1, 64, 64)
    pixels = read(prediction_grid(frames[:, :1], frames, frames, path=tmp_path / "a.png"))
    from_the_right = pixels[80, -12 - 32 :: -66][:6]
    assert from_the_right.tolist() == [[level] * 3 for level in (255, 255, 128, 64, 0, 0)]


# --- animation ---


def test_gif_plays_every_frame_and_loops(tmp_path):
    frames = video(1, 4)
    path = prediction_gif(frames, frames[:, :3], frames[:, :3], path=tmp_path / "a.gif", fps=5)
    pictures, durations = read_gif(path)
    assert len(pictures) == 7, "even where nothing moves"
    assert durations == [200] * 6 + [600]
    with Image.open(path) as image:
        assert image.info["loop"] == 0


@pytest.mark.parametrize(("fps", "duration"), [(6, 170), (10, 100), (50, 20), (0.5, 2000)])
def test_gif_durations_follow_fps(tmp_path, fps, duration):
    frames = video(1, 2)
    _, durations = read_gif(prediction_gif(frames, frames, frames, path=tmp_path / "a.gif", fps=fps))
    assert durations[:-1] == [duration] * 3


@pytest.mark.parametrize("fps", [0, -1, 51, math.nan])
def test_impossible_frame_rates_are_refused(tmp_path, fps):
    frames = video(1, 2)
    with pytest.raises(ValueError, match="fps must be in"):
        prediction_gif(frames, frames, frames, path=tmp_path / "a.gif", fps=fps)


def test_gif_shows_truth_above_and_observed_then_predicted_below(tmp_path):
    observed = coloured(2, {(1, 0): RED})
    target, prediction = coloured(2, {(1, 1): RED}), coloured(2, {(1, 1): GREEN})
    pictures, _ = read_gif(prediction_gif(observed, target, prediction, path=tmp_path / "a.gif"))
    truth, model = box_of(pictures[3], RED), box_of(pictures[3], GREEN)
    assert truth[2:] == model[2:] == (128, 128)
    assert truth[0] == model[0]
    assert model[1] > truth[1] + 128

    def at(picture, box):
        return picture[box[1] : box[1] + 128, box[0] : box[0] + 128]

    for box in (truth, model):
        assert (at(pictures[0], box) == RED).all(), "both halves show what the model sees"
        assert (at(pictures[1], box) == 0).all()


def test_the_border_of_the_prediction_changes_when_it_begins(tmp_path):
    bright = video(1, 2, value=1.0)
    pictures, _ = read_gif(prediction_gif(bright, bright, bright, path=tmp_path / "a.gif"))
    whites = np.argwhere((pictures[0] == 255).all(axis=-1))
    left, bottom = whites[:, 1].min(), whites[:, 0].max()
    borders = [tuple(picture[bottom - 60, left - 2]) for picture in pictures]
    assert borders == [visualize._OBSERVED] * 2 + [visualize._PREDICTED] * 2
    above = {tuple(picture[bottom - 60 - 136, left - 2]) for picture in pictures}
    assert above == {visualize._FAINT}


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_colours_are_close_to_the_frames(tmp_path, channels):
    ramp = torch.linspace(0, 1, 32 * 32).reshape(1, 1, 1, 32, 32).repeat(1, 1, channels, 1, 1)
    if channels == 3:
        ramp[:, :, 1] = ramp[:, :, 1].flip(-1)
        ramp[:, :, 2] = ramp[:, :, 2].transpose(-1, -2).clone()
    grid = read(prediction_grid(ramp, ramp, ramp, path=tmp_path / "a.png"))
    pictures, _ = read_gif(prediction_gif(ramp, ramp, ramp, path=tmp_path / "a.gif"))
    exact = (ramp[0, 0].permute(1, 2, 0).expand(-1, -1, 3) * 255).round().numpy()
    left, top = visualize._MARGIN + visualize._LABEL_COLUMN, visualize._MARGIN + visualize._LABEL_ROW
    shown = pictures[0][top + 3 : top + 131 : 4, left + 3 : left + 131 : 4].astype(float)
    assert np.abs(shown - exact).mean() < (1 if channels == 1 else 6)
    top += visualize._LABEL_ROW
    assert (grid[top : top + 64 : 2, left : left + 64 : 2] == exact).all()


# --- both ---


@pytest.mark.parametrize(("draw", "name"), PICTURES)
def test_files_are_made_anew_identically_and_leave_nothing_else(tmp_path, draw, name):
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, 2, 3, 16, 16, generator=generator, requires_grad=True)
    path = tmp_path / "new" / "folder" / name
    assert draw(frames, frames, frames, path=str(path)) == path
    first = path.read_bytes()
    draw(frames, frames, frames, path=path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("draw", "name"), PICTURES)
def test_a_failing_write_leaves_the_old_picture(tmp_path, monkeypatch, draw, name):
    path = tmp_path / name
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(visualize.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        draw(video(), video(), video(), path=path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("draw", "name"), PICTURES)
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((video(), video(frames=4), video(frames=3)), r"target \(2, 4, .*prediction \(2, 3, "),
        ((video(batch=1), video(), video()), r"do not fit.*observed \(1, 3, "),
        ((video(height=8), video(), video()), "do not fit"),
        ((video(channels=2),) * 3, "1 or 3 channels"),
        ((video()[0],) * 3, r"\[B, T, C, H, W\]"),
        ((video(frames=0), video(), video()), "not empty"),
        ((video(), video(frames=0), video(frames=0)), "not empty"),
        ((video(), video(), video(value=math.nan)), "prediction holds NaN"),
        ((video().to(torch.uint8), video(), video()), r"observed is torch.uint8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, draw, name, parts, message):
    with pytest.raises(ValueError, match=message):
        draw(*parts, path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("draw", "name"), PICTURES)
def test_no_rows_are_refused(tmp_path, draw, name):
    with pytest.raises(ValueError, match="rows must be at least 1"):
        draw(video(), video(), video(), path=tmp_path / name, rows=0)


@pytest.mark.parametrize(("draw", "name"), PICTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_type_can_be_drawn(tmp_path, draw, name, dtype):
    frames = video(value=0.5).to(dtype)
    assert draw(frames, frames, frames, path=tmp_path / name).stat().st_size > 0


# --- loss curve ---


def blue_columns(pixels):
    return np.nonzero((np.abs(pixels.astype(int) - (37, 99, 205)).max(axis=-1) < 10).any(axis=0))[0]


def test_loss_curve_is_drawn_on_a_logarithmic_axis(tmp_path):
    """A geometric sequence is a straight line: the middle point is halfway between the others."""
    pixels = read(loss_curve([0, 1, 2], [100.0, 1.0, 0.01], path=tmp_path / "new" / "loss.png"))
    blue = np.abs(pixels.astype(int) - (37, 99, 205)).max(axis=-1) < 10
    columns = np.nonzero(blue.any(axis=0))[0]

    def height(x):
        return np.nonzero(blue[:, x])[0].mean()

    left, right = columns.min() + 4, columns.max() - 4
    assert height((left + right) // 2) == pytest.approx((height(left) + height(right)) / 2, abs=3)
    assert height(left) < height(right)


def test_loss_curve_is_reproducible(tmp_path):
    once = loss_curve([1, 2], [0.5, 0.25], path=tmp_path / "a.png").read_bytes()
    assert loss_curve([1, 2], [0.5, 0.25], path=tmp_path / "b.png").read_bytes() == once


def test_losses_off_the_logarithmic_axis_leave_a_gap(tmp_path):
    losses = [1.0, 1.0, math.nan, 1.0, 0.0, -1.0, math.inf, 1.0]
    pixels = read(loss_curve(range(8), losses, path=tmp_path / "a.png"))
    whole = read(loss_curve(range(8), [1.0] * 8, path=tmp_path / "b.png"))
    assert blue_columns(pixels).size < 0.4 * blue_columns(whole).size


@pytest.mark.parametrize(
    ("steps", "losses", "message"),
    [
        ([1, 2], [0.5], "steps .* same length"),
        ([], [], "none of 0"),
        ([1], [math.nan], "none of 1"),
    ],
)
def test_losses_that_cannot_be_drawn_are_refused(tmp_path, steps, losses, message):
    with pytest.raises(ValueError, match=message):
        loss_curve(steps, losses, path=tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_loaded_late_and_pyplot_never(tmp_path):
    code = (
        "import sys, crevnet.visualize as v; assert 'matplotlib' not in sys.modules;"
        f"v.loss_curve([1], [1.0], path={str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True, timeout=300)
