"""The IDX file format, in which MNIST is published.

Source: "THE IDX FILE FORMAT", http://yann.lecun.com/exdb/mnist/ (Y. LeCun, C. Cortes, C. J. C. Burges).
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from crevnet.data.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"


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
        raise DataError(f"{path}: damaged gzip file ({error}); replace the file with a fresh copy") from error


def parse_idx(content: bytes) -> np.ndarray:
    """Decode the uncompressed content of an IDX file of unsigned bytes, which is known to be one.

    The header is two zero bytes, a type code, the number of dimensions, and each dimension as a big-endian
    uint32; the values follow with the last dimension fastest.

    Returns:
        uint8, writable, of the shape that the header says.
    """
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    # frombuffer is read-only, which torch.from_numpy warns about.
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
