"""Importing this names every package of the extra `crevnet` that is missing, not only the first that is imported.

The command lines import it before anything else. The other modules need only what they import: a model runs where
there is no parser of command lines.

Raises:
    ModuleNotFoundError: Packages of the extra are not installed.
"""

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
