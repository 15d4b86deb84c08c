import pytest
import torch

from benchmarks.contenders import stored
from benchmarks.engine_measures import MIB, counts
from benchmarks.engine_workloads import CONVOLUTION, TRANSFORMER, WORKLOADS, Counted

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_stacks_are_the_same_every_time(workload):
    (one, x), (other, y) = workload.build(2), workload.build(2)
    assert torch.equal(x, y)
    assert x.shape == workload.shape
    assert x.numel() * x.element_size() in (2 * MIB,)
    assert len(one.blocks) == 2
    assert len(one.transforms) == 4
    for a, b in zip(one.blocks.parameters(), other.blocks.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("workload", "mib"),
    [
        # Twice what a convolution, a normalisation and a ReLU save: a stream each.
        (CONVOLUTION, 2 * 3),
        # Stream, normalisation, queries, keys, values, attention; and stream, normalisation, twice four widths.
        (TRANSFORMER, (2 + 3 + 1) + (2 + 4 + 4)),
    ],
    ids=["convolution", "transformer"],
)
def test_stored_autograd_keeps_what_a_block_saves(workload, mib):
    peaks = []
    for depth in (1, 2):
        stack, x = workload.build(depth)
        peaks.append(counts(stored(stack), stack, x).peak_mib)
    assert mib <= peaks[1] - peaks[0] < mib * 1.01


def test_a_block_is_two_couplings():
    stack, x = CONVOLUTION.build(1)
    (block,) = stack
    a, b = x.detach().chunk(2, 1)
    with torch.no_grad():
        c, d = block(a, b)
        assert torch.equal(c, a + block.f(b))
        assert torch.equal(d, b + block.g(c))


def test_evaluations_are_counted_however_a_transform_is_called():
    transform = Counted(torch.nn.Identity())
    x = torch.zeros(1)
    assert transform(x) is x
    assert transform.forward(x) is x
    assert transform.count == [2]
