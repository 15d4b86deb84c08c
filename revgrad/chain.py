"""Running, undoing and rewinding a list of layers: the inner loops of every mode."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from revgrad.attributes import check_attributes
from revgrad.cell import without
from revgrad.errors import StreamError
from revgrad.gradients import add, newest_node
from revgrad.layer import (
    NO_ARGUMENTS,
    Arguments,
    Grads,
    LayerCall,
    Layout,
    Note,
    ReversibleLayer,
    State,
    StreamGrads,
    Streams,
)
from revgrad.modules import modules_of
from revgrad.residue import Residue


class Link(NamedTuple):
    """A layer's place in a chain."""

    name: str
    layer: ReversibleLayer


@dataclass
class Saved:
    """What a layer has read besides the streams."""

    state: State
    """Its own state and the carry, without a cell that is recovered."""
    strides: Layout
    """See `LayerCall.strides`."""
    note: Note | None = None
    """See `LayerCall.note`."""


class ChainState(NamedTuple):
    """The conditioning states of a chain at one time step."""

    layers: tuple[State, ...]
    """One tuple of tensors per layer; `()` for a stateless one."""
    carry: State = ()
    """The tensors that go from one stateful layer to the next, and from the last one to the first of the next time
    step.
    """

    def tensors(self) -> list[Tensor]:
        """All tensors in order."""
        return [x for state in self.layers for x in state] + list(self.carry)

    def detach(self) -> "ChainState":
        """The same values without their graph: for backpropagation that is truncated in time."""
        return self.replace(x.detach() for x in self.tensors())

    def replace(self, tensors: Iterable[Tensor]) -> "ChainState":
        """The same structure with other tensors."""
        it = iter(tensors)
        return ChainState(tuple(tuple(next(it) for _ in s) for s in self.layers), tuple(next(it) for _ in self.carry))


Around = Callable[[int], AbstractContextManager[object]]
"""Makes the context manager around a layer, given its position."""


def no_context(position: int) -> AbstractContextManager[object]:
    """An `Around` that does nothing."""
    return nullcontext()


def cells_of(links: Iterable[Link], state: ChainState, exact: bool) -> list[Tensor | None]:
    """By layer, the cell in its state where it is recovered.

    Raises:
        StreamError: A state has no tensor in the cell's place.
    """
    cells: list[Tensor | None] = []
    for (name, layer), own in zip(links, state.layers, strict=True):
        position = layer.recovered_cell(exact)
        if position is not None and position >= len(own):
            raise StreamError(
                f"{name}: inverted_cell={position}, but the layer's own state has {len(own)} tensor(s), counted from 0"
            )
        cells.append(None if position is None else own[position])
    return cells


def stateless(links: Iterable[Link]) -> ChainState:
    """The state of a chain that has none."""
    return ChainState(tuple(() for _ in links))


def run_chain(
    links: tuple[Link, ...],
    streams: Streams,
    state: ChainState,
    residue: Residue | None,
    *,
    around: Around = no_context,
    keep: Callable[[Saved], None] | None = None,
    arguments: Sequence[Arguments] = (),
    entering: Callable[[int, Streams], None] | None = None,
    layouts: Sequence[Layout] = (),
) -> tuple[Streams, ChainState]:
    """Apply all layers in order.

    Args:
        links: The layers.
        streams: Their input.
        state: Conditioning states.
        residue: None in float arithmetic.
        around: Context manager around each layer.
        keep: Called with what each layer has read.
        arguments: Conditioning by layer; empty where there is none.
        entering: Called with each layer's position and input.
        layouts: What the layers read is given to them in these, by layer; empty where in its own.
    """
    new_states: list[State] = []
    carry = state.carry
    for i, (name, layer) in enumerate(links):
        call = LayerCall(name=name, residue=residue, arguments=arguments[i] if arguments else NO_ARGUMENTS)
        call.noting = keep is not None
        call.layout = layouts[i] if layouts else None
        if layer.stateful:
            call.state = with_carry(name, layer, state.layers[i], carry)
        if entering is not None:
            entering(i, streams)
        with around(i):
            streams = layer.run(streams, call)
        if keep is not None:
            state_read = without(call.state, layer.recovered_cell(residue is not None))
            keep(Saved(state_read, call.strides, call.note))
        own, carry = split_carry(layer, call.new_state, carry)
        new_states.append(own)
    return streams, ChainState(tuple(new_states), carry)


def undo_chain(
    links: tuple[Link, ...],
    streams: Streams,
    states: Sequence[State],
    residue: Residue | None,
    *,
    around: Around = no_context,
    arguments: Sequence[Arguments] = (),
    new_state: ChainState | None = None,
    layouts: Sequence[Layout] = (),
    inverting: bool = False,
) -> Streams:
    """Undo all layers, last first, given what each has read (`Saved.state`), and the state that they have left, where
    it has cells that are recovered. `layouts` as in `run_chain`, `inverting` as in `LayerCall`.
    """
    for i in reversed(range(len(links))):
        name, layer = links[i]
        call = LayerCall(name, states[i], residue=residue, arguments=arguments[i] if arguments else NO_ARGUMENTS)
        call.inverting = inverting
        call.layout = layouts[i] if layouts else None
        position = layer.recovered_cell(residue is not None)
        if position is not None and new_state is not None:
            call.cell = new_state.layers[i][position]
        with around(i):
            streams = layer.undo(streams, call)
    return streams


