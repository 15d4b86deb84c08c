import pytest
import torch

from revgrad import ReversibilityError
from revgrad.gradients import add, check_closed, edge, gradients, is_differentiable, leaf, negated, per_sample


def test_leaf_is_a_fresh_leaf():
    x = torch.randn(3, requires_grad=True) * 2
    y = leaf(x)
    assert y.is_leaf
    assert y.requires_grad
    assert y.data_ptr() == x.data_ptr()
    assert not leaf(torch.arange(3)).requires_grad


def test_gradients_take_none_for_zero():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    constant = torch.ones(2)
    one = torch.ones(2)
    assert gradients((3 * x,), (None,), (x, y)) == (None, None)
    assert gradients((constant,), (one,), (x,)) == (None,)
    found = gradients((3 * x, constant, 5 * x), (one, one, None), (x, constant, y))
    assert found[0].tolist() == [3, 3]
    assert found[1:] == (None, None)


def test_gradients_get_a_graph_on_demand():
    x = torch.tensor([3.0], requires_grad=True)
    y, ones = x**3, torch.ones(1)
    (first,) = gradients((y,), (ones,), (x,), create_graph=True)
    assert gradients((first,), (ones,), (x,))[0].item() == 18
    assert not gradients((x**3,), (ones,), (x,))[0].requires_grad


def test_add_takes_none_for_zero():
    x = torch.ones(2)
    assert add(None, None) is None
    assert add(x, None) is x
    assert add(None, x) is x
    assert add(x, x).tolist() == [2, 2]


def test_negated_takes_none_for_zero():
    assert negated(None) is None
    assert negated(torch.ones(1)).item() == -1


def test_per_sample_sums_everything_but_the_first_dimension():
    x = torch.arange(12.0).view(2, 3, 2)
    assert per_sample(x).tolist() == [15, 51]
    assert per_sample(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert per_sample(torch.zeros(0, 3)).shape == (0,)
    assert per_sample(torch.zeros(3, 0)).tolist() == [0, 0, 0]
    assert per_sample(torch.full((1, 1000), 1.001, dtype=torch.bfloat16)).dtype == torch.float32
    assert per_sample(x.double()).dtype == torch.float64


def test_integers_have_no_gradient():
    kinds = {torch.float32: True, torch.bfloat16: True, torch.complex64: True, torch.int64: False, torch.bool: False}
    assert {kind: is_differentiable(torch.zeros(1, dtype=kind)) for kind in kinds} == kinds


def test_gradients_begin_at_edges_as_at_tensors():
    x = torch.tensor([2.0], requires_grad=True)
    assert gradients((edge(x * x),), (torch.ones(1),), (x,))[0].item() == 4
    assert edge(x.detach()) is None


def test_a_tensor_that_would_get_no_gradient_is_found():
    x, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    check_closed("layer 3", (x * 2, other.detach()), (x,))
    check_closed("layer 3", (x * other,), (x, other))
    with pytest.raises(ReversibilityError, match=r"layer 3: the transform reads a tensor of shape \(2,\)"):
        check_closed("layer 3", (x * 2, x * other.exp()), (x,))
