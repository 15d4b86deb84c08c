"""A second evaluation normalises with the batch statistics of the first; the oracle is stored autograd in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from revgrad import AdditiveCoupling, ReversibleSequential
from revgrad.batch_statistics import keeping, reusing

pytestmark = pytest.mark.usefixtures("single_thread")

SHAPES = {nn.BatchNorm1d: [(7, 3), (5, 3, 4)], nn.BatchNorm2d: [(3, 3, 5, 2)], nn.BatchNorm3d: [(2, 3, 1, 3, 5)]}
CASES = [(norm, shape) for norm, shapes in SHAPES.items() for shape in shapes]
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "untracked": {"track_running_stats": False},
    "large eps": {"eps": 0.5},
}


class Scaled(nn.Module):
    """A transform around a normalisation, which it may call several times, or under a checkpoint."""

    def __init__(self, norm, calls=1, checkpointed=False):
        super().__init__()
        self.norm, self.calls, self.checkpointed = norm, calls, checkpointed

    def forward(self, x):
        y = x * 1.5 + 0.3
        for i in range(self.calls):
            y = torch.tanh(checkpoint(self.norm, y, use_reentrant=False) if self.checkpointed else self.norm(y)) + i
        return y


class Counter(TorchDispatchMode):
    """How often statistics of a batch are computed."""

    def __init__(self):
        super().__init__()
        self.computed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm.default:
            self.computed += bool(args[5])
        return func(*args, **(kwargs or {}))


def chain_of(norms, **options):
    transforms = [m if isinstance(m, Scaled) else Scaled(m) for m in norms]
    layers = [AdditiveCoupling(t, source=i % 2, target=1 - i % 2) for i, t in enumerate(transforms)]
    return ReversibleSequential(*layers, **options)


def pair(shape, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("norm", "shape"), CASES, ids=str)
def test_gradients_and_running_statistics_are_those_of_stored(check, norm, shape, options):
    chain = chain_of([norm(3, **OPTIONS[options], dtype=torch.float64) for _ in range(4)])
    for p in chain.parameters():
        nn.init.uniform_(p, 0.5, 2)
    x = pair(shape)
    expected = check.gradients(chain, x, "stored")
    found = check.gradients(chain, x, "reversible")
    check.same(found, expected, rtol=1e-11)
    buffers = [name for name in found if name.startswith("buffer")]
    check.same({n: found[n] for n in buffers}, {n: expected[n] for n in buffers})
    assert len(buffers) == (0 if options == "untracked" else 12)


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.composes("Modes", "BatchNorm on a CPU, in a second evaluation", "works: with the statistics of the first")
def test_statistics_are_computed_once(check, arithmetic):
    chain, x = chain_of([nn.BatchNorm1d(3) for _ in range(4)], arithmetic=arithmetic), pair((6, 3), torch.float32)
    with Counter() as forward:
        y = chain(*x)
    with Counter() as backward:
        check.loss(y).backward()
    assert (forward.computed, backward.computed) == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("norm", "shape"), CASES, ids=str)
def test_the_same_input_gives_the_same_bits(norm, shape, options, layout, dtype):
    x = torch.randn(shape, dtype=dtype)
    if layout == "channels last" and x.ndim > 3:
        x = x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    module = norm(3, **OPTIONS[options], dtype=dtype)
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 2)
    expected = copy.deepcopy(module)(x)
    kept = {}
    with torch.no_grad(), keeping([module], kept):
        assert torch.equal(module(x), expected)
    with reusing([module], kept), Counter() as counter:
        assert torch.equal(module(x), expected)
    assert counter.computed == (kept[module] is None)
    assert (kept[module] is None) == (layout == "transposed" and not x.is_contiguous())


def test_exact_gradients_are_those_of_stored_layers(check):
    transforms = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()) for _ in range(6)]
    layers = [AdditiveCoupling(t, source=i % 2, target=1 - i % 2) for i, t in enumerate(transforms)]
    chain, x = ReversibleSequential(*layers, arithmetic="exact"), pair((6, 3), torch.float32)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"))


def test_a_second_backward_pass_has_them_too(check):
    chain, x = chain_of([nn.BatchNorm1d(3).double() for _ in range(3)]), pair((6, 3))
    loss = check.loss(chain(*x))
    once = torch.autograd.grad(loss, x, retain_graph=True)
    with Counter() as counter:
        again = torch.autograd.grad(loss, x)
    assert counter.computed == 0
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("case", ["called twice", "shared", "checkpointed", "in eval mode", "subclass", "own forward"])
def test_what_is_called_otherwise_is_evaluated_as_it_is(check, case):
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    norms = [Doubled(3).double() if case == "subclass" else nn.BatchNorm1d(3).double() for _ in range(3)]
    if case == "called twice":
        norms = [Scaled(norm, calls=2) for norm in norms]
    if case == "shared":
        norms[2] = norms[0]
    if case == "checkpointed":
        norms = [Scaled(norm, checkpointed=True) for norm in norms]
    chain, x = chain_of(norms), pair((6, 3))
    if case == "in eval mode":
        chain(*x)
        chain[1].eval()
    if case == "own forward":
        norms[1].forward = lambda x: x.square()
    found, expected = (check.gradients(chain, x, mode) for mode in ("reversible", "stored"))
    if case == "checkpointed":  # which moves the running statistics twice, without a chain around it as well
        found, expected = (
            {k: v for k, v in d.items() if "running" not in k and "num" not in k} for d in (found, expected)
        )
    check.same(found, expected, rtol=1e-11)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_modules_are_left_as_they_were(where):
    norm = nn.BatchNorm1d(3)

    def fail(*_):
        raise RuntimeError("a hook that fails")

    chain, x = chain_of([norm]), pair((6, 3), torch.float32)
    before = dict(norm.__dict__)
    y = None if where == "forward" else chain(*x)
    handle = norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook that fails"):
        chain(*x) if y is None else y[0].sum().backward()
    handle.remove()
    assert norm.__dict__.keys() == before.keys()
    assert "forward" not in norm.__dict__


def test_one_value_per_channel_is_refused_as_ever():
    chain = chain_of([nn.BatchNorm1d(3)])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain(*pair((1, 3), torch.float32))


def test_wrong_number_of_dimensions_is_refused_as_ever():
    chain = chain_of([nn.BatchNorm2d(3)])
    with pytest.raises(ValueError, match="expected 4D input"):
        chain(*pair((6, 3), torch.float32))


def test_second_derivatives(check):
    chain = chain_of([nn.BatchNorm1d(3).double() for _ in range(3)])
    x = pair((5, 3))
    found = {}
    for mode in ("stored", "reversible"):
        model = copy.deepcopy(chain)
        model.mode = mode
        first = torch.autograd.grad(check.loss(model(*x)), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        found[mode] = dict(enumerate(second))
    check.same(found["reversible"], found["stored"], rtol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_compiled_transforms_are_not_compiled_again_and_again(check):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    chain = chain_of([nn.BatchNorm1d(3).double() for _ in range(2)])
    x = pair((6, 3))
    expected = check.gradients(chain, x, "stored")
    for layer in chain:
        layer.transform.norm.compile(backend="aot_eager")
    for _ in range(3):
        y = chain(*x)
        gradients = torch.autograd.grad(check.loss(y), x)
        graphs = counters["stats"]["unique_graphs"]
    check.same(
        {f"gradient of input {i}": g for i, g in enumerate(gradients)},
        {k: v for k, v in expected.items() if k.startswith("gradient of input")},
        rtol=1e-11,
    )
    y = chain(*x)
    check.loss(y).backward()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
