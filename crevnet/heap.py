"""The memory that a step frees stays with the process, on a CPU."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let the next step have it. Otherwise the GNU C library hands large blocks back to the system, and asks for them
    again; the system fills every page with zeros first.

    Holds for the whole process, and for good: it never takes less memory than it once did. What the environment says
    (`MALLOC_...`, `GLIBC_TUNABLES`) goes before.

    Returns:
        Whether it has been set: not under another C library or allocator, nor against the environment.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
