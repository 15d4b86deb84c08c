"""What the recurrent operators share: gates, how they update a cell state, and that activations are recomputed.

A convolution returns gates before activation side by side, `[B, n C, ...]` in n groups of C channels: i, f, g and, of
four groups, o. With them the new cell state is `c' = sigmoid(f) c + sigmoid(i) tanh(g)`. The bias of the convolution,
one number per channel, may be left for the operator to add.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels.backend import converted, on_device, tl, triton
from revgrad_kernels.layout import Matrix, canonical, laid_out_like, samples, size_class

sigmoid_backward: Any = torch.ops.aten.sigmoid_backward
"""Gradient with respect to the argument, from `(gradient, sigmoid(argument))`; differentiable."""
tanh_backward: Any = torch.ops.aten.tanh_backward
"""Gradient with respect to the argument, from `(gradient, tanh(argument))`; differentiable."""


def recompute(operator: Any, gradients: Callable[..., Any]) -> None:
    """Register autograd of a custom operator that saves its inputs alone: the activations in between are larger.

    Args:
        operator: The operator.
        gradients: From its inputs and the gradients of its outputs to the gradients of its inputs.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return gradients(*ctx.saved_tensors, *grads)

    operator.register_autograd(backward, setup_context=save)


def given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple(t for t in tensors if t is not None)


def check_gates(operator: str, groups: int, cell: Tensor, bias: Tensor | None, **named_gates: Tensor) -> None:
    """Check the shapes of gates, given by their name, and of their bias.

    Raises:
        ValueError: Gates and bias do not have `groups` times the channels of the cell state.
    """
    batch, channels, *size = cell.shape if cell.ndim > 1 else (0, 0)
    for name, gates in named_gates.items():
        if cell.ndim < 2 or [*gates.shape] != [batch, groups * channels, *size]:
            times = {3: "three", 4: "four"}[groups]
            raise ValueError(
                f"{operator}: {name} {tuple(gates.shape)} must have {times} times the channels of cell "
                f"{tuple(cell.shape)}"
            )
        if bias is not None and bias.shape != gates.shape[1:2]:
            raise ValueError(
                f"{operator}: the bias must have one element per channel of {name} {tuple(gates.shape)}, "
                f"got {tuple(bias.shape)}"
            )


