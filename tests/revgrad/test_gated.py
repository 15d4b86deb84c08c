import torch
from torch.nn import functional

from revgrad import GatedCoupling, LayerCall


def test_forgets_what_the_gate_lets_go():
    assert GatedCoupling.forgets


def test_merge_and_its_derivative_are_their_formulas(make):
    x, a, h = torch.randn(3, 2, 4, dtype=torch.float64).unbind()
    layer = GatedCoupling(make.net(4, 2))
    torch.testing.assert_close(layer.merge(x, a, h), (1 - a.sigmoid()) * x + a.sigmoid() * h)
    torch.testing.assert_close(layer.log_derivative(x, a, h), (1 - a.sigmoid()).log())
    far = torch.tensor([200.0])
    assert layer.log_derivative(far, far, far).item() == functional.logsigmoid(-far).item() == -200


def test_stream_that_is_read_stays(make):
    x = make.streams(requires_grad=False)
    assert GatedCoupling(make.net(4, 2)).run(x, LayerCall())[0] is x[0]


def test_batched_gradients_in_exact_arithmetic(make):
    chain = make.chain("gated", 2, arithmetic="exact").double()
    x = make.streams(dtype=torch.float64)
    v = torch.randn(5, 3, 4, dtype=torch.float64)
    for chain.mode in ("stored", "reversible"):
        y = chain(*x)[0]
        found = torch.autograd.grad(y, x, v, is_grads_batched=True, retain_graph=True)
        for i in range(5):
            one = torch.autograd.grad(y, x, v[i], retain_graph=True)
            torch.testing.assert_close([g[i] for g in found], list(one))
