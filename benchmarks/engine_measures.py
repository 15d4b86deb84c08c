"""What is measured of a training step of a stack: memory, evaluations, gradients, time."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Model, stored
from benchmarks.engine_workloads import Stack
from benchmarks.timing import no_collector, processor_seconds
from revgrad import LiveMemory

MIB = 2.0**20


@dataclass(frozen=True)
class Counts:
    """What does not depend on the machine's load."""

    peak_mib: float
    """Most bytes alive from the start of the forward to the end of the backward pass. Weights, their gradients, and the
    input with its gradient exist before and do not count.
    """
    evaluations: float
    """Of each transform."""
    gradient: Tensor
    """Of all weights, in one row."""
    input_gradient: Tensor


class ResizedMemory(LiveMemory):
    """Also sees storages that are resized by hand, as some libraries do to free what is still referred to.

    It takes a look at every storage before every operator.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for key, ref in self._storages.items():
            storage = ref()
            if storage is not None and storage.nbytes() != self._sizes[key]:
                self.live += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)
        return super().__torch_dispatch__(func, types, args, kwargs)


def loss_weight(x: Tensor) -> Tensor:
    """What the output is multiplied with, so that every element has a gradient of its own."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) / x.numel()


def training_step(model: Model, x: Tensor, weight: Tensor) -> None:
    """Forward pass, weighted sum of the output, backward pass; nothing keeps the output alive in between."""
    (model(x) * weight).sum().backward()


def counts(model: Model, stack: Stack, x: Tensor, *, resized: bool = False) -> Counts:
    """Take one training step and count; `resized` sees storages that are, which takes longer."""
    weight = loss_weight(x)
    weights = list(stack.blocks.parameters())
    for leaf in (*weights, x):
        leaf.grad = torch.zeros_like(leaf)
    before = sum(t.count[0] for t in stack.transforms)
    with no_collector(), (ResizedMemory if resized else LiveMemory)() as memory:
        training_step(model, x, weight)
    evaluations = (sum(t.count[0] for t in stack.transforms) - before) / len(stack.transforms)
    gradient = torch.cat([p.grad.flatten() for p in weights if p.grad is not None])
    return Counts(memory.peak / MIB, evaluations, gradient, x.grad.clone())


def true_gradient(stack: Stack, x: Tensor) -> Tensor:
    """The gradient of the same weights and input in float64, by stored autograd."""
    double = Stack(copy.deepcopy(stack.blocks).double(), stack.dim)
    x = x.detach().double().requires_grad_()
    return counts(stored(double), double, x).gradient


def relative_error(found: Tensor, true: Tensor) -> float:
    """L2 norm of the difference, as a fraction of that of the true gradient."""
    return float((found.to(true.dtype) - true).norm() / true.norm())


def step_seconds(model: Model, x: Tensor, weight: Tensor) -> float:
    """Processor time of one training step; gradients add up, as they do over several batches."""
    return processor_seconds(lambda: training_step(model, x, weight))


def forward_seconds(model: Model, x: Tensor) -> float:
    """Processor time of one forward pass without a graph."""
    with torch.no_grad():
        return processor_seconds(lambda: model(x))
