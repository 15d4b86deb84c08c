"""From what others have written: pairs and groups of residual functions, and stacks of residual blocks."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from revgrad.adapter import Adapter
from revgrad.additive import AdditiveCoupling
from revgrad.errors import StreamError
from revgrad.layer import ReversibleLayer
from revgrad.momentum import MomentumStep
from revgrad.rearrangement import Concatenate, Split
from revgrad.sequential import OPTIONS, ReversibleSequential


def from_pairs(
    pairs: Iterable[tuple[nn.Module | None, nn.Module | None]],
    split_dim: int | None = None,
    **options: Any,
) -> ReversibleSequential:
    """A chain of the blocks of RevNet, Reformer, RevTorch and memcnn: `y1 = x1 + F(x2)`, then `y2 = x2 + G(y1)`.

    Args:
        pairs: `(F, G)` per block. None for one that adds nothing.
        split_dim: Dimension along which a single tensor is halved on its way in and joined on its way out; by default
            the chain takes and returns the two streams.
        options: Of `ReversibleSequential`.

    Raises:
        StreamError: A pair is not two modules or None; or nothing is left to run.
        TypeError: There is no such option.
    """
    _check_options("from_pairs", options, "split_dim")
    layers: list[ReversibleLayer] = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise StreamError(f"from_pairs: item {i} is not a pair (F, G) of modules, but a {type(pair).__name__}")
        for module, source in zip(pair, (1, 0), strict=True):
            if module is not None and not isinstance(module, nn.Module):
                raise StreamError(f"from_pairs: pair {i} holds a {type(module).__name__}, neither a module nor None")
            if module is not None:
                layers.append(AdditiveCoupling(module, source=source, target=1 - source))
    if not layers:
        raise StreamError("from_pairs: there is no module in the pairs")
    return ReversibleSequential(*_on_parts(layers, 2, split_dim), **options)


def from_groups(
    blocks: Iterable[Sequence[nn.Module]],
    split_dim: int | None = None,
    **options: Any,
) -> ReversibleSequential:
    """A chain of grouped reversible blocks (Li et al. 2021, RevGNN; PyG's `GroupAddRev`) on k streams.

    A block of functions `f_1 .. f_k` computes `y_1 = x_1 + f_1(x_2 + ... + x_k)`, then `y_i = x_i + f_i(y_(i-1))`. What
    all functions are told besides, such as the edges of a graph, is given by name: `chain(*streams, edge_index=edges)`.

    Args:
        blocks: k modules per block, at least two, the same number in each.
        split_dim: Dimension along which a single tensor is cut into k equal streams on its way in and joined on its way
            out; by default the chain takes and returns the k streams.
        options: Of `ReversibleSequential`.

    Raises:
        StreamError: There are no blocks, or they are not of one size of at least two.
        TypeError: There is no such option.
    """
    _check_options("from_groups", options, "split_dim")
    blocks = [tuple(block) for block in blocks]
    sizes = {len(block) for block in blocks}
    if len(sizes) != 1 or min(sizes) < 2:
        raise StreamError(
            f"from_groups: every block needs the same number of modules, at least 2; got blocks of {sorted(sizes)}"
        )
    k = sizes.pop()
    layers: list[ReversibleLayer] = []
    for first, *rest in blocks:
        layers.append(AdditiveCoupling(_OfSum(first), source=tuple(range(1, k)), target=0))
        layers += [AdditiveCoupling(f, source=i - 1, target=i) for i, f in enumerate(rest, 1)]
    return ReversibleSequential(*_on_parts(layers, k, split_dim), **options)


def _on_parts(layers: list[ReversibleLayer], parts: int, split_dim: int | None) -> list[ReversibleLayer]:
    """Layers on streams, on the parts of one tensor where it is to be split."""
    return layers if split_dim is None else [Split(parts, split_dim), *layers, Concatenate(parts, split_dim)]


def _check_options(function: str, options: dict[str, Any], *own: str) -> None:
    """Raise for an option that a chain does not have; `own` are those of the function besides."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function}: there is no option {name!r}; there are {', '.join((*own, *OPTIONS))}")


