import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from revgrad_kernels import pixel_shuffle, pixel_shuffle_concatenate, pixel_unshuffle, pixel_unshuffle_split
from revgrad_kernels.backend import tl, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.kernels.cases import DEVICE, LAYOUTS, arrange, needs_triton

module = importlib.import_module("revgrad_kernels.pixel_shuffle")
ORDERS = ["pytorch", "irevnet"]
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
CASES = [((2, 3, 4, 6), 2), ((1, 1, 9, 3), 3), ((2, 2, 5, 7), 1), ((3, 1, 4, 4), 4)]
DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
]  # fmt: skip


def literal(x, n, order):
    """The module docstring, pixel by pixel."""
    channels, (height, width) = x.shape[1], x.shape[-2:]
    y = x.new_empty(x.shape[0], channels * n * n, *x.shape[2:-2], height // n, width // n)
    for c, i, j, h, w in itertools.product(range(channels), range(n), range(n), range(height // n), range(width // n)):
        k = c * n * n + i * n + j if order == "pytorch" else (i * n + j) * channels + c
        y[:, k, ..., h, w] = x[:, c, ..., h * n + i, w * n + j]
    return y


def numbered(shape, layout="contiguous", dtype=torch.float32):
    """No two elements alike, as far as the dtype can tell them apart."""
    return arrange(torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape).to(dtype), layout)


def assert_same(found, expected):
    """The same bits at the same places in memory, in tensors of their own."""
    found, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def functions(x, n, order, backend):
    """All four functions, with the arguments they have when `x` is folded and unfolded again."""
    options = {"order": order, "backend": backend}
    folded = pixel_unshuffle(x, n, order=order, backend="reference")
    found = [(pixel_unshuffle, (x, n), options), (pixel_shuffle, (folded, n), options)]
    if folded.shape[1] % 2 == 0:
        halves = pixel_unshuffle_split(x, n, order=order, backend="reference")
        found += [(pixel_unshuffle_split, (x, n), options), (pixel_shuffle_concatenate, (*halves, n), options)]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("frames", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_every_pixel_goes_where_the_documentation_says_and_back(shape, factor, frames, order, backend):
    x = numbered((*shape[:2], *frames, *shape[2:]))
    folded = pixel_unshuffle(x, factor, order=order, backend=backend)
    assert torch.equal(folded, literal(x, factor, order))
    assert torch.equal(pixel_shuffle(folded, factor, order=order, backend=backend), x)


@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_the_order_by_default_is_pytorchs(shape, factor):
    x = torch.randn(shape)
    folded = pixel_unshuffle(x, factor)
    assert torch.equal(folded, F.pixel_unshuffle(x, factor))
    assert torch.equal(pixel_shuffle(folded, factor), F.pixel_shuffle(folded, factor))


def test_the_order_of_irevnet_keeps_the_channels_of_a_pixel_together():
    x = numbered((1, 2, 4, 4))
    folded = pixel_unshuffle(x, 2, order="irevnet")
    for i, j in itertools.product(range(2), range(2)):
        assert torch.equal(folded[:, 4 * i + 2 * j : 4 * i + 2 * j + 2], x[:, :, i::2, j::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((2, 1, 4, 4), 2), ((2, 3, 4, 6), 2), ((1, 4, 3, 4, 2), 1), ((1, 4, 3, 4, 2), 2), ((1, 2, 3, 6), 3)],
    ids=str,
)
def test_split_is_unshuffle_and_two_halves_and_concatenate_undoes_it(shape, factor, layout, order, backend):
    x = numbered(shape, layout)
    halves = pixel_unshuffle_split(x, factor, order=order, backend=backend)
    for half, expected in zip(halves, pixel_unshuffle(x, factor, order=order).chunk(2, 1), strict=True):
        assert torch.equal(half, expected)
        assert half.is_contiguous() or half.is_contiguous(memory_format=module.memory_format(x))
    back = pixel_shuffle_concatenate(*halves, factor, order=order, backend=backend)
    assert torch.equal(back, x)
    assert module.memory_format(back) == module.memory_format(x)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_moves_every_dtype_as_the_reference_does(dtype, layout):
    # 12 x 26 pixels of 5 channels: more than one tile, and none of them full.
    for function, (*tensors, n), options in functions(numbered((1, 5, 12, 26), dtype=dtype), 2, "pytorch", "triton"):
        if layout == "strided":
            tensors = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in tensors]
        else:
            tensors = [arrange(t, layout) for t in tensors]
        assert_same(function(*tensors, n, **options), function(*tensors, n, backend="reference"))


@needs_triton
@given(
    st.integers(1, 4),
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from([(), (0,), (1,), (3,)])),
    st.tuples(st.integers(0, 5), st.integers(0, 7)),
    st.sampled_from(LAYOUTS),
    st.sampled_from(ORDERS),
)
@example(2, (1, 70, ()), (1, 2), "channels_last", "pytorch")
@example(2, (1, 70, ()), (1, 2), "channels_last", "irevnet")
@example(3, (2, 2, (2,)), (1, 130), "contiguous", "pytorch")
@example(3, (2, 2, (2,)), (1, 130), "contiguous", "irevnet")
def test_triton_moves_every_shape_as_the_reference_does(factor, leading, size, layout, order):
    batch, channels, frames = leading
    x = numbered((batch, channels, *frames, *(s * factor for s in size)), layout, torch.float32)
    for function, arguments, options in functions(x, factor, order, "triton"):
        assert_same(function(*arguments, **options), function(*arguments, order=order, backend="reference"))


@triton.jit
def divided(out_ptr, start, divisor, SIZE: tl.constexpr):
    more = tl.arange(0, SIZE)
    quotient, quotients, remainder = module._divided(tl.cast(start, tl.int64), more, divisor)
    tl.store(out_ptr + more, quotient + quotients)
    tl.store(out_ptr + SIZE + more, remainder.to(tl.int64))


@needs_triton
@pytest.mark.parametrize("start", [0, 5, 2**31 - 3, 2**40 + 7])
@pytest.mark.parametrize("divisor", [1, 2, 3, 1000, 2**30])
def test_indices_beyond_32_bits_are_divided_as_whole_numbers(start, divisor):
    out = torch.empty(2, 64, dtype=torch.int64, device=DEVICE)
    divided[(1,)](out, start, divisor, SIZE=64)
    assert out.T.tolist() == [list(divmod(start + i, divisor)) for i in range(64)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "strided")])
