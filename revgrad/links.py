"""A chain as a list of layers with names for errors, and whether what it is given fits."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from revgrad.chain import ChainState, Link, stateless
from revgrad.errors import StreamError
from revgrad.layer import Inverse, ReversibleLayer, Streams

Mode = Literal["stored", "checkpoint", "reversible"]
Arithmetic = Literal["auto", "exact", "float"]
Chain = ReversibleLayer | Iterable[ReversibleLayer]


def chain_links(chain: Chain, prefix: str = "", outermost: ReversibleLayer | None = None) -> tuple[Link, ...]:
    """Flatten layers, sequences of layers and inverses of sequences into links with names for errors.

    Args:
        chain: What to flatten.
        prefix: Its place in the outermost chain; empty for that itself.
        outermost: That chain, where it has options.

    Raises:
        StreamError: Something in it is no reversible layer; or a chain in it has options that are not the outermost's.
    """
    if isinstance(chain, Inverse) and isinstance(chain.layer, Inverse):
        return chain_links(chain.layer.layer, prefix, outermost)
    if isinstance(chain, Inverse) and is_sequence(chain.layer):
        inner = chain_links(chain.layer, prefix, outermost)
        return tuple(Link(f"inverse of {name}", Inverse(layer)) for name, layer in reversed(inner))
    if isinstance(chain, ReversibleLayer) and not is_sequence(chain):
        return (Link(f"layer {prefix or '0'} ({describe(chain)})", chain),)
    if not isinstance(chain, Iterable):
        raise StreamError(f"a {type(chain).__name__} is no chain of reversible layers: {_advice(chain, chain)}")
    if isinstance(chain, ReversibleLayer):
        if not prefix:
            outermost = chain
        elif outermost is not None:
            _check_options(chain, prefix, outermost)
    links: list[Link] = []
    for i, layer in enumerate(chain):
        if not isinstance(layer, ReversibleLayer):
            raise StreamError(
                f"layer {prefix}{i} is a {type(layer).__name__}, not a reversible layer: {_advice(chain, layer)}"
            )
        links += chain_links(layer, f"{prefix}.{i}" if prefix else f"{i}", outermost)
    return tuple(links)


def _check_options(chain: ReversibleLayer, place: str, outermost: ReversibleLayer) -> None:
    """Raise for options of a chain inside another that would be ignored."""
    for name, value in chain.chosen_options().items():
        if getattr(outermost, name, None) != value:
            raise StreamError(
                f"layer {place} is a chain with {name}={value!r}, which would be ignored, since the outermost chain's "
                "options count: set it there, or take it off this one"
            )


def check_every(name: str, value: int | None) -> None:
    """Raise unless a number of layers or time steps is one, or None."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise StreamError(f"{name} must be at least 1 and whole, got {value!r}")


def _advice(chain: Any, wrong: Any) -> str:
    """What to do about something that is no reversible layer.

    Args:
        chain: What was given.
        wrong: The item of it that is none, or itself.
    """
    if isinstance(chain, nn.Module):
        modules = chain.named_modules() if not isinstance(chain, ReversibleLayer) else ()
        inside = [f".{name}" for name, m in modules if isinstance(m, ReversibleLayer) and is_sequence(m)]
        if inside:
            which = inside[0] if len(inside) == 1 else f"one of {', '.join(inside)}"
            return f"pass the chain that is inside, {which}, and the streams that it is given"
    layers = list(wrong) if isinstance(wrong, Iterable) else []
    if layers and all(isinstance(x, ReversibleLayer) for x in layers):
        return "unpack it, ReversibleSequential(*layers)"
    return "put it inside a coupling, AdditiveCoupling(module), or give residual blocks to momentum_from"


def is_sequence(layer: Any) -> bool:
    """Whether a layer is itself a chain of layers."""
    return isinstance(layer, nn.Module) and hasattr(layer, "__iter__")


def describe(layer: ReversibleLayer) -> str:
    """A layer's class, through inverses."""
    return f"Inverse({describe(layer.layer)})" if isinstance(layer, Inverse) else type(layer).__name__


def check_mode(mode: str) -> None:
    """Raise for an unknown mode."""
    if mode not in ("stored", "checkpoint", "reversible"):
        raise StreamError(f"mode must be 'stored', 'checkpoint' or 'reversible', got {mode!r}")


def check_offload(offload: bool, mode: str) -> None:
    """Raise for a mode whose activations autograd keeps."""
    if offload and mode != "reversible":
        raise StreamError(
            f"offload=True goes with mode='reversible', not {mode!r}: what autograd keeps itself can be moved by "
            "torch.autograd.graph.save_on_cpu(pin_memory=True)"
        )


def checked_streams(what: str, streams: Iterable[Any]) -> Streams:
    """The streams as a tuple.

    Raises:
        StreamError: There are none, or one is not a tensor.
    """
    streams = tuple(streams)
    wrong = [type(x).__name__ for x in streams if not isinstance(x, Tensor)]
    if wrong or not streams:
        found = f"a {wrong[0]}" if wrong else "none"
        raise StreamError(f"{what}: the streams must be tensors, at least one; got {found}")
    return streams


def checked_state(links: tuple[Link, ...], state: ChainState | None) -> ChainState:
    """The state, or an empty one for a chain without states.

    Raises:
        StreamError: A stateful layer has no state, or the number of states is wrong, or they are no ChainState.
    """
    if state is None:
        state = stateless(links)
    if not isinstance(state, ChainState):
        raise StreamError(f"the states must be a ChainState, got a {type(state).__name__}: {_form(links)}")
    if len(state.layers) != len(links):
        raise StreamError(
            f"the chain has {len(links)} layers, but the state has {len(state.layers)} entries: {_form(links)}, with "
            "() for a stateless layer"
        )
    for (name, layer), own in zip(links, state.layers, strict=True):
        if not (isinstance(own, (tuple, list)) and all(isinstance(x, Tensor) for x in own)):
            raise StreamError(
                f"{name}: its state must be a tuple of tensors, got a {type(own).__name__}: {_form(links)}"
            )
        if layer.stateful and not own and not state.carry:
            raise StreamError(f"{name} is stateful, but no state was given for it: states={_form(links)}")
        if not layer.stateful and own:
            raise StreamError(f"{name} takes no state, but {len(own)} tensor(s) were given for it")
    return state


def _form(links: tuple[Link, ...]) -> str:
    """What the state of a chain looks like, for errors."""
    own = ["(h,)" if layer.stateful else "()" for _, layer in links]
    shown = own if len(own) <= 4 else [*own[:3], "..."]
    return f"ChainState(({', '.join(shown)}{',' if len(own) == 1 else ''}))"
