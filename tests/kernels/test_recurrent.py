import pytest
import torch
from revgrad_kernels import cell_update, hidden_output

SIZES = [(), (5,), (3, 5), (2, 3, 5)]


def literal_cell(gates, cell):
    i, f, g = gates.chunk(3, dim=1)
    return torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)


def literal_hidden(o, u):
    return torch.sigmoid(o) * torch.tanh(u)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-15)])
def test_same_values_and_gradients_as_the_composition(size, dtype, tolerance):
    gates = torch.randn(2, 9, *size, dtype=dtype, requires_grad=True)
    cell = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 3, *size, dtype=dtype)
    for operator, literal, inputs in [
        (cell_update, literal_cell, (gates, cell)),
        (hidden_output, literal_hidden, (gates[:, :3], cell)),
    ]:
        found, expected = operator(*inputs), literal(*inputs)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        ours = torch.autograd.grad(found, (gates, cell), grad)
        theirs = torch.autograd.grad(expected, (gates, cell), grad)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=4 * tolerance, atol=4 * tolerance)


def test_gradcheck():
    gates = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    cell = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell_update, (gates, cell))
    assert torch.autograd.gradcheck(hidden_output, (gates[:, :2].detach().requires_grad_(), cell))


def test_saves_its_inputs_only(single_thread):
    saved = []
    gates, cell = torch.randn(2, 6, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cell_update(gates, cell)
        hidden_output(gates[:, :2], cell)
    assert [x.data_ptr() for x in saved] == [gates.data_ptr(), cell.data_ptr(), gates.data_ptr(), cell.data_ptr()]


def test_mixed_dtypes_compute_in_the_cells():
    gates = torch.randn(2, 6, 3).bfloat16().requires_grad_()
    cell = torch.randn(2, 2, 3, requires_grad=True)
    new = cell_update(gates, cell)
    assert new.dtype == torch.float32
    assert torch.equal(new, cell_update(gates.float(), cell))
    hidden = hidden_output(gates[:, :2], new)
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, hidden_output(gates[:, :2].float(), new))
    hidden.sum().backward()
    assert gates.grad.dtype == torch.bfloat16
    assert cell.grad.dtype == torch.float32


def test_gradients_of_strided_inputs():
    gates = torch.randn(3, 6, 2, dtype=torch.float64).transpose(0, 2).requires_grad_()  # [2, 6, 3]
    cell = torch.randn(1, 2, 3, dtype=torch.float64).expand(2, 2, 3).requires_grad_()
    ours = torch.autograd.grad(cell_update(gates, cell).sum(), (gates, cell))
    theirs = torch.autograd.grad(literal_cell(gates, cell).sum(), (gates, cell))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cell", [(2, 3, 5), (2, 2, 4), (1, 2, 5)])
def test_shapes_that_do_not_fit(cell):
    with pytest.raises(ValueError, match=r"cell_update: gates \(2, 6, 5\) must have three times the channels"):
        cell_update(torch.zeros(2, 6, 5), torch.zeros(cell))
    with pytest.raises(ValueError, match=r"hidden_output: shapes .* differ"):
        hidden_output(torch.zeros(2, 6, 5), torch.zeros(cell))


def test_second_derivatives_are_refused():
    gates, cell = torch.randn(2, 6, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(cell_update(gates, cell).square().sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        grad.sum().backward()
