"""Adam as one pass over weights, gradients and moments: PyTorch's fused step, for any memory layout."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    *,
    capturable: bool = False,
) -> torch.optim.Adam:
    """`torch.optim.Adam`, fused: two thirds of its time on a CPU, and no memory besides the moments.

    Its state is that of any other `torch.optim.Adam`, so that it takes the state of one that is not fused. What is
    loaded are the moments; how to step stays as it is here.

    The fused step of a CPU walks through memory as it lies, without asking for strides: a gradient laid out in another
    order than its weight would, without an error, move other weights. So gradients and loaded moments are laid out like
    their weights first. Autograd does so by itself, but whoever sets a `.grad`, or saves the moments of weights in
    another layout, need not.

    Args:
        parameters: The weights.
        learning_rate: Of the first step.
        betas: Decay of the first and second moments.
        capturable: Whether a CUDA graph may capture the step.
    """
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=True, capturable=capturable)
    optimiser.register_step_pre_hook(_lay_out_gradients)
    optimiser.register_load_state_dict_pre_hook(_with_own_options)
    optimiser.register_load_state_dict_post_hook(_lay_out_moments)
    return optimiser


def _lay_out_gradients(optimiser: Optimizer, *_: Any) -> None:
    for group in optimiser.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad = _laid_out_like(weight, weight.grad)


def _lay_out_moments(optimiser: Optimizer) -> None:
    for weight, state in optimiser.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _laid_out_like(weight, state[name])


def _with_own_options(optimiser: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What was saved by a step that is not fused would else turn this one off."""
    return {**state, "param_groups": optimiser.state_dict()["param_groups"]}


def _laid_out_like(weight: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == weight.stride() else torch.empty_like(weight).copy_(x)
