"""UNet with a recurrent predictor at its bottleneck (Table 2): "UNet+StackedRNN" and "UNet+RPM".

The paper says that a UNet takes the place of the two-way autoencoder; the rest is not stated and chosen so that what
the predictor reads is what it reads in CrevNet:

- Three stages and 8 channels in the first, so that a 64 x 64 frame becomes 64 channels of 8 x 8: CrevNet's 2 x 32.
- Eight recurrent modules of 3 x 3 convolutions, as CrevNet's: either reversible predictive modules on the two halves of
  the features, or plain recurrent layers on all of them, each reading the hidden state of the one below.
- 2D and frame by frame: the rows stand between those with and without 3D convolutions and neither is named. With
  `stacking="depth"` and `clip=3` UNet and predictor are 3D.
- The decoder's skip connections are of the frame that is read at the same time step; only the bottleneck recurs.
- A UNet is not invertible, so a prediction that is read again is encoded again, and the activations of UNet and
  predictor alike are stored for the backward pass.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crevnet.baselines.stacked_rnn import RecurrentStack
from crevnet.baselines.unet import UNet
from crevnet.cells import zero_states
from crevnet.frame_size import check_foldable
from crevnet.predictor import reversible_predictor
from crevnet.video_model import RecurrentModel, VideoConfig
from revgrad import ChainState


@dataclass(kw_only=True)
class UNetRNNConfig(VideoConfig):
    """Configuration of a UNet with a recurrent predictor. The defaults are "UNet+RPM" (none stated in the paper).

    Raises:
        ValueError: Frames cannot be halved as often as there are stages.
    """

    name: Literal["unet-rnn"] = "unet-rnn"
    """Which model this is."""
    cell: Literal["convlstm", "stlstm"] = "stlstm"
    """Recurrent cell."""
    predictor: Literal["stacked", "rpm"] = "rpm"
    """`rpm`: reversible predictive modules on the two halves of the features; `stacked`: recurrent layers on all."""
    modules: int = 8
    """Reversible predictive modules, or recurrent layers."""
    width: int = 8
    """Channels of the UNet's first stage; they double with every stage."""
    stages: int = 3
    """How often the UNet halves height and width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fold = 2**self.stages
        check_foldable(self.image_size, fold, f"{fold}, by which model.stages {self.stages} folds it")

    def build(self) -> "UNetRNN":
        """The model, with random weights."""
        return UNetRNN(self)


class UNetRNN(RecurrentModel):
    """Encode a clip with a UNet, predict the features of the next one, decode with the clip's skip connections.

    Args:
        config: What the model is made from.

    Attributes:
        unet: Encoder and decoder.
        predictor: A `RecurrentStack`, or a chain of reversible predictive modules.
    """

    def __init__(self, config: UNetRNNConfig) -> None:
        super().__init__(config)
        self.config: UNetRNNConfig = config
        channels, *depth, height, width = config.clip_shape()
        features = config.width * 2**config.stages
        self.size = (*depth, height // 2**config.stages, width // 2**config.stages)
        self.unet = UNet(channels, len(self.size), width=config.width, stages=config.stages)
        self.predictor: RecurrentStack | torch.nn.Module
        if config.predictor == "rpm":
            self.width = features // 2
            predictor = reversible_predictor(config.cell, config.modules, self.width, self.size)
            predictor.mode = "stored"
            predictor.arithmetic = "float"  # fixed point serves the inverse alone, which is not asked for
            self.predictor = predictor
        else:
            self.width = features
            self.predictor = RecurrentStack(config.cell, config.modules, self.width, self.size)

    def initial_state(self, like: Tensor) -> ChainState:
        """Zero states for a batch of clips."""
        zero = like.new_zeros(like.shape[0], self.width, *self.size)
        return zero_states(self.config.cell, self.config.modules, zero)

    def step(self, clip: Tensor, state: ChainState) -> tuple[Tensor, ChainState]:
        """As in `RecurrentModel`."""
        features, skips = self.unet.encode(clip)
        if self.config.predictor == "rpm":
            streams, state = self.predictor(*features.chunk(2, dim=1), states=state)
            features = torch.cat(streams, dim=1)
        else:
            features, state = self.predictor(features, state)
        return self.unet.decode(features, skips), state
