"""Residual steps with a momentum (Sander et al. 2021, Momentum residual neural networks)."""

import math

import torch
from revgrad_kernels import exact_additive, exact_additive_inverse
from torch import Tensor, nn

from revgrad.additive import AdditiveCoupling
from revgrad.coupling import Coupling
from revgrad.errors import StreamError
from revgrad.layer import Grads
from revgrad.residue import Residue
from revgrad.sequential import ReversibleSequential

_ONE = 2**16
"""Exact arithmetic scales by multiples of `1 / _ONE`."""


class VelocityCoupling(Coupling):
    """`target' = g target + (1 - g) f` with the message `f` and a constant `g`.

    The float inverse divides by g: `n` of them multiply a rounding error by up to `g^-n`. In exact arithmetic g is
    rounded to a multiple of `2^-16`, and the `-log2(g)` bits per element that the product forgets go to the residue.

    Args:
        transform: See `Coupling`; returns `f`.
        source: See `Coupling`.
        target: See `Coupling`.
        gamma: g, between 0 and 1, both excluded.
        stateful: See `Coupling`.
        carries: See `Coupling`.

    Raises:
        StreamError: g is not between 0 and 1; or as `Coupling`.
    """

    forgets = True
    vjp_reads_values = False

    def __init__(
        self,
        transform: nn.Module,
        source: int | tuple[int, ...] = 0,
        target: int = 1,
        *,
        gamma: float = 0.9,
        stateful: bool = False,
        carries: int = 0,
    ) -> None:
        super().__init__(transform, source, target, stateful=stateful, carries=carries)
        if not 0 < gamma < 1:
            raise StreamError(
                f"VelocityCoupling: gamma must be between 0 and 1, both excluded, got {gamma}: at 0 the step forgets "
                "the velocity and has no inverse, at 1 it ignores the transform"
            )
        self.gamma = gamma
        self._numerator = min(max(1, round(gamma * _ONE)), _ONE - 1)

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Weighted sum with constant weights."""
        return self.gamma * target + (1 - self.gamma) * message[0]

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """The weighted sum solved for the target."""
        return (merged - (1 - self.gamma) * message[0]) / self.gamma

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """Scale the target exactly and add `(1 - g) f` rounded to the grid."""
        return exact_additive(residue.scale(target, self._numerators(target)), self._share(target, *message))

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract `(1 - g) f`, then undo the scaling."""
        scaled = exact_additive_inverse(merged, self._share(merged, *message))
        return residue.unscale(scaled, self._numerators(scaled))

    def log_derivative(self, target: Tensor, *message: Tensor) -> Tensor:
        """`log g`."""
        return torch.full_like(target, math.log(self.gamma))

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """With the weights that the forward pass used."""
        g = self._numerator / _ONE if exact else self.gamma
        return g * grad, ((1 - g) * grad).to(message[0].dtype)

    def _numerators(self, x: Tensor) -> Tensor:
        return torch.full(x.shape, self._numerator, dtype=torch.int64, device=x.device)

    def _share(self, target: Tensor, message: Tensor) -> Tensor:
        return (1 - self._numerator / _ONE) * message.to(target.dtype)

    def extra_repr(self) -> str:
        """Streams and momentum."""
        return f"{super().extra_repr()}, gamma={self.gamma:g}"


class MomentumStep(ReversibleSequential):
    """A residual step with a momentum on the streams `(x, v)`: `v' = g v + (1 - g) f(x)`, then `x' = x + v'`.

    With g near 0 it is the residual step `x + f(x)`. The backward pass evaluates `f` once.

    Args:
        f: Module from `x` to an update of its shape.
        gamma: g, between 0 and 1, both excluded.

    Raises:
        StreamError: g is not between 0 and 1.
    """

    def __init__(self, f: nn.Module, gamma: float = 0.9) -> None:
        super().__init__(
            VelocityCoupling(f, source=0, target=1, gamma=gamma), AdditiveCoupling(nn.Identity(), source=1, target=0)
        )
