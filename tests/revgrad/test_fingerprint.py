import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.masked import MaskedTensor
from torch.testing._internal.two_tensor import TwoTensor

from revgrad import AdditiveCoupling, ReversibleSequential, StreamError
from revgrad.fingerprint import _PIECE, _weights, fingerprint, relative_error, tolerance_of


def test_equal_streams_have_equal_fingerprints():
    x = torch.randn(3, 50, 211)
    same = x.clone()
    # Another layout of the same values is the same stream.
    other = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(fingerprint((x,)), fingerprint((same,)))
    assert torch.equal(fingerprint((x,)), fingerprint((other,)))
    assert fingerprint((x, x[0])).shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprint_does_not_depend_on_where_the_memory_begins(dtype):
    x = torch.randn(40000, dtype=dtype)
    for offset in range(1, 64):
        for length in (17, 3001, 20011):
            view = x[offset : offset + length]
            assert torch.equal(fingerprint((view,)), fingerprint((view.clone(),))), (offset, length)


@pytest.mark.parametrize("precise", [True, False])
def test_streams_of_several_sizes_and_dtypes_have_one_fingerprint_each(precise):
    streams = [torch.randn(70000), torch.randn(3, dtype=torch.float64), torch.arange(5), torch.randn(2, 140000).half()]
    together = fingerprint(streams, precise)
    assert torch.equal(together, torch.cat([fingerprint((x,), precise) for x in streams]))


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("length", [1, 246, _PIECE - 1, _PIECE, _PIECE + 1, 3 * _PIECE, 3 * _PIECE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_fingerprint_is_what_it_says(dtype, length, precise):
    x = torch.randn(length, dtype=dtype)
    weighted, plain, squares = fingerprint((x,), precise).tolist()
    flat = x.double()
    weights = (torch.arange(len(flat)) * 40503 % 65536).double() / 2**15 - 1
    tolerance = 1e-12 if precise or dtype == torch.float64 else 1e-5
    size = float(flat.norm())
    assert weighted == pytest.approx(float(weights @ flat), abs=tolerance * size)
    assert plain == pytest.approx(float(flat.sum()) / len(flat) ** 0.5, abs=tolerance * size)
    assert squares == pytest.approx(float(flat @ flat), rel=tolerance)


@pytest.mark.parametrize("length", [1, 2, 1000, 16384, 16385, 50000])
def test_fingerprint_sees_one_changed_element_and_swapped_neighbours(length):
    x = torch.randn(length)
    expected = fingerprint((x,))
    for i in {0, length // 2, length - 1}:
        y = x.clone()
        y[i] += 2.0**-16
        assert not torch.equal(fingerprint((y,)), expected)
    if length > 1:
        y = torch.cat([x[1:2], x[:1], x[2:]])
        assert not torch.equal(fingerprint((y,)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_in_less_precision_is_near_the_precise_one(dtype):
    x = torch.randn(3, 40000).to(dtype)
    precise, quick = fingerprint((x,)), fingerprint((x,), precise=False)
    size = precise[2].sqrt()
    assert float(((quick - precise).abs() / torch.stack([size, size, precise[2]])).max()) < 1e-5
    assert torch.equal(quick, fingerprint((x.clone(),), precise=False))
    assert torch.equal(quick, precise) == (dtype == torch.float64)


def test_fingerprint_of_nothing():
    assert fingerprint((torch.zeros(0, 3),)).tolist() == [0, 0, 0]


def test_fingerprints_under_fake_tensors_leave_nothing_fake_behind():
    _weights.cache_clear()
    with FakeTensorMode(), contextlib.suppress(Exception):  # values cannot be compared there
        fingerprint((torch.ones(3),))
    assert fingerprint((torch.ones(3),)).sum() != 0


def test_complex_streams_differ_in_either_part():
    x = torch.randn(3, 4, dtype=torch.complex64)
    real, imaginary = x + 1, x + 1j
    a, b, c = (fingerprint((t,)) for t in (x, real, imaginary))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(fingerprint((x.conj().conj(),)), a)
    assert not torch.equal(fingerprint((x.conj(),)), a)


def test_relative_error_is_the_share_of_what_differs():
    torch.manual_seed(0)
    x = torch.randn(10_000)
    expected, n = fingerprint((x,)), [x.numel()]
    assert float(relative_error(expected, expected, n)) == 0
    for share in (0.01, 0.1, 1.0):
        found = float(relative_error(fingerprint((x * (1 + share),)), expected, n))
        assert share <= found <= 2 * share
    zero = torch.zeros(4)
    assert float(relative_error(fingerprint((zero + 1e-3,)), fingerprint((zero,)), [4])) == pytest.approx(1e-3)


def test_tolerances_grow_with_coarser_numbers():
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    assert sorted(map(tolerance_of, dtypes)) == list(map(tolerance_of, dtypes))
    assert tolerance_of(torch.complex64) == tolerance_of(torch.float32)
    assert tolerance_of(torch.int64) == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.composes("Misuse", "nested, masked or wrapped tensors as streams", "error: *cannot compare sums*")
@pytest.mark.parametrize("kind", ["nested", "wrapped", "masked"])
def test_tensors_without_sums_say_so(kind):
    x = torch.randn(3, 4)
    if kind == "nested":
        x = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    else:
        x = TwoTensor(x, x) if kind == "wrapped" else MaskedTensor(x, x > 0)
    chain = ReversibleSequential(AdditiveCoupling(nn.Linear(4, 4) if kind != "masked" else nn.Identity()))
    inputs = (x, x.detach().requires_grad_())
    with pytest.raises(StreamError, match=f"is a {type(x).__name__}, of which .* cannot compare sums"):
        chain(*inputs)
    chain.mode = "stored"
    chain(*inputs)
