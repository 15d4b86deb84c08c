"""CrevNet video prediction, and all that it takes to train it, built on reversible autograd."""

import os

# Threads of OpenMP wait for each other in a loop, for a millisecond by default. Where other programs take the cores
# meanwhile, steps were seen to take ten times as long and more. Read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
