"""`ReversibleSequential`: like `nn.Sequential`, for reversible layers."""

import inspect
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from revgrad.arithmetic import is_exact
from revgrad.budget import Budget, parse_budget, run_partly_stored, stored_layers
from revgrad.cell import without
from revgrad.chain import ChainState, undo_chain
from revgrad.checkpointed import run_layers_checkpointed
from revgrad.conditioning import bind
from revgrad.errors import StreamError
from revgrad.function import run_reversible
from revgrad.layer import Arguments, LayerCall, ReversibleLayer, Streams
from revgrad.links import (
    Arithmetic,
    Mode,
    chain_links,
    check_every,
    check_mode,
    check_offload,
    checked_state,
    checked_streams,
)
from revgrad.log_det import with_log_det, zero_log_det
from revgrad.program import Program
from revgrad.residue import Residue
from revgrad.tracing import recomputing

Result = Tensor | Streams


class ReversibleSequential(ReversibleLayer):
    """A chain of reversible layers that stores its output and conditioning states, and recomputes the rest in backward.

    Called with the streams as arguments, it returns one tensor or a tuple of streams; with conditioning states, the
    pair of that and the new states. It is itself a layer: chains nest, and `Inverse` of a chain is its inverse.

    Args:
        layers: Reversible layers or chains of them.
        mode: `reversible`; `checkpoint` (`torch.utils.checkpoint` around every layer) or `stored` give the same
            results from the same weights. May be changed at any time.
        arithmetic: `float`, `exact` (fixed-point streams, bit-exact inverse), or `auto`: exact if a coupling
            forgets (gated, momentum, or with an inverted cell).
        anchor_every: In reversible mode, also keep the streams in front of every n-th layer: recovering goes on from
            them, so that float errors add up over n layers at most.
        drift_guard: In reversible mode, compare the recovered input of every layer with that of the forward pass, so
            that an error names the first layer whose input cannot be recovered: always, or in so many first passes.
        memory_budget: In reversible mode, bytes (a number, or a text such as `2 GiB`) that may be spent on speed: as
            many layers as fit are stored, which are not evaluated again in backward. They count on top of what the
            chain keeps anyway: its output, states, residue, and the graph of the layer at hand. `free` stores those at
            the end that leave the peak where it is: they take no more than the graph of a layer in front of them, and
            have been freed when that one is evaluated again (of several chains in a model, in the last). What layers
            take is measured by one forward pass more for
            every new shape of the input.
        offload: In reversible mode, whether states and anchors wait in host memory between forward and backward pass,
            where the chain runs on CUDA. Elsewhere nothing changes.

    Nested chains are flattened: mode, arithmetic and what follows them are those of the outermost one. A slice,
    `chain[:k]`, is a chain of the same layers with the same options.

    Raises:
        StreamError: A layer is not reversible, streams and states do not fit (named by its place in the chain), or an
            option makes no sense.
    """

    def __init__(
        self,
        *layers: ReversibleLayer,
        mode: Mode = "reversible",
        arithmetic: Arithmetic = "auto",
        anchor_every: int | None = None,
        drift_guard: bool | int = False,
        memory_budget: int | str | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        chain_links(layers)  # names what is no layer
        self.layers = nn.ModuleList(layers)
        self.mode = mode
        self.arithmetic = arithmetic
        self.anchor_every = anchor_every
        self.drift_guard = drift_guard
        self.memory_budget = memory_budget
        self.offload = offload
        self._stored_layers: dict[Hashable, tuple[bool, ...]] = {}
        """By budget and what the cost depends on, which layers are stored."""
        if memory_budget is not None and mode != "reversible":
            raise StreamError(f"memory_budget= decides what to reverse: it goes with mode='reversible', not {mode!r}")
        check_offload(offload, mode)
        self.stateful = any(layer.stateful for _, layer in self._program({}, None).core)

    def __iter__(self) -> Iterator[ReversibleLayer]:
        return iter(self.layers)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> ReversibleLayer: ...

    @overload
    def __getitem__(self, index: slice) -> "ReversibleSequential": ...

    def __getitem__(self, index: int | slice) -> ReversibleLayer:
        if isinstance(index, slice):
            part = ReversibleSequential(*list(self)[index])
            part.training = self.training
            for name, value in self.chosen_options().items():
                setattr(part, name, value)
            return part
        return self.layers[index]  # type: ignore[return-value]

    @property
    def mode(self) -> Mode:
        """`reversible`, `checkpoint` or `stored`; may be changed at any time."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        check_mode(mode)
        self._mode = mode

    @property
    def arithmetic(self) -> Arithmetic:
        """`float`, `exact` or `auto`; may be changed at any time."""
        return self._arithmetic

    @arithmetic.setter
    def arithmetic(self, arithmetic: Arithmetic) -> None:
        is_exact(arithmetic, ())
        self._arithmetic = arithmetic

    @property
    def drift_guard(self) -> bool | int:
        """True, False or a number of forward passes, counted from when it is set."""
        return self._drift_guard

    @drift_guard.setter
    def drift_guard(self, drift_guard: bool | int) -> None:
        if not isinstance(drift_guard, int) or drift_guard < 0:
            raise StreamError(f"drift_guard must be True, False or a number of forward passes, got {drift_guard!r}")
        self._drift_guard, self._passes = drift_guard, 0

    @property
    def anchor_every(self) -> int | None:
        """A number of layers, or None; may be changed at any time."""
        return self._anchor_every

    @anchor_every.setter
    def anchor_every(self, anchor_every: int | None) -> None:
        check_every("anchor_every", anchor_every)
        self._anchor_every = anchor_every

    @property
    def memory_budget(self) -> int | str | None:
        """Bytes, a text such as `2 GiB`, `free`, or None; may be changed at any time."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, memory_budget: int | str | None) -> None:
        self._budget: Budget = 0 if memory_budget is None else parse_budget(memory_budget)
        self._memory_budget = memory_budget

    def chosen_options(self) -> dict[str, Any]:
        """By name, the options that are not at their defaults."""
        return {name: getattr(self, name) for name, default in OPTIONS.items() if getattr(self, name) != default}

    def forward(
        self,
        *streams: Tensor,
        states: ChainState | None = None,
        residue: Residue | None = None,
        per_layer: Sequence[Arguments | None] | None = None,
        log_det: bool = False,
        **conditioning: Any,
    ) -> Any:
        """Run the chain.

        Args:
            streams: The input streams.
            states: Conditioning states, one tuple per layer.
            residue: Collects what exact gated merges forget, for `inverse`; only without gradients, since a backward
                pass keeps its own.
            per_layer: Conditioning of single layers: one mapping per layer of the flattened chain, None for none. Adds
                to `conditioning` and replaces it.
            log_det: Whether to return `log |det dy/dx|` as well, `[B]`; the first dimension is that of the samples.
            conditioning: Arguments for every transform whose `forward` has a parameter of that name: tensors, plain
                values, None, and tuples, lists and dicts of these. Tensors get their gradients, summed over layers.

        Returns:
            The output streams (a lone one bare). With `states` the pair of them and the new states; with `log_det` one
            item more, the log-determinant.

        Raises:
            StreamError: Conditioning that no layer takes, besides what the class says.
        """
        check_offload(self.offload, self.mode)
        recomputes = self.mode == "reversible" and recomputing()
        program = self._program(conditioning, per_layer, guarded=recomputes and self.count_pass())
        streams = checked_streams("ReversibleSequential", streams)
        state = program.enter_state(checked_state(program.core, states))
        if residue is not None and torch.is_grad_enabled():
            raise StreamError(
                "residue= is for running a chain and undoing it without gradients: call it under torch.no_grad()"
            )
        if log_det:
            program, state = with_log_det(program), ChainState(((), *state.layers), state.carry)
        out, new = self._run(program, streams, state, residue)
        if log_det:
            new, out, total = ChainState(new.layers[1:], new.carry), out[:-1], out[-1]
        result = (_result(out), *(() if states is None else (new,)), *((total,) if log_det else ()))
        return result if len(result) > 1 else result[0]

    def _run(
        self, program: Program, streams: Streams, state: ChainState, residue: Residue | None
    ) -> tuple[Streams, ChainState]:
        """Run a program in the chain's mode; where no backward pass can recompute, as in stored mode."""
        if self.mode == "checkpoint" and recomputing():
            return run_layers_checkpointed(program, streams, state)
        if self.mode == "reversible" and recomputing() and program.wants_gradients([streams], state):
            stored = stored_layers(program, streams, state, self._budget, self._stored_layers) if self._budget else ()
            if any(stored):
                return run_partly_stored(program, streams, state, stored)
            return run_reversible(program, [streams], state, stacked=False)
        bits = (residue if residue is not None else Residue(keep=False)) if program.exact else None
        out, new = program.run_core(0, program.enter(streams, bits), (), state, bits)
        if bits is not None:
            bits.check_range()
        return out, new

    def inverse(
        self,
        *streams: Tensor,
        states: ChainState | None = None,
        new_states: ChainState | None = None,
        residue: Residue | None = None,
        per_layer: Sequence[Arguments | None] | None = None,
        log_det: bool = False,
        **conditioning: Any,
    ) -> Any:
        """Recover the input streams from the output streams; differentiable in float arithmetic.

        Args:
            streams: Outputs of the chain.
            states: The conditioning states that were given to the forward pass.
            new_states: Those that it returned; needed where cells are inverted.
            residue: What the forward pass collected; is used up. Needed to undo gated couplings in exact arithmetic.
            per_layer: As in the forward pass.
            log_det: Whether to return `log |det dx/dy|` as well, `[B]`: a pair then.
            conditioning: As in the forward pass.

        Raises:
            StreamError: Stateful layers that pass a carry among themselves: their states at this step depend on the
                forward pass. ReversibilityError: The residue is missing or does not fit.
        """
        program = self._program(conditioning, per_layer)
        streams = checked_streams("inverse", streams)
        state = checked_state(program.core, states)
        if state.carry:
            raise StreamError(
                "inverse: what one layer carries to the next is not determined by the states alone: choose carries=0, "
                "with which every layer keeps its own"
            )
        bits = (residue if residue is not None else Residue()) if program.exact else None
        after = None if new_states is None else checked_state(program.core, new_states)
        read = [
            without(own, layer.recovered_cell(program.exact))
            for (_, layer), own in zip(program.core, state.layers, strict=True)
        ]
        links = program.core
        if log_det:
            links, streams = with_log_det(program).core[1:], (*streams, zero_log_det(streams))
        found = undo_chain(
            links, streams, read, bits, arguments=program.arguments.core, new_state=after, inverting=True
        )
        return (_result(found[:-1]), found[-1]) if log_det else _result(found)

    def accepts(self, name: str) -> bool:
        """Whether one of the layers does."""
        return any(layer.accepts(name) for _, layer in chain_links(self))

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """As a layer of another chain: chains are flattened, so this is only reached directly."""
        for _, layer in chain_links(self):
            streams = layer.run(streams, call)
        return streams

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """As a layer of another chain: undo all layers."""
        for _, layer in reversed(chain_links(self)):
            streams = layer.undo(streams, call)
        return streams

    def _program(
        self, common: Arguments, per_layer: Sequence[Arguments | None] | None, *, guarded: bool = False
    ) -> Program:
        links = chain_links(self)
        return Program.of_chain(
            links,
            exact=is_exact(self.arithmetic, links),
            arguments=bind(links, common, per_layer),
            anchor_every=self.anchor_every,
            guarded=guarded,
            offload=self.offload,
        )

    def count_pass(self) -> bool:
        """Count the pass that begins; whether the drift guard watches it."""
        if isinstance(self.drift_guard, bool):
            return self.drift_guard
        self._passes += 1
        return self._passes <= self.drift_guard

    def extra_repr(self) -> str:
        """Mode, arithmetic, and the options that are not left at their defaults."""
        shown = {"mode": self.mode, "arithmetic": self.arithmetic} | self.chosen_options()
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _result(streams: Streams) -> Result:
    return streams[0] if len(streams) == 1 else streams


OPTIONS = {
    p.name: p.default for p in inspect.signature(ReversibleSequential).parameters.values() if p.kind is p.KEYWORD_ONLY
}
"""The options of a chain and their defaults; each is an attribute of the same name."""
