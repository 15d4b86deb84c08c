"""The affine coupling of Real NVP (Dinh et al. 2017) and Glow (Kingma and Dhariwal 2018)."""

import math

import torch
from torch import Tensor, nn

from revgrad.coupling import Coupling
from revgrad.errors import StreamError


class AffineCoupling(Coupling):
    """`target' = target * exp(s) + t` with the message `(s, t)` (Real NVP, Glow). Float arithmetic only.

    The inverse, `(target' - t) * exp(-s)`, multiplies the rounding error of `target'` by `exp(-s)`. With `bound = b`
    the scale is `exp(b * tanh(s / b))`, which is `exp(s)` near zero and never leaves `exp(-b) .. exp(b)`. Then, with
    the float's rounding unit `u`, the recovered target is off by no more than `8 u exp(b) (|target'| + |t|)`, and each
    further coupling that is undone multiplies an error of its target by at most `exp(b)`.

    Args:
        transform: See `Coupling`; returns `(s, t)`.
        source: See `Coupling`.
        target: See `Coupling`.
        bound: b, the largest magnitude of the log-scale; None for none. Between 1 and 2 suits most flows.
        stateful: See `Coupling`.
        carries: See `Coupling`.

    Raises:
        StreamError: The bound is not positive and finite; or as `Coupling`.
    """

    tensors_in_message = 2

    def __init__(
        self,
        transform: nn.Module,
        source: int | tuple[int, ...] = 0,
        target: int = 1,
        *,
        bound: float | None = None,
        stateful: bool = False,
        carries: int = 0,
    ) -> None:
        super().__init__(transform, source, target, stateful=stateful, carries=carries)
        if bound is not None and not 0 < bound < math.inf:
            raise StreamError(f"AffineCoupling: the bound on the log-scale must be positive and finite, got {bound}")
        self.bound = bound

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Scale and shift."""
        s, t = message
        return target * torch.exp(self._log_scale(s)) + t

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Shift and scale back."""
        s, t = message
        return (merged - t) * torch.exp(-self._log_scale(s))

    def log_derivative(self, target: Tensor, *message: Tensor) -> Tensor:
        """The log-scale."""
        return self._log_scale(message[0])

    def _log_scale(self, s: Tensor) -> Tensor:
        return s if self.bound is None else self.bound * torch.tanh(s / self.bound)

    def extra_repr(self) -> str:
        """Streams and bound."""
        return super().extra_repr() + ("" if self.bound is None else f", bound={self.bound:g}")