def test_groups_may_differ_in_layout(layouts, backend):
    x = numbered((2, 3, 4, 6))
    first, second = (arrange(t, layout) for t, layout in zip(pixel_unshuffle_split(x, 2), layouts, strict=True))
    back = pixel_shuffle_concatenate(first, second, 2, backend=backend)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=module.memory_format(first))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("factor", [1, 2])
def test_the_layout_is_kept_and_the_result_is_a_tensor_of_its_own(factor, layout, backend):
    for shape in (2, 4, 4, 6), (2, 4, 3, 4, 6):
        x = numbered(shape, layout)
        for function, (*tensors, n), options in functions(x, factor, "pytorch", backend):
            results = function(*tensors, n, **options)
            for result in (results,) if isinstance(results, torch.Tensor) else results:
                assert result.is_contiguous(memory_format=module.memory_format(x))
                assert not result._is_view() or result._base.numel() == result.numel()
                assert result.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("factor", "order", "layout"), [(2, "pytorch", "channels_last"), (3, "irevnet", "contiguous")])
def test_first_and_second_derivatives(factor, order, layout, backend):
    x = arrange(torch.randn(1, 2, factor, 2 * factor, dtype=torch.float64), layout)
    for function, (*tensors, n), options in functions(x, factor, order, backend):
        # Of the square, since the second derivative of a linear function is zero.
        square = lambda *t, f=function, n=n, o=options: f(*(u * u for u in t), n, **o)  # noqa: E731
        leaves = [t.detach().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(square, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(square, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_inverse_bit_by_bit(layout, backend):
    x = arrange(torch.randn(2, 3, 4, 6), layout)
    for order in ORDERS:
        (_, _, options), *_ = functions(x, 2, order, backend)
        leaf = x.detach().requires_grad_()
        grad = torch.randn(2, 12, 2, 3, device=DEVICE)
        (found,) = torch.autograd.grad(pixel_unshuffle(leaf, 2, **options), leaf, grad)
        assert torch.equal(found, pixel_shuffle(grad, 2, **options))
        first, _ = pixel_unshuffle_split(leaf, 2, **options)
        (found,) = torch.autograd.grad(first, leaf, grad[:, :6])
        assert torch.equal(found, pixel_shuffle(torch.cat([grad[:, :6], 0 * grad[:, :6]], 1), 2, **options))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("factor", [2, 3])
def test_samples_of_any_layout_inside_vmap(factor, order, layout):
    x = arrange(torch.randn(5, 2, 6, 2 * factor, 3 * factor), layout)
    for function, (*tensors, n), options in functions(x[0], factor, order, "auto"):
        many = [torch.stack([t * k for k in range(3)], -1) for t in tensors]
        expected = function(*(t * 2 for t in tensors), n, **options)
        found = torch.vmap(lambda *t, f=function, n=n, o=options: f(*t, n, **o), in_dims=-1)(*many)
        for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)), strict=True):
            assert torch.equal(one[2], other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dtype_is_kept_under_autocast(backend):
    x = torch.randn(1, 4, 2, 2, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for function, arguments, options in functions(x, 2, "pytorch", backend):
            results = function(*arguments, **options)
            assert {t.dtype for t in ((results,) if isinstance(results, torch.Tensor) else results)} == {torch.float32}


@pytest.mark.parametrize(
    ("shape", "layout", "order"),
    [
        ((2, 2, 4, 6), "contiguous", "irevnet"),
        ((1, 2, 3, 4, 2), "channels_last", "pytorch"),
        ((1, 1, 2, 4), "strided", "pytorch"),
    ],
)
def test_opcheck(shape, layout, order):
    x = arrange(torch.randn(shape), layout)
    for function, (*tensors, n), _ in functions(x, 2, order, "reference"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(getattr(module, f"_{function.__name__}"), (*leaves, n, order))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_without_a_graph_break_and_exports(layout, backend):
    class Fold(torch.nn.Module):
        def forward(self, x):
            first, second = pixel_unshuffle_split(x * 2, 2, backend=backend)
            x = pixel_shuffle_concatenate(second, first, 2, backend=backend)
            return pixel_shuffle(pixel_unshuffle(x, 2, order="irevnet", backend=backend), 2, backend=backend)

    x = arrange(torch.randn(2, 2, 4, 6), layout)
    compiled = torch.compile(Fold(), backend="aot_eager", fullgraph=True)
    grad = arrange(torch.randn(x.shape), layout)
    results = []
    for function in (Fold(), compiled, torch.export.export(Fold(), (x,)).module()):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for result in results[1:]:
        assert_same(result, results[0])


def test_fake_tensors_of_a_gpu_take_the_operator_and_keep_the_layout():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.profiler.profile() as profile:
        x = torch.empty(2, 2, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        y = pixel_unshuffle(x, 2)
        first, second = pixel_unshuffle_split(x, 2)
        back = pixel_shuffle_concatenate(first, second, 2)
        assert y.device.type == "cuda"
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, first, second, back))
        assert pixel_shuffle(y, 2).stride() == back.stride() == x.stride()
    names = {"pixel_unshuffle", "pixel_shuffle", "pixel_unshuffle_split", "pixel_shuffle_concatenate"}
    assert {f"revgrad::{name}" for name in names} <= {event.name for event in profile.events()}


def test_tensors_without_data():
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert pixel_unshuffle(x, 2).shape == (2, 12, 2, 2)
    assert [half.shape for half in pixel_unshuffle_split(x, 2, order="irevnet")] == [(2, 6, 2, 2)] * 2


@pytest.mark.parametrize("operator", [pixel_shuffle, pixel_unshuffle, pixel_unshuffle_split])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 4, 1, 1, 4, 4)])
def test_wrong_number_of_dimensions(operator, shape):
    with pytest.raises(ValueError, match=rf"{operator.__name__}: expected .* got shape \({shape[0]}, {shape[1]}"):
        operator(torch.zeros(shape), 2)


