"""Pointwise operators of reversible and recurrent networks, each usable on its own.

Every operator here is plain PyTorch: it runs on any device and is the reference that a fused kernel must match.
"""

from revgrad_kernels.exact_weighted_sum import forget, recall
from revgrad_kernels.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from revgrad_kernels.recurrent import cell_update, hidden_output
from revgrad_kernels.weighted_sum import weighted_sum, weighted_sum_backward, weighted_sum_inverse

__all__ = [
    "cell_update",
    "forget",
    "hidden_output",
    "pixel_shuffle",
    "pixel_unshuffle",
    "recall",
    "weighted_sum",
    "weighted_sum_backward",
    "weighted_sum_inverse",
]
