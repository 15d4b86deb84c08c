"""The stacks of additive couplings that the engine and its peers run: convolutions and transformers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Counted(nn.Module):
    """A transform that counts its evaluations, however it is called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        # In a list: an attribute itself is as it was when a backward pass evaluates again.
        self.count = [0]

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        self.count[0] += 1
        return self.net(x)


class Block(nn.Module):
    """`a' = a + f(b)`, `b' = b + g(a')`: two couplings."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = Counted(f)
        self.g = Counted(g)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """One after the other."""
        a = a + self.f(b)
        return a, b + self.g(a)


@dataclass(frozen=True)
class Stack:
    """Blocks, and the dimension along which a state is cut in two streams."""

    blocks: nn.ModuleList
    dim: int

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]

    @property
    def transforms(self) -> list[Counted]:
        """All of them, in order."""
        return [t for block in self for t in (block.f, block.g)]


@dataclass(frozen=True)
class Workload:
    """A kind of stack."""

    name: str
    block: Callable[[], Block]
    shape: tuple[int, ...]
    """Of the state, which is both streams together."""
    dim: int
    depths: tuple[int, ...]
    """Numbers of blocks that are measured."""
    description: str

    def build(self, depth: int) -> tuple[Stack, Tensor]:
        """A stack and its input, the same ones every time."""
        torch.manual_seed(0)
        stack = Stack(nn.ModuleList(self.block() for _ in range(depth)), self.dim)
        return stack, torch.randn(self.shape).requires_grad_()


class SelfAttention(nn.Module):
    """Layer normalisation and multi-head self-attention, `[B, T, D]` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attend."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


def _convolution(channels: int = 32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


CONVOLUTION = Workload(
    "convolution",
    lambda: Block(_convolution(), _convolution()),
    shape=(8, 64, 32, 32),
    dim=1,
    depths=(4, 16, 64),
    description="convolution 3 x 3, batch normalisation, ReLU; 64 channels, 32 x 32, batch 8",
)
TRANSFORMER = Workload(
    "transformer",
    lambda: Block(SelfAttention(256, 8), _perceptron(256)),
    shape=(4, 256, 512),
    dim=2,
    depths=(4, 12, 24),
    description="attention of 8 heads, perceptron of 4 times the width; two streams of width 256, 256 tokens, batch 4",
)
WORKLOADS = (CONVOLUTION, TRANSFORMER)
