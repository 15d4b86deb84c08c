"""`check_invertible`: does a chain invert, how exactly, and at what cost in residue."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from revgrad.actnorm import ActNorm
from revgrad.arithmetic import is_exact
from revgrad.cell import without
from revgrad.chain import ChainState, Link, split_carry, with_carry
from revgrad.conditioning import bind
from revgrad.gradients import is_differentiable
from revgrad.layer import NO_ARGUMENTS, Arguments, LayerCall, ReversibleLayer, State, Streams, unwrapped
from revgrad.links import Chain, chain_links, checked_state, checked_streams
from revgrad.modules import CopiedBuffers
from revgrad.program import Program, put_on_grid
from revgrad.replay import Snapshot
from revgrad.residue import Residue
from revgrad.sequential import ReversibleSequential


@dataclass(frozen=True)
class LayerReport:
    """One layer of an `InvertibilityReport`."""

    name: str
    own_error: float
    """Relative error of the layer's input, recovered from its true output: the layer's own share."""
    chain_error: float
    """Relative error of the layer's input, recovered from the chain's output through all layers behind it."""
    bits: float
    """Bits of residue per element of the updated stream."""


@dataclass(frozen=True)
class InvertibilityReport:
    """What `check_invertible` found, per layer in chain order. Errors are largest absolute error over largest
    magnitude.
    """

    layers: tuple[LayerReport, ...]
    exact: bool
    tolerance: float

    @property
    def first_degraded(self) -> LayerReport | None:
        """Where inversion first goes wrong: going backwards from the output, the first layer whose recovered input is
        off.
        """
        return next((r for r in reversed(self.layers) if not r.chain_error <= self.tolerance), None)

    @property
    def invertible(self) -> bool:
        """Whether every layer's input is recovered within the tolerance."""
        return self.first_degraded is None

    @property
    def bits(self) -> float:
        """Bits of residue per element, all layers together."""
        return sum(r.bits for r in self.layers)

    def __str__(self) -> str:
        width = max([5, *(len(r.name) for r in self.layers)])
        lines = [f"{'layer':{width}}  own error  chain error  residue bits/element"]
        lines += [f"{r.name:{width}}  {r.own_error:9.2e}  {r.chain_error:11.2e}  {r.bits:8.3f}" for r in self.layers]
        bad = self.first_degraded
        verdict = "inverts bit for bit" if self.exact else f"inverts within {self.tolerance:g}"
        lines.append(
            verdict if bad is None else f"does not invert within {self.tolerance:g}: degrades first at {bad.name}"
        )
        return "\n".join(lines)


@torch.no_grad()
def check_invertible(
    module: Chain,
    inputs: Tensor | Sequence[Tensor],
    states: ChainState | None = None,
    *,
    arithmetic: str | None = None,
    tolerance: float | None = None,
    conditioning: Arguments = NO_ARGUMENTS,
) -> InvertibilityReport:
    """Run a chain forward and back, layer by layer, and compare.

    Needs the memory of all activations: it is a diagnosis, not a training step. Random numbers are replayed, buffers of
    transforms are left alone, and so is an `ActNorm` that has seen no batch.

    Args:
        module: A reversible layer or chain.
        inputs: Its input stream or streams.
        states: Conditioning states, if it is stateful.
        arithmetic: `exact` or `float`; by default the module's own, or `auto`.
        tolerance: Relative error that still counts as inverted: by default 0 in exact arithmetic, else 1e-3 for
            float32, 1e-9 for float64 and 5e-2 for less.
        conditioning: Arguments for every transform that takes them.

    Raises:
        StreamError: Streams or states do not fit.
    """
    links = chain_links(module)
    chain, _ = unwrapped(module)
    chosen = arithmetic or (chain.arithmetic if isinstance(chain, ReversibleSequential) else "auto")
    exact = is_exact(chosen, links)
    streams = checked_streams("check_invertible", (inputs,) if isinstance(inputs, Tensor) else inputs)
    if exact:
        streams = put_on_grid(streams)
    if tolerance is None:
        coarsest = max(_TOLERANCE.get(x.dtype.to_real(), 5e-2) for x in streams if is_differentiable(x))
        tolerance = 0.0 if exact else coarsest
    residue = Residue() if exact else None
    snapshot = Snapshot(layer for _, layer in links)
    state = Program.of_chain(links, exact=exact).enter_state(checked_state(links, states))
    arguments = bind(links, conditioning) or (NO_ARGUMENTS,) * len(links)
    norms = [m for m in snapshot.modules if isinstance(m, ActNorm) and not m.initialised]
    unset = [(m, m.bias.detach().clone(), m.log_scale.detach().clone()) for m in norms]
    inner = [m for m in snapshot.modules if not isinstance(m, ReversibleLayer)]
    with CopiedBuffers(inner):
        try:
            applications = _run(links, streams, state, arguments, residue, snapshot)
            reports = _undo(applications, residue, snapshot)
        finally:
            for norm, *parameters in unset:
                norm.set(*parameters, initialised=False)
    return InvertibilityReport(tuple(reports), exact, tolerance)


