"""What the configurations of the baselines have in common: they read frame by frame, folded into patches."""

from dataclasses import dataclass

from revgrad_kernels import pixel_shuffle, pixel_unshuffle
from torch import Tensor

from crevnet.convolution import check_odd
from crevnet.frame_size import check_foldable
from crevnet.video_model import VideoConfig


@dataclass(kw_only=True)
class FrameConfig(VideoConfig):
    """Configuration of a model that reads one frame per time step.

    Raises:
        ValueError: The patch does not divide the frame, or a time step is something other than one frame with its
            channels.
    """

    patch: int = 4
    """Pixels (patch x patch) of a frame folded into channels before the network; 4 is what the public code trains with,
    1 is what the paper counts in table 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_foldable(self.image_size, self.patch, f"model.patch {self.patch}, by which frames are folded")
        if self.clip != 1 or self.stacking != "channels":
            raise ValueError(
                f"model.clip must be 1 and model.stacking 'channels' for {self.name}, which reads frame by frame; got "
                f"{self.clip} and {self.stacking!r}"
            )

    @property
    def folded_channels(self) -> int:
        """Channels of a folded frame."""
        return self.channels * self.patch**2

    @property
    def folded_size(self) -> tuple[int, int]:
        """Height and width of a folded frame."""
        height, width = self.frame_size
        return height // self.patch, width // self.patch

    def fold(self, frame: Tensor) -> Tensor:
        """Pixels to channels: `[B, channels, H, W]` to `[B, folded_channels, H / patch, W / patch]`."""
        return pixel_unshuffle(frame, self.patch)

    def unfold(self, folded: Tensor) -> Tensor:
        """Channels to pixels, the inverse of `fold`."""
        return pixel_shuffle(folded, self.patch)


def check_layers(hidden: tuple[int, ...], kernel_size: int, *, at_least: int = 1) -> None:
    """Check the options of a stack of convolutional recurrent layers.

    Args:
        hidden: `model.hidden`, channels per layer.
        kernel_size: `model.kernel_size`.
        at_least: How few layers there may be.

    Raises:
        ValueError: Too few layers, a layer without channels, or a kernel of even size, which has no centre.
    """
    if len(hidden) < at_least or min(hidden) < 1:
        raise ValueError(
            f"model.hidden must name {at_least} or more layers, each of at least one channel, got {hidden}"
        )
    check_odd("kernel_size", kernel_size)
