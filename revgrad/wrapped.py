"""`wrap`: a bijection from a function and its inverse."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revgrad.errors import ReversibilityError, StreamError
from revgrad.fingerprint import tolerance_of
from revgrad.in_place import Unchanged
from revgrad.layer import LayerCall, ReversibleLayer, Streams
from revgrad.tracing import has_values


def wrap(
    forward: Callable[..., Any], inverse: Callable[..., Any], log_det: Callable[..., Tensor | None] | None = None
) -> "Wrapped":
    """Make a reversible layer of two callables that undo each other.

    Parameters are found in modules and in the modules of bound methods (`wrap(flow.forward, flow.invert)`). A function
    that reads a parameter in any other way raises in the backward pass. The backward pass costs one call of `inverse`
    and one of `forward`; a coupling costs one of its transform.

    Args:
        forward: Called with all streams of the chain; returns a tensor or a tuple of them.
        inverse: Called with what `forward` returns; returns the streams again.
        log_det: Called as `forward`, returns the log-determinant `[B]`, or None where it is zero.

    Returns:
        The layer. Its first use on values compares the streams with what comes back.
    """
    return Wrapped(forward, inverse, log_det)


class Wrapped(ReversibleLayer):
    """What `wrap` returns; arguments as there. Float arithmetic only.

    Raises:
        StreamError: A callable does not return tensors; or exact arithmetic.
        ReversibilityError: The first use does not invert.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        inverse: Callable[..., Any],
        log_det: Callable[..., Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.forward_map = forward
        self.inverse_map = inverse
        self.log_det_map = log_det
        maps = (forward, inverse, log_det)
        owners = dict.fromkeys(getattr(f, "__self__", None) for f in maps)
        self.owners = nn.ModuleList(m for m in owners if isinstance(m, nn.Module) and m not in maps)
        self._checked = False

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Call `forward`."""
        return self._applied(self.forward_map, self.inverse_map, streams, call)

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Call `inverse`."""
        return self._applied(self.inverse_map, self.forward_map, streams, call)

    def log_det(self, streams: Streams, call: LayerCall) -> Tensor | None:
        """Call `log_det`."""
        if self.log_det_map is None:
            raise StreamError(
                f"{call.name}: its log-determinant is not known: give wrap(forward, inverse, log_det=...), a callable "
                "that returns one number per sample"
            )
        return self.log_det_map(*streams)

    def _applied(
        self, there: Callable[..., Any], back: Callable[..., Any], streams: Streams, call: LayerCall
    ) -> Streams:
        if call.residue is not None:
            raise StreamError(f"{call.name}: a wrapped function has no exact form; choose arithmetic='float'")
        out = _streams(there, streams, call)
        if not self._checked and has_values((*streams, *out)):
            with torch.no_grad():
                _compare(_streams(back, out, call), streams, call)
            self._checked = True
        return out

    def extra_repr(self) -> str:
        """The callables that are no modules."""
        maps = [self.forward_map, self.inverse_map, self.log_det_map]
        return ", ".join(_name(f) for f in maps if f is not None and not isinstance(f, nn.Module))


def _name(f: Callable[..., Any]) -> str:
    return getattr(f, "__qualname__", type(f).__name__)


def _streams(f: Callable[..., Any], streams: Streams, call: LayerCall) -> Streams:
    with Unchanged(streams, lambda x: _changed(call.name, f, x)):
        try:
            out = f(*streams)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in streams)
            error.add_note(f"{call.name}: in {_name(f)}, given {len(streams)} stream(s) of shape {shapes}")
            raise
    out = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    wrong = [type(x).__name__ for x in out if not isinstance(x, Tensor)]
    if wrong or not out:
        found = f"a {wrong[0]}" if wrong else "nothing"
        raise StreamError(f"{call.name}: {_name(f)} must return a tensor or a tuple of tensors, returned {found}")
    return out


def _changed(name: str, f: Callable[..., Any], x: Tensor) -> StreamError:
    return StreamError(
        f"{name}: {_name(f)} changed its input in place, a stream of shape {tuple(x.shape)}: make the operation out of "
        "place"
    )


def _compare(found: Streams, expected: Streams, call: LayerCall) -> None:
    """Raise unless the streams came back."""
    shapes = [[tuple(x.shape) for x in streams] for streams in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ReversibilityError(
            f"{call.name}: the inverse returned streams of shapes {shapes[0]} for an input of shapes {shapes[1]}"
        )
    sizes = [float(x.abs().max()) if x.numel() else 0.0 for x in expected]
    for a, b, size in zip(found, expected, sizes, strict=True):
        if not b.numel() or not math.isfinite(size):
            continue
        # Zeros have no size of their own: they are judged by that of the largest stream, or as if all were ones.
        error = float((a - b).abs().max()) / (size or max(sizes) or 1.0)
        if not error <= tolerance_of(b.dtype):
            raise ReversibilityError(
                f"{call.name}: the inverse is off by {error:.2g} of the input's size: it does not undo the function, "
                "or not precisely enough; revgrad.check_invertible measures it"
            )
