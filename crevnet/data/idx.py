"""The IDX file format, in which MNIST is published.

Source: "THE IDX FILE FORMAT", http://yann.lecun.com/exdb/mnist/ (Y. LeCun, C. Cortes, C. J. C. Burges).
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from crevnet.data.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_FIX = "replace the file with a fresh copy"


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzip-compressed.

    Returns:
        uint8, of the shape that the header promises.

    Raises:
        DataError: the file is missing, truncated, has trailing bytes, is a damaged gzip file, is no IDX file,
            or holds another type than unsigned bytes.
    """
    return parse_idx(read_content(path), path)


def read_content(path: str | Path) -> bytes:
    """Return the bytes of a file, decompressed if its content (whatever its name) is gzip.

    Raises:
        DataError: the file is missing or unreadable, or its compressed content is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); {_FIX}") from error


def parse_idx(content: bytes, name: str | Path) -> np.ndarray:
    """Decode the uncompressed content of an IDX file of unsigned bytes; `name` is what errors call it.

    The header is two zero bytes, a type code, the number of dimensions, and each dimension as a big-endian
    uint32; the values follow with the last dimension fastest.

    Returns:
        uint8, writable, of the shape that the header promises.

    Raises:
        DataError: see `read_idx`.
    """
    if len(content) < 4:
        raise DataError(f"{name}: truncated: {len(content)} bytes, too short for an IDX header; {_FIX}")
    zeros, dtype, dimensions = struct.unpack_from(">HBB", content)
    if zeros != 0 or dimensions == 0:
        raise DataError(f"{name}: not an IDX file: it starts with {content[:4].hex()}; {_FIX}")
    if dtype != _UINT8:
        raise DataError(f"{name}: IDX type 0x{dtype:02x}, only unsigned bytes (0x08) are read; convert the file")
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{name}: truncated: its IDX header takes {header} bytes, found {len(content)}; {_FIX}")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    promised, found = math.prod(shape), len(content) - header
    if found != promised:
        problem = "truncated" if found < promised else "trailing bytes"
        raise DataError(f"{name}: {problem}: the header promises {promised} bytes, found {found}; {_FIX}")
    try:
        # frombuffer is read-only, which torch.from_numpy warns about.
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
    except ValueError as error:
        raise DataError(f"{name}: impossible shape {shape} ({error}); {_FIX}") from error
