"""The way back: one backward pass through all time steps of a program, last layer first."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from revgrad.chain import ChainGradients, ChainState, cells_of, first_updates, rewind_chain
from revgrad.errors import ReversibilityError
from revgrad.fingerprint import fingerprint, relative_error, tolerance_of
from revgrad.gradients import is_differentiable
from revgrad.graphless import graphless
from revgrad.layer import Grads, ReversibleLayer, StreamGrads, Streams
from revgrad.program import CORE, ENTRY, EXIT, Part, Program
from revgrad.replay import Snapshot
from revgrad.residue import Residue
from revgrad.tape import Segment, Tape


class BackwardPass:
    """One backward pass. It owns the references to outputs and gradients, and drops each one when used.

    Args:
        program: What was run forwards.
        snapshot: What it depended on.
        tape: What it left.
        backward: Its outputs and the gradients with respect to them.
        stacked: Whether these have a time dimension; otherwise there is one time step.
        gradients: Receives the gradients of parameters and states.
        given: The inputs by time step, where states are recomputed.
        inputs_wanted: Whether the gradients of the inputs are.
    """

    def __init__(
        self,
        program: Program,
        snapshot: Snapshot,
        tape: Tape,
        backward: StreamGrads,
        stacked: bool,
        gradients: ChainGradients,
        given: list[Streams | None],
        *,
        inputs_wanted: bool,
    ) -> None:
        self.program = program
        self.snapshot = snapshot
        self.tape = tape
        self.flow = backward
        self.stacked = stacked
        self.gradients = gradients
        self.given = given
        self.inputs_wanted = inputs_wanted
        entry = [i for _, layer in program.entry for i in snapshot.indices_of(layer)]
        entry += [i for given in program.arguments.entry for i in gradients.conditioning(given)]
        self.entry_wanted = inputs_wanted or any(gradients.parameters[i].requires_grad for i in entry)
        self._input_grads: list[Grads] = []
        self._cells, tape.cells = tape.cells, []
        self._start: ChainState | None = None

    def input_grads(self) -> Grads:
        """Gradients of the given inputs in their order, if wanted, once all has been rewound. All others end up in
        `gradients`.
        """
        return tuple(g for grads in reversed(self._input_grads) for g in grads)

    def rewind(self) -> Iterator[int]:
        """Rewind everything, then compare what was recovered with what was given.

        Yields:
            The number of each application of a layer at the first time step: when it has been rewound, the gradients
            of the parameters that no earlier layer has are complete.
        """
        outputs, self.flow = self.flow, StreamGrads([], [])
        untouched = [i == len(self.program.exit) for i in first_updates(self.program.exit, len(outputs.grads))]
        feedback: Grads = ()
        while self.tape.segments:
            segment = self.tape.segments.pop()  # with it goes the last reference to its states
            residue = self._recompute(segment) if self.program.keep_states_every > 1 else self.tape.residue
            for t in range(segment.last, segment.first - 1, -1):
                backward = outputs
                earlier: Grads = ()
                if self.stacked:
                    # Where an output is the core's own, untouched by the exit, its gradient has joined the next step's.
                    own = _at(t, outputs.grads, [not (feedback and same) for same in untouched])
                    # Where it touches none, its outputs are as many as the core's streams; else nothing is to join.
                    if any(untouched) and not self.program.fed[t]:
                        earlier = tuple(_at(t - 1, outputs.grads, untouched))
                    backward = StreamGrads([y[t] for y in outputs.streams], own)
                yield from self._step(t, backward, feedback, earlier, residue)
                feedback = () if self.program.fed[t] else tuple(backward.grads)
                if self.program.fed[t] and self.inputs_wanted:
                    self._input_grads.append(tuple(backward.grads))
            if residue is not None:
                residue.check_undone_to(segment.residue)
            self._compare_cells(segment)

    def _step(
        self, t: int, backward: StreamGrads, feedback: Grads, earlier: Grads, residue: Residue | None
    ) -> Iterator[int]:
        """One time step backwards.

        Args:
            t: The time step.
            backward: From its outputs to its inputs.
            feedback: Gradients of the core's output that come from the next step.
            earlier: Gradients of the core's input that come from the output of the step before.
            residue: None in float arithmetic.
        """
        yield from self._rewind(t, EXIT, backward, None, feedback)
        yield from self._rewind(t, CORE, backward, residue, earlier)
        if self.program.fed[t] and self.program.entry and self.entry_wanted:
            yield from self._rewind(t, ENTRY, backward, None)

    def _rewind(
        self, t: int, part: Part, backward: StreamGrads, residue: Residue | None, joining: Grads = ()
    ) -> Iterator[int]:
        links = self.program.parts[part]
        if self.program.exact and residue is None:
            residue = Residue()
        positions = rewind_chain(
            links,
            backward,
            self.tape.take_saved(t, part),
            residue,
            around=lambda i: self.snapshot.standing_in(
                self.gradients.parameters, links[i].layer, self.program.application(t, part, i)
            ),
            replaying=self.program.around(t, part, self.snapshot.replaying),
            indices_of=self.snapshot.indices_of,
            into=self.gradients,
            joining=joining,
            arguments=self.program.arguments[part],
            cells=self._cells if part is CORE else None,
        )
        for i in positions:
            self._arrive(t, part, i, backward, links[i].name)
            if t == 0:
                yield self.program.application(t, part, i)
        if not links:
            self._arrive(t, part, 0, backward, "")

    def _recompute(self, segment: Segment) -> Residue | None:
        """Run a segment again from its start, this time keeping the states that are read."""
        residue = segment.residue.clone() if segment.residue is not None else None
        features, state = self.tape.start_of(segment)
        self._cells = []  # those of the segment's end come out again
        self._start = state
        with torch.no_grad(), graphless(), self.snapshot.standing_in(self.gradients.parameters):
            for t in range(segment.first, segment.last + 1):
                entered = self.given[t]
                if entered is not None:
                    entered = self.program.enter(entered, residue)
                keep = partial(self.tape.keep, t, parts=(CORE,))
                features, state = self.program.run_core(
                    t, entered, features, state, residue, self.snapshot.replaying, keep
                )
        if residue is not None:
            residue.check_range()
        self._cells = cells_of(self.program.core, state, self.program.exact)
        return residue

    def _compare_cells(self, segment: Segment) -> None:
        """Raise unless the cells recovered are those that the segment started from."""
        links = self.program.core
        if all(cell is None for cell in self._cells):
            return
        start = self.tape.start_of(segment)[1] if self._start is None else self._start
        given, self._start = cells_of(links, start, self.program.exact), None
        for (name, _), found, expected in zip(links, self._cells, given, strict=True):
            if expected is not None:
                self.tape.checks.equal(found, expected, partial(_cell_differs, name))  # type: ignore[arg-type]

    def _arrive(self, t: int, part: Part, position: int, backward: StreamGrads, name: str) -> None:
        """Compare a layer's recovered input with what is known of it; go on from the input itself where it was kept."""
        expected = self.tape.fingerprints.get((t, part, position))
        anchor = self.tape.take_anchor(t, position) if part is CORE else None
        if anchor is not None and expected is None:
            expected = fingerprint(self.program.recovered(position, anchor), self.program.exact)
        if expected is not None:
            of_layer = f"of {name} " if name and part is CORE and self.program.guarded else ""
            found = tuple(backward.streams)
            self.compare(self.program.recovered(position, found) if part is CORE else found, expected, of_layer)
        if anchor is not None:
            backward.streams[:] = [x.detach() for x in anchor]

    def compare(self, streams: Streams, expected: Tensor, of_layer: str = "") -> None:
        """Raise unless the recovered input is the input that was given."""
        checks, exact = self.tape.checks, self.program.exact
        found = fingerprint(streams, exact)
        if checks.known_equal(found, expected):
            return
        error = relative_error(found, expected, [x.numel() for x in streams])
        dtypes = [x.dtype for x in streams if is_differentiable(x)]
        tolerance = min(map(tolerance_of, dtypes))
        ok = (found == expected).all() if exact else error <= tolerance  # which NaN is not
        layers = tuple(self.program.layers())
        checks.require(
            ok | ~expected.isfinite().all(), partial(_input_differs, found, error, of_layer, layers, dtypes, exact)
        )


