"""The recurrent operators' code for the CPU: it computes what the reference does, and knows when it is not the one."""

import pytest
import torch
from revgrad_kernels import cell_update, recurrent_cpu
from revgrad_kernels.backend import BackendError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests.kernels.cases import arrange, assert_close
from tests.kernels.test_recurrent import FUNCTIONS, LAYOUTS, assert_same, inputs, results

SHAPES = [(1, 1), (3, 31), (2, 127, 3), (2, 3, 5, 7), (1, 33, 1, 2), (2, 4, 3, 5, 2), (0, 3, 4, 4)]


@pytest.fixture
def all_sizes(monkeypatch):
    """Small tensors take the code as well."""
    monkeypatch.setattr(recurrent_cpu, "SMALL", 0)


@pytest.fixture
def uses(monkeypatch):
    """How often the code has been used."""
    found = []
    compute = recurrent_cpu.Operator.compute.__func__
    spy = classmethod(lambda cls, *tensors: (found.append(cls), compute(cls, *tensors))[1])
    monkeypatch.setattr(recurrent_cpu.Operator, "compute", spy)
    return found


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 4e-15)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_values_gradients_and_layouts_as_the_reference(
    all_sizes, uses, function, dtype, tolerance, shape, layout, optional
):
    tensors = {name: t.cpu() for name, t in inputs(function, shape, dtype, layout, optional).items()}
    found, expected = results(function, tensors), results(function, tensors, backend="reference")
    assert len(uses) == 1
    assert_same(found, expected, {"rtol": tolerance, "atol": tolerance}, samples=max(1, torch.Size(shape).numel()))
    if layout != "strided":
        for one, other in zip(found[0], expected[0], strict=True):
            assert one.stride() == other.contiguous(memory_format=layout_of(tensors)).stride()


def layout_of(tensors):
    """The memory format of gates, or of the update."""
    x = next(tensors[name] for name in ("gates", "update") if name in tensors)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.is_contiguous():
        return torch.contiguous_format
    return last


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(all_sizes, uses, function, optional):
    leaves = [t.cpu().requires_grad_() for t in inputs(function, (2, 2, 2), torch.float64, optional=optional).values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert uses


@pytest.mark.parametrize("function", FUNCTIONS)
def test_with_and_without_gradients_the_bits_are_the_same(all_sizes, function):
    tensors = {name: t.cpu() for name, t in inputs(function, (2, 5, 3, 4)).items()}
    with torch.no_grad():
        plain = function(**tensors)
    traced = function(**{name: t.requires_grad_() for name, t in tensors.items()})
    for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (plain, traced)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_some_inputs_only(all_sizes, function):
    tensors = {name: t.cpu() for name, t in inputs(function, (2, 3, 4)).items()}
    grads = results(function, tensors)[1]
    for wanted in tensors:
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(y.shape, generator=generator) for y in outputs]
        used = [(y, g) for y, g in zip(outputs, incoming, strict=True) if y.requires_grad]
        found = torch.autograd.grad([y for y, _ in used], leaves[wanted], [g for _, g in used])[0]
        assert torch.equal(found, grads[wanted]), wanted


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batched_gradients(all_sizes, uses, function):
    leaves = [t.cpu().requires_grad_() for t in inputs(function, (2, 3, 4, 5)).values()]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for some in (outputs, *([y] for y in outputs)):
        grads = [torch.randn(3, *y.shape) for y in some]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(some, leaves, grads, is_grads_batched=True, **options)
        for k in range(3):
            expected = torch.autograd.grad(some, leaves, [g[k] for g in grads], **options)
            for one, other in zip(found, expected, strict=True):
                assert_close(one[k] if one.ndim > other.ndim else one, other)
    assert uses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_off_by_roundings_of_one_at_most(dtype):
    x = torch.cat([torch.linspace(-20, 20, 20001), torch.tensor([0.0, 1e-8, torch.inf, -torch.inf])]).to(dtype)
    assert float((recurrent_cpu.tanh(x) - torch.tanh(x.double())).abs().max()) <= 2 * torch.finfo(dtype).eps
    assert float(recurrent_cpu.tanh(torch.zeros(1, dtype=dtype))) == 0
    assert recurrent_cpu.tanh(torch.tensor([torch.nan], dtype=dtype)).isnan()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_are_refused_and_the_error_says_who_has_them(all_sizes, function):
    leaves = [t.cpu().requires_grad_() for t in inputs(function, (2, 3, 4)).values()]
    outputs = function(*leaves)
    first = (outputs if isinstance(outputs, tuple) else (outputs,))[0]
    with pytest.raises(BackendError, match="no second derivative on a CPU; for one choose backend='reference'"):
        torch.autograd.grad(first.sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_tensors_go_through(all_sizes, uses, function):
    shapes = {name: t.shape for name, t in inputs(function, (2, 3, 4)).items()}
    with FakeTensorMode():
        results(function, {name: torch.empty(shape) for name, shape in shapes.items()}, grads=None)
    assert len(uses) == 1


def test_small_tensors_take_plain_pytorch_and_others_do_not(uses):
    side = int(recurrent_cpu.SMALL**0.5)
    for function in FUNCTIONS:
        results(function, {name: t.cpu() for name, t in inputs(function, (1, 1, side - 1, side)).items()})
    assert not uses
    for function in FUNCTIONS:
        results(function, {name: t.cpu() for name, t in inputs(function, (1, 2, side, side)).items()})
    assert len(uses) == len(FUNCTIONS)


def test_other_tensors_take_the_reference(all_sizes, uses, monkeypatch):
    gates, cell = torch.randn(2, 6, 5), torch.randn(2, 2, 5)
    mixed = cell_update(gates.bfloat16(), cell)
    half = cell_update(gates.half(), cell.half())
    assert (mixed.dtype, half.dtype) == (torch.float32, torch.float16)
    cell_update(gates, cell, backend="reference")
    monkeypatch.setattr("revgrad_kernels.backend.AUTO", "reference")
    cell_update(gates, cell)
    assert not uses


def test_transforms_of_functions_and_compilers_take_the_reference(all_sizes, uses):
    gates, cell = torch.randn(2, 6, 5), torch.randn(2, 2, 5)

    def loss(gates):
        return cell_update(gates, cell).square().sum()

    found = torch.func.grad(loss)(gates)
    expected = torch.autograd.grad(loss(leaf := gates.clone().requires_grad_()), leaf)[0]
    assert_close(found, expected)
    uses.clear()
    torch.compile(loss, backend="eager", fullgraph=True)(gates)
    assert not uses


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_takes_the_reference(all_sizes, uses, function):
    tensors = {name: t.cpu() for name, t in inputs(function, (2, 3, 4)).items()}
    tangents = []
    for backend in ("auto", "reference"):
        with forward_ad.dual_level():
            outputs = function(**{name: forward_ad.make_dual(t, t) for name, t in tensors.items()}, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            tangents.append([forward_ad.unpack_dual(y).tangent for y in outputs])
    assert all(map(torch.equal, *tangents))
    assert not uses


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_and_incoming_gradients_stay_as_they_are(all_sizes, function):
    tensors = [arrange(t, "contiguous").cpu().requires_grad_() for t in inputs(function, (2, 3, 4)).values()]
    before = [t.detach().clone() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(y) for y in outputs]
    kept = [g.clone() for g in grads]
    first, second = (torch.autograd.grad(outputs, tensors, grads, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, (*tensors, *grads, *first), (*before, *kept, *second)))
