"""Transforms made of another transform: they pass on what it is told by name."""

import inspect
from typing import Any

from torch import nn


class Adapter(nn.Module):
    """A transform that calls another one. Its `forward` takes the sources, and hands conditioning on as it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def positional(self, given: int) -> int:
        """How many arguments the inner transform is given by position, where this one is given so many."""
        return given


def takes(transform: nn.Module, name: str, positional: int) -> bool:
    """Whether a transform takes an argument of this name when its first `positional` ones are given by position."""
    if isinstance(transform, Adapter):
        return takes(transform.inner, name, transform.positional(positional))
    transform = getattr(transform, "_orig_mod", transform)  # of torch.compile, which takes anything
    found: list[Any] = list(inspect.signature(transform.forward).parameters.values())
    given = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:positional]
    named = [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in given]
    anything = any(p.kind is p.VAR_KEYWORD for p in found)
    return name in named or (anything and name not in [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD])
