import ctypes
import os
import subprocess
import sys

import pytest

from crevnet.heap import keep_freed_memory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")

FAULTS = """
import ctypes, resource, sys

from crevnet.heap import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
size = 40 * 2**20
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [library.malloc(size) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in reversed(blocks):
        library.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
"""Page faults of 160 MiB that are freed and taken again."""


def faults(memory):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS, memory]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_freed_memory_is_not_asked_for_again():
    pages = 160 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults("kept") < 0.05 * pages < 0.5 * pages < faults("handed back")


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_goes_before(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
