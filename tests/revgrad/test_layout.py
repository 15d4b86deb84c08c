import pytest
import torch

from revgrad.layout import dense, laid_out

WHOLE = torch.arange(2.0 * 6 * 4 * 5).view(2, 6, 4, 5)


@pytest.mark.parametrize(
    "x", [WHOLE, WHOLE.to(memory_format=torch.channels_last), WHOLE.permute(2, 0, 3, 1)], ids=["plain", "last", "moved"]
)
def test_layouts_without_gaps_stay_what_they_are(x):
    assert dense(x) is x


@pytest.mark.parametrize(
    "x", [WHOLE[:, :3], WHOLE[..., ::2], WHOLE[:1].expand(3, 6, 4, 5)], ids=["chunk", "every other", "expanded"]
)
def test_views_with_gaps_or_overlaps_become_contiguous(x):
    assert dense(x).is_contiguous()
    assert torch.equal(dense(x), x)


def test_values_are_the_same_in_another_layout():
    strides = WHOLE.to(memory_format=torch.channels_last).stride()
    there = laid_out(WHOLE, strides)
    assert there.stride() == strides
    assert torch.equal(there, WHOLE)
    assert laid_out(there, strides) is there


def test_what_is_not_aligned_is_copied():
    memory = torch.arange(2.0 * 100)
    for x in (memory[1:].view(199), memory[20:140].view(2, 60).t(), memory[4:8]):
        for found in (dense(x), laid_out(x, x.stride())):
            assert found.storage_offset() == 0
            assert found.stride() == x.stride()
            assert torch.equal(found, x)
    x = memory[16:32]
    assert dense(x) is laid_out(x, x.stride()) is x
