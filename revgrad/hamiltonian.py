"""Stable reversible steps that discretise differential equations (Chang et al. 2018, Reversible architectures for
arbitrarily deep residual neural networks).
"""

from collections.abc import Callable
from typing import Any

import torch
from revgrad_kernels import exact_additive
from torch import Tensor, nn
from torch.nn import functional

from revgrad.adapter import Adapter
from revgrad.additive import AdditiveCoupling
from revgrad.coupling import Coupling
from revgrad.errors import StreamError
from revgrad.layer import Grads
from revgrad.rearrangement import Swap
from revgrad.residue import Residue
from revgrad.sequential import ReversibleSequential

_TRANSPOSED = {
    nn.Conv1d: functional.conv_transpose1d,
    nn.Conv2d: functional.conv_transpose2d,
    nn.Conv3d: functional.conv_transpose3d,
}


class SymmetricTransform(nn.Module):
    """`factor * K^T act(K z + b)` with one linear operator `K`: its Jacobian `K^T diag(act') K` is symmetric.

    Where `act` does not decrease, that has no negative eigenvalue, which is what keeps Hamiltonian steps stable, and
    with the factor -1 leapfrog steps.

    Args:
        operator: `nn.Linear`, or `nn.Conv1d` to `nn.Conv3d` with stride 1 and zero padding given in numbers. Holds K
            and b.
        activation: act, element by element.
        factor: Usually 1 or -1.

    Raises:
        StreamError: The operator is another one.
    """

    def __init__(
        self, operator: nn.Module, activation: Callable[[Tensor], Tensor] = torch.tanh, *, factor: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(operator, nn.Linear) and not _plain_convolution(operator):
            raise StreamError(
                "SymmetricTransform: the operator must be nn.Linear, or nn.Conv1d to nn.Conv3d with stride 1 and zero "
                f"padding given in numbers, got {operator}"
            )
        self.operator = operator
        self.activation = activation
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        """`[B, C, ...]` to the same shape."""
        k: Any = self.operator
        hidden = self.factor * self.activation(k(z))
        if isinstance(k, nn.Linear):
            return functional.linear(hidden, k.weight.t())
        return _TRANSPOSED[type(k)](hidden, k.weight, padding=k.padding, groups=k.groups, dilation=k.dilation)


def _plain_convolution(m: Any) -> bool:
    return (
        type(m) in _TRANSPOSED and set(m.stride) == {1} and m.padding_mode == "zeros" and not isinstance(m.padding, str)
    )


class HamiltonianStep(ReversibleSequential):
    """A step of length h on the streams `(y, z)`: `y' = y + h f(z)`, then `z' = z - h g(y')` (symplectic Euler).

    Preserves volume. With two `SymmetricTransform`s it discretises a stable system of any depth.

    Args:
        f: Module from `z` to an update of the shape of `y`.
        g: Module from `y` to an update of the shape of `z`.
        step_size: h.
    """

    def __init__(self, f: nn.Module, g: nn.Module, step_size: float = 1.0) -> None:
        super().__init__(
            AdditiveCoupling(_Scaled(f, step_size), source=1, target=0),
            AdditiveCoupling(_Scaled(g, -step_size), source=0, target=1),
        )


class ReflectionCoupling(Coupling):
    """`target' = message - target`: its own inverse, exact like a sum; preserves volume."""

    vjp_reads_values = False

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Reflect at half the message."""
        return message[0] - target

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Reflect back."""
        return message[0] - merged

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """With the message rounded to the grid; nothing is forgotten."""
        return exact_additive(-target, message[0])

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """The same."""
        return exact_additive(-merged, message[0])

    def log_derivative(self, target: Tensor, *message: Tensor) -> None:
        """Zero."""

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """The gradient for the message, the opposite for the target."""
        return -grad, grad.to(message[0].dtype)

    def unmerge_vjp(self, grad: Tensor, exact: bool, merged: Tensor, *message: Tensor) -> Grads:
        """The same."""
        return self.merge_vjp(grad, exact, merged, *message)


class LeapfrogStep(ReversibleSequential):
    """A step of length h of `x'' = f(x)` on the streams `(x_n, x_(n-1))`, which become `(x_(n+1), x_n)`.

    `x_(n+1) = 2 x_n - x_(n-1) + h^2 f(x_n)`. Preserves volume; the backward pass evaluates `f` once. In exact
    arithmetic the whole message `2 x_n + h^2 f(x_n)` is rounded to the grid.

    Args:
        f: Module from `x` to an acceleration of its shape, such as `SymmetricTransform(operator, factor=-1)`.
        step_size: h.
    """

    def __init__(self, f: nn.Module, step_size: float = 1.0) -> None:
        super().__init__(ReflectionCoupling(_Leap(f, step_size**2), source=0, target=1), Swap())


class _Scaled(Adapter):
    """`factor * inner(x)`."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__(inner)
        self.factor = factor

    def forward(self, x: Tensor, **conditioning: Any) -> Tensor:
        return self.factor * self.inner(x, **conditioning)


class _Leap(_Scaled):
    """`2 x + factor * inner(x)`."""

    def forward(self, x: Tensor, **conditioning: Any) -> Tensor:
        return 2 * x + super().forward(x, **conditioning)
