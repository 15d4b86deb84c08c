"""Programs step by step, without the autograd Function: what is run can be undone, bit for bit."""

import math

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ChainState, GatedCoupling, Inverse, Residue, Swap, snap
from revgrad.chain import undo_chain
from revgrad.links import chain_links
from revgrad.program import CORE, ENTRY, Part, Program, flat, stack
from revgrad.residue import entropy_bits, quantise_gate
from revgrad.unrolling import unroll

MODULES, STEPS, BATCH, WIDTH = 40, 20, 4, 16


class Module(nn.Module):
    """A tiny stateful transform with gate logits spread like N(mean, 1.5), whatever it reads; counts the entropy."""

    def __init__(self, mean):
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.mean = mean
        self.entropy, self.gates, self.updates = 0.0, 0.0, 0

    def forward(self, x, state):
        a, h = self.mix(torch.cat([x, *state], dim=1)).chunk(2, dim=1)
        a = self.mean + 1.5 * (a - a.mean()) / a.std()
        h = torch.tanh(h)
        self.entropy += entropy_bits(quantise_gate(torch.sigmoid(a)))
        self.gates += float(torch.sigmoid(a).mean())
        self.updates += 1
        return (a, h), (h,)


def logit_mean(gate):
    normal = math.sqrt(2) * torch.erfinv(torch.linspace(-1, 1, 4003)[1:-1])
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(1.5 * normal + middle).mean() < gate else (low, middle)
    return low


@torch.no_grad()
@pytest.mark.parametrize("mean_gate", [0.1, 0.5, 0.9, 0.99])
def test_forty_modules_over_twenty_steps_invert_bit_for_bit(mean_gate, record_property):
    modules = [Module(logit_mean(mean_gate)) for _ in range(MODULES)]
    layers = [GatedCoupling(m, i % 2, 1 - i % 2, stateful=True) for i, m in enumerate(modules)]
    program = Program.of_chain(chain_links(layers), exact=True)
    zero = torch.zeros(BATCH, WIDTH)
    state, residue = ChainState(((zero,),) * MODULES), Residue()
    tape, halfway = [], None
    for t in range(STEPS):
        if t == STEPS // 2:
            halfway = residue.bits, sum(m.entropy for m in modules)
        given = program.enter((torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)), residue)
        read = []
        output, state = program.run_core(0, given, (), state, residue, keep=lambda part, r, read=read: read.append(r))
        tape.append((given, output, [r.state for r in read]))
    residue.check_range()

    updates = sum(m.updates for m in modules)
    assert updates == MODULES * STEPS
    assert sum(m.gates for m in modules) / updates == pytest.approx(mean_gate, abs=0.01)
    entropy = sum(m.entropy for m in modules)
    assert entropy <= residue.used_bits <= 1.1 * entropy
    # Amortised, of what is stored: words of 16 bits come when they are full, so a half may be short by one per element.
    stored, needed = residue.bits - halfway[0], entropy - halfway[1]
    assert needed - 16 * BATCH * WIDTH <= stored <= 1.1 * needed + 16 * BATCH * WIDTH
    record_property("bits_per_update", residue.used_bits / updates / (BATCH * WIDTH))

    for given, output, read in reversed(tape):
        recovered = undo_chain(program.core, output, read, residue)
        assert torch.equal(recovered[0], given[0])
        assert torch.equal(recovered[1], given[1])
    residue.check_undone_to()
    assert residue.used_bits == 0


