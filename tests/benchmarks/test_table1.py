from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import table1
from benchmarks.table1 import (
    PATCHED,
    SYSTEMS,
    activations_mb,
    count_ahead,
    gflops_per_frame,
    parameters,
    per_sample_mb,
    training_mb,
)
from crevnet.baselines.convlstm import ConvLSTMConfig
from crevnet.baselines.e3d_lstm import E3DLSTMConfig
from crevnet.video_model import VideoConfig

SMALL = ConvLSTMConfig(patch=1, image_size=16, hidden=(4, 4), kernel_size=3)
PUBLISHED = {
    "ConvLSTM": (107.4, 1043),
    "FRNN": (80.1, 717),
    "VPN": (309.6, 5206),
    "PredRNN": (192.9, 1666),
    "PredRNN++": (106.8, 2017),
    "E3D-LSTM": (381.3, 2695),
    "CrevNet+ConvLSTM": (0.919, 130),
    "CrevNet+ST-LSTM": (1.618, 195),
}
"""Table 1 of the CrevNet paper (ICLR 2020): GFLOPs of a frame, and MB of a sample in training."""


def test_all_systems_of_table_1_are_there():
    names = ["ConvLSTM", "FRNN", "VPN", "PredRNN", "PredRNN++", "E3D-LSTM", "CrevNet+ConvLSTM", "CrevNet+ST-LSTM"]
    assert [s.name for s in SYSTEMS] == names
    assert set(PATCHED) < set(names)


def test_flops_are_twice_the_multiply_accumulates():
    per_pixel = 1 * 4 + 2 * (8 * 16 * 9) + 4 * 1
    assert gflops_per_frame(SMALL) == pytest.approx(2 * per_pixel * 16 * 16 / 1e9, rel=1e-12)


def test_the_papers_numbers_are_those_of_its_table_1():
    assert {s.name: (s.paper_gflops, s.paper_mb) for s in SYSTEMS} == PUBLISHED


@pytest.mark.parametrize(("system", "gflops"), [(SYSTEMS[-2], 0.91), (SYSTEMS[-1], 1.59)], ids=["convlstm", "stlstm"])
def test_a_frame_of_crevnet(system, gflops):
    """Predictor and decoder: what is predicted is not encoded again."""
    assert gflops_per_frame(system.config) == pytest.approx(gflops, abs=0.005)


def test_attention_is_not_counted():
    """Of 11 gates over x and h, 3 over m and one over c' and m', 2 x 5 x 5 each, and two 1 x 1 x 1 convolutions."""
    n, positions = 4, 2 * 8 * 8
    convolutions = 50 * (7 * n + (4 + 3 + 2) * n**2) + 2 * n**2 + n
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention are not in the counter's books
        found = gflops_per_frame(E3DLSTMConfig(patch=1, image_size=8, hidden=(n,)))
    assert found == pytest.approx(2 * positions * convolutions / 1e9, rel=1e-12)


class Scale(nn.Module):
    """Predicts nothing: its loss is the sum of all pixels, each times one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def loss(self, clips):
        return (clips * self.weight).sum()


class ScaleConfig(VideoConfig):
    def build(self):
        return Scale()


@pytest.mark.parametrize("steps", [2, 5])
def test_memory_of_a_sample_by_hand(steps):
    """The product of clips and weight, or in the backward pass the gradient of every product: a number per pixel."""
    assert per_sample_mb(ScaleConfig(image_size=8), steps) == pytest.approx((steps + 1) * 8 * 8 * 4 / 1e6, rel=1e-9)


def test_all_memory_is_four_numbers_per_weight_and_the_activations():
    assert training_mb(SMALL, 3.0) == pytest.approx(parameters(SMALL) * 16 / 1e6 + 3.0)


def test_stored_memory_grows_with_steps_and_batch():
    one, two, longer = activations_mb(SMALL, 1, 2), activations_mb(SMALL, 2, 2), activations_mb(SMALL, 1, 4)
    assert one < two < 2.1 * one
    assert one < longer < 2.5 * one


def test_counting_ahead_in_other_processes_finds_the_same():
    config = replace(SMALL, hidden=(4, 6))
    wanted = [(config, batch, 2) for batch in (1, 2)]
    here = [activations_mb(*w) for w in wanted]
    table1._COUNTED.clear()
    count_ahead(wanted)
    assert [table1._COUNTED[str(config), batch, 2] for batch in (1, 2)] == here


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_deeper_system_is_the_same_one_at_once_the_depth(system):
    assert system.deeper(1) == system.config
    assert parameters(system.deeper(2)) > 1.5 * parameters(system.config)
