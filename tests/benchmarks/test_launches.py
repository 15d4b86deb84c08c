import torch

from benchmarks.launches import Launches


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
