import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from crevnet.data import DataError
from crevnet.data.idx import parse_idx, read_content


def to_idx(array: np.ndarray) -> bytes:
    """The format written out byte by byte, as the oracle of the parser."""
    header = bytes([0, 0, 8, array.ndim])
    for length in array.shape:
        header += bytes([length >> 24 & 255, length >> 16 & 255, length >> 8 & 255, length & 255])
    return header + bytes(array.flatten().tolist())


@settings(deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_reads_back_what_was_written(array):
    read = parse_idx(to_idx(array))
    assert read.dtype == np.uint8
    assert read.shape == array.shape
    assert (read == array).all()
    assert read.flags.writeable


CONTENT = bytes(range(256)) * 8


@pytest.mark.parametrize("name", ["digits", "digits.gz"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_compression_is_told_by_content_not_by_name(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(CONTENT))
    assert read_content(tmp_path / name) == CONTENT
    assert read_content(str(tmp_path / name)) == CONTENT


DAMAGED_GZIP = bytearray(gzip.compress(CONTENT))
DAMAGED_GZIP[len(DAMAGED_GZIP) // 2] ^= 0xFF


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(gzip.compress(CONTENT)[:-9], id="cut off"),
        pytest.param(bytes(DAMAGED_GZIP), id="bit rot"),
        pytest.param(gzip.compress(CONTENT) + b"junk", id="junk after"),
    ],
)
def test_damaged_files_are_named_with_problem_and_fix(tmp_path, content):
    path = tmp_path / "digits-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: damaged gzip file \(.*\); replace the file with a fresh copy$"):
        read_content(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such file; check the path"):
        read_content(tmp_path / "absent")


def test_unreadable_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read"):
        read_content(tmp_path)
