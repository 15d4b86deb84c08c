"""Pixel shuffle's code for the CPU: it moves what the reference moves, and knows when it is not the one."""

import pytest
import torch
from revgrad_kernels import backend, pixel_shuffle, pixel_shuffle_concatenate, pixel_shuffle_cpu, pixel_unshuffle
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests.kernels.cases import LAYOUTS
from tests.kernels.test_pixel_shuffle import CASES, DTYPES, ORDERS, assert_same, functions, numbered


@pytest.fixture(autouse=True)
def nothing_kept():
    """Every test meets its shapes for the first time."""
    pixel_shuffle_cpu._folding.cache_clear()
    pixel_shuffle_cpu._unfolding.cache_clear()


@pytest.fixture
def uses(monkeypatch):
    """How often the code has been used."""
    found = []
    moved = pixel_shuffle_cpu._moved
    monkeypatch.setattr(pixel_shuffle_cpu, "_moved", lambda *args: (found.append(1), moved(*args))[1])
    return found


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(d, layout) for d in DTYPES for layout in LAYOUTS if layout != "strided" or d == torch.float32],
    ids=str,
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("frames", [(), (3,)], ids=str)
@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_moves_as_the_reference_does(uses, shape, factor, frames, order, dtype, layout):
    x = numbered((*shape[:2], *frames, *shape[2:]), layout, dtype).cpu()
    for function, arguments, options in functions(x, factor, order, "auto"):
        assert_same(function(*arguments, **options), function(*arguments, **options | {"backend": "reference"}))
    assert uses


def test_gradients_are_those_of_the_reference(uses):
    x = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    for function, arguments, options in functions(x, 2, "irevnet", "auto"):
        leaves = [a.detach().requires_grad_() for a in arguments if isinstance(a, torch.Tensor)]
        factor = arguments[-1]
        assert torch.autograd.gradcheck(lambda *t, f=function, n=factor, o=options: f(*t, n, **o), leaves)
        assert torch.autograd.gradgradcheck(lambda *t, f=function, n=factor, o=options: f(*t, n, **o), leaves)
    assert uses


def test_a_shape_met_in_inference_mode_serves_training():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    with torch.inference_mode():
        pixel_unshuffle(x, 2)
    pixel_unshuffle(x, 2).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        y = pixel_unshuffle(torch.randn(1, 1, 4, 4, device="cpu"), 2)
    assert y.device.type == "cpu"


def test_a_shape_is_looked_up_from_the_second_time_on(uses):
    x = torch.randn(2, 1, 4, 4)
    for _ in range(3):
        pixel_unshuffle(x, 2)
    assert pixel_shuffle_cpu._folding.cache_info().misses == 1
    assert len(uses) == 3


def test_what_is_kept_is_limited():
    assert pixel_shuffle_cpu.LARGEST * 4 * pixel_shuffle_cpu._KEPT * 2 <= 64 * 2**20
    assert pixel_shuffle_cpu._folding.cache_info().maxsize == pixel_shuffle_cpu._KEPT


def test_others_take_the_reference(uses, monkeypatch):
    x = torch.randn(1, 1, 4, 4)
    large = torch.randn(1, 1, 1024, 512)
    pixel_unshuffle(large, 2)
    pixel_unshuffle(x, 2, backend="reference")
    pixel_unshuffle(x[:0], 2)
    pixel_shuffle_concatenate(large.view(1, 4, 256, 512), large.view(1, 4, 256, 512), 2)
    with FakeTensorMode() as mode:
        pixel_unshuffle(mode.from_tensor(x), 2)
    torch.func.vmap(lambda t: pixel_unshuffle(t[None], 2))(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(2, 1, 4, 4, requires_grad=True), torch.ones(2, 1, 4, 4))
        assert forward_ad.unpack_dual(pixel_unshuffle(dual, 2)).tangent.sum() == 32
    monkeypatch.setattr(backend, "AUTO", "reference")
    pixel_shuffle(x.expand(1, 4, 4, 4), 2)
    assert not uses
