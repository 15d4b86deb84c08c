"""Fused optimisers (`fused=True`) change weights without autograd noticing, so that a backward pass that evaluates a
transform again would do so with other weights than the forward pass, and not know.
"""

from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@cache
def watch_fused_optimisers() -> None:
    """From now on count the steps of fused optimisers as changes in place of their weights, as other steps are."""
    register_optimizer_step_post_hook(_count)


def _count(optimiser: Optimizer, *_: Any) -> None:
    for group in optimiser.param_groups:
        if group.get("fused"):
            changed = [p for p in group["params"] if p.grad is not None and not p.is_inference()]
            torch.autograd.graph.increment_version(changed)