class ChainGradients:
    """Gradients that a rewind through several chains accumulates: parameters and conditioning tensors in total, states
    from one time step to the one before.
    """

    def __init__(self, parameters: list[Tensor], layers: int, carry: int) -> None:
        self.parameters = parameters
        self.total: list[Tensor | None] = [None] * len(parameters)
        self._owned = [False] * len(parameters)
        self.states: list[Grads] = [()] * layers
        self.carry: Grads = (None,) * carry

    def conditioning(self, arguments: Arguments) -> list[int]:
        """Which of `parameters` are in these arguments."""
        wanted = {id(x) for x in tree_leaves(dict(arguments))} if arguments else set()
        return [self._places[key] for key in wanted & self._places.keys()] if wanted else []

    @cached_property
    def _places(self) -> dict[int, int]:
        return {id(p): i for i, p in enumerate(self.parameters)}

    def add(self, indices: list[int], grads: Grads) -> None:
        """Add parameter gradients, in the order in which stored autograd would: last application first."""
        for i, grad in zip(indices, grads, strict=True):
            total = self.total[i]
            if grad is None:
                continue
            if total is None:
                self.total[i] = grad
            elif self._owned[i] and (grad.is_sparse or not total.is_sparse):
                total.add_(grad)
            else:  # the dense one first: PyTorch adds in no other order
                self.total[i], self._owned[i] = grad + total if total.is_sparse else total + grad, True

    def take(self, indices: Sequence[int]) -> Grads:
        """Give away the sums of these parameters, which are complete."""
        taken = tuple(self.total[i] for i in indices)
        for i in indices:
            self.total[i] = None
        return taken


def rewind_chain(
    links: tuple[Link, ...],
    backward: StreamGrads,
    kept: list[Saved],
    residue: Residue | None,
    *,
    around: Around,
    replaying: Around,
    indices_of: Callable[[ReversibleLayer], list[int]],
    into: ChainGradients,
    joining: Grads = (),
    arguments: Sequence[Arguments] = (),
    cells: list[Tensor | None] | None = None,
) -> Iterator[int]:
    """Recover the chain's input and the gradients with respect to it, one layer's graph alive at a time.

    Args:
        links: The layers.
        backward: Outputs of the chain and gradients with respect to them; becomes its inputs and theirs.
        kept: What each layer has read; is used up.
        residue: None in float arithmetic.
        around: Context manager around each layer.
        replaying: Context manager for the second evaluation of each layer.
        indices_of: Which of `into.parameters` a layer has.
        into: Holds the gradients of the states handed on, receives those of the states read, and of the parameters.
        joining: Gradients that reach the chain's input streams from what ran after the chain. Each is added as soon
            as its stream has been rewound to the input, which is the order in which stored autograd adds.
        arguments: Conditioning by layer, made of tensors that are in `into.parameters`; empty where there is none.
        cells: By layer, the cell after the chain, where it is recovered; becomes the one before it.

    Yields:
        The position of each layer that has been rewound.
    """
    first = first_updates(links, len(joining))
    _join(backward, joining, first, len(links))
    for i in reversed(range(len(links))):
        name, layer = links[i]
        saved = kept.pop()
        call = LayerCall(
            name=name, state=saved.state, strides=saved.strides, residue=residue, replay=partial(replaying, i)
        )
        call.note = saved.note
        if arguments:
            call.arguments = arguments[i]
        if cells is not None:
            call.cell, cells[i] = cells[i], None
        carried = into.carry if layer.carries else ()
        state_grads = (*into.states[i], *carried) if layer.stateful and into.states else ()
        indices = [*indices_of(layer), *into.conditioning(call.arguments)]
        newest = newest_node()
        with around(i):
            back = layer.rewind(backward, call, state_grads, [into.parameters[j] for j in indices])
        if call.leftovers is not None:
            call.leftovers.check(name, layer)
        elif layer.evaluations_in_rewind:
            check_attributes(modules_of(layer), newest)
        if cells is not None:
            cells[i] = call.cell
        _join(backward, joining, first, i)
        into.add(indices, back.parameter_grads)
        if layer.stateful:
            cut = len(back.state_grads) - layer.carries
            into.states[i] = back.state_grads[:cut]
            if layer.carries:
                into.carry = back.state_grads[cut:]
        # What a paused rewind still names would stay alive.
        del saved, call, carried, state_grads, back
        yield i


def first_updates(links: tuple[Link, ...], count: int) -> list[int]:
    """Per input stream, the position of the first layer that changes it; the number of layers where none does."""
    first = [len(links)] * count
    for i in reversed(range(len(links))):
        stream = links[i].layer.updates()
        if stream is None:
            first = [i] * count
        elif stream < count:
            first[stream] = i
    return first


def _join(backward: StreamGrads, joining: Grads, first: list[int], position: int) -> None:
    for s, at in enumerate(first):
        if at == position:
            backward.grads[s] = add(joining[s], backward.grads[s])


def with_carry(name: str, layer: ReversibleLayer, own: State, carry: State) -> State:
    """What a stateful layer reads: its own state, and the carry if it takes one.

    Raises:
        StreamError: It takes a carry of another number of tensors.
    """
    if layer.carries not in (0, len(carry)):
        raise StreamError(
            f"{name}: takes a carry of {layer.carries} tensor(s), but the chain's state carries {len(carry)}"
        )
    return (*own, *carry) if layer.carries else own


def split_carry(layer: ReversibleLayer, state: State, carry: State) -> tuple[State, State]:
    """Of the new state of a layer that was given this carry, its own part and the carry for the next layer."""
    if not layer.stateful:
        return (), carry
    cut = len(state) - layer.carries
    return state[:cut], state[cut:] if layer.carries else carry
