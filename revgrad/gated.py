"""The gated coupling: a weighted sum of what was and what comes."""

from revgrad_kernels import (
    exact_weighted_sum_backward,
    weighted_sum,
    weighted_sum_backward,
    weighted_sum_inverse,
)
from torch import Tensor
from torch.nn import functional

from revgrad.coupling import Coupling
from revgrad.layer import Grads
from revgrad.residue import Residue


class GatedCoupling(Coupling):
    """`target' = (1 - g) target + g h` with `g = sigmoid(a)` and the message `(a, h)` (CrevNet, section 2.2).

    In float arithmetic the inverse divides by `1 - g` and loses what the gate forgot. In exact arithmetic `1 - g` is
    rounded to `n / 2^16` with `n >= 1` and the forgotten bits go to the residue.
    """

    tensors_in_message = 2
    forgets = True

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Weighted sum."""
        a, h = message
        return weighted_sum(a, target, h)

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Weighted sum solved for the target."""
        a, h = message
        return weighted_sum_inverse(a, merged, h)

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """Scale the target exactly and add `g h` rounded to the grid."""
        a, h = message
        return residue.merge(a, target, h)

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract `g h`, then undo the scaling."""
        a, h = message
        return residue.unmerge(a, merged, h)

    def log_derivative(self, target: Tensor, *message: Tensor) -> Tensor:
        """`log(1 - g)`, of the gate before it is quantised."""
        return functional.logsigmoid(-message[0])

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """In one pass, with the gate that the forward pass used."""
        backward = exact_weighted_sum_backward if exact else weighted_sum_backward
        grad_a, grad_x, grad_h = backward(message[0], target, message[1], grad)
        return grad_x, grad_a, grad_h
