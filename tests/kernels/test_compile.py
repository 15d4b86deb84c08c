"""Every kernel compiles for a GPU that need not be there, without spilling registers."""

import pytest
from revgrad_kernels.backend import HAS_TRITON

from benchmarks.kernel_resources import in_own_process

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    return in_own_process("--largest")


def test_every_kernel_of_the_package_is_compiled(compiled):
    assert compiled["rows"]
    assert not compiled["missing"], "give each an operator in benchmarks/gpu/operators.py that launches it"


def test_no_kernel_uses_the_stack(compiled):
    assert not [row for row in compiled["rows"] if row["stack"] or row["local"]]


def test_contiguous_tensors_are_read_and_written_16_bytes_at_a_time(compiled):
    """But for what pixel shuffle reads: pixels that lie apart."""
    rows = [row for row in compiled["rows"] if row["layout"] == "contiguous"]
    assert not [row for row in rows if max(row["stores"]) < 16]
    assert not [row for row in rows if max(row["loads"]) < 16 and "pixel" not in row["operator"]]
