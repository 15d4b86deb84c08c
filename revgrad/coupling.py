"""Couplings: one stream is read, another is updated by an operation that can be undone once the message is known.

    message, state' = transform(source, state)       expensive, arbitrary, never inverted
    target'         = merge(target, message)         cheap, pointwise, invertible in target
    target          = unmerge(target', message)

The transform reads only the source stream, which the coupling leaves as it is. Undoing or rewinding a coupling
therefore evaluates the transform exactly once, on the very input that the forward pass gave it.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from revgrad_kernels import (
    exact_additive,
    exact_additive_inverse,
    exact_weighted_sum_backward,
    weighted_sum,
    weighted_sum_backward,
    weighted_sum_inverse,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from revgrad.errors import StreamError
from revgrad.layer import (
    NO_ARGUMENTS,
    Arguments,
    Flow,
    Grads,
    ReversibleLayer,
    Rewound,
    Step,
    Streams,
    check_closed,
    edge,
    gradients,
    leaf,
)
from revgrad.residue import Residue

Message = Tensor | tuple[Tensor, ...]


class Coupling(ReversibleLayer):
    """A coupling of two streams. Subclasses define `merge` and `unmerge`, and may define their exact forms.

    Args:
        transform: Called as `transform(source)`, returns the message; or, where stateful, as `transform(source,
            state)` with a tuple of tensors, returns `(message, new_state)`. Conditioning follows by keyword, as far as
            its `forward` has parameters of these names.
        source: Index of the stream that is read.
        target: Index of the stream that is updated.
        stateful: Whether the transform takes and returns a conditioning state.
        carries: How many trailing tensors of the state go to the next stateful layer of the chain (PredRNN's zigzag
            memory) instead of the same layer at the next time step.

    Raises:
        StreamError: Source and target are the same stream.
    """

    tensors_in_message = 1
    evaluations_in_rewind = 1

    def __init__(
        self, transform: nn.Module, source: int = 0, target: int = 1, *, stateful: bool = False, carries: int = 0
    ) -> None:
        super().__init__()
        if source == target:
            raise StreamError(
                f"{type(self).__name__}: source and target are both stream {source}; a coupling needs two"
            )
        if min(source, target) < 0:
            raise StreamError(
                f"{type(self).__name__}: streams are counted from 0, got source={source} and target={target}"
            )
        self.transform = transform
        self.source = source
        self.target = target
        self.stateful = stateful
        self.carries = carries

    def updates(self) -> int:
        """The target."""
        return self.target

    def accepts(self, name: str) -> bool:
        """Whether the transform has a parameter of this name besides those for source and state."""
        found = list(inspect.signature(self.transform.forward).parameters.values())
        if any(p.kind is p.VAR_KEYWORD for p in found):
            return name not in [p.name for p in found[: 1 + self.stateful] if p.kind is p.POSITIONAL_OR_KEYWORD]
        return any(
            p.name == name and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in found[1 + self.stateful :]
        )

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

    def run(self, streams: Streams, step: Step) -> Streams:
        """Update the target."""
        return self._update(streams, step, undo=False)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Restore the target."""
        return self._update(streams, step, undo=True)

    def rewind(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Restore the target and pull the gradients back, with one evaluation of the transform."""
        return self._rewind(flow, step, state_grads, wrt, undo=False)

    def rewind_undo(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """As `rewind`, for an application of `undo`."""
        return self._rewind(flow, step, state_grads, wrt, undo=True)

    def _update(self, streams: Streams, step: Step, *, undo: bool) -> Streams:
        self._check_streams(streams, step)
        source, target = _dense(streams[self.source]), streams[self.target]
        step.strides = source.stride()
        message, step.new_state = self._message(source, target, step.state, step.name, step.arguments)
        updated = self._updated(target, message, step.residue, undo=undo)
        if step.residue is not None:
            step.residue.watch(step.name, updated)
        return _replace(streams, self.target, updated)

    def _rewind(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor], *, undo: bool) -> Rewound:
        streams, grads = flow.streams, flow.grads
        # A copy in the layout of the forward pass takes the stream's place: there are never both.
        streams[self.source] = _laid_out(streams[self.source], step.strides)
        source = leaf(streams[self.source])
        states = tuple(map(leaf, step.state))
        with torch.enable_grad(), step.replay():
            message, new_state = self._message(source, streams[self.target], states, step.name, step.arguments)
        check_closed(step.name, (*message, *new_state), (source, *states, *wrt))
        # From here on the graph alone decides which messages and states stay alive, and until when.
        outputs = tuple(map(edge, (*message, *new_state)))
        values = tuple(m.detach() for m in message)
        del message, new_state
        with torch.no_grad():
            streams[self.target] = self._updated(streams[self.target], values, step.residue, undo=not undo)
        grad = grads[self.target]
        message_grads: Grads = (None,) * len(values)
        if grad is not None:
            vjp = self.unmerge_vjp if undo else self.merge_vjp
            with _no_autocast(grad):
                grads[self.target], *rest = vjp(grad, step.residue is not None, streams[self.target], *values)
            message_grads = tuple(rest)
        del values, grad
        # The source is an output too: its gradient from later layers comes first in the sum, as under stored autograd.
        found = gradients(
            (*outputs, source), (*message_grads, *state_grads, grads[self.source]), (source, *states, *wrt)
        )
        grads[self.source] = found[0]
        n = 1 + len(states)
        return Rewound(found[1:n], found[n:])

    def _message(
        self, source: Tensor, target: Tensor, state: Streams, name: str, arguments: Arguments = NO_ARGUMENTS
    ) -> tuple[Streams, Streams]:
        """Evaluate the transform and check what it returns."""
        # Neither can be traced; a compiled graph has no versions.
        version = None if torch.compiler.is_compiling() or source.is_inference() else source._version
        try:
            out = self.transform(source, state, **arguments) if self.stateful else self.transform(source, **arguments)
        except Exception as error:
            error.add_note(f"{name}: in its transform, given stream {self.source} of shape {tuple(source.shape)}")
            raise
        if version is not None and source._version != version:
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
        message = out if isinstance(out, tuple) else (out,)
        if len(message) != self.tensors_in_message or not all(isinstance(m, Tensor) for m in message):
            raise StreamError(
                f"{name}: {type(self).__name__} needs a message of {self.tensors_in_message} tensor(s) from its "
                f"transform"
            )
        for m in message:
            if m.shape != target.shape:
                raise StreamError(
                    f"{name}: the transform returned a message of shape {tuple(m.shape)}, "
                    f"but the target stream {self.target} has shape {tuple(target.shape)}"
                )
        return message, new_state

    def _updated(self, target: Tensor, message: Streams, residue: Residue | None, *, undo: bool) -> Tensor:
        with _no_autocast(target):
            if residue is None:
                message = tuple([m.to(target.dtype) for m in message])
                return self.unmerge(target, *message) if undo else self.merge(target, *message)
            if torch.is_grad_enabled():
                return _ExactUpdate.apply(self, undo, residue, target, *message)
            return (self.unmerge_exact if undo else self.merge_exact)(residue, target, *message)

    def _check_streams(self, streams: Streams, step: Step) -> None:
        if len(streams) <= max(self.source, self.target):
            raise StreamError(
                f"{step.name}: couples stream {self.source} to stream {self.target}, but there are {len(streams)} "
                f"streams; put a Split before it"
            )

    def _no_exact_form(self) -> StreamError:
        return StreamError(f"{type(self).__name__} has no exact form; choose arithmetic='float'")

    def extra_repr(self) -> str:
        """Which stream is read and which updated."""
        return f"source={self.source}, target={self.target}"


class AdditiveCoupling(Coupling):
    """`target' = target + message` (NICE, RevNet, i-RevNet; eq. 2 and 3)."""

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Add the message."""
        return target + message[0]

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract the message."""
        return merged - message[0]

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """Add the message rounded to the grid; nothing is forgotten."""
        return exact_additive(target, message[0])

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract the message rounded to the grid."""
        return exact_additive_inverse(merged, message[0])

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """The same gradient for both."""
        return grad, grad.to(message[0].dtype)

    def unmerge_vjp(self, grad: Tensor, exact: bool, merged: Tensor, *message: Tensor) -> Grads:
        """The opposite gradient for the message."""
        return grad, -grad.to(message[0].dtype)


class AffineCoupling(Coupling):
    """`target' = target * exp(s) + t` with the message `(s, t)` (Real NVP, Glow). Float arithmetic only."""

    tensors_in_message = 2

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Scale and shift."""
        s, t = message
        return target * torch.exp(s) + t

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Shift and scale back."""
        s, t = message
        return (merged - t) * torch.exp(-s)


class GatedCoupling(Coupling):
    """`target' = (1 - g) target + g h` with `g = sigmoid(a)` and the message `(a, h)` (section 2.2, appendix B).

    In float arithmetic the inverse divides by `1 - g` and loses what the gate forgot. In exact arithmetic `1 - g` is
    rounded to `n / 2^16` with `n >= 1` and the forgotten bits go to the residue.
    """

    tensors_in_message = 2

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Weighted sum."""
        a, h = message
        return weighted_sum(a, target, h)

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Weighted sum solved for the target."""
        a, h = message
        return weighted_sum_inverse(a, merged, h)

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """Scale the target exactly and add `g h` rounded to the grid."""
        a, h = message
        return residue.merge(a, target, h)

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract `g h`, then undo the scaling."""
        a, h = message
        return residue.unmerge(a, merged, h)

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """In one pass, with the gate that the forward pass used."""
        backward = exact_weighted_sum_backward if exact else weighted_sum_backward
        grad_a, grad_x, grad_h = backward(message[0], target, message[1], grad)
        return grad_x, grad_a, grad_h


class _ExactUpdate(torch.autograd.Function):
    """An exact merge (or unmerge) with a straight-through gradient, for stored autograd.

    Saves the target before the update and the message, all of one shape; backward is the coupling's `merge_vjp`.
    """

    @staticmethod
    def forward(ctx: Any, coupling: Coupling, undo: bool, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        ctx.coupling, ctx.undo = coupling, undo
        ctx.save_for_backward(target, *message)
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


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Merges compute in the target's own dtype, in the forward pass and in the rewind alike."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _dense(x: Tensor) -> Tensor:
    """A copy without gaps of a view with gaps (a chunk of channels): what a layout can be restored from."""
    if x.is_contiguous():
        return x
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x if span == x.numel() else x.contiguous()


def _laid_out(x: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """The same values in another memory layout."""
    if strides is None or x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _replace(items: tuple, index: int, value: Any) -> tuple:
    return (*items[:index], value, *items[index + 1 :])
