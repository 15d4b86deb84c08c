import torch

from revgrad import ChainState, Residue
from revgrad.chain import Saved
from revgrad.program import CORE, ENTRY, EXIT
from revgrad.tape import Segment, Tape, pack, unpack


def tape():
    residue = Residue()
    residue.scale(torch.ones(3), torch.full((3,), 2**15))
    h, c, x = torch.randn(3, 2).unbind()
    segments = [Segment(0, 1, ChainState(((h,), ()), (c,)), (x,), residue)]
    reads = {(0, CORE): [Saved((h, c), (1,)), Saved((), None)]}
    return Tape(segments, reads, residue, {(0, CORE, 0): torch.ones(3)})


def tensors_of(tape):
    return [*tape.segments[0].state.tensors(), *tape.segments[0].features, *tape.saved[0, CORE][0].state]


def test_what_was_packed_comes_back():
    before = tape()
    layout, tensors = pack(before)
    for again in (unpack(layout, tuple(tensors)), unpack(layout, tuple(tensors))):
        assert all(a is b for a, b in zip(tensors_of(again), tensors_of(before), strict=True))
        assert again.segments[0].state._fields == before.segments[0].state._fields
        assert (again.segments[0].first, again.segments[0].last) == (0, 1)
        assert again.saved[0, CORE][0].strides == (1,)
        assert again.residue.bits == before.residue.bits
        assert again.fingerprints is before.fingerprints


def test_a_layout_holds_no_tensors_but_fingerprints():
    layout, tensors = pack(tape())
    assert not any(isinstance(x, torch.Tensor) for x in tensors_of(layout))
    assert len(tensors) == 3 + 2 + 2 * 3  # states and features, what was read, two residues


def test_using_up_an_unpacked_tape_leaves_the_layout():
    layout, tensors = pack(tape())
    first = unpack(layout, tuple(tensors))
    first.saved[0, CORE].pop()
    first.segments.pop()
    again = unpack(layout, tuple(tensors))
    assert len(again.saved[0, CORE]) == 2
    assert len(again.segments) == 1


def test_keep_notes_what_is_asked_for():
    made = Tape()
    read = Saved((), None)
    made.keep(3, CORE, read, parts=(CORE,))
    made.keep(3, CORE, read, parts=(ENTRY, EXIT))
    made.keep(4, EXIT, read, parts=(ENTRY, EXIT))
    assert made.saved == {(3, CORE): [read], (4, EXIT): [read]}
