"""Couplings: one stream or several are read, another is updated by an operation that can be undone once the message is
known.

    message, state' = transform(source, state)       expensive, arbitrary, never inverted
    target'         = merge(target, message)         cheap, pointwise, invertible in target
    target          = unmerge(target', message)

The transform reads only the source, which the coupling leaves as it is. Undoing or rewinding a coupling
therefore evaluates the transform exactly once, on the very input that the forward pass gave it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from revgrad_kernels.backend import converted
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from revgrad.adapter import takes
from revgrad.cell import Merge, Recall, update_for
from revgrad.errors import StreamError
from revgrad.hints import not_given, wrong_number, wrong_shape
from revgrad.layer import (
    NO_ARGUMENTS,
    Arguments,
    Flow,
    Grads,
    ReversibleLayer,
    Rewound,
    Step,
    Streams,
    add,
    check_closed,
    edge,
    gradients,
    leaf,
    negated,
    per_sample,
)
from revgrad.layout import dense, laid_out
from revgrad.residue import Residue

Message = Tensor | tuple[Tensor, ...]


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
        StreamError: There is no source, one is given twice, or the target is among them; a cell is to be inverted of a
            transform that has no state or takes no `update`.
    """

    tensors_in_message = 1
    evaluations_in_rewind = 1
    vjp_reads_values = True
    """Whether in exact arithmetic the gradient of a merge depends on target and message, or on their dtypes alone."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A gradient of its own may read what the one it replaces does not.
        own = vars(cls)
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
        sources = (source,) if isinstance(source, int) else tuple(source)
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
        """Gradients with respect to `(target, *message)`; exact ones pass straight through the rounding."""
        return _vjp(self.merge, grad, target, *message)

    def unmerge_vjp(self, grad: Tensor, exact: bool, merged: Tensor, *message: Tensor) -> Grads:
        """As `merge_vjp`, for `unmerge`."""
        return _vjp(self.unmerge, grad, merged, *message)

    def log_derivative(self, target: Tensor, *message: Tensor) -> Tensor | None:
        """`log |d merge / d target|`, element by element in the target's shape; differentiable.

        None where it is zero everywhere. `target` is what `merge` reads, not what it returns.
        """
        raise StreamError(
            f"{type(self).__name__} does not say what its log-determinant is: define "
            "log_derivative(target, *message); return None where it is zero"
        )

    def run(self, streams: Streams, step: Step) -> Streams:
        """Update the target."""
        return self._update(streams, step, undo=False)[0]

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Restore the target."""
        return self._update(streams, step, undo=True)[0]

    def run_log_det(self, streams: Streams, step: Step) -> tuple[Streams, Tensor | None]:
        """As `run`, with the sum of the target's logarithmic derivatives."""
        out, message = self._update(streams, step, undo=False)
        return out, self._log_det(streams[self.target], message)

    def undo_log_det(self, streams: Streams, step: Step) -> tuple[Streams, Tensor | None]:
        """As `undo`, with the opposite sum."""
        out, message = self._update(streams, step, undo=True)
        return out, negated(self._log_det(out[self.target], message))

    def rewind(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Restore the target and pull the gradients back, with one evaluation of the transform."""
        return self._rewind(flow, step, state_grads, wrt, undo=False)

    def rewind_undo(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """As `rewind`, for an application of `undo`."""
        return self._rewind(flow, step, state_grads, wrt, undo=True)

    def _update(self, streams: Streams, step: Step, *, undo: bool) -> tuple[Streams, Streams]:
        """The streams after `run` or `undo`, and the message."""
        self._check_streams(streams, step)
        sources, target = tuple(dense(streams[s]) for s in self._sources), streams[self.target]
        step.strides = tuple(x.stride() for x in sources)
        update, state = update_for(self.inverted_cell, step, step.state, known=undo)
        if undo and update is not None and torch.is_grad_enabled():
            raise StreamError(f"{step.name}: undoing an inverted cell has no gradient: call it in torch.no_grad()")
        message, step.new_state = self._message(sources, target, state, step.name, step.arguments, update)
        updated = self._updated(target, message, step.residue, undo=undo)
        if isinstance(update, Recall):
            step.cell = update.recover()
        if step.residue is not None:
            step.residue.watch(step.name, updated)
        return _replace(streams, self.target, updated), message

    def _rewind(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor], *, undo: bool) -> Rewound:
        streams, grads = flow.streams, flow.grads
        # A copy in the layout of the forward pass takes the stream's place: there are never both.
        for i, strides in zip(self._sources, step.strides or (), strict=step.strides is not None):
            streams[i] = laid_out(streams[i], strides)
        sources = tuple(leaf(streams[i]) for i in self._sources)
        states = tuple(map(leaf, step.state))
        with torch.enable_grad(), step.replay():
            update, states = update_for(self.inverted_cell, step, states, known=True)
            message, new_state = self._message(sources, streams[self.target], states, step.name, step.arguments, update)
        check_closed(step.name, (*message, *new_state), (*sources, *states, *wrt))
        # From here on the graph alone decides which messages and states stay alive, and until when.
        outputs = tuple(map(edge, (*message, *new_state)))
        values = tuple(m.detach() for m in message)
        del message, new_state
        log_det_grad, step.log_det_grad = step.log_det_grad, None
        message_grads: Grads = (None,) * len(values)
        if undo:
            message_grads = self._pull_log_det(flow, negated(log_det_grad), values, message_grads)
        with torch.no_grad():
            streams[self.target] = self._updated(streams[self.target], values, step.residue, undo=not undo)
        if isinstance(update, Recall):
            step.cell = update.recover()
        grad = grads[self.target]
        if grad is not None:
            vjp = self.unmerge_vjp if undo else self.merge_vjp
            with no_autocast(grad):
                grads[self.target], *rest = vjp(grad, step.residue is not None, streams[self.target], *values)
            message_grads = tuple(map(add, rest, message_grads))
        if not undo:
            message_grads = self._pull_log_det(flow, log_det_grad, values, message_grads)
        del values, grad
        # The source is an output too: its gradient from later layers comes first in the sum, as under stored autograd.
        found = gradients(
            (*outputs, *sources),
            (*message_grads, *state_grads, *(grads[i] for i in self._sources)),
            (*sources, *states, *wrt),
        )
        n, m = len(sources), len(states)
        for i, grad in zip(self._sources, found, strict=False):
            grads[i] = grad
        return Rewound(found[n : n + m], found[n + m :])

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

    def _pull_log_det(self, flow: Flow, grad: Tensor | None, message: Streams, message_grads: Grads) -> Grads:
        """Add what the log-determinant contributes to the gradients of target and message."""
        if grad is None:
            return message_grads
        with torch.enable_grad():
            target, *leaves = map(leaf, (flow.streams[self.target], *message))
            log_det = self._log_det(target, tuple(leaves))
        own, *rest = gradients((log_det,), (grad,), (target, *leaves))
        flow.grads[self.target] = add(flow.grads[self.target], own)
        return tuple(map(add, message_grads, rest))

    def _message(
        self,
        sources: Streams,
        target: Tensor,
        state: Streams,
        name: str,
        arguments: Arguments = NO_ARGUMENTS,
        update: Merge | Recall | None = None,
    ) -> tuple[Streams, Streams]:
        """Evaluate the transform and check what it returns."""
        # Neither can be traced; a compiled graph has no versions.
        compiling = torch.compiler.is_compiling()
        versions = [None if compiling or x.is_inference() else x._version for x in sources]
        if update is not None:
            arguments = {**arguments, "update": update}
        try:
            out = self.transform(*sources, *((state,) if self.stateful else ()), **arguments)
        except Exception as error:
            shapes = ", ".join(
                f"stream {i} of shape {tuple(x.shape)}" for i, x in zip(self._sources, sources, strict=True)
            )
            lacks = ""
            if isinstance(error, TypeError):
                given = len(sources) + self.stateful
                lacks = not_given(self.transform, given, arguments, stateful=self.stateful)
            error.add_note(f"{name}: in its transform, given {shapes}{lacks}")
            raise
        if any(v is not None and x._version != v for x, v in zip(sources, versions, strict=True)):
            raise StreamError(
                f"{name}: the transform changed its input in place, and with it the stream; "
                "make its first operation out of place (ReLU(inplace=False))"
            )
        new_state: Streams = ()
        if self.stateful:
            if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple)):
                raise StreamError(
                    f"{name}: a stateful transform must return (message, new_state) with new_state a tuple of tensors"
                )
            out, new_state = out
            if len(new_state) != len(state) or not all(isinstance(s, Tensor) for s in new_state):
                raise StreamError(
                    f"{name}: the transform was given a state of {len(state)} tensor(s) and must return as many, "
                    f"got {len(new_state)}"
                )
            if update is not None:
                update.check(new_state[self.inverted_cell])  # type: ignore[index]
        message = out if isinstance(out, tuple) else (out,)
        if len(message) != self.tensors_in_message or not all(isinstance(m, Tensor) for m in message):
            raise StreamError(
                f"{name}: {type(self).__name__} needs a message of {self.tensors_in_message} tensor(s) from its "
                f"transform, which {wrong_number(message, self.tensors_in_message, target)}"
            )
        for m in message:
            if m.shape != target.shape:
                raise StreamError(
                    f"{name}: the transform returned a message of shape {tuple(m.shape)}, "
                    f"but the target stream {self.target} has shape {tuple(target.shape)}{wrong_shape(m, target)}"
                )
        return message, new_state

    def _updated(self, target: Tensor, message: Streams, residue: Residue | None, *, undo: bool) -> Tensor:
        with no_autocast(target):
            if residue is None:
                message = tuple([converted(m, target.dtype) for m in message])
                return self.unmerge(target, *message) if undo else self.merge(target, *message)
            if torch.is_grad_enabled():
                return _ExactUpdate.apply(self, undo, residue, target, *message)
            return (self.unmerge_exact if undo else self.merge_exact)(residue, target, *message)

    def _check_streams(self, streams: Streams, step: Step) -> None:
        if len(streams) <= max(*self._sources, self.target):
            n = len(streams)
            found = (
                "is one stream; put a Split before it, or give it more" if n == 1 else f"are {n} streams, 0 to {n - 1}"
            )
            raise StreamError(f"{step.name}: couples stream {self.source} to stream {self.target}, but there {found}")

    def _no_exact_form(self) -> StreamError:
        return StreamError(f"{type(self).__name__} has no exact form; choose arithmetic='float'")

    def extra_repr(self) -> str:
        """Which stream is read and which updated."""
        return f"source={self.source}, target={self.target}"


class _ExactUpdate(torch.autograd.Function):
    """An exact merge (or unmerge) with a straight-through gradient, for stored autograd; backward is the coupling's
    `merge_vjp`.

    Saves the target before the update and the message, all of one shape, if that reads them.
    """

    @staticmethod
    def forward(ctx: Any, coupling: Coupling, undo: bool, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        ctx.coupling, ctx.undo = coupling, undo
        values = (target, *message)
        ctx.save_for_backward(*(values if coupling.vjp_reads_values else (x.new_empty(0) for x in values)))
        return (coupling.unmerge_exact if undo else coupling.merge_exact)(residue, target, *message)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        vjp = ctx.coupling.unmerge_vjp if ctx.undo else ctx.coupling.merge_vjp
        return None, None, None, *vjp(grad, True, *ctx.saved_tensors)


def _vjp(merge: Any, grad: Tensor, *inputs: Tensor) -> Grads:
    with torch.enable_grad():
        leaves = tuple(map(leaf, inputs))
        out = merge(*(x.to(leaves[0].dtype) for x in leaves))
    return gradients((out,), (grad,), leaves)


_NOTHING = nullcontext()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Merges compute in the target's own dtype, in the forward pass and in the rewind alike."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _replace(items: tuple, index: int, value: Any) -> tuple:
    return (*items[:index], value, *items[index + 1 :])
