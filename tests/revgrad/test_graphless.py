import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from revgrad import AdditiveCoupling, ReversibleSequential
from revgrad.graphless import graphless


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.composes("Modes", "transformers in eval mode, whose fast path would compute other values")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_a_transformer_in_eval_mode_computes_what_it_computes_with_a_graph(arithmetic):
    padding = torch.zeros(8, 16, dtype=torch.bool)
    padding[0, 10:] = True
    found = []
    for mode in ("stored", "reversible"):
        torch.manual_seed(0)
        x = [torch.randn(8, 16, 16, requires_grad=True) for _ in range(2)]
        chain = ReversibleSequential(
            AdditiveCoupling(Encoder()), AdditiveCoupling(Encoder(), 1, 0), mode=mode, arithmetic=arithmetic
        ).eval()
        y = chain(*x, padding=padding)
        found.append((*y, *torch.autograd.grad(sum(v.square().sum() for v in y), list(chain.parameters()))))
    for stored, reversible in zip(*found, strict=True):
        torch.testing.assert_close(reversible, stored, rtol=1e-3, atol=1e-3 * float(stored.detach().abs().max()))


class Slope(nn.Module):
    """The derivative of a network in the direction of ones, in forward mode."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        with forward_ad.dual_level():
            y = torch.tanh(self.net(forward_ad.make_dual(x, torch.ones_like(x))))
            return forward_ad.unpack_dual(y).tangent


@pytest.mark.composes("Autograd", "forward-mode differentiation inside a transform")
def test_a_transform_may_differentiate_in_forward_mode(make, check):
    model, x = ReversibleSequential(AdditiveCoupling(Slope()), AdditiveCoupling(Slope(), 1, 0)), make.streams()
    check.same(check.gradients(model, x), check.gradients(model, x, "stored"), rtol=1e-5)
    assert torch._C._is_fwd_grad_enabled()


def test_the_settings_come_back_after_an_error():
    def fail():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError

    with pytest.raises(KeyError), graphless():
        fail()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_threads_that_overlap_leave_the_settings_as_they_were(enabled):
    """The first to enter leaves first, so that the second found what the first had set."""
    entered, left = threading.Event(), threading.Event()

    def second():
        with graphless():
            entered.set()
            assert left.wait(timeout=60)
            assert not torch.backends.mha.get_fastpath_enabled()

    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with parametrize.cached(), ThreadPoolExecutor() as pool:
            with graphless():
                future = pool.submit(second)
                assert entered.wait(timeout=60)
            left.set()
            future.result()
            assert torch.backends.mha.get_fastpath_enabled() == enabled
            assert parametrize._cache_enabled == 1
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert parametrize._cache_enabled == 0
