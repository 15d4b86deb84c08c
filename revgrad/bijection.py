"""Parameter-free bijections: they move values between places and streams and never change one."""

from collections.abc import Sequence

import torch
from revgrad_kernels import pixel_shuffle, pixel_unshuffle
from revgrad_kernels.pixel_shuffle import Order
from torch import Tensor

from revgrad.errors import StreamError
from revgrad.layer import Flow, Grads, ReversibleLayer, Rewound, Run, Step, Streams


class Bijection(ReversibleLayer):
    """A permutation of values. Its Jacobian is orthogonal: gradients go back by the inverse itself."""

    evaluations_in_rewind = 0

    def has_exact_form(self) -> bool:
        """No value changes."""
        return True

    def log_det(self, streams: Streams, step: Step) -> None:
        """Zero.

        Raises:
            StreamError: Values move between samples, so that what later layers add would be another sample's.
        """
        if any(getattr(self, "dim", 1) in (0, -x.dim()) for x in streams):
            raise StreamError(
                f"{step.name}: moves values along the first dimension, which log_det takes for the samples"
            )

    def rewind(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Undo streams and gradients alike; nothing is evaluated twice."""
        return _rearrange(self.undo, flow, step, wrt)

    def rewind_undo(self, flow: Flow, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """As `rewind`, in the other direction."""
        return _rearrange(self.run, flow, step, wrt)


def _rearrange(move: Run, flow: Flow, step: Step, wrt: Sequence[Tensor]) -> Rewound:
    step.log_det_grad = None  # the log-determinant is constant
    grads = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(flow.streams, flow.grads, strict=True))
    flow.streams[:] = move(tuple(flow.streams), step)
    flow.grads[:] = move(grads, step)
    return Rewound((), (None,) * len(wrt))


class PixelUnshuffle(Bijection):
    """Fold space into channels in all streams: `[B, C, (T,) H, W]` to `[B, C n^2, (T,) H / n, W / n]` (section 2.1).

    Args:
        factor: n.
        order: Of the output channels, `pytorch` or `irevnet`; see `revgrad_kernels.pixel_shuffle`.
    """

    def __init__(self, factor: int = 2, order: Order = "pytorch") -> None:
        super().__init__()
        self.factor = factor
        self.order = order

    def run(self, streams: Streams, step: Step) -> Streams:
        """Space to channels."""
        return tuple(pixel_unshuffle(x, self.factor, order=self.order) for x in streams)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Channels to space."""
        return tuple(pixel_shuffle(x, self.factor, order=self.order) for x in streams)

    def extra_repr(self) -> str:
        """Factor and order."""
        return f"factor={self.factor}, order={self.order!r}"


class PixelShuffle(PixelUnshuffle):
    """Unfold channels into space in every stream: the inverse of `PixelUnshuffle`."""

    def run(self, streams: Streams, step: Step) -> Streams:
        """Channels to space."""
        return super().undo(streams, step)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Space to channels."""
        return super().run(streams, step)


class Split(Bijection):
    """Cut the only stream into several along a dimension.

    Args:
        sizes: Number of equal parts, or the sizes of the parts.
        dim: Dimension to cut.
    """

    def __init__(self, sizes: int | Sequence[int] = 2, dim: int = 1) -> None:
        super().__init__()
        self.sizes = sizes
        self.dim = dim

    def run(self, streams: Streams, step: Step) -> Streams:
        """One stream to several."""
        if len(streams) != 1:
            raise StreamError(f"{step.name}: Split takes one stream, got {len(streams)}")
        (x,) = streams
        width = x.shape[self.dim]
        if isinstance(self.sizes, int):
            if width % self.sizes:
                raise StreamError(
                    f"{step.name}: dimension {self.dim} of size {width} cannot be cut into {self.sizes} equal "
                    f"parts; give the sizes"
                )
            return x.chunk(self.sizes, self.dim)
        if sum(self.sizes) != width:
            raise StreamError(
                f"{step.name}: sizes {tuple(self.sizes)} do not add up to dimension {self.dim} of size {width}"
            )
        return x.split(list(self.sizes), self.dim)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Several streams to one."""
        return (torch.cat(streams, self.dim),)

    def extra_repr(self) -> str:
        """Sizes and dimension."""
        return f"sizes={self.sizes}, dim={self.dim}"


class Concatenate(Split):
    """Join the streams along a dimension: the inverse of `Split` with the same arguments."""

    def run(self, streams: Streams, step: Step) -> Streams:
        """Several streams to one."""
        return super().undo(streams, step)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """One stream to several."""
        return super().run(streams, step)


class Permute(Bijection):
    """Reorder the channels of every stream: output channel `i` is input channel `order[i]`.

    Raises:
        StreamError: `order` is not a permutation, or a stream has another number of channels.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise StreamError(f"Permute: {list(order)} is not a permutation of 0 .. {len(order) - 1}")
        self.dim = dim
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("inverse_order", torch.argsort(self.order), persistent=False)

    def run(self, streams: Streams, step: Step) -> Streams:
        """Reorder."""
        return self._select(streams, self.order, step)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Restore the order."""
        return self._select(streams, self.inverse_order, step)

    def _select(self, streams: Streams, order: Tensor, step: Step) -> Streams:
        for x in streams:
            if x.shape[self.dim] != len(order):
                raise StreamError(f"{step.name}: {x.shape[self.dim]} channels, but the permutation orders {len(order)}")
        return tuple(x.index_select(self.dim, order) for x in streams)


class Swap(Bijection):
    """Reverse the order of the streams."""

    def run(self, streams: Streams, step: Step) -> Streams:
        """Last stream first."""
        return streams[::-1]

    def undo(self, streams: Streams, step: Step) -> Streams:
        """First stream last again."""
        return streams[::-1]
