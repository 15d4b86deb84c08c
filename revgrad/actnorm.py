"""Activation normalisation (Kingma and Dhariwal 2018, Glow)."""

import torch
from torch import Tensor, nn

from revgrad.channelwise import Channelwise, per_channel
from revgrad.errors import StreamError
from revgrad.layer import LayerCall
from revgrad.tracing import has_values

_SMALLEST = 1e-6
"""A channel that deviates by less is taken for constant."""


class ActNorm(Channelwise):
    """`y = (x + bias) * exp(log_scale)` per channel of one stream `[B, C, ...]`.

    The first batch that a chain is called on in training mode, in whichever direction it passes the layer, sets both
    parameters so that its channels leave with mean 0 and standard deviation 1 (a constant channel keeps its scale).
    Until then the layer is the identity, in `chain.inverse` too: samples that are drawn set nothing. Whether it has
    happened is `initialised`, which is part of the `state_dict`; parameters that are not zero, such as those of a
    moving average, count as set.

    Wrap a model in DDP after it has seen a first batch: wrapping makes the parameters of all processes equal.

    Args:
        channels: C.
        target: Index of the stream; the others pass unchanged.

    Raises:
        StreamError: As `Channelwise`; or the first batch has a single value per channel, from which nothing follows.
    """

    def __init__(self, channels: int, target: int = 0) -> None:
        super().__init__(channels, target)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.initialised = False

    def transformed(self, x: Tensor) -> Tensor:
        """Shift and scale."""
        return (x + per_channel(self.bias, x)) * per_channel(self.log_scale, x).exp()

    def restored(self, y: Tensor) -> Tensor:
        """Scale and shift back."""
        return y * per_channel(-self.log_scale, y).exp() - per_channel(self.bias, y)

    def log_volume(self) -> Tensor:
        """Sum of the log-scales."""
        return self.log_scale.sum()

    # Not a buffer: the engine takes a buffer that changes in the forward pass for one that the recomputation would see
    # changed. This one only says that the parameters are set, which they then are in the recomputation too.
    def get_extra_state(self) -> Tensor:
        """`initialised`, for the `state_dict`."""
        return torch.tensor(self.initialised)

    def set_extra_state(self, state: Tensor) -> None:
        """Take `initialised` from a `state_dict`."""
        self.initialised = bool(state)

    @torch.no_grad()
    def prepare(self, x: Tensor, call: LayerCall, *, undo: bool) -> None:
        """Initialise, if that is due. A rewind finds it done in the forward pass, whatever the direction."""
        if self.initialised or not self.training or call.inverting:
            return
        if has_values((x,)) and (self.bias.any() or self.log_scale.any()):
            self.initialised = True
            return
        values = x.detach().to(self.bias.dtype).transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            raise StreamError(
                f"{call.name}: the first batch sets mean and scale and needs more than one value per channel, "
                f"got shape {tuple(x.shape)}"
            )
        deviation, mean = torch.std_mean(values, dim=1, correction=0)
        deviation = torch.where(deviation > _SMALLEST, deviation, 1)
        if undo:
            self.set(mean / deviation, deviation.log())
        else:
            self.set(-mean, -deviation.log())

    @torch.no_grad()
    def set(self, bias: Tensor, log_scale: Tensor, *, initialised: bool = True) -> None:
        """Set both parameters, `[C]`."""
        self.bias.copy_(bias)
        self.log_scale.copy_(log_scale)
        self.initialised = initialised
