"""Couplings: one stream or several are read, another is updated by an operation that can be undone once the message is
known.

    message, state' = transform(source, state)       expensive, arbitrary, never inverted
    target'         = merge(target, message)         cheap, pointwise, invertible in target
    target          = unmerge(target', message)

The transform reads only the source, which the coupling leaves as it is. Undoing or rewinding a coupling
therefore evaluates the transform exactly once, on the very input that the forward pass gave it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from revgrad_kernels.backend import converted
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from revgrad.adapter import takes
from revgrad.autocast import no_autocast
from revgrad.cell import CellRecall, ExactCellUpdate, update_for
from revgrad.errors import StreamError
from revgrad.exact_update import updated_exactly
from revgrad.gradients import add, check_closed, edge, gradients, leaf, negated, newest_node, per_sample
from revgrad.in_place import Unchanged
from revgrad.layer import NO_ARGUMENTS, Arguments, Grads, LayerCall, ReversibleLayer, Rewound, StreamGrads, Streams
from revgrad.layout import dense, laid_out
from revgrad.leftovers import Leftovers
from revgrad.message import NOTED, check_message, compare_with, evaluate, note_of, parted
from revgrad.residue import Residue
from revgrad.tracing import records_graph


class Coupling(ReversibleLayer):
    """A coupling of streams. Subclasses define `merge` and `unmerge`, and may define `log_derivative` and exact forms.

    Args:
        transform: Called as `transform(*sources)`, returns the message: as many tensors as the coupling needs, of the
            target's shape. Where stateful, called as `transform(*sources, state)` with a tuple of tensors, it returns
            `(message, new_state)`. Conditioning follows by keyword, as far as its `forward` has parameters of these
            names.
        source: Index of the stream that is read, or several of them. A source may have another shape than the target,
            and may be a tensor of integers, which has no gradient.
        target: Index of the stream that is updated.
        stateful: Whether the transform takes and returns a conditioning state.
        carries: How many trailing tensors of the state go to the next stateful layer of the chain (PredRNN's zigzag
            memory) instead of the same layer at the next time step.
        inverted_cell: Position in the state, counted from 0, of a cell that exact arithmetic recovers in the backward
            pass instead of keeping it. The transform is then called with a keyword `update` besides, which it must
            use on the cell: see `revgrad.CellUpdate`. In float arithmetic, whose inverse would divide by the forget
            gate, the cell is kept and `update` is not given.

    Raises:
        StreamError: Source or target are no numbers, or there is no source, one is given twice, or the target is
            among them; a cell is to be inverted of a transform that has no state or takes no `update`.
    """

    tensors_in_message = 1
    evaluations_in_rewind = 1
    vjp_reads_values = True
    """Whether in exact arithmetic the gradient of a merge depends on target and message, or on their dtypes alone."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "merge" in own or "unmerge" in own:
            # What is inherited belongs to another merge.
            for name in _MADE_FOR_A_MERGE - own.keys():
                setattr(cls, name, getattr(Coupling, name))
        # A gradient of its own may read what the one it replaces does not.
        if ("merge_vjp" in own or "unmerge_vjp" in own) and "vjp_reads_values" not in own:
            cls.vjp_reads_values = True

    def __init__(
        self,
        transform: nn.Module,
        source: int | tuple[int, ...] = 0,
        target: int = 1,
        *,
        stateful: bool = False,
        carries: int = 0,
        inverted_cell: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(transform, nn.Module):
            raise StreamError(
                f"{name}: the transform must be a module, whose parameters the chain knows; got a "
                f"{type(transform).__name__}: write a module that calls it"
            )
        sources = tuple(source) if isinstance(source, (tuple, list)) else (source,)
        if any(not isinstance(i, int) or isinstance(i, bool) for i in (*sources, target)):
            raise StreamError(
                f"{name}: source and target are numbers of streams, such as source=0, target=1, got a "
                f"{type(source).__name__} and a {type(target).__name__}: a coupling has one transform; a pair (F, G) "
                "is two of them, which from_pairs makes"
            )
        if len(set(sources)) != len(sources) or not sources:
            raise StreamError(f"{name}: source={source} must name one stream or several, each once")
        if target in sources:
            raise StreamError(f"{name}: source and target are both stream {target}; a coupling needs two")
        if min(*sources, target) < 0:
            raise StreamError(f"{name}: streams are counted from 0, got source={source} and target={target}")
        self.transform = transform
        self.source = source
        self._sources = sources
        self.target = target
        self.stateful = stateful
        self.carries = carries
        if inverted_cell is not None and not (stateful and inverted_cell >= 0 and self.accepts("update")):
            raise StreamError(
                f"{name}: inverted_cell={inverted_cell} needs stateful=True, and a transform whose forward has a "
                "parameter update=revgrad.update_cell besides source and state"
            )
        self.inverted_cell = inverted_cell
        self._noted = 0

    def updates(self) -> int:
        """The target."""
        return self.target

    def has_exact_form(self) -> bool:
        """Whether the subclass defines one."""
        return type(self).merge_exact is not Coupling.merge_exact

    def accepts(self, name: str) -> bool:
        """Whether the transform has a parameter of this name besides those for sources and state, free to be given."""
        if name == "update" and self.inverted_cell is not None:
            return False
        return takes(self.transform, name, len(self._sources) + self.stateful)

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Float arithmetic: the updated target. Differentiable."""
        raise TypeError(f"{type(self).__name__} does not define merge(target, *message)")

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Float arithmetic: the target before `merge`. Differentiable."""
        raise TypeError(f"{type(self).__name__} does not define unmerge(merged, *message)")

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """Grid values to grid values, one to one together with the residue."""
        raise self._no_exact_form()

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """The inverse of `merge_exact`."""
        raise self._no_exact_form()

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """Gradients with respect to `(target, *message)`; exact ones pass straight through the rounding.

        By default those of `merge`. A subclass may say them; its `merge` then reads no other tensor.
        """
        return self._vjp(self.merge, grad, target, *message)[0]

    def unmerge_vjp(self, grad: Tensor, exact: bool, merged: Tensor, *message: Tensor) -> Grads:
        """As `merge_vjp`, for `unmerge`."""
        return self._vjp(self.unmerge, grad, merged, *message)[0]

    def log_derivative(self, target: Tensor, *message: Tensor) -> Tensor | None:
        """`log |d merge / d target|`, element by element in the target's shape; differentiable.

        None where it is zero everywhere. `target` is what `merge` reads, not what it returns.
        """
        raise StreamError(
            f"{type(self).__name__} does not say what its log-determinant is: define "
            "log_derivative(target, *message); return None where it is zero"
        )

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Update the target."""
        return self._applied(streams, call, undo=False)[0]

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Restore the target."""
        return self._applied(streams, call, undo=True)[0]

    def run_log_det(self, streams: Streams, call: LayerCall) -> tuple[Streams, Tensor | None]:
        """As `run`, with the sum of the target's logarithmic derivatives."""
        out, message = self._applied(streams, call, undo=False)
        return out, self._log_det(streams[self.target], message)

    def undo_log_det(self, streams: Streams, call: LayerCall) -> tuple[Streams, Tensor | None]:
        """As `undo`, with the opposite sum."""
        out, message = self._applied(streams, call, undo=True)
        return out, negated(self._log_det(out[self.target], message))

    def rewind(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Restore the target and pull the gradients back, with one evaluation of the transform."""
        return self._rewind(backward, call, state_grads, wrt, undo=False)

    def rewind_undo(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """As `rewind`, for an application of `undo`."""
        return self._rewind(backward, call, state_grads, wrt, undo=True)

    def _applied(self, streams: Streams, call: LayerCall, *, undo: bool) -> tuple[Streams, Streams]:
        """The streams after `run` or `undo`, and the message."""
        self._check_streams(streams, call)
        sources, target = tuple(dense(streams[s]) for s in self._sources), streams[self.target]
        if call.layout is not None:
            sources = tuple(map(laid_out, sources, call.layout))
        call.strides = tuple(x.stride() for x in sources)
        update, state = update_for(self.inverted_cell, call, call.state, known=undo)
        if undo and update is not None and torch.is_grad_enabled():
            raise StreamError(f"{call.name}: undoing an inverted cell has no gradient: call it in torch.no_grad()")
        message, call.new_state = self._message(sources, target, state, call.name, call.arguments, update)
        if call.noting and self._noted < NOTED:
            call.note = note_of(message, sources)
            self._noted += call.note is not None
        updated = self._merged(target, message, call.residue, undo=undo)
        if isinstance(update, CellRecall):
            call.cell = update.recover()
        if call.residue is not None:
            call.residue.watch(call.name, updated)
        return (*streams[: self.target], updated, *streams[self.target + 1 :]), message

    def _rewind(
        self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor], *, undo: bool
    ) -> Rewound:
        """Evaluate the transform again, restore the target, pull the gradients back: through merge, then transform."""
        sources, states, outputs, message, update = self._evaluated_again(backward.streams, call, wrt)
        log_det_grad, call.log_det_grad = call.log_det_grad, None
        # The log-determinant is taken where the merge reads its target: at what `undo` put out, or at what is restored.
        if undo:
            log_det_grads = self._pull_log_det(backward, negated(log_det_grad), message, wrt)
        self._restore(backward.streams, call, message, update, undo=undo)
        del update
        merge_grads = self._pull_merge(backward, call, message, wrt, undo=undo)
        if not undo:
            log_det_grads = self._pull_log_det(backward, log_det_grad, message, wrt)
        message_grads = tuple(map(add, merge_grads[0], log_det_grads[0]))
        wrt_grads = tuple(map(add, merge_grads[1], log_det_grads[1]))
        # Only the sums go on: nothing else waits beside the graph while it is differentiated.
        del message, merge_grads, log_det_grads
        grads = backward.grads
        # The source is an output too: its gradient from later layers comes first in the sum, as under stored autograd.
        found = gradients(
            (*outputs, *sources),
            (*message_grads, *state_grads, *(grads[i] for i in self._sources)),
            (*sources, *states, *wrt),
        )
        n, m = len(sources), len(states)
        for i, grad in zip(self._sources, found, strict=False):
            grads[i] = grad
        return Rewound(found[n : n + m], tuple(map(add, found[n + m :], wrt_grads)))

    def _evaluated_again(
        self, streams: list[Tensor], call: LayerCall, wrt: Sequence[Tensor]
    ) -> tuple[Streams, Streams, tuple[GradientEdge | None, ...], Streams, ExactCellUpdate | None]:
        """Evaluate the transform with a graph, on what the forward pass gave it.

        Returns:
            The leaves that it read as sources and as states, where the graph ends in message and new states, the
            values of the message, and what has updated an inverted cell.
        """
        # A copy in the layout of the forward pass takes the stream's place: there are never both.
        for i, strides in zip(self._sources, call.strides or (), strict=call.strides is not None):
            streams[i] = laid_out(streams[i], strides)
        sources = tuple(leaf(streams[i]) for i in self._sources)
        states = tuple(map(leaf, call.state))
        before = newest_node()
        with torch.enable_grad(), call.replay():
            update, states = update_for(self.inverted_cell, call, states, known=True)
            message, new_state = self._message(sources, streams[self.target], states, call.name, call.arguments, update)
        others = (*states, *wrt)
        results = (*message, *new_state)
        call.leftovers = Leftovers(sources, others, check_closed(call.name, results, (*sources, *others)), before)
        # From here on the graph alone decides which messages and states stay alive, and until when.
        outputs = tuple(map(edge, results))
        values = tuple(m.detach() for m in message)
        del message, new_state, results
        if call.note is not None:
            compare_with(call.note, values, tuple(x.detach() for x in sources), call.name)
        return sources, states, outputs, values, update

    def _restore(
        self, streams: list[Tensor], call: LayerCall, message: Streams, update: ExactCellUpdate | None, *, undo: bool
    ) -> None:
        """Put back what the application found as target, and as inverted cell."""
        with torch.no_grad():
            streams[self.target] = self._merged(streams[self.target], message, call.residue, undo=not undo)
        if isinstance(update, CellRecall):
            call.cell = update.recover()

    def _pull_merge(
        self, backward: StreamGrads, call: LayerCall, message: Streams, wrt: Sequence[Tensor], *, undo: bool
    ) -> tuple[Grads, Grads]:
        """Take the target's gradient back through the merge; gradients of the message, and of `wrt`."""
        grad = backward.grads[self.target]
        if grad is None:
            return (None,) * len(message), (None,) * len(wrt)
        kind, target = type(self), backward.streams[self.target]
        with no_autocast(grad):
            if (kind.unmerge_vjp is Coupling.unmerge_vjp) if undo else (kind.merge_vjp is Coupling.merge_vjp):
                found, own = self._vjp(self.unmerge if undo else self.merge, grad, target, *message, wrt=wrt)
            else:
                vjp = self.unmerge_vjp if undo else self.merge_vjp
                found, own = vjp(grad, call.residue is not None, target, *message), (None,) * len(wrt)
        backward.grads[self.target], *rest = found
        return tuple(rest), own

    def _vjp(
        self, merge: Callable[..., Tensor], grad: Tensor, *inputs: Tensor, wrt: Sequence[Tensor] = ()
    ) -> tuple[Grads, Grads]:
        """Gradients of a merge with respect to its inputs, and to what else it reads of `wrt`."""
        with torch.enable_grad():
            leaves = tuple(map(leaf, inputs))
            out = merge(*(x.to(leaves[0].dtype) for x in leaves))
        check_closed(type(self).__name__, (out,), (*leaves, *wrt))
        found = gradients((out,), (grad,), (*leaves, *wrt))
        return found[: len(leaves)], found[len(leaves) :]

    def _log_det(self, target: Tensor, message: Streams) -> Tensor | None:
        with no_autocast(target):
            derivative = self.log_derivative(target, *(m.to(target.dtype) for m in message))
        if derivative is None:
            return None
        if derivative.shape != target.shape:
            raise StreamError(
                f"{type(self).__name__}: log_derivative returned shape {tuple(derivative.shape)}, but there is one "
                f"derivative for every element of the target, of shape {tuple(target.shape)}"
            )
        return per_sample(derivative)

    def _pull_log_det(
        self, backward: StreamGrads, grad: Tensor | None, message: Streams, wrt: Sequence[Tensor]
    ) -> tuple[Grads, Grads]:
        """Add what the log-determinant contributes to the target's gradient; gradients of the message, and of `wrt`."""
        if grad is None:
            return (None,) * len(message), (None,) * len(wrt)
        with torch.enable_grad():
            target, *leaves = map(leaf, (backward.streams[self.target], *message))
            log_det = self._log_det(target, tuple(leaves))
        if log_det is not None:
            check_closed(type(self).__name__, (log_det,), (target, *leaves, *wrt))
        own, *rest = gradients((log_det,), (grad,), (target, *leaves, *wrt))
        backward.grads[self.target] = add(backward.grads[self.target], own)
        return tuple(rest[: len(leaves)]), tuple(rest[len(leaves) :])

    def _message(
        self,
        sources: Streams,
        target: Tensor,
        state: Streams,
        name: str,
        arguments: Arguments = NO_ARGUMENTS,
        update: ExactCellUpdate | None = None,
    ) -> tuple[Streams, Streams]:
        """Evaluate the transform; message and new state, checked."""
        out = evaluate(
            self.transform, self._sources, sources, state if self.stateful else None, name, arguments, update
        )
        new_state: Streams = ()
        if self.stateful:
            out, new_state = parted(out, state, name)
            if update is not None:
                update.check(new_state[self.inverted_cell])  # type: ignore[index]
        message = out if isinstance(out, tuple) else (out,)
        check_message(message, self.tensors_in_message, target, self.target, name, type(self).__name__)
        return message, new_state

    def _merged(self, target: Tensor, message: Streams, residue: Residue | None, *, undo: bool) -> Tensor:
        with no_autocast(target):
            if residue is None:
                message = tuple([converted(m, target.dtype) for m in message])
                merge = self.unmerge if undo else self.merge
                if self._noted >= NOTED:
                    return merge(target, *message)
                with Unchanged((target, *message), self._merge_changed):
                    return merge(target, *message)
            if records_graph():
                return updated_exactly(self, undo, residue, target, *message)
            return (self.unmerge_exact if undo else self.merge_exact)(residue, target, *message)

    def _merge_changed(self, x: Tensor) -> StreamError:
        return StreamError(
            f"{type(self).__name__}: merge and unmerge must not change what they are given in place, but a tensor of "
            f"shape {tuple(x.shape)} was changed: make the operation out of place"
        )

    def _check_streams(self, streams: Streams, call: LayerCall) -> None:
        if len(streams) <= max(*self._sources, self.target):
            n = len(streams)
            found = (
                "is one stream; put a Split before it, or give it more" if n == 1 else f"are {n} streams, 0 to {n - 1}"
            )
            raise StreamError(f"{call.name}: couples stream {self.source} to stream {self.target}, but there {found}")

    def _no_exact_form(self) -> StreamError:
        return StreamError(f"{type(self).__name__} has no exact form; choose arithmetic='float'")

    def extra_repr(self) -> str:
        """Which stream is read and which updated."""
        return f"source={self.source}, target={self.target}"


_MADE_FOR_A_MERGE = {"merge_vjp", "unmerge_vjp", "merge_exact", "unmerge_exact", "log_derivative", "vjp_reads_values"}
