"""Conditioning: what transforms are told besides streams and states, such as a context, a mask or a time embedding.

A program holds the arguments of its layers. The autograd Function takes their tensors out, each once however many
layers read it, and puts stand-ins in for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revgrad.chain import Link
from revgrad.errors import StreamError
from revgrad.layer import Arguments, ReversibleLayer, unwrapped


class Placeholder:
    """Stands for a tensor that has been taken out."""


def bind(
    links: tuple[Link, ...], common: Arguments, per_layer: Sequence[Arguments | None] | None = None
) -> tuple[Arguments, ...]:
    """The arguments of each layer; none at all where nothing is given.

    Args:
        links: The layers.
        common: By name, what every layer gets that accepts the name.
        per_layer: One mapping per layer (None for none), which adds to the common arguments and replaces them.

    Raises:
        StreamError: A name that no layer, or that this layer, accepts; another number of mappings than layers; an
            object other than tuples, lists and dicts that holds tensors.
    """
    if not common and per_layer is None:
        return ()
    own = [given or {} for given in ([None] * len(links) if per_layer is None else per_layer)]
    if len(own) != len(links):
        raise StreamError(
            f"the chain has {len(links)} layers, but per_layer has {len(own)} entries (use None for a layer without)"
        )
    for name in common:
        if not any(layer.accepts(name) for _, layer in links):
            fix = "give the forward method of a transform a parameter of this name"
            if any(isinstance(m, nn.Sequential) for _, layer in links for m in layer.modules()):
                fix += " (an nn.Sequential hands nothing on to what is in it: write a module that does)"
            if not any(map(_may_accept, links)):
                fix = (
                    "none takes any, for they have no transforms (a wrapped function is given the streams alone); make "
                    "one a coupling, or a ReversibleLayer that defines accepts(name)"
                )
            raise StreamError(f"no layer of the chain takes an argument {name!r}: {fix}")
    for given in (common, *own):
        for name, value in given.items():
            _check_kind(name, value)
    bound = []
    for (name, layer), mine in zip(links, own, strict=True):
        wrong = next((key for key in mine if not layer.accepts(key)), None)
        if wrong is not None:
            raise StreamError(f"{name} takes no argument {wrong!r}, but per_layer has one for it")
        bound.append({key: value for key, value in common.items() if layer.accepts(key)} | dict(mine))
    return tuple(bound)


def _check_kind(name: str, value: object) -> None:
    """Raise for an object that holds tensors where they are not looked for."""
    for x in tree_leaves(value):
        inside = getattr(x, "__dict__", {}) if not isinstance(x, (Tensor, nn.Module)) else {}
        if any(isinstance(y, Tensor) for y in inside.values()):
            raise StreamError(
                f"the argument {name!r} has a {type(x).__name__} with tensors in it, which are not looked for: they "
                "would get no gradient, and a change of them would go unnoticed; pass a tuple or a dict of tensors"
            )


def _may_accept(link: Link) -> bool:
    """Whether there are arguments at all that a layer takes, by some name."""
    inner, _ = unwrapped(link.layer)
    return type(inner).accepts is not ReversibleLayer.accepts


def distinct_leaves(arguments: Any, kind: type = Tensor) -> list[Any]:
    """All tensors (or places) in nested arguments, each once."""
    return list({id(x): x for x in tree_leaves(arguments) if isinstance(x, kind)}.values())


def replaced(arguments: Any, old: Sequence[object], new: Sequence[object]) -> Any:
    """The same nested arguments, with new tensors or places for the old ones."""
    changes = {id(a): b for a, b in zip(old, new, strict=True)}
    return tree_map(lambda x: changes.get(id(x), x), arguments)


def conditioning_changed(x: Tensor) -> StreamError:
    """The error where a transform has changed this tensor, which a second evaluation is to read again."""
    return StreamError(
        f"a transform changed a conditioning tensor of shape {tuple(x.shape)} in place, and the recomputation "
        "in backward would read another value: make the operation out of place"
    )
