"""The plain CrevNet is the model that it is measured against."""

import pytest
import torch

from benchmarks.plain_crevnet import PlainCrevNet, fold, unfold
from benchmarks.training import random_clips
from crevnet.model import CrevNetConfig


@pytest.mark.parametrize("cell", ["convlstm", "stlstm"])
def test_same_loss_and_gradients(cell):
    config = CrevNetConfig(cell=cell, image_size=16, blocks=(2, 1), modules=3, mode="stored", arithmetic="float")
    model = config.build().double()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))  # the peepholes begin at zero
    plain, clips = PlainCrevNet(model).double(), random_clips(config, 2, 3).double()
    expected, found = model.loss(clips), plain.loss(clips)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    attention = model.predictor[1].transform.attention[0].weight
    fused = (
        model.predictor[0].transform.cell.gates if cell == "convlstm" else model.predictor[0].transform.cell.cell_gates
    ).weight
    one, two = torch.autograd.grad(expected, [attention, fused])
    gates = [getattr(plain.cells[0], name).weight for name in "ifgo"]
    other, *parts = torch.autograd.grad(found, [plain.attentions[1][0].weight, *gates])
    torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(torch.cat(parts), two, rtol=1e-8, atol=1e-14)


def test_unfold_undoes_fold():
    x = torch.randn(2, 3, 2, 4, 6)
    assert torch.equal(unfold(fold(x)), x)
    assert fold(x).shape == (2, 12, 2, 2, 3)
