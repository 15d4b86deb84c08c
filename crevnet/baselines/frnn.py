"""Folded recurrent network (Oliu et al. 2018, "Folded Recurrent Neural Networks for Future Video Prediction").

Encoder and decoder are one stack of bijective GRUs and share its states: given frames go up the stack, predictions
come down, and nothing predicted is encoded again. The configuration is that of the authors' code for Moving MNIST
(`model/mmnist/model_frnn.py` of github.com/moliusimon/frnn), and so are the tied weights of the front layers, the
learned initial states and the update of the topmost state after a prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.baselines.frame_config import FrameConfig
from crevnet.convolution import check_odd, convolution
from crevnet.frame_size import check_foldable
from crevnet.video_model import VideoModel


@dataclass(kw_only=True)
class FRNNConfig(FrameConfig):
    """Configuration of a folded recurrent network. The defaults are the published ones for Moving MNIST.

    A teacher-forced time step of 64 x 64 pixels takes 38.8 GFLOPs, of which 21.5 for reading a frame and 17.3 for
    predicting one; table 1 has 80.1.

    Raises:
        ValueError: No layers, widths and kernel sizes that do not match, an even kernel, a frame that cannot be halved
            once per stage, or as in `FrameConfig`.
    """

    name: Literal["frnn"] = "frnn"
    """Which model this is."""
    patch: int = 1
    """Pixels (patch x patch) of a frame folded into channels before the network; 1, as the network pools by itself."""
    front: tuple[int, ...] = (32, 64)
    """Output channels of the convolutions, with hyperbolic tangents, below the bijective GRUs."""
    front_kernel_size: int = 5
    """Odd size of those convolutions."""
    widths: tuple[int, ...] = (128, 256, 512, 256)
    """Channels above the bijective GRUs, per stage; each stage begins by halving the resolution."""
    kernel_sizes: tuple[int, ...] = (5, 5, 3, 3)
    """Odd size of all convolutions of the bijective GRUs, per stage."""
    units: int = 2
    """Bijective GRUs per stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("front", self.front), ("widths", self.widths)):
            if not values or min(values) < 1:
                raise ValueError(f"model.{name} must name one or more layers of at least one channel, got {values}")
        if len(self.kernel_sizes) != len(self.widths):
            raise ValueError(
                f"model.kernel_sizes must name one size for each of the {len(self.widths)} stages of model.widths, got "
                f"{self.kernel_sizes}"
            )
        check_odd("front_kernel_size", self.front_kernel_size)
        check_odd("kernel_sizes", *self.kernel_sizes)
        fold = self.patch * 2 ** len(self.widths)
        check_foldable(self.image_size, fold, f"{fold}, by which model.patch and {len(self.widths)} stages fold it")

    def build(self) -> "FRNN":
        """The model, with random weights."""
        return FRNN(self)


class ConvGRU(nn.Module):
    """A convolutional GRU; a bijective GRU is two of them in opposite directions between two states.

    With `*` for convolution, `[,]` for concatenation of channels and products of tensors elementwise::

        r = sigmoid(Wr * [x, h] + br)
        z = sigmoid(Wz * [x, h] + bz)
        h' = (1 - z) h + z tanh(Wh * [x, r h] + bh)

    Args:
        inputs: Channels of x.
        channels: Channels of h.
        kernel_size: Odd size of all convolutions.

    Attributes:
        gates: Wr and Wz.
        candidate: Wh.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.gates = convolution(2, inputs + channels, 2 * channels, kernel_size)
        self.candidate = convolution(2, inputs + channels, channels, kernel_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The new state `[B, channels, H, W]`, from `x [B, inputs, H, W]` and the state h."""
        reset, update = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * h], dim=1)))
        return h + update * (candidate - h)


@dataclass(frozen=True)
class FRNNState:
    """The states below and above each bijective GRU, from the first one up.

    Within a stage what is above one unit is below the next; between stages lies the pooling.
    """

    below: tuple[Tensor, ...]
    """`[B, inputs, H, W]` per unit; none before the first frame."""
    above: tuple[Tensor, ...]
    """`[B, outputs, H, W]` per unit."""


