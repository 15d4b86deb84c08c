"""Fused operators of reversible and recurrent networks, each usable on its own.

Each has a reference in plain PyTorch, which runs on any device and is the truth; a Triton kernel, which runs on CUDA
tensors; and the operator that is registered with `torch.library`. `revgrad_kernels.backend` says which one runs.
"""

from revgrad_kernels.cell_update import cell_update
from revgrad_kernels.convlstm import convlstm
from revgrad_kernels.exact_additive import exact_additive, exact_additive_inverse
from revgrad_kernels.exact_weighted_sum import (
    exact_weighted_sum,
    exact_weighted_sum_backward,
    exact_weighted_sum_inverse,
    exact_weighted_sum_refill,
)
from revgrad_kernels.hidden_output import hidden_output
from revgrad_kernels.pixel_shuffle import (
    pixel_shuffle,
    pixel_shuffle_concatenate,
    pixel_unshuffle,
    pixel_unshuffle_split,
)
from revgrad_kernels.reservoir import forget, level_costs, recall
from revgrad_kernels.stlstm_states import stlstm_states
from revgrad_kernels.weighted_sum import weighted_sum, weighted_sum_backward, weighted_sum_inverse

__all__ = [
    "cell_update",
    "convlstm",
    "exact_additive",
    "exact_additive_inverse",
    "exact_weighted_sum",
    "exact_weighted_sum_backward",
    "exact_weighted_sum_inverse",
    "exact_weighted_sum_refill",
    "forget",
    "hidden_output",
    "level_costs",
    "pixel_shuffle",
    "pixel_shuffle_concatenate",
    "pixel_unshuffle",
    "pixel_unshuffle_split",
    "recall",
    "stlstm_states",
    "weighted_sum",
    "weighted_sum_backward",
    "weighted_sum_inverse",
]
