import pytest
import torch

from revgrad import fused_optimisers

OPTIMISERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.composes("Misuse", "weights changed by a fused optimiser", "error: *modified by an inplace operation*")
def test_a_step_between_forward_and_backward_raises(make, check, kind, fused):
    chain, x = make.chain("mixed", 3), make.streams()
    optimiser = kind(chain.parameters(), lr=1e-6, fused=fused)  # too small a change for its effect to be noticed
    check.loss(chain(*x)).backward()
    y = chain(*x)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check.loss(y).backward()


def test_weights_without_a_gradient_have_not_changed(make, check):
    chain, x = make.chain("additive", 3), make.streams()
    optimiser = torch.optim.Adam(chain.parameters(), fused=True)
    y = chain(*x)
    optimiser.step()
    check.loss(y).backward()


def test_noticed_once():
    for _ in range(2):
        fused_optimisers.watch_fused_optimisers()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    before = weight._version
    torch.optim.Adam([weight], fused=True).step()
    assert weight._version == before + 1