class FRNN(VideoModel):
    """Convolutions, then stages of max pooling and bijective GRUs, run upwards to read and downwards to predict.

    Frames are scaled to -1 .. 1, the range of the hyperbolic tangent that makes the prediction, and predictions back
    to 0 .. 1. Downwards, a front convolution is transposed, with the same weights and a bias of its own, and pooling
    becomes repetition of values. Teacher forced, the states only ever go up and each prediction comes down from a copy
    of them; free running, the states go on from where the prediction has left them. (The authors train free running
    only, on the frames after the observed ones, with an L1 loss.)

    Attributes:
        front: The convolutions below the bijective GRUs.
        front_down_biases: Their biases on the way down.
        up: Of each bijective GRU the one that updates the state above it, given the one below.
        down: The one that updates the state below it, given the one above.
        initial: The states above before the first time step, learned, one value per channel; zero at first.
    """

    def __init__(self, config: FRNNConfig) -> None:
        super().__init__(config)
        self.config: FRNNConfig = config
        inputs = (config.folded_channels, *config.front[:-1])
        self.front = nn.ModuleList(
            convolution(2, i, o, config.front_kernel_size) for i, o in zip(inputs, config.front, strict=True)
        )
        self.front_down_biases = nn.ParameterList(torch.zeros(i) for i in inputs)
        widths = [width for width in config.widths for _ in range(config.units)]
        kernel_sizes = [size for size in config.kernel_sizes for _ in range(config.units)]
        shapes = list(zip((config.front[-1], *widths[:-1]), widths, kernel_sizes, strict=True))
        self.up = nn.ModuleList(ConvGRU(below, above, size) for below, above, size in shapes)
        self.down = nn.ModuleList(ConvGRU(above, below, size) for below, above, size in shapes)
        self.initial = nn.ParameterList(torch.zeros(width) for width in widths)

    def initial_state(self, like: Tensor) -> FRNNState:
        """The learned states before the first time step, for a batch of frames."""
        height, width = self.config.folded_size
        folds = [2 ** (1 + unit // self.config.units) for unit in range(len(self.up))]
        # A sum, not an expanded view: `FlopCounterMode` cannot follow views of parameters under `no_grad`.
        above = (
            like.new_zeros(like.shape[0], 1, height // fold, width // fold) + values.view(1, -1, 1, 1)
            for values, fold in zip(self.initial, folds, strict=True)
        )
        return FRNNState((), tuple(above))

    def encode(self, frame: Tensor, state: FRNNState) -> FRNNState:
        """Read a frame `[B, channels, H, W]`: all states anew, from the bottom up."""
        x = 2 * self.config.fold(frame) - 1
        for layer in self.front:
            x = torch.tanh(layer(x))
        below, above = [], []
        for unit, (gru, h) in enumerate(zip(self.up, state.above, strict=True)):
            if unit % self.config.units == 0:
                x = F.max_pool2d(x, 2)
            below.append(x)
            x = gru(x, h)
            above.append(x)
        return FRNNState(tuple(below), tuple(above))

    def decode(self, state: FRNNState) -> tuple[Tensor, FRNNState]:
        """Predict a frame: all states anew, from the top down, and the topmost from the new one below it.

        Returns:
            The next frame `[B, channels, H, W]`, in 0 .. 1, and the states that belong to it.
        """
        x = state.above[-1]
        below, above = list(state.below), list(state.above)
        for unit in reversed(range(len(self.down))):
            above[unit] = x
            x = below[unit] = self.down[unit](x, below[unit])
            if unit % self.config.units == 0:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        above[-1] = self.up[-1](below[-1], above[-1])
        for layer, bias in zip(reversed(self.front), reversed(self.front_down_biases), strict=True):
            x = torch.tanh(F.conv_transpose2d(x, layer.weight, bias, padding=layer.padding))  # type: ignore[arg-type]
        return self.config.unfold((x + 1) / 2), FRNNState(tuple(below), tuple(above))

    def forward(self, clips: Tensor, fed: Sequence[bool] | None = None, steps: int | None = None) -> Tensor:
        """As in `VideoModel`; where nothing is fed, the states go on from where the last prediction has left them."""
        predictions = []
        state = ahead = self.initial_state(clips)
        for t, given in enumerate(self.feeding(clips, fed, steps)):
            state = self.encode(clips[:, t], state) if given else ahead
            prediction, ahead = self.decode(state)
            predictions.append(prediction)
        return torch.stack(predictions, dim=1)