@pytest.mark.parametrize("operator", [pixel_unshuffle, pixel_unshuffle_split])
@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_unshuffle_of_indivisible_frames_says_what_to_do(size, operator):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels cannot be folded by 2; pad or resize"):
        operator(torch.zeros(1, 1, *size), 2)


def test_shuffle_of_indivisible_channels():
    with pytest.raises(ValueError, match="6 channels are not a multiple of 2 x 2"):
        pixel_shuffle(torch.zeros(1, 6, 2, 2), 2)
    with pytest.raises(ValueError, match="pixel_shuffle_concatenate: 6 channels are not a multiple of 2 x 2"):
        pixel_shuffle_concatenate(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), 2)


def test_odd_channels_have_no_halves():
    with pytest.raises(ValueError, match=r"3 channels folded by 3 are 27, .* use pixel_unshuffle"):
        pixel_unshuffle_split(torch.zeros(1, 3, 3, 3), 3)


@pytest.mark.parametrize(
    "second", [torch.zeros(1, 6, 2, 2), torch.zeros(1, 2, 2, 2).double()], ids=["channels", "dtype"]
)
def test_groups_that_differ_are_refused(second):
    with pytest.raises(
        ValueError, match=r"same shape and dtype, got \(1, 2, 2, 2\) torch.float32 and .* use pixel_shuffle"
    ):
        pixel_shuffle_concatenate(torch.zeros(1, 2, 2, 2), second, 2)


@pytest.mark.parametrize("operator", [pixel_shuffle, pixel_unshuffle, pixel_unshuffle_split])
def test_arguments_out_of_range(operator):
    with pytest.raises(ValueError, match=operator.__name__):
        operator(torch.zeros(1, 4, 4, 4), 0)
    with pytest.raises(ValueError, match=f"{operator.__name__}: order must be one of pytorch, irevnet, got 'rows'"):
        operator(torch.zeros(1, 4, 4, 4), 2, order="rows")


@pytest.mark.parametrize("operator", [pixel_shuffle, pixel_unshuffle, pixel_unshuffle_split])
def test_the_factor_is_an_integer_whatever_came_before(operator):
    x = torch.zeros(1, 4, 4, 4)
    for factor in (2.0, 2, 2.0, "2", (2, 2), None, torch.tensor(2.0)):
        if factor == 2 and isinstance(factor, int):
            expected = operator(x, factor)
            continue
        with pytest.raises(TypeError, match=rf"^{operator.__name__}: the factor must be an integer, got"):
            operator(x, factor)
    for integer in (torch.tensor(2), np.int64(2)):
        assert_same(operator(x, integer), expected)
    with pytest.raises(ValueError, match=r"order must be one of pytorch, irevnet, got \['pytorch'\]"):
        operator(x, 2, order=["pytorch"])
