"""Other ways to take a gradient, and what is left behind."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from revgrad import ReversibleSequential

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def chain(small):
    return small.chain().double()


@pytest.fixture
def x(make):
    return make.streams(dtype=torch.float64)


def detached(x):
    return tuple(t.detach() for t in x)


def gradient(chain, x, mode, of=None):
    """Of the first input and all weights, in one mode."""
    chain.mode = mode
    return torch.autograd.grad((of or chain)(*x), (x[0], *chain.parameters()))


@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.composes("Autograd", "torch.func.grad, jacrev, jvp, hessian", "works; runs as stored mode")
def test_derivatives_of_torch_func(make, check, x, kind):
    chain = make.chain(kind, 3, arithmetic="float").double()
    x = detached(x)
    weights = dict(chain.named_parameters())

    def loss(weights, a):
        return check.loss(functional_call(chain, weights, (a, x[1])))

    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        found[mode] = {
            "output": loss(weights, x[0]),
            "input": grad(loss, argnums=1)(weights, x[0]),
            "reverse": jacrev(lambda a: chain(a, x[1])[0])(x[0]),
            "forward": jvp(lambda a: loss(weights, a), (x[0],), (torch.ones_like(x[0]),))[1],
            "second": hessian(lambda a: loss(weights, a))(x[0]),
            **grad(loss)(weights, x[0]),
        }
    check.same(found["reversible"], found["stored"], rtol=1e-10)
    a = x[0].clone().requires_grad_()
    chain.mode = "stored"
    torch.testing.assert_close(found["reversible"]["input"], torch.autograd.grad(loss(weights, a), a)[0])


@pytest.mark.composes("Autograd", "torch.func in exact arithmetic", "error: *torch.func knows no exact arithmetic*")
def test_torch_func_in_exact_arithmetic_is_refused(make, check, x):
    chain = make.chain("gated", 2).double()
    with pytest.raises(ValueError, match=r"torch\.func .* knows no exact arithmetic: choose arithmetic='float'"):
        grad(lambda a: check.loss(chain(a, a)))(x[0].detach())


@pytest.mark.composes("Autograd", "torch.func.vmap, over samples and over gradients", "works; runs as stored mode")
def test_vmap(chain, check, x):
    x = detached(x)
    expected = chain(*x)
    batched = vmap(lambda a, b: chain(a, b))(*x)
    for a, b in zip(batched, expected, strict=True):
        torch.testing.assert_close(a, b)
    weight = chain[1].transform.first.weight
    per_sample = vmap(
        lambda w, a, b: grad(lambda w: functional_call(chain, {_NAME: w}, (a, b))[0].sum())(w), (None, 0, 0)
    )
    (total,) = torch.autograd.grad(chain(*x)[0].sum(), weight)
    torch.testing.assert_close(per_sample(weight.detach(), *x).sum(0), total)


_NAME = "layers.1.transform.first.weight"


@pytest.mark.composes("Autograd", "torch.func.functional_call, with other weights and buffers")
def test_functional_call(check, x, small):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("shift", torch.zeros(4))

        def forward(self, x):
            return self.norm(torch.tanh(self.linear(x))) + self.shift * x

    chain = small.of(Shifted).double().eval()
    weights = {k: torch.randn_like(p).requires_grad_() for k, p in chain.named_parameters()}
    buffers = {k: torch.rand_like(b) + 0.5 if b.is_floating_point() else b for k, b in chain.named_buffers()}
    own = [p.detach().clone() for p in chain.parameters()]
    found = {}
    for mode in ("stored", "reversible", "checkpoint"):
        chain.mode = mode
        y = functional_call(chain, {**weights, **buffers}, x)
        # The module has its own weights and buffers again when the backward pass comes.
        found[mode] = dict(enumerate([*y, *torch.autograd.grad(check.loss(y), (*x, *weights.values()))]))
    check.same(found["reversible"], found["stored"], rtol=1e-9)
    check.same(found["checkpoint"], found["stored"], rtol=1e-9)
    assert all(map(torch.equal, chain.parameters(), own))
    assert all(p.grad is None for p in chain.parameters())


@pytest.mark.composes("Autograd", "batched gradients (is_grads_batched, jacobian with vectorize=True)")
def test_batched_gradients(chain, x):
    y = chain(*x)
    v = torch.randn(5, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad(y[0], x, v, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        for a, b in zip(found, torch.autograd.grad(y[0], x, v[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.composes("Autograd", "batched gradients with dropout", "error: *calling random operations inside of vmap*")
def test_batched_gradients_with_dropout(small, x):
    """The transform is evaluated again inside PyTorch's vmap, which draws no random numbers."""
    y = small.of(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))).double()(*x)
    v = torch.randn(5, 3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="calling random operations inside of vmap"):
        torch.autograd.grad(y[0], x, v, is_grads_batched=True)


@pytest.mark.composes("Autograd", "the input used again outside, a skip around the chain")
def test_skip_around_the_chain(chain, x, check):
    def around(*x):
        y = chain(*x)
        return (y[0] * x[0] + x[1].exp() * y[1] + x[0]).sin().sum()

    for a, b in zip(gradient(chain, x, "reversible", around), gradient(chain, x, "stored", around), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.composes("Autograd", "the output read after backward")
def test_output_is_readable_after_backward(chain, x, check):
    y = chain(*x)
    kept = [t.detach().clone() for t in y]
    check.loss(y).backward()
    assert all(map(torch.equal, y, kept))


@pytest.mark.composes("Autograd", "nothing left on the modules after a step")
def test_modules_are_as_before(make, check):
    chain = make.chain("mixed", 4, inner=lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)))

    def contents():
        found = {}
        for name, module in chain.named_modules():
            for key, value in vars(module).items():
                found[name, key] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value
        return found

    before = contents()
    for _ in range(2):
        check.loss(chain(*make.streams())).backward()
    after = contents()
    for noted in [k for k in before if k[1] == "_noted"]:  # how many messages have been compared
        assert after.pop(noted) == before.pop(noted) + 2
    assert after == before


@pytest.mark.composes("Autograd", "two sequences of shared weights, one after the other")
def test_chains_that_share_weights(small, make, check):
    first = small.chain(3).double()
    second = ReversibleSequential(*reversed(list(first)))
    x = make.streams(dtype=torch.float64)
    found = {}
    for mode in ("stored", "reversible"):
        first.mode = second.mode = mode
        loss = check.loss(second(*first(*x)))
        found[mode] = dict(enumerate(torch.autograd.grad(loss, (*x, *first.parameters()))))
    check.same(found["reversible"], found["stored"], rtol=1e-9)


@pytest.mark.composes("Autograd", "gradients in a thread of one's own, copies of a module apart")
def test_backward_in_threads(chain, make, check):
    from concurrent.futures import ThreadPoolExecutor

    models = [copy.deepcopy(chain) for _ in range(2)]
    x = [make.streams(dtype=torch.float64) for _ in models]

    def step(model, x):
        return torch.autograd.grad(check.loss(model(*x)), (*x, *model.parameters()))

    expected = [step(model, inputs) for model, inputs in zip(models, x, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(step, models, x))
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))
