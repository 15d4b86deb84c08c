"""The engine and its peers: ways to run one and the same stack of additive couplings, from state to state."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import isqrt

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.engine_workloads import Block, Stack
from revgrad import AdditiveCoupling, Concatenate, ReversibleSequential, Split
from revgrad.message import NOTED

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to run a stack. All of them share the stack's weights."""

    name: str
    build: Callable[[Stack], Model]
    package: str | None = None
    """Where it comes from; `build` raises where that cannot be imported."""
    ours: bool = False
    measures: bool = False
    """Whether its first forward pass of a stack measures what layers take, and is longer for that."""
    seldom: bool = False
    """Whether it is far from the others in time, and is timed in one round out of `SELDOM`, the first among them."""
    resizes: bool = False
    """Whether it frees what is still referred to, by resizing its storage."""
    trains: bool = True
    """Whether it takes training steps, and no forward passes without a graph."""

    @property
    def reversible(self) -> bool:
        """Whether it recomputes activations from outputs."""
        return self.ours or self.package is not None

    def version(self) -> str | None:
        """Of the package, if it is installed."""
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None


def stored(stack: Stack) -> Model:
    """Stored autograd."""
    return lambda x: _joined(stack, partial(_run, list(stack)), x)


def checkpointed(stack: Stack, every: int = 1) -> Model:
    """`torch.utils.checkpoint` around every so many blocks."""
    blocks = list(stack)
    segments = [blocks[i : i + every] for i in range(0, len(blocks), every)]

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for segment in segments:
            a, b = checkpoint(_run, segment, a, b, use_reentrant=False)
        return a, b

    return lambda x: _joined(stack, run, x)


def by_memcnn(stack: Stack) -> Model:
    """One `InvertibleModuleWrapper` per block. The first keeps its input, which is the caller's; others free theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import memcnn

    couplings = [memcnn.AdditiveCoupling(block.f, block.g, split_dim=stack.dim) for block in stack]
    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(c, keep_input=not i) for i, c in enumerate(couplings)))


def by_revtorch(stack: Stack) -> Model:
    """One `ReversibleSequence`."""
    from revtorch import revtorch

    blocks = [revtorch.ReversibleBlock(block.f, block.g, stack.dim) for block in stack]
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def by_revlib(stack: Stack) -> Model:
    """One `ReversibleSequential`, in its default memory mode."""
    import revlib

    return revlib.ReversibleSequential(*stack.transforms, split_dim=stack.dim)


def by_revgrad(stack: Stack, arithmetic: str, mode: str = "reversible", memory_budget: str | None = None) -> Model:
    """One `ReversibleSequential` of this library, past the first passes, in which messages are compared."""
    couplings = [AdditiveCoupling(t, source=1 - i % 2, target=i % 2) for i, t in enumerate(stack.transforms)]
    for coupling in couplings:
        coupling._noted = NOTED
    ends = Split(2, stack.dim), Concatenate(2, stack.dim)
    return ReversibleSequential(
        ends[0],
        *couplings,
        ends[1],
        mode=mode,  # type: ignore[arg-type]
        arithmetic=arithmetic,  # type: ignore[arg-type]
        memory_budget=memory_budget,
    )


def _run(blocks: list[Block], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for block in blocks:
        a, b = block(a, b)
    return a, b


def _joined(stack: Stack, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    return torch.cat(run(*x.chunk(2, stack.dim)), stack.dim)


SELDOM = 3
STORED = Contender("stored autograd", stored)
FORWARD = Contender("forward pass alone", stored, trains=False)
"""What a second evaluation costs at least. It is timed, and is no contender."""
FREE = Contender(
    "revgrad float, free budget",
    partial(by_revgrad, arithmetic="float", memory_budget="free"),
    ours=True,
    measures=True,
)
EXACT = Contender("revgrad exact", partial(by_revgrad, arithmetic="exact"), ours=True)
CONTENDERS = (
    STORED,
    Contender("checkpoint per block", checkpointed, seldom=True),
    Contender("checkpoint, square root", lambda stack: checkpointed(stack, isqrt(len(stack.blocks))), seldom=True),
    Contender("memcnn", by_memcnn, "memcnn", seldom=True, resizes=True),
    Contender("RevTorch", by_revtorch, "revtorch"),
    Contender("revlib", by_revlib, "revlib"),
    Contender("revgrad float", partial(by_revgrad, arithmetic="float"), ours=True),
    FREE,
    EXACT,
)