class _Application(NamedTuple):
    """What one layer was given in the forward pass, and what it left."""

    link: Link
    inputs: Streams
    outputs: Streams
    state: State
    new_state: State
    arguments: Arguments
    residue: Residue | None
    """A copy, from behind the layer."""
    bits: float
    """Per element of the updated stream."""


def _run(
    links: tuple[Link, ...],
    streams: Streams,
    state: ChainState,
    arguments: tuple[Arguments, ...],
    residue: Residue | None,
    snapshot: Snapshot,
) -> list[_Application]:
    """Run all layers in order, and keep everything."""
    applications: list[_Application] = []
    carry = state.carry
    for i, (link, own, given) in enumerate(zip(links, state.layers, arguments, strict=True)):
        name, layer = link
        call = LayerCall(name=name, arguments=given, residue=residue)
        if layer.stateful:
            call.state = with_carry(name, layer, own, carry)
        before = residue.used_bits if residue is not None else 0.0
        with snapshot.first_evaluation(i, streams[0].device):
            outputs = layer.run(streams, call)
        _, carry = split_carry(layer, call.new_state, carry)
        updated = sum(y.numel() for x, y in zip(streams, outputs, strict=False) if x is not y)
        bits = (residue.used_bits - before) / max(1, updated) if residue is not None else 0.0
        behind = residue.clone() if residue is not None else None
        applications.append(_Application(link, streams, outputs, call.state, call.new_state, given, behind, bits))
        streams = outputs
    return applications


def _undo(applications: list[_Application], residue: Residue | None, snapshot: Snapshot) -> list[LayerReport]:
    """Undo every layer from its true output, and from what the layers behind it have recovered; reports in chain order.

    Args:
        applications: The forward pass.
        residue: What it has left; is used up. None in float arithmetic.
        snapshot: Its random numbers.
    """
    reports: list[LayerReport] = []
    recovered = applications[-1].outputs if applications else ()
    for i, (link, inputs, outputs, state, new_state, arguments, behind, bits) in reversed([*enumerate(applications)]):
        name, layer = link
        position = layer.recovered_cell(residue is not None)
        errors: list[float] = []
        for given, bits_left in ((outputs, behind), (recovered, residue)):
            call = LayerCall(name, without(state, position), arguments=arguments, residue=bits_left)
            expected = inputs
            if position is not None:
                call.cell, expected = new_state[position], (*expected, state[position])
            with snapshot.replaying(i):
                found = recovered = layer.undo(given, call)
            errors.append(_error(found if call.cell is None else (*found, call.cell), expected))
        reports.append(LayerReport(name, errors[0], errors[1], bits))
    return reports[::-1]


_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


def _error(found: Streams, true: Streams) -> float:
    """Largest absolute error over largest magnitude, of all streams; infinite where something is not finite."""
    worst = 0.0
    for a, b in zip(found, true, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.numel() and not torch.equal(a, b):
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
