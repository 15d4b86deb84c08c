"""The additive coupling of NICE (Dinh et al. 2014) and RevNet (Gomez et al. 2017), and of the two-way autoencoder."""

from revgrad_kernels import exact_additive, exact_additive_inverse
from torch import Tensor

from revgrad.coupling import Coupling
from revgrad.layer import Grads
from revgrad.residue import Residue


class AdditiveCoupling(Coupling):
    """`target' = target + message` (NICE, RevNet, i-RevNet; CrevNet, eq. 2 and 3)."""

    vjp_reads_values = False

    def merge(self, target: Tensor, *message: Tensor) -> Tensor:
        """Add the message."""
        return target + message[0]

    def unmerge(self, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract the message."""
        return merged - message[0]

    def merge_exact(self, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
        """Add the message rounded to the grid; nothing is forgotten."""
        return exact_additive(target, message[0])

    def unmerge_exact(self, residue: Residue, merged: Tensor, *message: Tensor) -> Tensor:
        """Subtract the message rounded to the grid."""
        return exact_additive_inverse(merged, message[0])

    def log_derivative(self, target: Tensor, *message: Tensor) -> None:
        """Zero."""

    def merge_vjp(self, grad: Tensor, exact: bool, target: Tensor, *message: Tensor) -> Grads:
        """The same gradient for both."""
        return grad, grad.to(message[0].dtype)

    def unmerge_vjp(self, grad: Tensor, exact: bool, merged: Tensor, *message: Tensor) -> Grads:
        """The opposite gradient for the message."""
        return grad, -grad.to(message[0].dtype)
