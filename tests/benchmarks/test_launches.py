import pytest
import revgrad_kernels  # noqa: F401  # registers the operators
import torch

from benchmarks.launches import Launches, group_of

OURS = sorted({n.partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("revgrad::")})
GROUPS = {
    "convolution": ["convolution", "convolution_backward", "mkldnn_convolution", "addmm", "index_select"],
    "copy": [
        *("copy_", "_to_copy", "clone", "cat", "stack", "contiguous"),
        *("zero_", "zeros_like", "new_zeros", "full", "full_like", "ones", "ones_like", "fill_"),
    ],
    "ReLU": ["relu", "relu_", "threshold_backward"],
    "pointwise, reductions": ["add", "mul_", "sigmoid", "tanh_backward", "sum", "where", "threshold", "round"],
}


def test_operators_are_counted_with_the_bytes_they_read_and_write():
    x, y = torch.randn(10, 4), torch.randn(4, 3)
    with Launches() as launches:
        (x @ y).relu_()
    assert {name: (count.calls, count.bytes) for name, count in launches.counts.items()} == {
        "mm": (1, 4 * (40 + 12 + 30)),
        "relu_": (1, 4 * 30),
    }


def test_views_and_allocations_launch_nothing():
    x = torch.randn(4, 6)
    with Launches() as launches:
        x.t().reshape(3, 8)[1:].detach()
        torch.empty(5)
        torch.empty_like(x)
    assert list(launches.counts) == ["clone"]


def test_groups_hold_everything_largest_first():
    x = torch.randn(1, 2, 8, 8)
    with Launches() as launches:
        y = torch.nn.functional.conv2d(x, torch.randn(4, 2, 3, 3))
        torch.cat([y, y]).relu().add(1)
    groups = launches.by_group()
    assert sum(c.bytes for c in groups.values()) == sum(c.bytes for c in launches.counts.values())
    assert [c.bytes for c in groups.values()] == sorted((c.bytes for c in groups.values()), reverse=True)
    assert set(groups) >= {"convolution", "copy", "ReLU"}


@pytest.mark.parametrize("name", OURS)
def test_all_of_our_operators_are_fused_kernels(name):
    """Whatever their names contain: two of them contain `cat` and `fill`."""
    assert group_of(name) == "fused kernels"


def test_some_of_our_operators_are_called_like_others():
    assert {"revgrad::pixel_shuffle_concatenate", "revgrad::exact_weighted_sum_refill"} <= set(OURS)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_the_kind_of_an_operator(group, name):
    assert group_of(name) == group