def biased(gates: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gates in a dtype, with the bias of their convolution added."""
    gates = converted(gates, dtype)
    return gates if bias is None else gates + converted(bias, dtype).view(-1, *(1,) * (gates.ndim - 2))


def split_gates(groups: int, gates: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`i`, `f`, `g` and, of four groups, `o` before activation, the bias added."""
    return biased(gates, bias, dtype).chunk(groups, dim=1)


def activated(i: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sigmoid(i)`, `sigmoid(f)` and `tanh(g)`."""
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g)


def updated(cell: Tensor, i: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """The new cell state, from gates before activation and in their layout."""
    # Not by way of `activated`: each activation that is freed at once leaves its place in the cache to the next.
    return torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)


def gated(gate: Tensor, update: Tensor) -> Tensor:
    """`sigmoid(gate) * tanh(update)`, in the layout of the update."""
    return torch.tanh(update) * torch.sigmoid(gate)


def gate_gradients(grad: Tensor, cell: Tensor, i: Tensor, f: Tensor, g: Tensor) -> Iterable[Tensor]:
    """Gradients of `i`, `f` and `g` before activation, one after the other, from that of the new cell state."""
    yield sigmoid_backward(grad * g, i)
    yield sigmoid_backward(grad * cell, f)
    yield tanh_backward(grad * i, g)


def side_by_side(like: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """Parts joined along the channels into something like `like`; differentiable where gradients are enabled."""
    if torch.is_grad_enabled():
        return torch.cat([part.to(like.dtype) for part in parts], dim=1)
    # Into place one by one, so that not all of them are in memory twice.
    joined, start = torch.empty_like(like), 0
    for part in parts:
        joined[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return joined


def bias_gradient(bias: Tensor | None, grad_gates: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Sum of the gates' gradient over everything but channels.

    In a pass of its own, as a convolution makes it for its bias. The kernels work on rows of samples, where a tile
    holds several channels or a part of one: they could only add by channel atomically, in another order every time.
    """
    if bias is None:
        return None
    return grad_gates.sum([d for d in range(grad_gates.ndim) if d != 1], dtype=dtype).to(bias.dtype)


def aligned(gates: Tensor, *tensors: Tensor) -> Any:
    """A tuple of the gates, canonical, and the tensors in their memory layout."""
    gates = canonical(gates)
    return gates, *(laid_out_like(gates, t) for t in tensors)


def launch(kernel: Any, groups: int, gates: Tensor, *tensors: Tensor | None, wide: Any, **options: Any) -> None:
    """Run a kernel on cell states as rows, of which canonical gates hold `groups` side by side."""
    if not gates.numel():
        return
    columns = samples(gates).columns // groups
    matrix = Matrix(gates.numel() // groups // columns, columns)
    pixels = columns // (gates.shape[1] // groups)
    with on_device(gates):
        kernel[matrix.grid](
            gates, *tensors, matrix.rows, columns, pixels, size_class(gates.numel() // groups),
            INDEX=tl.int32 if columns < 2**30 else tl.int64, WIDE=wide, WIDTH=matrix.width, **options,
        )  # fmt: skip


@triton.jit
def load_gate(
    gates_ptr, bias_ptr, row, column, columns, pixels, mask,
    NUMBER: tl.constexpr, GROUPS: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A group of gates before activation, counted from 0; `pixels` columns that follow each other share a channel."""
    gate = tl.load(gates_ptr + (row * GROUPS + NUMBER) * columns + column, mask, other=0).to(WIDE)
    if bias_ptr is not None:
        # A division in 64 bits would take several times as long.
        channel = NUMBER * (columns // pixels) + column.to(INDEX) // pixels
        gate += tl.load(bias_ptr + channel, column < columns, other=0).to(WIDE)
    return gate


@triton.jit
def load_activated(
    gates_ptr, bias_ptr, row, column, columns, pixels, mask,
    GROUPS: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`sigmoid(i)`, `sigmoid(f)` and `tanh(g)`."""
    i = load_gate(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 0, GROUPS, INDEX, WIDE)
    f = load_gate(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 1, GROUPS, INDEX, WIDE)
    g = load_gate(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 2, GROUPS, INDEX, WIDE)
    return sigmoid(i), sigmoid(f), tanh(g)


@triton.jit
def store_gate(gates_ptr, gate, row, column, columns, mask, NUMBER: tl.constexpr, GROUPS: tl.constexpr):
    """Write a group, counted from 0."""
    tl.store(gates_ptr + (row * GROUPS + NUMBER) * columns + column, gate, mask)


@triton.jit
def store_gate_gradients(gates_ptr, grad, cell, i, f, g, row, column, columns, mask, GROUPS: tl.constexpr):
    """Write the gradients of `i`, `f` and `g` before activation, from that of the new cell state."""
    store_gate(gates_ptr, grad * g * i * (1 - i), row, column, columns, mask, 0, GROUPS)
    store_gate(gates_ptr, grad * cell * f * (1 - f), row, column, columns, mask, 1, GROUPS)
    store_gate(gates_ptr, grad * i * (1 - g * g), row, column, columns, mask, 2, GROUPS)


@triton.jit
def sigmoid(x):
    """In the dtype of `x`; never overflows to something that is not a number."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """In the dtype of `x`, with small relative error also near 0; never overflows.

    Written out because Triton's interpreter has none. Below 1/16, where the quotient cancels, the Taylor series up to
    `x^9` is exact to 1e-14.
    """
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.0625, series, tl.where(x < 0, -quotient, quotient))
