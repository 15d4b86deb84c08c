"""Messages: what a transform returns, checked; and notes of them, which tell whether a second evaluation differs."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from revgrad.cell import ExactCellUpdate
from revgrad.checks import current_checks
from revgrad.errors import ReversibilityError, StreamError
from revgrad.fingerprint import fingerprint, relative_error, tolerance_of
from revgrad.gradients import is_differentiable
from revgrad.hints import not_given, wrong_number, wrong_shape
from revgrad.in_place import Unchanged
from revgrad.layer import Arguments, Note, Streams
from revgrad.tracing import has_values

NOTED = 3
"""How many of its first messages a coupling compares with those of the second evaluation."""

_WELL, _LOOSE = 0.1, 10
"""A source counts as recovered up to this multiple of what an input may be off by; its message may be off by that, for
transforms amplify errors.
"""


def evaluate(
    transform: nn.Module,
    indices: tuple[int, ...],
    sources: Streams,
    state: Streams | None,
    name: str,
    arguments: Arguments,
    update: ExactCellUpdate | None,
) -> Any:
    """Call a transform.

    Args:
        transform: The transform.
        indices: Which streams the sources are, for messages.
        sources: What it reads.
        state: Its state; None for a stateless one.
        name: How errors call the layer.
        arguments: Conditioning.
        update: What it is to update an inverted cell with.

    Raises:
        StreamError: It changes what it reads in place.
    """
    if update is not None:
        arguments = {**arguments, "update": update}
    stateful = state is not None
    with Unchanged((*sources, *(state or ())), partial(_read_changed, name, sources)):
        try:
            return transform(*sources, *((state,) if stateful else ()), **arguments)
        except Exception as error:
            shapes = ", ".join(f"stream {i} of shape {tuple(x.shape)}" for i, x in zip(indices, sources, strict=True))
            lacks = ""
            if isinstance(error, TypeError):
                lacks = not_given(transform, len(sources) + stateful, arguments, stateful=stateful)
            error.add_note(f"{name}: in its transform, given {shapes}{lacks}")
            raise


def _read_changed(name: str, sources: Streams, x: Tensor) -> StreamError:
    which = ("input", "stream") if any(x is source for source in sources) else ("state", "caller's")
    return StreamError(
        f"{name}: the transform changed its {which[0]} in place, and with it the {which[1]}; "
        "make its first operation out of place (ReLU(inplace=False))"
    )


def parted(out: Any, state: Streams, name: str) -> tuple[Any, Streams]:
    """Message and new state of a stateful transform.

    Raises:
        StreamError: It has returned something else.
    """
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple)):
        raise StreamError(
            f"{name}: a stateful transform must return (message, new_state) with new_state a tuple of tensors"
        )
    message, new_state = out
    if len(new_state) != len(state) or not all(isinstance(s, Tensor) for s in new_state):
        raise StreamError(
            f"{name}: the transform was given a state of {len(state)} tensor(s) and must return as many, "
            f"got {len(new_state)}"
        )
    return message, new_state


def check_message(message: tuple[Any, ...], count: int, target: Tensor, index: int, name: str, kind: str) -> None:
    """Raise unless a message fits.

    Args:
        message: What was returned.
        count: How many tensors it must have.
        target: The stream that is updated.
        index: Which stream that is.
        name: How errors call the layer.
        kind: The name of its class.

    Raises:
        StreamError: Another number of tensors, or of another shape than the target.
    """
    if len(message) != count or not all(isinstance(m, Tensor) for m in message):
        raise StreamError(
            f"{name}: {kind} needs a message of {count} tensor(s) from its transform, which "
            f"{wrong_number(message, count, target)}"
        )
    for m in message:
        if m.shape != target.shape:
            raise StreamError(
                f"{name}: the transform returned a message of shape {tuple(m.shape)}, "
                f"but the target stream {index} has shape {tuple(target.shape)}{wrong_shape(m, target)}"
            )


def note_of(message: Streams, sources: Streams) -> Note | None:
    """What a message is compared with in the backward pass; None where it has no values to look at yet."""
    if not (current_checks().may_wait and has_values(message)):
        return None
    return tuple(fingerprint((*message, *sources), precise=False).tolist())


def compare_with(note: Note, message: Streams, sources: Streams, name: str) -> None:
    """Raise unless a message is the one that was noted.

    Where the sources have not been recovered well, the message cannot be the same: that is for the comparison of the
    chain's input to say.

    Raises:
        ReversibilityError: It is not.
    """
    found = fingerprint((*message, *sources), precise=False)
    expected, n = found.new_tensor(note), 3 * len(message)
    # Integers come back as they were.
    tolerance = min((tolerance_of(x.dtype) for x in (*message, *sources) if is_differentiable(x)), default=0.0)
    off = relative_error(found[n:], expected[n:], [x.numel() for x in sources])
    if not (float(off) <= _WELL * tolerance and bool(expected.isfinite().all())):
        return
    error = float(relative_error(found[:n], expected[:n], [x.numel() for x in message]))
    if not error <= _LOOSE * tolerance:
        raise ReversibilityError(
            f"{name}: in the backward pass its transform returned another message than in the forward pass, off by "
            f"{error:.2g} of its size, so the gradient would be wrong: it must depend on nothing but its inputs, its "
            "parameters and PyTorch's random numbers (not on Python's or NumPy's, on how often it was called, or on an "
            "attribute that has changed); or choose mode='stored'"
        )
