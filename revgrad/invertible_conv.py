"""The invertible 1x1 convolution (Kingma and Dhariwal 2018, Glow)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revgrad.channelwise import Channelwise


class InvertibleConv1x1(Channelwise):
    """`y = W x` at every position of one stream `[B, C, ...]`: a permutation of channels that is learnt.

    `W = P L (U + diag(sign * exp(log_scale)))` with a fixed permutation P, a unit lower triangular L, a strictly upper
    triangular U and fixed signs. So W is invertible whatever the parameters are, its log-determinant is the sum of the
    log-scales, and its inverse takes two triangular solves. W starts as a random rotation, which inverts to the last
    bits; the error of the inverse is the float's rounding times the condition of W.

    Args:
        channels: C.
        target: Index of the stream; the others pass unchanged.

    Raises:
        StreamError: As `Channelwise`.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, target: int = 0) -> None:
        super().__init__(channels, target)
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        permutation, lower, upper = torch.linalg.lu(rotation)
        dtype = torch.get_default_dtype()
        self.register_buffer("permutation", permutation.argmax(1))
        self.register_buffer("sign", upper.diagonal().sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_scale = nn.Parameter(upper.diagonal().abs().log().to(dtype))

    def weight(self) -> Tensor:
        """W, `[C, C]`, in float32 at least."""
        lower, upper = self._factors()
        return (lower @ upper)[self.permutation]

    def inverse_weight(self) -> Tensor:
        """The inverse of W, from the factors."""
        lower, upper = self._factors()
        one = torch.eye(self.channels, dtype=lower.dtype, device=lower.device)
        half = torch.linalg.solve_triangular(lower, one[self.permutation].t(), upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True)

    def transformed(self, x: Tensor) -> Tensor:
        """Mix the channels."""
        with _full_precision(x):
            return torch.einsum("oc,bc...->bo...", self.weight().to(x.dtype), x)

    def restored(self, y: Tensor) -> Tensor:
        """Mix them back."""
        with _full_precision(y):
            return torch.einsum("oc,bc...->bo...", self.inverse_weight().to(y.dtype), y)

    def log_volume(self) -> Tensor:
        """Sum of the log-scales."""
        return self.log_scale.sum()

    def _factors(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.lower.dtype, torch.float32)
        lower, upper, scale = (p.to(dtype) for p in (self.lower, self.upper, self.log_scale))
        one = torch.eye(self.channels, dtype=dtype, device=lower.device)
        return lower.tril(-1) + one, upper.triu(1) + torch.diag(self.sign.to(dtype) * scale.exp())


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """Products of float32 on a GPU in float32: TensorFloat-32 keeps 10 bits, with which W does not undo its inverse."""
    matmul = torch.backends.cuda.matmul
    # The compiler cannot change a setting halfway; what it traces is stored, and nothing is inverted.
    if not x.is_cuda or x.dtype is not torch.float32 or torch.compiler.is_compiling():
        yield
        return
    wanted = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = wanted
