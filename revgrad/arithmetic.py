"""Exact or float: which arithmetic a chain is run in."""

from collections.abc import Sequence

from torch import nn

from revgrad.chain import Link
from revgrad.errors import StreamError
from revgrad.layer import Inverse, ReversibleLayer


def is_exact(arithmetic: str, links: Sequence[Link]) -> bool:
    """Resolve `auto`."""
    if arithmetic not in ("auto", "exact", "float"):
        raise StreamError(f"arithmetic must be 'auto', 'exact' or 'float', got {arithmetic!r}")
    recalling = _recalling(links)
    if arithmetic == "exact" and recalling is not None:
        raise StreamError(
            f"{recalling}: undoes a layer that forgets (it is gated or has a momentum), and no layer before it has "
            "forgotten that much: exact arithmetic has nothing to recall it from; choose arithmetic='float'"
        )
    if arithmetic != "auto":
        return arithmetic == "exact"
    return recalling is None and any(forgets(layer) for _, layer in links)


def _only_forgets(module: nn.Module) -> bool:
    """Whether a module forgets, and has no cell that is recovered, whose undoing has errors of its own."""
    return isinstance(module, ReversibleLayer) and module.forgets and module.inverted_cell is None


def _recalling(links: Sequence[Link]) -> str | None:
    """The first layer that undoes more layers that forget than have been run."""
    run = 0
    for name, layer in links:
        inverted = False
        while isinstance(layer, Inverse):
            layer, inverted = layer.layer, not inverted
        run += (-1 if inverted else 1) * sum(map(_only_forgets, layer.modules()))
        if run < 0:
            return name
    return None


def forgets(layer: ReversibleLayer) -> bool:
    """Whether exact arithmetic needs a residue to undo a layer, or one inside it."""
    return any(isinstance(m, ReversibleLayer) and (m.forgets or m.inverted_cell is not None) for m in layer.modules())
