"""CrevNet video prediction, and all that it takes to train it, built on reversible autograd.

Raises:
    ModuleNotFoundError: Packages of the extra `crevnet` are not installed.
"""

import os
from importlib.util import find_spec

_EXTRA = {
    "einops": "einops",
    "jsonargparse": "jsonargparse[signatures]",
    "lightning_fabric": "lightning-fabric",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "torchmetrics": "torchmetrics",
    "tqdm": "tqdm",
    "yaml": "PyYAML",
}
"""Modules, and the packages that have them."""

_missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
if _missing:
    raise ModuleNotFoundError(
        f"crevnet needs {', '.join(_missing)}: in the folder of the repository run "
        "pip install -c constraints.txt -e '.[crevnet]'"
    )

# Threads of OpenMP wait for each other in a loop, for a millisecond by default. Where other programs take the cores
# meanwhile, steps were seen to take ten times as long and more. Read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