def _of_chain(option: str) -> Any:
    """The option of the chain inside; may be changed at any time."""
    return property(lambda self: getattr(self.chain, option), lambda self, value: setattr(self.chain, option, value))


class MomentumNetwork(nn.Module):
    """A stack of residual blocks with a momentum: one tensor in, one of the same shape out.

    The velocity starts at zero and is dropped at the end, so that the network has no inverse; `chain`, the
    `ReversibleSequential` inside, has: of the pair of output and velocity. The options of the chain are attributes here
    as well.
    """

    def __init__(self, chain: ReversibleSequential) -> None:
        super().__init__()
        self.chain = chain

    mode = _of_chain("mode")
    arithmetic = _of_chain("arithmetic")
    anchor_every = _of_chain("anchor_every")
    drift_guard = _of_chain("drift_guard")
    memory_budget = _of_chain("memory_budget")
    offload = _of_chain("offload")

    def forward(self, x: Tensor, **conditioning: Any) -> Tensor:
        """`[B, ...]` to the same shape. Conditioning goes to the blocks that take it by its name."""
        return self.chain(x, torch.zeros_like(x), **conditioning)[0]


def momentum_from(
    blocks: Iterable[nn.Module],
    gamma: float = 0.9,
    *,
    skip_inside: bool,
    **options: Any,
) -> MomentumNetwork:
    """Run a stack of residual blocks, with their own parameters, as a momentum network (Sander et al. 2021).

    With gamma near 0 it computes what the stack does; with a larger one, which inverts better, the network is another
    and has to be trained or tuned. Blocks must not change the shape of their input: convert each stage of a ResNet by
    itself.

    Args:
        blocks: An `nn.Sequential` or any other modules, in order.
        gamma: Momentum, between 0 and 1, both excluded; see `VelocityCoupling`.
        skip_inside: Whether a block adds its input itself, as in `x + f(x)` or `relu(x + f(x))`; its `f` is then
            `block(x) - x`. False where a block is `f` alone.
        options: Of `ReversibleSequential`.

    Raises:
        StreamError: There are no blocks, something else is among them, or gamma is not between 0 and 1.
        TypeError: There is no such option.
    """
    _check_options("momentum_from", options)
    if isinstance(blocks, nn.Module) and not isinstance(blocks, Iterable):
        raise StreamError(
            f"momentum_from: a {type(blocks).__name__} is no sequence of blocks: pass those of one stage, such as "
            "model.layer1 of a ResNet"
        )
    blocks = list(blocks)
    for i, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise StreamError(f"momentum_from: block {i} is a {type(block).__name__}, not a module")
    steps = [MomentumStep(_Change(block) if skip_inside else block, gamma) for block in blocks]
    if not steps:
        raise StreamError("momentum_from: there are no blocks")
    return MomentumNetwork(ReversibleSequential(*steps, **options))


class _OfSum(Adapter):
    """`f` of the sum of the streams."""

    def positional(self, given: int) -> int:
        return 1

    def forward(self, *streams: Tensor, **conditioning: Any) -> Tensor:
        return self.inner(reduce(torch.add, streams), **conditioning)


class _Change(Adapter):
    """What a block changes: `block(x) - x`."""

    def forward(self, x: Tensor, **conditioning: Any) -> Tensor:
        y = self.inner(x, **conditioning)
        if not isinstance(y, Tensor):
            raise StreamError(
                f"momentum_from: {type(self.inner).__name__} returns a {type(y).__name__}; a block must return a tensor"
            )
        if y.shape != x.shape:
            raise StreamError(
                f"momentum_from: {type(self.inner).__name__} changes the shape from {tuple(x.shape)} to "
                f"{tuple(y.shape)}; leave blocks that do outside, and convert each stage by itself"
            )
        return y - x
