import gc
import time

import pytest
import torch
from torch import nn

from benchmarks.contenders import stored
from benchmarks.engine_measures import (
    MIB,
    ResizedMemory,
    counts,
    loss_weight,
    relative_error,
    step_seconds,
    true_gradient,
)
from benchmarks.engine_workloads import Block, Workload
from benchmarks.timing import no_collector
from revgrad import LiveMemory

pytestmark = pytest.mark.usefixtures("single_thread")

LINEAR = Workload("linear", lambda: Block(nn.Linear(4, 4), nn.Linear(4, 4)), (1024, 8), 1, (2,), "linear")


def test_counts_are_the_same_every_time():
    stack, x = LINEAR.build(2)
    one, other = (counts(stored(stack), stack, x) for _ in range(2))
    assert one.peak_mib == other.peak_mib > 0
    assert one.evaluations == other.evaluations == 1
    assert torch.equal(one.gradient, other.gradient)
    assert torch.equal(one.input_gradient, other.input_gradient)
    assert len(one.gradient) == sum(p.numel() for p in stack.blocks.parameters())
    assert gc.isenabled()


def test_counts_do_not_include_what_was_there_before():
    """Of the output alone: a state, its product with the weight, and the gradient that comes back."""
    stack, x = LINEAR.build(1)
    peak = counts(lambda x: x * 2, stack, x).peak_mib
    assert peak <= 3 * x.numel() * 4 / MIB + 1e-3


def test_sees_storages_that_are_resized_by_hand():
    for counter, live in ((ResizedMemory, 40), (LiveMemory, 80)):
        with no_collector(), counter() as memory:
            a, b = torch.zeros(10), torch.zeros(10)
            a.untyped_storage().resize_(0)
            b.add_(1)
            assert memory.live == live
            a.untyped_storage().resize_(80)
            b.add_(1)
            assert memory.live == (120 if live == 40 else 80)
            del a, b
            assert memory.live == 0
        assert memory.peak == (120 if live == 40 else 80)


@pytest.mark.parametrize("resized", [True, False])
def test_counts_see_what_is_resized_where_they_are_to(resized):
    """A state that is freed by hand as soon as its product is there."""
    stack, x = LINEAR.build(1)

    def freeing(x):
        y = x * 2
        z = y * 2
        y.untyped_storage().resize_(0)
        return z * 2

    tensors = round(counts(freeing, stack, x, resized=resized).peak_mib * MIB / (4 * x.numel()))
    assert tensors == (2 if resized else 3)


def test_gradients_that_were_there_do_not_matter():
    stack, x = LINEAR.build(2)
    expected = counts(stored(stack), stack, x).gradient
    step_seconds(stored(stack), x, loss_weight(x))
    assert torch.equal(counts(stored(stack), stack, x).gradient, expected)


def test_true_gradient_leaves_the_stack_alone():
    stack, x = LINEAR.build(2)
    before = [p.clone() for p in stack.blocks.parameters()]
    truth = true_gradient(stack, x)
    assert truth.dtype == torch.float64
    assert all(p.dtype == torch.float32 and p.grad is None for p in stack.blocks.parameters())
    assert all(map(torch.equal, stack.blocks.parameters(), before))
    assert relative_error(counts(stored(stack), stack, x).gradient, truth) < 1e-5


def test_relative_error():
    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.0]), true) == 0
    assert relative_error(torch.tensor([3.0, 9.0]), true) == 1


def test_loss_weights_differ_and_are_the_same_every_time():
    x = torch.zeros(5, 3, dtype=torch.float64)
    assert torch.equal(loss_weight(x), loss_weight(x))
    assert loss_weight(x).unique().numel() == 15
    assert loss_weight(x).dtype == torch.float64


@pytest.mark.parametrize("shape", [(10, 10), (1000, 100)])
def test_loss_weights_are_of_one_length_whatever_the_size(shape):
    """Each of the n numbers is of the order of 1/n, all of them together of that of one over the root of n."""
    x = torch.zeros(shape)
    assert loss_weight(x).norm().item() == pytest.approx(x.numel() ** -0.5, rel=0.2)


def test_step_seconds_is_processor_time():
    x = torch.zeros(4, requires_grad=True)

    def sleepy(x):
        time.sleep(0.2)
        return 2 * x

    assert step_seconds(sleepy, x, loss_weight(x)) < 0.1


def test_step_seconds_is_a_time():
    stack, x = LINEAR.build(1)
    assert 0 < step_seconds(stored(stack), x, loss_weight(x)) < 10
    assert gc.isenabled()
