import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from crevnet.metrics import (
    MAX_PSNR_DB,
    METRICS,
    VideoMetrics,
    copy_last_frame,
    mse_per_frame,
    psnr_per_frame,
    ssim_per_frame,
)

FUNCTIONS = [mse_per_frame, ssim_per_frame, psnr_per_frame]
SHAPES = [(2, 3, 1, 16, 16), (1, 1, 3, 11, 17), (3, 2, 2, 23, 12)]


def frames(shape, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * spread - (spread - 1) / 2


def each_frame(function, prediction, target):
    """Apply a NumPy function of two [C, H, W] images to every frame, literally."""
    prediction = np.clip(prediction.double().numpy(), 0, 1)
    target = target.double().numpy()
    return np.array(
        [[function(p, t) for p, t in zip(ps, ts, strict=True)] for ps, ts in zip(prediction, target, strict=True)]
    )


def ssim_oracle(x, y):
    """Wang et al. 2004, equation 13, with scipy's Gaussian; scipy calls the border "mirror"."""

    def mean(image):
        return np.stack([gaussian_filter(channel, 1.5, mode="mirror", radius=5) for channel in image])

    c1, c2 = 0.01**2, 0.03**2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_the_squared_error_summed_over_a_frame(shape):
    prediction, target = frames(shape, 1, spread=1.5), frames(shape, 2)
    expected = each_frame(lambda p, t: ((p - t) ** 2).sum(), prediction, target)
    np.testing.assert_allclose(mse_per_frame(prediction, target).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_matches_its_definition(shape):
    prediction, target = frames(shape, 1, spread=1.5), frames(shape, 2)
    expected = each_frame(lambda p, t: 10 * math.log10(1 / ((p - t) ** 2).mean()), prediction, target)
    np.testing.assert_allclose(psnr_per_frame(prediction, target).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_matches_an_independent_implementation(shape):
    target = frames(shape, 2)
    prediction = target + 0.3 * (frames(shape, 1) - 0.5)
    expected = each_frame(ssim_oracle, prediction, target)
    assert 0.3 < expected.mean() < 0.99
    np.testing.assert_allclose(ssim_per_frame(prediction, target).numpy(), expected, atol=1e-10)


def test_ssim_is_the_same_across_the_chunks_it_is_computed_in():
    prediction, target = frames((5, 27, 1, 11, 11), 1), frames((5, 27, 1, 11, 11), 2)
    alone = torch.cat([ssim_per_frame(prediction[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(ssim_per_frame(prediction, target), alone, rtol=0, atol=1e-12)


def test_hand_computed_values():
    target = torch.zeros(1, 2, 1, 16, 16)
    prediction = torch.stack([torch.full((1, 16, 16), 0.5), torch.full((1, 16, 16), 0.1)])[None]
    torch.testing.assert_close(mse_per_frame(prediction, target), torch.tensor([[64.0, 2.56]]).double())
    torch.testing.assert_close(psnr_per_frame(prediction, target), torch.tensor([[20 * math.log10(2), 20.0]]).double())


def test_perfect_prediction():
    target = frames((2, 3, 1, 12, 12))
    assert (mse_per_frame(target, target) == 0).all()
    assert (psnr_per_frame(target, target) == MAX_PSNR_DB).all()
    torch.testing.assert_close(ssim_per_frame(target, target), torch.ones(2, 3).double())


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_predictions_are_clamped_to_the_range_of_an_image(metric):
    target = frames((1, 2, 1, 12, 12))
    wild = torch.where(target > 0.5, 7.0, -3.0)
    torch.testing.assert_close(metric(wild, target), metric((target > 0.5).float(), target))


@pytest.mark.parametrize(("level", "nearest"), [(1.00005, 1.0), (-0.00005, 0.0)])
def test_what_a_target_overshoots_by_resizing_is_measured(level, nearest):
    """Only predictions are clamped."""
    target = torch.full((1, 1, 1, 12, 12), level, dtype=torch.float64)
    error = mse_per_frame(torch.full_like(target, nearest), target)
    assert error.item() == pytest.approx(144 * 0.00005**2, rel=1e-6)


@pytest.mark.parametrize("metric", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_inputs_are_measured_in_float64(metric, dtype):
    prediction, target = frames((1, 2, 1, 12, 12), 1).to(dtype), frames((1, 2, 1, 12, 12), 2).to(dtype)
    result = metric(prediction.requires_grad_(), target)
    assert result.dtype == torch.float64
    assert not result.requires_grad
    assert torch.equal(result, metric(prediction.double(), target.double()))


def test_autocast_does_not_reach_the_metrics():
    prediction, target = frames((1, 2, 1, 12, 12), 1), frames((1, 2, 1, 12, 12), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssim_per_frame(prediction, target)
    assert torch.equal(inside, ssim_per_frame(prediction, target))


def poisoned(value):
    spoiled = frames((1, 2, 1, 12, 12))
    spoiled[0, 1, 0, 3, 4] = value
    return spoiled


@pytest.mark.parametrize("metric", [*FUNCTIONS, lambda p, t: VideoMetrics(p.shape[1]).update(p, t)])
@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (
            torch.zeros(1, 2, 1, 12, 12),
            torch.zeros(1, 3, 1, 12, 12),
            r"\(1, 2, 1, 12, 12\).*\(1, 3, 1, 12, 12\)",
        ),
        (torch.zeros(2, 1, 12, 12), torch.zeros(2, 1, 12, 12), r"\[B, T, C, H, W\]"),
        (torch.zeros(0, 2, 1, 12, 12), torch.zeros(0, 2, 1, 12, 12), "empty"),
        (poisoned(math.nan), frames((1, 2, 1, 12, 12)), "prediction holds NaN"),
        (poisoned(math.inf), frames((1, 2, 1, 12, 12)), "prediction holds NaN or inf"),
        (frames((1, 2, 1, 12, 12)), poisoned(math.nan), "target holds NaN"),
        (frames((1, 2, 1, 12, 12)), 255 * frames((1, 2, 1, 12, 12)), "target spans"),
        (frames((1, 2, 1, 12, 12)), frames((1, 2, 1, 12, 12)) - 0.5, "target spans"),
        (frames((1, 2, 1, 12, 12)), torch.full((1, 2, 1, 12, 12), 1.005), "target spans"),
        (frames((1, 2, 1, 12, 12)), torch.full((1, 2, 1, 12, 12), -0.005), "target spans"),
        (torch.zeros(1, 2, 1, 12, 12, dtype=torch.uint8), torch.zeros(1, 2, 1, 12, 12), "uint8"),
    ],
)
def test_what_cannot_be_measured_is_refused(metric, prediction, target, message):
    with pytest.raises(ValueError, match=message):
        metric(prediction, target)


@pytest.mark.parametrize("size", [(10, 32), (32, 10)])
def test_frames_smaller_than_the_ssim_window_are_refused(size):
    small = torch.zeros(1, 1, 1, *size)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*11 x 11"):
        ssim_per_frame(small, small)


def accumulate(prediction, target, sizes):
    metrics = VideoMetrics(target.shape[1])
    for p, t in zip(prediction.split(sizes), target.split(sizes), strict=True):
        metrics.update(p, t)
    return metrics


def assert_same(result, expected):
    assert result["sequences"] == expected["sequences"]
    for name in METRICS:
        assert result[name] == pytest.approx(expected[name], rel=1e-12)
        assert result["per_frame"][name] == pytest.approx(expected["per_frame"][name], rel=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_accumulated_means_match_the_per_frame_metrics(channels):
    prediction, target = frames((7, 4, channels, 12, 12), 1), frames((7, 4, channels, 12, 12), 2)
    result = accumulate(prediction, target, [2, 2, 3]).compute()
    assert result["sequences"] == 7
    assert set(result) == {*METRICS, "per_frame", "sequences"}
    for name, metric in zip(("mse", "ssim", "psnr"), FUNCTIONS, strict=True):
        values = metric(prediction, target)
        assert result["per_frame"][name] == pytest.approx(values.mean(dim=0).tolist(), rel=1e-12)
        assert result[name] == pytest.approx(values.mean().item(), rel=1e-12)
        assert isinstance(result[name], float)
    mean = (prediction.double() - target.double()).square().mean().item()
    assert result["mse_per_value"] == pytest.approx(mean, rel=1e-12)
    assert result["per_frame"]["mse_per_value"] == pytest.approx(
        [mse / (channels * 144) for mse in result["per_frame"]["mse"]], rel=1e-12
    )


@pytest.mark.parametrize("sizes", [[7], [1, 6], [1] * 7, [3, 3, 1]])
def test_the_result_does_not_depend_on_batching(sizes):
    prediction, target = frames((7, 4, 1, 12, 12), 1), frames((7, 4, 1, 12, 12), 2)
    assert_same(accumulate(prediction, target, sizes).compute(), accumulate(prediction, target, [4, 3]).compute())


def reduce_all(ranks):
    barrier = threading.Barrier(len(ranks), timeout=60)
    sent = [None] * len(ranks)
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(rank.reduce, collective(barrier, sent, i)) for i, rank in enumerate(ranks)]
        return [future.exception() for future in futures]


def collective(barrier, sent, index):
    """One rank's all-reduce: wait for the others, and return the sum of what all sent."""

    def all_reduce(tensor):
        assert tensor.dtype == torch.float64
        sent[index] = tensor
        barrier.wait()
        total = torch.stack(sent).sum(dim=0)
        barrier.wait()
        return total

    return all_reduce


@pytest.mark.parametrize("sizes", [[7], [3, 4], [0, 5, 2], [7, 0, 0]])
def test_processes_together_measure_what_one_process_would(sizes):
    prediction, target = frames((7, 4, 1, 12, 12), 1), frames((7, 4, 1, 12, 12), 2)
    ranks = [VideoMetrics(4) for _ in sizes]
    for rank, p, t in zip(ranks, prediction.split(sizes), target.split(sizes), strict=True):
        if len(p):
            rank.update(p, t)
    assert reduce_all(ranks) == [None] * len(sizes)
    for rank in ranks:
        assert_same(rank.compute(), accumulate(prediction, target, [7]).compute())


def test_ranks_without_any_data_agree_that_there_is_none():
    ranks = [VideoMetrics(4), VideoMetrics(4)]
    assert reduce_all(ranks) == [None, None]
    with pytest.raises(RuntimeError, match="no sequence"):
        ranks[0].compute()


def test_reducing_or_updating_after_a_reduction_is_refused():
    metrics = accumulate(frames((1, 2, 1, 12, 12)), frames((1, 2, 1, 12, 12)), [1])
    metrics.reduce(lambda tensor: tensor)
    with pytest.raises(RuntimeError, match="already reduced"):
        metrics.reduce(lambda tensor: tensor)
    with pytest.raises(RuntimeError, match="already reduced"):
        metrics.update(frames((1, 2, 1, 12, 12)), frames((1, 2, 1, 12, 12)))


def test_sequences_of_another_length_are_refused():
    metrics = accumulate(frames((1, 2, 1, 12, 12)), frames((1, 2, 1, 12, 12)), [1])
    with pytest.raises(ValueError, match="this batch has 3 frames to a sequence, not 2"):
        metrics.update(frames((1, 3, 1, 12, 12)), frames((1, 3, 1, 12, 12)))
    assert metrics.compute()["sequences"] == 1


def test_copying_the_last_frame():
    observed = frames((2, 3, 1, 4, 5))
    copies = copy_last_frame(observed, 4)
    assert copies.shape == (2, 4, 1, 4, 5)
    for step in range(4):
        assert torch.equal(copies[:, step], observed[:, -1])
    before = observed.clone()
    copies[:, 0] = 9
    assert torch.equal(observed, before)
    assert not (copies[:, 1] == 9).any()


@pytest.mark.parametrize(("shape", "steps"), [((2, 3, 4, 5), 1), ((2, 0, 1, 4, 5), 1), ((2, 3, 1, 4, 5), 0)])
def test_copying_needs_a_frame_and_a_positive_number_of_steps(shape, steps):
    with pytest.raises(ValueError, match=r"observed must be|steps must be"):
        copy_last_frame(torch.zeros(shape), steps)
