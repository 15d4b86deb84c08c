"""Video Pixel Network (Kalchbrenner et al. 2016): an encoder and an LSTM that keep the resolution, and a PixelCNN.

From the paper: equations and shape of the blocks, 8 of them in the encoder and 12 in the decoder, c = 128, the
dilation, the loss on Moving MNIST. Chosen here: the 1x1 convolution that widens the frame, the size of the first masked
convolution (that of the others), how the decoder gets the context (by addition to the frame's first features), biases
everywhere, and an LSTM without peepholes, of 2c channels as between the blocks, with 5x5 kernels, with which a time
step costs what CrevNet's table 1 says (to 0.6%).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from revgrad_kernels import cell_update, hidden_output
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.baselines.frame_config import FrameConfig
from crevnet.baselines.pixel_cnn import PixelDecoder, ResidualMultiplicativeBlock
from crevnet.convolution import check_odd, convolution
from crevnet.video_model import VideoModel


@dataclass(kw_only=True)
class VPNConfig(FrameConfig):
    """Configuration of a Video Pixel Network. The defaults are the published ones, without dilation.

    A teacher-forced time step of 64 x 64 pixels takes 311.4 GFLOPs (masked weights counted like others); table 1 has
    309.6.

    Raises:
        ValueError: An even kernel, fewer channels than a (folded) pixel has, or as in `FrameConfig`.
    """

    name: Literal["vpn"] = "vpn"
    """Which model this is."""
    patch: int = 1
    """Pixels (patch x patch) of a frame folded into channels before the network; 1, as the model is one of pixels."""
    width: int = 128
    """c, channels of the multiplicative units; there are twice as many between the blocks and in the LSTM."""
    encoder_blocks: int = 8
    """Residual multiplicative blocks before the LSTM."""
    decoder_blocks: int = 12
    """Masked residual multiplicative blocks after the LSTM."""
    kernel_size: int = 3
    """Odd size of the convolutions of the multiplicative units."""
    lstm_kernel_size: int = 5
    """Odd size of the convolutions of the LSTM."""
    dilated: bool = False
    """Whether the encoder's blocks are dilated by 1, 2, 4, 8, 1, 2, ..: the better variant in the paper."""
    objective: Literal["mse", "cross_entropy"] = "mse"
    """Training loss. `mse`: mean squared error of the predicted means, as of all models here; `cross_entropy`: the
    paper's for Moving MNIST, each pixel as a probability, here averaged over pixels (the paper sums those of a frame).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("kernel_size", self.kernel_size)
        check_odd("lstm_kernel_size", self.lstm_kernel_size)
        if self.width < self.folded_channels:
            raise ValueError(
                f"model.width must be at least {self.folded_channels}, one for each channel of a pixel, got "
                f"{self.width}"
            )

    def build(self) -> "VPN":
        """The model, with random weights."""
        return VPN(self)


class VPN(VideoModel):
    """Video Pixel Network: a frame given all frames before it, its pixels one after the other (section 2).

    Each frame goes through residual multiplicative blocks into a convolutional LSTM, whose hidden state is the context
    in which a PixelCNN predicts the mean of each pixel of the next frame, `sigmoid(logit)`, given the pixels before it
    in raster order and, of several channels, those before it in the same pixel.

    Training is teacher forced throughout: the decoder reads the frame that it predicts. `forward` and `predict`
    generate: pixel by pixel, the predicted mean taken for the pixel's value. That is one pass of the decoder for every
    pixel and channel of a frame, in sequence, each for that pixel alone (`RasterScan`): the arithmetic of one pass over
    the frame, in `H W` (4096) times as many steps.

    Attributes:
        widen: Folded frame to 2c channels.
        encoder: Residual multiplicative blocks.
        lstm: The convolution of the gates i, f, g and o of `c' = f c + i g`, `h' = o tanh(c')`, over `[x, h]`.
        decoder: The PixelCNN.
    """

    def __init__(self, config: VPNConfig) -> None:
        super().__init__(config)
        self.config: VPNConfig = config
        width = 2 * config.width
        self.widen = convolution(2, config.folded_channels, width, 1)
        self.encoder = nn.Sequential(
            *(
                ResidualMultiplicativeBlock(config.width, config.kernel_size, dilation=2 ** (b % 4 * config.dilated))
                for b in range(config.encoder_blocks)
            )
        )
        self.lstm = convolution(2, 2 * width, 4 * width, config.lstm_kernel_size)
        self.decoder = PixelDecoder(config.folded_channels, config.width, config.decoder_blocks, config.kernel_size)

    def initial_state(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Zero hidden and cell state, `[B, 2c, H, W]`, for a batch of frames (one tensor, shared)."""
        zero = like.new_zeros(like.shape[0], 2 * self.config.width, *self.config.folded_size)
        return zero, zero

    def read(self, features: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The LSTM's hidden and cell state after one more frame, whose encoding is `features [B, 2c, H, W]`."""
        hidden, cell = state
        gates, output = self.lstm(torch.cat([features, hidden], dim=1)).split([3 * cell.shape[1], cell.shape[1]], dim=1)
        cell = cell_update(gates, cell)
        return hidden_output(output, cell), cell

    def logits(self, clips: Tensor) -> Tensor:
        """Teacher-forced logits of all frames but the first, folded: `[B, N, folded_channels, H, W]`.

        Args:
            clips: N + 1 frames, `[B, N + 1, channels, H, W]`.
        """
        frames = self.config.fold(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        read, predicted = frames[:, :-1], frames[:, 1:]
        features = self.encoder(self.widen(read.flatten(0, 1))).unflatten(0, read.shape[:2])
        state = self.initial_state(frames)
        contexts = []
        for t in range(read.shape[1]):
            state = self.read(features[:, t], state)
            contexts.append(state[0])
        context = torch.stack(contexts, dim=1).flatten(0, 1)
        return self.decoder(predicted.flatten(0, 1), context).unflatten(0, predicted.shape[:2])

    def loss(self, clips: Tensor, fed: Sequence[bool] | None = None) -> Tensor:
        """The objective of the configuration, over all predictions, a scalar.

        Args:
            clips: N + 1 clips; the last N are predicted, each pixel from the clips and pixels before it.
            fed: Whether each of the first N is given: all of them.

        Raises:
            ValueError: Something is not fed, or as in `forward`.
        """
        if not all(self.feeding(clips[:, :-1], fed, None)):
            raise ValueError(
                "VPN: training is teacher forced only (feeding.kind=teacher), as its decoder reads the pixels "
                "of the frame that it predicts"
            )
        logits = self.logits(clips)
        target = self.config.fold(clips[:, 1:].flatten(0, 1)).unflatten(0, logits.shape[:2])
        if self.config.objective == "cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, target)
        return F.mse_loss(torch.sigmoid(logits), target).clone()

    def forward(self, clips: Tensor, fed: Sequence[bool] | None = None, steps: int | None = None) -> Tensor:
        """As in `VideoModel`; predictions are generated, and carry no gradient."""
        return self._run(clips, self.feeding(clips, fed, steps), 0)

    def predict_clips(self, clips: Tensor, steps: int) -> Tensor:
        """As in `VideoModel`; only what is asked for is generated."""
        first = clips.shape[1] - 1
        return self._run(clips, self.feeding(clips, None, first + steps), first)

    @torch.no_grad()
    def _run(self, clips: Tensor, fed: list[bool], first: int) -> Tensor:
        """Generated predictions from time step `first` on."""
        predictions: list[Tensor] = []
        state = self.initial_state(clips)
        for t, given in enumerate(fed):
            frame = self.config.fold(clips[:, t] if given else predictions[-1])
            state = self.read(self.encoder(self.widen(frame)), state)
            if t >= first:
                predictions.append(self.config.unfold(self.decoder.generate(state[0])))
        return torch.stack(predictions, dim=1)
