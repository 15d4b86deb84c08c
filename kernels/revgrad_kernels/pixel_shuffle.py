"""Bijective down- and upsampling between space and channels, in two and three dimensions.

`pixel_unshuffle` turns `(c, h, w)` into `(c n^2, h / n, w / n)`, `pixel_shuffle` back (section 2.1; Shi et al.
2016). In three dimensions only space is folded, never time. Channel order is PyTorch's: output channel `c n^2 + i n
+ j` holds the pixels at row offset `i`, column offset `j` of input channel `c`.
"""

from einops import rearrange
from torch import Tensor


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """Fold space into channels: `[B, C, (T,) H, W]` to `[B, C n^2, (T,) H / n, W / n]`.

    Raises:
        ValueError: Not a 4D or 5D tensor, or height or width is not a multiple of the factor.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"pixel_unshuffle: expected [B, C, H, W] or [B, C, T, H, W], got shape {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"pixel_unshuffle: {height} x {width} pixels cannot be folded by {factor}; "
            "pad or resize the frames to a multiple of the factor"
        )
    if x.ndim == 4:
        return rearrange(x, "b c (h i) (w j) -> b (c i j) h w", i=factor, j=factor).contiguous()
    return rearrange(x, "b c t (h i) (w j) -> b (c i j) t h w", i=factor, j=factor).contiguous()


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Unfold channels into space: `[B, C n^2, (T,) H, W]` to `[B, C, (T,) H n, W n]`.

    Raises:
        ValueError: Not a 4D or 5D tensor, or the number of channels is not a multiple of the squared factor.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"pixel_shuffle: expected [B, C, H, W] or [B, C, T, H, W], got shape {tuple(x.shape)}")
    if factor < 1 or x.shape[1] % factor**2:
        raise ValueError(f"pixel_shuffle: {x.shape[1]} channels are not a multiple of {factor} x {factor}")
    if x.ndim == 4:
        return rearrange(x, "b (c i j) h w -> b c (h i) (w j)", i=factor, j=factor).contiguous()
    return rearrange(x, "b (c i j) t h w -> b c t (h i) (w j)", i=factor, j=factor).contiguous()
