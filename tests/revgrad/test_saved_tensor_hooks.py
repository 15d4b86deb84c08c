import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from revgrad.saved_tensor_hooks import Unhooked, hooked


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.composes("Systems", "save_on_cpu around forward and backward pass, with unused outputs")
def test_hooks_around_the_backward_pass_change_nothing(make, check, wanted):
    model, x = make.chain("additive", 3), make.streams()
    inputs, found = (*x, *model.parameters()), []
    for model.mode in ("stored", "reversible"):
        with save_on_cpu():
            y = model(*x)
            loss = check.loss([y[i] for i in wanted])
            found.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    check.same(*(dict(enumerate(grads)) for grads in found), rtol=1e-5)


def test_hooks_are_back_in_their_order():
    packed = []

    def noting(name):
        return saved_tensors_hooks(lambda x: (packed.append(name), x.detach())[1], lambda x: x)

    def saving():
        packed.clear()
        torch.ones(2, requires_grad=True).exp()
        return list(packed)

    def fail():
        assert not hooked()
        assert not saving()
        raise KeyError

    with noting("outer"):
        with noting("inner"):
            with pytest.raises(KeyError), Unhooked():
                fail()
            assert saving() == ["inner"]
        assert saving() == ["outer"]
    assert not hooked()
