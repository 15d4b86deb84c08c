"""`plan`: what each way to train a chain keeps and recomputes, told before anything is run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from revgrad.arithmetic import is_exact
from revgrad.budget import choose_stored, parse_budget
from revgrad.chain import ChainState, Link
from revgrad.conditioning import bind
from revgrad.cost import ChainCost, measure
from revgrad.layer import NO_ARGUMENTS, Arguments, Streams, unwrapped
from revgrad.links import Chain, chain_links, checked_state, checked_streams
from revgrad.program import Program
from revgrad.sequential import ReversibleSequential


@dataclass(frozen=True)
class ModeCost:
    """One way to run a chain."""

    name: str
    kept_bytes: int
    """Alive between forward and backward pass: what is saved, and the results."""
    extra_flops: int
    """Of what the backward pass evaluates again."""
    stored_layers: int
    """How many layers are not evaluated again."""


@dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    stored: ModeCost
    checkpoint: ModeCost
    reversible: ModeCost
    budgeted: tuple[ModeCost, ...]
    """One per memory budget."""
    layers: int
    forward_flops: int
    """Of one forward pass."""
    largest_layer_bytes: int
    """The graph of the largest layer, which comes on top while it is evaluated again."""
    exact: bool

    @property
    def modes(self) -> tuple[ModeCost, ...]:
        """All of them."""
        return self.stored, self.checkpoint, self.reversible, *self.budgeted

    def step_flops(self, way: ModeCost) -> float:
        """FLOPs of a training step over those of stored autograd, where a backward pass takes two forward passes."""
        return 1 + way.extra_flops / (3 * self.forward_flops) if self.forward_flops else 1.0

    def __str__(self) -> str:
        width = max(len(way.name) for way in self.modes)
        lines = [f"{'way':{width}}        kept  evaluated again    step  layers stored"]
        lines += [
            f"{way.name:{width}}  {_bytes(way.kept_bytes):>10}  {_flops(way.extra_flops):>15}  "
            f"{self.step_flops(way):5.3f}x  {way.stored_layers:4} of {self.layers}"
            for way in self.modes
        ]
        lines += [
            "kept: bytes between forward and backward pass; step: FLOPs over those of stored autograd.",
            "On top come gradients and, where layers are evaluated again, the graph of one: "
            f"{_bytes(self.largest_layer_bytes)} at most.",
        ]
        if self.exact:
            lines.append(
                "Not counted are the bits that reversed gated layers spill, which depend on the data: about 1.5 per "
                "element with ordinary gates; check_invertible tells. Nor the integers that exact merges compute with: "
                "on a CPU several times the bytes of a stream, for a moment."
            )
        return "\n".join(lines)


def plan(
    model: Chain,
    inputs: Tensor | Sequence[Tensor],
    states: ChainState | None = None,
    *,
    budgets: int | str | Sequence[int | str] | None = None,
    conditioning: Arguments = NO_ARGUMENTS,
) -> Plan:
    """Tell what every way to train a chain keeps and recomputes. Nothing is computed and no memory is taken.

    The transforms run under fake tensors, which have shapes and no values. What libraries reserve beside a result (as
    recurrent layers of oneDNN and cuDNN do) only shows in a real run, and is not counted. Train or eval mode, autocast
    and frozen parameters are as they are now.

    Args:
        model: A reversible layer or chain; in whichever mode.
        inputs: Its input stream or streams. Only shapes, dtypes and `requires_grad` matter: they may be on the meta
            device, or fake tensors of a mode that lets real weights in (`allow_non_fake_inputs`).
        states: Conditioning states, if it is stateful.
        budgets: Memory budget or budgets to plan for. By default the model's own, or else a quarter, a half and three
            quarters of what storing everything would add.
        conditioning: Arguments for every transform that takes them.

    Raises:
        StreamError: Streams or states do not fit, or a budget is nonsense.
        RuntimeError: From fake tensors, where a transform looks at values (`if x.max() > 1`).
    """
    links = chain_links(model)
    chain, _ = unwrapped(model)
    own = chain if isinstance(chain, ReversibleSequential) else ReversibleSequential()
    streams = checked_streams("plan", (inputs,) if isinstance(inputs, Tensor) else inputs)
    state = checked_state(links, states)
    arguments = bind(links, conditioning)
    exact = is_exact(own.arithmetic, links)
    program = Program.of_chain(links, exact=exact, arguments=arguments, anchor_every=own.anchor_every)
    device = _device(links, streams)
    with _fake_mode(streams) as mode:

        def fake(tensors: Sequence[Tensor]) -> Streams:
            return tuple(x if isinstance(x, FakeTensor) else _on(device, mode.from_tensor(x)) for x in tensors)

        program = program.emptied().filled(fake(program.conditioning()))
        cost = measure(program, fake(streams), state.replace(fake(state.tensors())))
    count = len(cost.layers)
    stored = _mode_cost("stored", cost, (True,) * count)
    every_reversed = _mode_cost("reversible", cost, (False,) * count, program.anchor_every)
    if budgets is None:
        budgets = own.memory_budget
    if budgets is None:
        budgets = [max(0, stored.kept_bytes - every_reversed.kept_bytes) * i // 4 for i in (1, 2, 3)]
    if isinstance(budgets, (int, str)):
        budgets = [budgets]
    budgeted = [
        _mode_cost(
            f"budget {size if isinstance(size, str) else _bytes(size)}",
            cost,
            choose_stored(cost, parse_budget(size), own.anchor_every),
            own.anchor_every,
        )
        for size in budgets
    ]
    forward = sum(layer.flops for layer in cost.layers)
    return Plan(
        stored=stored,
        checkpoint=ModeCost("checkpoint", cost.kept_by_checkpoints(), forward, 0),
        reversible=every_reversed,
        budgeted=tuple(budgeted),
        layers=count,
        forward_flops=forward,
        largest_layer_bytes=max((sum(layer.saved.values()) for layer in cost.layers), default=0),
        exact=exact,
    )


def _mode_cost(name: str, cost: ChainCost, stored: Sequence[bool], anchor_every: int | None = None) -> ModeCost:
    extra = sum(layer.recomputed_flops for layer, kept in zip(cost.layers, stored, strict=True) if not kept)
    return ModeCost(name, cost.kept(stored, anchor_every), extra, sum(stored))


def _bytes(size: int) -> str:
    return _scaled(size, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def _flops(count: int) -> str:
    return _scaled(count, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"])


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    """A number in the largest unit of which there is at least one."""
    power = min(int(math.log(max(number, 1), base)), len(units) - 1)
    return f"{number / base**power:.{1 if power else 0}f} {units[power]}"


def _fake_mode(streams: Streams) -> FakeTensorMode:
    """That of the streams, if they are fake."""
    own = next((x.fake_mode for x in streams if isinstance(x, FakeTensor)), None)
    return own or FakeTensorMode(allow_non_fake_inputs=True)


def _device(links: Sequence[Link], streams: Streams) -> torch.device:
    """Where the chain would run: that of the streams, or of the weights where the streams are on the meta device."""
    weights = (x for _, layer in links for x in (*layer.parameters(), *layer.buffers()))
    return next((x.device for x in (*streams, *weights) if not x.is_meta), streams[0].device)


def _on(device: torch.device, x: Tensor) -> Tensor:
    """A fake tensor that stands for one on this device, if it is of the meta device."""
    return torch.empty_like(x, device=device).requires_grad_(x.requires_grad) if x.is_meta else x
