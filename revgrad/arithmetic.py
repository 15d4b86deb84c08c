"""Exact or float: which arithmetic a chain is run in."""

from collections.abc import Sequence

from torch import nn

from revgrad.chain import Link
from revgrad.coupling import Coupling
from revgrad.errors import StreamError
from revgrad.layer import ReversibleLayer, unwrapped
from revgrad.modules import modules_of


def is_exact(arithmetic: str, links: Sequence[Link]) -> bool:
    """Resolve `auto`.

    Raises:
        StreamError: There is no such arithmetic, or a layer cannot be run in it.
    """
    if arithmetic not in ("auto", "exact", "float"):
        raise StreamError(f"arithmetic must be 'auto', 'exact' or 'float', got {arithmetic!r}")
    if arithmetic == "float":
        return False
    recalling = _recalling(links)
    if arithmetic == "exact" and recalling is not None:
        raise StreamError(
            f"{recalling}: undoes a layer that forgets (it is gated or has a momentum), and no layer before it has "
            "forgotten that much: exact arithmetic has nothing to recall it from; choose arithmetic='float'"
        )
    forgetting = next((name for name, layer in links if forgets(layer)), None)
    exact = arithmetic == "exact" or (arithmetic == "auto" and recalling is None and forgetting is not None)
    without = next((name for name, layer in links if exact and _is_coupling_in_floats(layer)), None)
    if without is not None:
        chosen = "" if arithmetic == "exact" else f", which arithmetic='auto' has chosen because {forgetting} forgets"
        raise StreamError(f"{without} has no exact form{chosen}; choose arithmetic='float'")
    return exact


def _is_coupling_in_floats(layer: ReversibleLayer) -> bool:
    """Other layers say themselves what they cannot do, and those of users need not say that they can."""
    inner, _ = unwrapped(layer)
    return isinstance(inner, Coupling) and not inner.has_exact_form()


def _only_forgets(module: nn.Module) -> bool:
    """Whether a module forgets, and has no cell that is recovered, whose undoing has errors of its own."""
    return isinstance(module, ReversibleLayer) and module.forgets and module.inverted_cell is None


def _recalling(links: Sequence[Link]) -> str | None:
    """The first layer that undoes more layers that forget than have been run."""
    run = 0
    for name, layer in links:
        inner, inverted = unwrapped(layer)
        run += (-1 if inverted else 1) * sum(map(_only_forgets, modules_of(inner)))
        if run < 0:
            return name
    return None


def forgets(layer: ReversibleLayer) -> bool:
    """Whether exact arithmetic needs a residue to undo a layer, or one inside it."""
    inside = modules_of(layer)
    return any(isinstance(m, ReversibleLayer) and (m.forgets or m.inverted_cell is not None) for m in inside)