@torch.no_grad()
def test_entry_core_and_exit_undo_one_another(make):
    entry = make.chain("additive", 3)
    core = make.recurrent("gated", 4, states=2, carries=1)
    program = Program.of_parts(entry, core, Inverse(entry), arithmetic="exact", fed=(True, False, True))
    state, residue, features = make.state(core), Residue(), ()
    tape = []
    for t, fed in enumerate(program.fed):
        before = features
        given = program.enter(make.streams(), residue) if fed else None
        read = []
        features, state = program.run_core(
            t, given, features, state, residue, keep=lambda part, r, read=read: read.append((part, r.state))
        )
        y = program.run_exit(t, features, residue)
        tape.append((given, before, features, y, [s for part, s in read if part is CORE]))
        assert [part for part, _ in read] == [ENTRY] * (3 if fed else 0) + [CORE] * 4
    for given, before, features, y, read in reversed(tape):
        if given is not None:
            assert all(map(torch.equal, program.undo(y, read, residue.clone()), given))
        streams = undo_chain(program.exit, y, [()] * 3, residue)
        assert all(map(torch.equal, streams, features))
        streams = undo_chain(program.core, streams, read, residue)
        if given is None:
            assert all(map(torch.equal, streams, before))
        else:
            assert all(map(torch.equal, undo_chain(program.entry, streams, [()] * 3, residue), given))
    residue.check_undone_to()


class Scaled(nn.Module):
    def forward(self, x, *, factor=1.0):
        return factor * x


@torch.no_grad()
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_undo_is_given_the_conditioning_of_every_part(make, arithmetic):
    entry, core = (AdditiveCoupling(Scaled(), i, 1 - i) for i in range(2))
    program = Program.of_parts(
        entry, core, Inverse(entry), arithmetic=arithmetic, conditioning={"factor": torch.tensor(3.0)}
    )
    residue = Residue() if program.exact else None
    given = program.enter(make.streams(dtype=torch.float64), residue)
    features, _ = program.run_core(0, given, (), ChainState(((),)), residue)
    recovered = program.undo(program.run_exit(0, features, residue), [()], residue)
    torch.testing.assert_close(recovered, given)
    torch.testing.assert_close(features[1], given[1] + 3 * given[0])


def test_every_application_has_a_number_of_its_own(make):
    layers = chain_links([Swap(), Swap()]), chain_links([Swap()] * 3), chain_links([Swap()])
    program = Program(*layers, (True,) * 4, exact=False)
    numbers = [program.application(t, part, i) for t in range(4) for part in Part for i in range(len(layers[part]))]
    assert numbers == list(range(4 * 6))
    assert program.steps == 4
    assert len(list(program.layers())) == 6


def test_contexts_are_entered_around_every_layer_in_order(make):
    from contextlib import contextmanager

    entered = []

    @contextmanager
    def context(number):
        entered.append(number)
        yield

    program = Program(*map(chain_links, (make.chain("additive", 2), [Swap()], [Swap()])), (True, False), exact=False)
    features, state = program.run_core(0, make.streams(), (), ChainState(((),)), None, context)
    program.run_exit(0, features, None, context)
    assert entered == [0, 1, 2, 3]
    program.run_core(1, None, features, state, None, context)
    assert entered[4:] == [6]


def test_enter_snaps_in_exact_arithmetic_only(make):
    x = make.streams()
    program = Program.of_chain((), exact=True)
    assert program.enter(x, None) is x
    assert all(map(torch.equal, program.enter(x, Residue()), map(snap, x)))


def test_core_input_is_reported(make):
    entry = make.chain("additive", 2)
    program = Program(chain_links(entry), chain_links([Swap()]), (), (True,), exact=False)
    seen = []
    features, _ = program.run_core(
        0, make.streams(), (), ChainState(((),)), None, entering=lambda position, x: seen.append((position, x))
    )
    assert [position for position, _ in seen] == [0]
    assert all(map(torch.equal, seen[0][1], features[::-1]))


@torch.no_grad()
def test_every_part_is_traced_without_a_break(make):
    entry, core = make.chain("additive", 2), make.chain("additive", 3)

    def run(*x):
        return unroll(core, [x, None], entry=entry, exit=Swap())[0]

    x = make.streams()
    torch.compiler.reset()
    assert all(map(torch.equal, torch.compile(run, backend="eager", fullgraph=True)(*x), run(*x)))


def test_stack_and_flat():
    a, b, c, d = (torch.full((2,), float(i)) for i in range(4))
    assert [x.tolist() for x in stack([(a, b), (c, d)])] == [[[0, 0], [2, 2]], [[1, 1], [3, 3]]]
    assert flat([(a, b), None, (c, d)]) == [a, b, c, d]
