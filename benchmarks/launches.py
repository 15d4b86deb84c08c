"""What a piece of code launches: operators with their calls and the bytes that they read and write."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GROUPS = {
    "fused kernels": ("revgrad::",),
    "convolution": ("convolution", "addmm", "index_select"),
    "copy": ("copy", "clone", "cat", "stack", "contiguous", "zero", "empty", "full", "ones", "fill"),
    "ReLU": ("relu", "threshold_backward"),
}
"""Kinds of operators by what their names contain, the first that fits; all others are pointwise arithmetic and
reductions. Fused kernels come first: some of their names contain those of other kinds.
"""
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "_unsafe_view")
"""What launches nothing."""


@dataclass
class Count:
    """Calls of an operator, and the bytes that it reads and writes, counted once per tensor."""

    calls: int = 0
    bytes: int = 0


class Launches(TorchDispatchMode):
    """Counts operators that do work on a device; views and allocations do none.

    Attributes:
        counts: By operator name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Count] = defaultdict(Count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in _FREE or func.is_view:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        count = self.counts[name]
        count.calls += 1
        count.bytes += sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
        return out

    def by_group(self) -> dict[str, Count]:
        """Sums over kinds of operators, the largest first."""
        groups: dict[str, Count] = defaultdict(Count)
        for name, count in self.counts.items():
            kind = group_of(name)
            groups[kind].calls += count.calls
            groups[kind].bytes += count.bytes
        return dict(sorted(groups.items(), key=lambda item: -item[1].bytes))


def group_of(name: str) -> str:
    """The kind of an operator."""
    return next((g for g, parts in GROUPS.items() if any(p in name for p in parts)), "pointwise, reductions")
