"""What activation normalisation and invertible convolutions have in common: one affine map of channels, everywhere."""

import math

from torch import Tensor

from revgrad.autocast import no_autocast
from revgrad.errors import StreamError
from revgrad.layer import LayerCall, ReversibleLayer, Streams


class Channelwise(ReversibleLayer):
    """An affine map of the channels of one stream `[B, C, ...]`, the same at every position. Float arithmetic only.

    Computes in the stream's dtype, under autocast as well. A subclass defines `transformed`, `restored` and
    `log_volume`.

    Args:
        channels: C.
        target: Index of the stream; the others pass unchanged.

    Raises:
        StreamError: The stream is missing or has other channels; or exact arithmetic.
    """

    def __init__(self, channels: int, target: int = 0) -> None:
        super().__init__()
        if channels < 1 or target < 0:
            raise StreamError(
                f"{type(self).__name__}: needs at least one channel, and streams are counted from 0; got "
                f"channels={channels}, target={target}"
            )
        self.channels = channels
        self.target = target

    def updates(self) -> int:
        """The target."""
        return self.target

    def transformed(self, x: Tensor) -> Tensor:
        """`[B, C, ...]` to the same shape; differentiable."""
        raise TypeError(f"{type(self).__name__} does not define transformed(x)")

    def restored(self, y: Tensor) -> Tensor:
        """The inverse of `transformed`."""
        raise TypeError(f"{type(self).__name__} does not define restored(y)")

    def log_volume(self) -> Tensor:
        """Log-determinant of the map at one position, a tensor without dimensions."""
        raise TypeError(f"{type(self).__name__} does not define log_volume()")

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Transform the target."""
        x = self._stream(streams, call)
        self.prepare(x, call, undo=False)
        with no_autocast(x):
            return self._replaced(streams, self.transformed(x))

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Restore the target."""
        y = self._stream(streams, call)
        self.prepare(y, call, undo=True)
        with no_autocast(y):
            return self._replaced(streams, self.restored(y))

    def log_det(self, streams: Streams, call: LayerCall) -> Tensor:
        """`log_volume` for every position of a sample."""
        x = self._stream(streams, call)
        with no_autocast(x):
            return (self.log_volume() * math.prod(x.shape[2:])).expand(len(x))

    def prepare(self, x: Tensor, call: LayerCall, *, undo: bool) -> None:
        """Called with the stream before it is transformed or restored; does nothing by default."""

    def _stream(self, streams: Streams, call: LayerCall) -> Tensor:
        if call.residue is not None:
            raise StreamError(f"{call.name}: {type(self).__name__} has no exact form; choose arithmetic='float'")
        if len(streams) <= self.target:
            raise StreamError(
                f"{call.name}: there is no stream {self.target}, only {len(streams)} stream(s), counted from 0"
            )
        x = streams[self.target]
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise StreamError(
                f"{call.name}: the stream must be [B, {self.channels}, ...], but has shape {tuple(x.shape)}"
            )
        return x

    def _replaced(self, streams: Streams, x: Tensor) -> Streams:
        return (*streams[: self.target], x, *streams[self.target + 1 :])

    def extra_repr(self) -> str:
        """Channels and stream."""
        return f"{self.channels}, target={self.target}"


def per_channel(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter `[C]` in the dtype and for the dimensions of a stream `[B, C, ...]`."""
    return parameter.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
