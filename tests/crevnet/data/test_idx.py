import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from crevnet.data import DataError, read_idx
from crevnet.data.idx import parse_idx


def to_idx(array: np.ndarray) -> bytes:
    """The format written out byte by byte, as the oracle of the reader."""
    header = bytes([0, 0, 8, array.ndim])
    for length in array.shape:
        header += bytes([length >> 24 & 255, length >> 16 & 255, length >> 8 & 255, length & 255])
    return header + bytes(array.flatten().tolist())


@settings(deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_reads_back_what_was_written(array):
    read = parse_idx(to_idx(array), "memory")
    assert read.dtype == np.uint8
    assert read.shape == array.shape
    assert (read == array).all()
    assert read.flags.writeable


@pytest.mark.parametrize("name", ["digits", "digits.gz"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_compression_is_told_by_content_not_by_name(tmp_path, name, compress):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / name).write_bytes(compress(to_idx(array)))
    assert (read_idx(tmp_path / name) == array).all()
    assert (read_idx(str(tmp_path / name)) == array).all()


GOOD = to_idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
DAMAGED_GZIP = bytearray(gzip.compress(bytes(range(256)) * 8))
DAMAGED_GZIP[len(DAMAGED_GZIP) // 2] ^= 0xFF


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "truncated: 0 bytes", id="empty"),
        pytest.param(GOOD[:3], "truncated: 3 bytes", id="no magic"),
        pytest.param(GOOD[:10], "IDX header takes 16 bytes, found 10", id="half a header"),
        pytest.param(GOOD[:-1], "truncated: the header promises 24 bytes, found 23", id="last byte gone"),
        pytest.param(GOOD + b"\n", "trailing bytes: the header promises 24 bytes, found 25", id="one too many"),
        pytest.param(b"<html></html>", "not an IDX file: it starts with 3c68746d", id="web page"),
        pytest.param(b"\0\0\x08\0" + b"x", "not an IDX file", id="no dimensions"),
        pytest.param(b"\0\0\x0d\x01" + GOOD[4:], "IDX type 0x0d", id="floats"),
        pytest.param(gzip.compress(GOOD)[:-9], "damaged gzip", id="gzip cut off"),
        pytest.param(bytes(DAMAGED_GZIP), "damaged gzip", id="gzip bit rot"),
        pytest.param(gzip.compress(GOOD) + b"junk", "damaged gzip", id="gzip with junk after"),
        pytest.param(b"\0\0\x08\x80" + struct.pack(">128I", *[0] * 128), "impossible shape", id="128 dimensions"),
    ],
)
def test_damaged_files_are_named_with_problem_and_fix(tmp_path, content, message):
    path = tmp_path / "digits-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "; replace the file" in str(caught.value) or "; convert the file" in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such file; check the path"):
        read_idx(tmp_path / "absent")


def test_unreadable_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read"):
        read_idx(tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=40), st.booleans())
def test_arbitrary_bytes_never_raise_anything_else(tail, with_magic):
    content = b"\0\0\x08" + tail if with_magic else tail
    try:
        array = parse_idx(content, "memory")
    except DataError:
        return
    assert to_idx(array) == content
