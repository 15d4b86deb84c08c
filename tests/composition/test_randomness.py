"""Random numbers on a GPU; those of a CPU are in tests/revgrad/test_replay.py."""

import pytest
import torch
from torch import nn


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.composes(
    "Randomness", "generators of CUDA devices", "should work; the test needs a GPU and has not been run"
)
def test_dropout_on_a_gpu_is_replayed(make, check):
    chain, x = make.chain("additive", 4, inner=lambda: nn.Dropout(0.4)).cuda(), make.streams()
    x = tuple(t.detach().cuda().requires_grad_() for t in x)
    found, after = {}, {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        torch.manual_seed(5)
        first, second = chain(*x), chain(*x)
        after[mode] = torch.cuda.get_rng_state()
        found[mode] = torch.autograd.grad(check.loss(first) + 2 * check.loss(second), (*x, *chain.parameters()))
        assert torch.equal(torch.cuda.get_rng_state(), after[mode])
    assert torch.equal(after["stored"], after["reversible"])
    for a, b in zip(found["reversible"], found["stored"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
