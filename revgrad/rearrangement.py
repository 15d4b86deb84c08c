"""Layers that move values between places and streams and never change one."""

from collections.abc import Sequence

import torch
from revgrad_kernels import pixel_shuffle, pixel_unshuffle
from revgrad_kernels.pixel_shuffle import Order
from revgrad_kernels.pixel_shuffle_reference import checked_factor
from torch import Tensor

from revgrad.errors import StreamError
from revgrad.layer import Grads, LayerCall, ReversibleLayer, Rewound, StreamGrads, StreamMap, Streams


class Rearrangement(ReversibleLayer):
    """A permutation of values without parameters. Its Jacobian is orthogonal: gradients go back by the inverse itself.

    Args:
        target: Index of the only stream that is rearranged; None for all of them.
    """

    evaluations_in_rewind = 0
    dim = 1
    """Along which dimension values move, where it may be that of the samples."""

    def __init__(self, target: int | None = None) -> None:
        super().__init__()
        if target is not None and target < 0:
            raise StreamError(f"{type(self).__name__}: streams are counted from 0; got target={target}")
        self.target = target

    def has_exact_form(self) -> bool:
        """No value changes."""
        return True

    def log_det(self, streams: Streams, call: LayerCall) -> None:
        """Zero.

        Raises:
            StreamError: Values move between samples, so that what later layers add would be another sample's.
        """
        if any(self.dim in (0, -x.dim()) for x in streams):
            raise StreamError(
                f"{call.name}: moves values along the first dimension, which log_det takes for the samples"
            )

    def rewind(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Undo streams and gradients alike; nothing is evaluated twice."""
        return _rearrange(self.undo, backward, call, wrt)

    def rewind_undo(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """As `rewind`, in the other direction."""
        return _rearrange(self.run, backward, call, wrt)

    def targets(self, streams: Streams, call: LayerCall) -> range:
        """Which streams are rearranged.

        Raises:
            StreamError: There is no stream `target`.
        """
        if self.target is None:
            return range(len(streams))
        if self.target >= len(streams):
            raise StreamError(
                f"{call.name}: there is no stream {self.target}, only {len(streams)} stream(s), counted from 0"
            )
        return range(self.target, self.target + 1)

    def extra_repr(self) -> str:
        """Its options, and the target, where there is one."""
        return ", ".join([*self._options(), *([] if self.target is None else [f"target={self.target}"])])

    def _options(self) -> tuple[str, ...]:
        """What `extra_repr` shows besides the target."""
        return ()


def _rearrange(move: StreamMap, backward: StreamGrads, call: LayerCall, wrt: Sequence[Tensor]) -> Rewound:
    call.log_det_grad = None  # the log-determinant is constant
    grads = tuple(
        torch.zeros_like(x) if g is None else g for x, g in zip(backward.streams, backward.grads, strict=True)
    )
    backward.streams[:] = move(tuple(backward.streams), call)
    backward.grads[:] = move(grads, call)
    return Rewound((), (None,) * len(wrt))


class PixelUnshuffle(Rearrangement):
    """Fold space into channels: `[B, C, (T,) H, W]` to `[B, C n^2, (T,) H / n, W / n]`, and of signals `[B, C, L]` to
    `[B, C n, L / n]` (i-RevNet; CrevNet, section 2.1).

    Args:
        factor: n.
        order: Of the output channels, `pytorch` or `irevnet`; see `revgrad_kernels.pixel_shuffle`.
        target: Index of the only stream that is folded; None for all of them.
    """

    def __init__(self, factor: int = 2, order: Order = "pytorch", target: int | None = None) -> None:
        super().__init__(target)
        self.factor = checked_factor(type(self).__name__, factor, order)
        if self.factor < 1:
            raise StreamError(f"{type(self).__name__}: factor={factor} must be at least 1")
        self.order = order

    def updates(self) -> int | None:
        """The target."""
        return self.target

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Space to channels."""
        return self._each(streams, call, fold=True)

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Channels to space."""
        return self._each(streams, call, fold=False)

    def _each(self, streams: Streams, call: LayerCall, *, fold: bool) -> Streams:
        chosen = self.targets(streams, call)
        image, signal = (pixel_unshuffle, _fold_signal) if fold else (pixel_shuffle, _unfold_signal)
        try:
            return tuple(
                x if i not in chosen else (signal if x.dim() == 3 else image)(x, self.factor, order=self.order)
                for i, x in enumerate(streams)
            )
        except ValueError as error:
            shapes = ", ".join(str(tuple(streams[i].shape)) for i in chosen)
            error.add_note(f"{call.name}: given streams of shape {shapes}")
            raise

    def _options(self) -> tuple[str, ...]:
        return (f"factor={self.factor}", f"order={self.order!r}")


def _fold_signal(x: Tensor, n: int, *, order: Order) -> Tensor:
    """`[B, C, L]` to `[B, C n, L / n]`."""
    b, c, length = x.shape
    if length % n:
        raise ValueError(f"a signal of length {length} cannot be folded by {n}")
    # Not unflatten and flatten, for which batched gradients have no rule.
    parts = x.reshape(b, c, length // n, n).movedim(3, 2 if order == "pytorch" else 1)
    return parts.reshape(b, c * n, length // n)


def _unfold_signal(x: Tensor, n: int, *, order: Order) -> Tensor:
    """`[B, C n, L]` to `[B, C, L n]`."""
    b, c, length = x.shape
    if c % n:
        raise ValueError(f"{c} channels are not a multiple of {n}")
    channels, at = ((c // n, n), 2) if order == "pytorch" else ((n, c // n), 1)
    parts = x.reshape(b, *channels, length).movedim(at, 3)
    return parts.reshape(b, c // n, length * n)


class PixelShuffle(PixelUnshuffle):
    """Unfold channels into space: the inverse of `PixelUnshuffle` with the same arguments."""

    run, undo = PixelUnshuffle.undo, PixelUnshuffle.run


class Split(Rearrangement):
    """Cut a stream into several along a dimension.

    Args:
        sizes: Number of equal parts, or the sizes of the parts.
        dim: Dimension to cut.
        target: Index of the stream, which its parts replace; None for the only one.
    """

    def __init__(self, sizes: int | Sequence[int] = 2, dim: int = 1, target: int | None = None) -> None:
        super().__init__(target)
        if isinstance(sizes, int) and sizes < 1:
            raise StreamError(f"{type(self).__name__}: sizes={sizes} must be at least 1, or the sizes of the parts")
        self.sizes = sizes
        self.dim = dim

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """One stream to several."""
        if self.target is None and len(streams) != 1:
            raise StreamError(
                f"{call.name}: {type(self).__name__} takes one stream, got {len(streams)}; target= says which"
            )
        (at,) = self.targets(streams, call)
        return (*streams[:at], *self._parts(streams[at], call), *streams[at + 1 :])

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Several streams to one."""
        count = self.sizes if isinstance(self.sizes, int) else len(self.sizes)
        at = self.target or 0
        found = len(streams) - at
        if found < count or (self.target is None and found > count):
            raise StreamError(
                f"{call.name}: joins {count} streams{f', from stream {at} on' if at else ''}, got {max(found, 0)}; "
                "the first argument says how many, or gives their sizes"
            )
        parts = streams[at : at + count]
        self._check_parts(parts, call)
        return (*streams[:at], torch.cat(parts, self.dim), *streams[at + count :])

    def _parts(self, x: Tensor, call: LayerCall) -> Streams:
        width = x.shape[self.dim]
        if isinstance(self.sizes, int):
            if width % self.sizes:
                raise StreamError(
                    f"{call.name}: dimension {self.dim} of size {width} cannot be cut into {self.sizes} equal "
                    f"parts; give the sizes"
                )
            return x.chunk(self.sizes, self.dim)
        if sum(self.sizes) != width:
            raise StreamError(
                f"{call.name}: sizes {tuple(self.sizes)} do not add up to dimension {self.dim} of size {width}"
            )
        return x.split(list(self.sizes), self.dim)

    def _check_parts(self, parts: Streams, call: LayerCall) -> None:
        """Raise unless cutting gives these parts again."""
        widths = tuple(x.shape[self.dim] for x in parts)
        if isinstance(self.sizes, int):
            if len(set(widths)) > 1:
                raise StreamError(
                    f"{call.name}: joins equal streams, got sizes {widths} along dimension {self.dim}; give these sizes"
                )
        elif widths != tuple(self.sizes):
            raise StreamError(
                f"{call.name}: joins streams of sizes {tuple(self.sizes)} along dimension {self.dim}, got {widths}"
            )

    def _options(self) -> tuple[str, ...]:
        return (f"sizes={self.sizes}", f"dim={self.dim}")


class Concatenate(Split):
    """Join streams along a dimension: the inverse of `Split` with the same arguments.

    Args:
        sizes: Number of streams, equal ones, or their sizes.
        dim: Dimension along which they are joined.
        target: Index of the first of them, which the result replaces; None where there are no others.
    """

    run, undo = Split.undo, Split.run


class Permute(Rearrangement):
    """Reorder the channels: output channel `i` is input channel `order[i]`. The order is saved with the weights.

    Args:
        order: A permutation of `0 .. C - 1`.
        dim: Dimension of the channels.
        target: Index of the only stream that is reordered; None for all of them.

    Raises:
        StreamError: `order` is not a permutation, or a stream has another number of channels.
    """

    order: Tensor

    def __init__(self, order: Sequence[int] | Tensor, dim: int = 1, target: int | None = None) -> None:
        super().__init__(target)
        places = order.tolist() if isinstance(order, Tensor) else list(order)
        if sorted(places) != list(range(len(places))):
            raise StreamError(f"Permute: {places} is not a permutation of 0 .. {len(places) - 1}")
        self.dim = dim
        self.register_buffer("order", torch.tensor(places, dtype=torch.int64))

    def updates(self) -> int | None:
        """The target."""
        return self.target

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Reorder."""
        return self._select(streams, self.order, call)

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Restore the order."""
        return self._select(streams, self.order.argsort(), call)

    def _select(self, streams: Streams, order: Tensor, call: LayerCall) -> Streams:
        chosen = self.targets(streams, call)
        for i in chosen:
            channels = streams[i].shape[self.dim]
            if channels != len(order):
                raise StreamError(f"{call.name}: {channels} channels, but the permutation orders {len(order)}")
        return tuple(x.index_select(self.dim, order) if i in chosen else x for i, x in enumerate(streams))

    def _options(self) -> tuple[str, ...]:
        return (f"dim={self.dim}",)


class Swap(Rearrangement):
    """Reverse the order of the streams."""

    def __init__(self) -> None:
        super().__init__()

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Last stream first."""
        return streams[::-1]

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """First stream last again."""
        return streams[::-1]
