import inspect
import json

import pytest
import torch

from benchmarks.scale_out import Network, gradient_bytes, measured_step, projection, scale_out
from benchmarks.training import random_clips, training_step
from crevnet.model import CrevNetConfig
from revgrad.cost import Flops

SLOW = Network(bytes_per_second=100.0, latency=0.5)
"""100 bytes a second."""


@pytest.fixture
def report(tmp_path):
    """A result of one step of 0.2 s with 16 sequences."""

    def write(device="H100", **changes):
        row = {"system": "CrevNet, stlstm", "batch": 16, "variant": "reversible exact", "kernels": "triton"}
        row |= {"precision": "float32", "weights": "channels-last", "launched": "called", "median": 0.2} | changes
        unfit = row | {"batch": 256}
        del unfit["median"]
        others = {"kernels": "plain"}, {"weights": "contiguous"}, {"launched": "graph"}
        rows = [unfit, *(row | other | {"median": 9.0} for other in others), row]
        path = tmp_path / "steps.json"
        path.write_text(json.dumps({"device": device, "rows": rows}))
        return path

    return write


def test_a_ring_by_hand():
    # 4 GPUs send a quarter of 400 bytes in each of 6 steps: 6 x (1 s + 0.5 s)
    assert SLOW.all_reduce(400, 4) == pytest.approx(9.0)
    assert SLOW.all_reduce(400, 1) == 0


def test_a_step_by_hand():
    row = projection(400, 4, SLOW, step=12.0, batch=2, backward_share=0.5)
    assert row["all_reduce_ms"] == pytest.approx(9000)
    assert row["after_ms"] == pytest.approx(21000)
    assert row["after_efficiency"] == pytest.approx(12 / 21)
    # 6 of the 9 seconds pass beside the backward pass
    assert row["beside_ms"] == pytest.approx(15000)
    assert row["beside_efficiency"] == pytest.approx(12 / 15)
    assert row["sequences_per_second"] == pytest.approx(8 / 21)


def test_a_short_sum_is_hidden_by_the_backward_pass():
    assert projection(400, 4, SLOW, step=30.0, batch=2, backward_share=0.5)["beside_efficiency"] == 1.0


def test_gradients_are_counted_on_the_model():
    assert gradient_bytes(CrevNetConfig()) / 4 == pytest.approx(4.12e6, rel=2e-3)  # weights, as in table 1
    assert gradient_bytes(CrevNetConfig(cell="convlstm")) / 4 == pytest.approx(2.38e6, rel=3e-3)


def test_the_step_is_that_of_the_trainer(report):
    """With fused kernels and weights channels-last, called operator by operator."""
    assert measured_step(report(), 16, "reversible exact", "float32") == (0.2, "H100")


def test_a_step_that_was_not_measured_is_refused_with_those_that_were(report):
    with pytest.raises(ValueError, match="no step stored exact, float32, batch 256; it has: reversible exact,"):
        measured_step(report(), 256, "stored exact", "float32")


def test_the_page_has_the_source_and_the_numbers(report):
    text = scale_out(results=report(), gpus=(8, 64), nvlink_gb=1.0, nvlink_latency_us=0, network_gbit=8.0)
    assert "projection, not a measurement" in text
    assert "step of 200.0 ms on one GPU: stlstm, reversible exact, float32, batch 16 per GPU, on H100." in text
    size = gradient_bytes(CrevNetConfig())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    inside, between = 2 * 7 / 8 * size / 1e9, 2 * 63 * (size / 64 / 1e9 + 5e-6)
    for row, n, summing in zip(rows, (8, 64), (inside, between), strict=True):
        assert row[0] == f"{n}"
        assert row[1] == f"{1e3 * summing:.3f}"
        assert row[3] == f"{0.2 / (0.2 + summing):.1%}"
        assert row[6] == f"{16 * n / (0.2 + summing):,.2f}"


@pytest.mark.parametrize("device", ["CPU, AMD EPYC", None])
def test_without_a_gpu_only_the_communication_is_told(report, tmp_path, device):
    text = scale_out("convlstm", results=report(device) if device else tmp_path / "missing.json")
    assert "not yet measured on a GPU" in text
    assert "efficiency" not in text
    assert "all-reduce, ms" in text


@pytest.mark.parametrize("options", [{"gpus": (0,)}, {"gpus": ()}, {"nvlink_gb": 0.0}, {"backward_share": 1.5}])
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match="gpus must be at least 1"):
        scale_out(**options)


def test_three_quarters_of_a_reversible_step_are_its_backward_pass():
    """One forward pass, one again, and two for the gradients; that is the default, as the default variant is such."""
    config = CrevNetConfig(image_size=16, blocks=(1, 1, 1), modules=2, clip=2, mode="reversible")
    model, clips = config.build(), random_clips(config, 1, 3)
    counted = []
    with torch.backends.mkldnn.flags(enabled=False):  # with it, some gradients take fewer operations than they have
        for run in (torch.no_grad()(lambda: model.loss(clips)), lambda: training_step(model, clips)):
            with Flops() as counter:
                run()
            counted.append(counter.total)
    forward, whole = counted
    defaults = {name: p.default for name, p in inspect.signature(scale_out).parameters.items()}
    assert defaults["variant"].startswith("reversible")
    assert defaults["backward_share"] == pytest.approx(1 - forward / whole, rel=0.02)