def _input_differs(
    found: Tensor,
    error: Tensor,
    of_layer: str,
    layers: tuple[ReversibleLayer, ...],
    dtypes: list[torch.dtype],
    exact: bool,
) -> ReversibilityError:
    by = f"by {float(error):.2g} of its size"
    changed = (
        "a transform depends on what has changed since the forward pass, or on random numbers that are not PyTorch's"
    )
    why = f"an inverse does not invert, or not precisely enough, or {changed}"
    if not bool(found.isfinite().all()):
        by = "and is not finite"
        why = (
            "the output of the chain is not finite (smaller steps avoid that: bound= of an affine coupling, "
            f"normalised inputs, a lower learning rate), or {why}"
        )
    # Exact arithmetic, where there is such a thing and it is not in use.
    fits = all(dtype in (torch.float32, torch.float64) for dtype in dtypes)
    possible = not exact and fits and all(layer.has_exact_form() for layer in layers)
    instead = "arithmetic='exact' or " if possible else ""
    return ReversibilityError(
        f"the input {of_layer}recovered in the backward pass differs from the one given {by}, so the gradient "
        f"would be wrong: {why}. "
        f"{'' if of_layer else 'check_invertible(module, inputs) or drift_guard=True names the layer; '}"
        f"anchor_every= keeps rounding from adding up, {instead}mode='stored' avoids it"
    )


def _cell_differs(name: str) -> ReversibilityError:
    return ReversibilityError(
        f"{name}: the cell recovered in the backward pass differs from the one given, so the gradient would be wrong: "
        "is the transform not deterministic? Choose mode='stored', or make the coupling without inverted_cell"
    )


def _at(t: int, grads: list[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
    """The wanted gradients of one time step, None for the others."""
    return [g[t] if g is not None and w else None for g, w in zip(grads, wanted, strict=True)]
