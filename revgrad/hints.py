"""What does not fit between a transform and its coupling, and what to do about it: the ends of error messages."""

import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from revgrad.adapter import Adapter


def wrong_number(message: Sequence[object], needed: int, target: Tensor) -> str:
    """What a transform has returned instead of `needed` tensors of the target's shape."""
    found = ", ".join(
        f"a tensor of shape {tuple(m.shape)}" if isinstance(m, Tensor) else f"a {type(m).__name__}" for m in message
    )
    if len(message) != 1:
        return f"returned {found or 'an empty tuple'}"
    (only,) = message
    if isinstance(only, list):
        return f"returned {found}: make it a tuple"
    shape = list(only.shape) if isinstance(only, Tensor) else []
    for dim, size in enumerate(target.shape if len(shape) == target.dim() else ()):
        if shape == [*target.shape[:dim], needed * size, *target.shape[dim + 1 :]]:
            return f"returned {found}: cut it, y.chunk({needed}, dim={dim})"
    return f"returned {found}"


def wrong_shape(message: Tensor, target: Tensor) -> str:
    """What to do about a message of another shape than the target's; nothing where that cannot be told."""
    try:
        fits = torch.broadcast_shapes(message.shape, target.shape) == target.shape
    except RuntimeError:
        fits = False
    return "; messages are not broadcast: return y.expand_as(x), with an x of that shape" if fits else ""


def not_given(transform: nn.Module, positional: int, names: Iterable[str], *, stateful: bool) -> str:
    """What a transform needs besides what it is called with; nothing if it has all that it needs.

    Args:
        transform: Whose `forward` is looked at.
        positional: How many arguments it is given by position.
        names: Those that it is given by name.
        stateful: Whether a state is among the former.
    """
    while isinstance(transform, Adapter):
        positional = transform.positional(positional)
        transform = transform.inner
    found = list(inspect.signature(transform.forward).parameters.values())
    by_position = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][positional:]
    known = set(names)
    required = [p for p in found if p.default is p.empty and p.name not in known]
    missing = [p for p in required if p in by_position or p.kind is p.KEYWORD_ONLY]
    if not missing:
        return ""
    state = ", or stateful=True for a recurrent state" if missing[0] in by_position and not stateful else ""
    return f"; it also needs {', '.join(p.name for p in missing)}: chain(x, {missing[0].name}=...){state}"
