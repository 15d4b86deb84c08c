"""The attention weighted sum of CrevNet, section 2.2: `y = (1 - g) x + g h` with the gate `g = sigmoid(a)`."""

import torch
from torch import Tensor


def weighted_sum(logits: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Blend two tensors by a gate: `(1 - sigmoid(logits)) * x + sigmoid(logits) * h`. All three have one shape."""
    return torch.lerp(x, h, torch.sigmoid(logits))


def weighted_sum_inverse(logits: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """Recover `x` from `y = weighted_sum(logits, x, h)`.

    The division by `1 - g` amplifies the rounding error of `y` by `1 / (1 - g)`; written as
    `y + (y - h) * exp(logits)`, because `g / (1 - g) = exp(logits)` has no cancellation near `g = 1`.
    """
    return y + (y - h) * torch.exp(logits)


def weighted_sum_backward(
    gate: Tensor, slope: Tensor, x: Tensor, h: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weighted sum with respect to `(logits, x, h)`.

    Args:
        gate: The gate `g` that the forward pass used (quantised, in exact arithmetic).
        slope: `dg / dlogits`, which is `s (1 - s)` with `s = sigmoid(logits)`.
        x: The stream that was blended.
        h: The message.
        grad: Gradient with respect to the result, of the same shape.
    """
    grad_h = grad * gate
    return (h - x) * grad * slope, grad - grad_h, grad_h
