import pytest
import torch
from revgrad_kernels import layout
from revgrad_kernels.backend import tl, triton

from tests.kernels.cases import DEVICE, needs_triton


@triton.jit
def counted(out_ptr, columns, WIDTH: tl.constexpr):
    tl.store(out_ptr, layout.tiles_across(columns, WIDTH))


@needs_triton
@pytest.mark.parametrize("width", [1, 128, 1024])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 2**31 - 1, 2**31 + 1, 2**40])
def test_columns_are_counted_in_tiles_up_to_the_limit_of_32_bits_and_beyond(columns, width):
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    counted[(1,)](out, columns, WIDTH=width)
    assert out.item() == -(-columns // width)
