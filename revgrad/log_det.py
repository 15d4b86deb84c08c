"""Log-determinants on request: one more stream, `[B]`, to which every layer adds its own.

The stream starts at zero inside the chain and leaves it with the outputs. Nothing ever reads it, so a rewind need not
recover it: its gradient, the same at every layer, is all that goes back.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from revgrad.chain import Link
from revgrad.errors import ReversibilityError, StreamError
from revgrad.layer import NO_ARGUMENTS, Grads, LayerCall, ReversibleLayer, Rewound, StreamGrads, Streams
from revgrad.program import Program


def with_log_det(program: Program) -> Program:
    """The same program with the log-determinant as one more stream behind its core's outputs.

    The first dimension of every stream is taken for the samples.
    """
    links = (Link("log-determinant", _Start()), *(Link(name, _Counted(layer)) for name, layer in program.core))
    core = program.arguments.core
    arguments = program.arguments._replace(core=(NO_ARGUMENTS, *core) if core else core)
    return replace(program, core=links, arguments=arguments)


def zero_log_det(streams: Streams) -> Tensor:
    """A log-determinant of zero for each sample, in float32 at least."""
    sizes = {x.shape[:1] for x in streams}
    if len(sizes) > 1 or not streams[0].dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in streams)
        raise StreamError(f"log_det: the first dimension of all streams must be that of the samples, got {shapes}")
    dtypes = [x.dtype for x in streams if x.is_floating_point()]
    dtype = torch.promote_types(dtypes[0] if dtypes else torch.float32, torch.float32)
    return torch.zeros(len(streams[0]), dtype=dtype, device=streams[0].device)


class _Start(ReversibleLayer):
    """Appends the stream."""

    def has_exact_form(self) -> bool:
        return True

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        return (*streams, zero_log_det(streams))

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        return streams[:-1]

    def rewind(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        del backward.streams[-1], backward.grads[-1]
        return Rewound((), ())


class _Counted(ReversibleLayer):
    """A layer on all streams but the last, to which it adds its log-determinant."""

    unread = 1

    def __init__(self, layer: ReversibleLayer) -> None:
        super().__init__()
        self.layer = layer
        self.stateful = layer.stateful
        self.carries = layer.carries
        self.evaluations_in_rewind = layer.evaluations_in_rewind
        self.forgets = layer.forgets
        self.inverted_cell = layer.inverted_cell

    def has_exact_form(self) -> bool:
        return self.layer.has_exact_form()

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        return self._added(*self.layer.run_log_det(streams[:-1], call), streams[-1], call)

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        return self._added(*self.layer.undo_log_det(streams[:-1], call), streams[-1], call)

    def rewind(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        total, grad = backward.streams.pop(), backward.grads.pop()
        call.log_det_grad = grad
        back = self.layer.rewind(backward, call, state_grads, wrt)
        if call.log_det_grad is not None:
            raise ReversibilityError(
                f"{call.name}: its rewind does not take call.log_det_grad, so the gradient of the log-determinant "
                "would be lost: pull it back and leave None, or do not define rewind"
            )
        backward.streams.append(total)
        backward.grads.append(grad)
        return back

    def _added(self, streams: Streams, own: Tensor | None, total: Tensor, call: LayerCall) -> Streams:
        if own is None:
            return (*streams, total)
        if own.shape != total.shape:
            raise StreamError(
                f"{call.name}: its log-determinant has shape {tuple(own.shape)}, but there must be one number for "
                f"each of the {len(total)} samples"
            )
        return (*streams, total + own.to(total.dtype))
