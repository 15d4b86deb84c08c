import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

from revgrad import AdditiveCoupling, ChainState, Inverse, Split, StreamError, Swap
from revgrad.chain import (
    ChainGradients,
    Link,
    _weights,
    fingerprint,
    first_updates,
    run_chain,
    stateless,
    undo_chain,
)
from revgrad.unroll import chain_links


def test_state_keeps_its_structure_with_other_tensors():
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    state = ChainState(((a, b), (), (c,)), (d,))
    assert state.tensors() == [a, b, c, d]
    other = state.replace([d, c, b, a])
    assert other == ChainState(((d, c), (), (b,)), (a,))
    assert ChainState(((),)).carry == ()


def test_undo_chain_is_the_inverse(make):
    chain = make.recurrent("additive", 4, states=2, carries=1).double()
    links, x, state = chain_links(chain), make.streams(dtype=torch.float64), make.state(chain, dtype=torch.float64)
    read = []
    y, new = run_chain(links, x, state, None, keep=read.append)
    assert len(new.layers) == 4
    assert len(new.carry) == 1
    # Each layer has read its own state and the carry that the layer before it wrote.
    assert [len(r.state) for r in read] == [3] * 4
    assert read[0].state[2] is state.carry[0]
    assert read[1].state[2] is not state.carry[0]
    back = undo_chain(links, y, [r.state for r in read], None)
    for a, b in zip(back, x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_carry_of_the_wrong_size_names_the_layer(make):
    chain = make.recurrent("additive", 2, states=1, carries=2)
    state = make.state(chain)
    with pytest.raises(
        StreamError, match=r"layer 0 \(AdditiveCoupling\): takes a carry of 2 tensor\(s\), .* carries 1"
    ):
        run_chain(chain_links(chain), make.streams(), ChainState(state.layers, state.carry[:1]), None)


def test_stateless_layers_pass_the_carry_on(make):
    core = make.recurrent("additive", 2, states=0, carries=1)
    links = chain_links([Swap(), core[0], Swap(), core[1], Swap()])
    zero = torch.zeros(3, 4)
    _, new = run_chain(links, make.streams(), ChainState(((),) * 5, (zero,)), None)
    assert new.layers == ((),) * 5
    assert new.carry[0].any()
    assert stateless(links) == ChainState(((),) * 5)


def test_parameter_gradients_add_up_without_touching_what_was_given():
    parameter = torch.zeros(2)
    into = ChainGradients([parameter, parameter], 0, 0)
    first, second, third = (torch.full((2,), float(i)) for i in (1, 2, 4))
    into.add([0, 1], (first, None))
    assert into.total[0] is first
    assert into.total[1] is None
    into.add([0], (second,))
    into.add([0], (third,))
    assert into.total[0].tolist() == [7, 7]
    assert [t.tolist() for t in (first, second, third)] == [[1, 1], [2, 2], [4, 4]]


def test_first_updates(make):
    a, b = AdditiveCoupling(make.net(4)), AdditiveCoupling(make.net(4), 1, 2)
    assert first_updates(chain_links([a, b]), 4) == [2, 0, 1, 2]
    assert first_updates(chain_links([a, Inverse(b), Swap()]), 4) == [2, 0, 1, 2]
    assert first_updates(chain_links([Split(2), a]), 1) == [0]
    assert first_updates(chain_links([a]), 1) == [1]
    assert first_updates((), 2) == [0, 0]


def test_link_is_a_name_and_a_layer():
    swap = Swap()
    assert Link("here", swap) == ("here", swap)


# Fingerprints


def test_equal_streams_have_equal_fingerprints():
    x = torch.randn(3, 50, 211)
    same = x.clone()
    # Another layout of the same values is the same stream.
    other = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(fingerprint((x,)), fingerprint((same,)))
    assert torch.equal(fingerprint((x,)), fingerprint((other,)))
    assert fingerprint((x, x[0])).shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprint_does_not_depend_on_where_the_memory_begins(dtype):
    x = torch.randn(40000, dtype=dtype)
    for offset in range(1, 64):
        for length in (17, 3001, 20011):
            view = x[offset : offset + length]
            assert torch.equal(fingerprint((view,)), fingerprint((view.clone(),))), (offset, length)


def test_fingerprint_is_what_it_says():
    x = torch.randn(2, 3, 41)
    weighted, plain, squares = fingerprint((x,)).tolist()
    flat = x.double().flatten()
    weights = (torch.arange(len(flat)) * 40503 % 65536).double() / 2**15 - 1
    assert weighted == pytest.approx(float(weights @ flat), rel=1e-12)
    assert plain == pytest.approx(float(flat.sum()) / len(flat) ** 0.5, rel=1e-9)
    assert squares == pytest.approx(float(flat @ flat), rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 1000, 16384, 16385, 50000])
def test_fingerprint_sees_one_changed_element_and_swapped_neighbours(length):
    x = torch.randn(length)
    expected = fingerprint((x,))
    for i in {0, length // 2, length - 1}:
        y = x.clone()
        y[i] += 2.0**-16
        assert not torch.equal(fingerprint((y,)), expected)
    if length > 1:
        y = torch.cat([x[1:2], x[:1], x[2:]])
        assert not torch.equal(fingerprint((y,)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprint_in_less_precision_is_near_the_precise_one(dtype):
    x = torch.randn(3, 40000).to(dtype)
    precise, quick = fingerprint((x,)), fingerprint((x,), precise=False)
    size = precise[2].sqrt()
    assert float(((quick - precise).abs() / torch.stack([size, size, precise[2]])).max()) < 1e-5
    assert torch.equal(quick, fingerprint((x.clone(),), precise=False))
    assert torch.equal(quick, precise) == (dtype == torch.float64)


def test_fingerprint_of_nothing():
    assert fingerprint((torch.zeros(0, 3),)).tolist() == [0, 0, 0]


def test_fingerprints_under_fake_tensors_leave_nothing_fake_behind():
    _weights.cache_clear()
    with FakeTensorMode(), contextlib.suppress(Exception):  # values cannot be compared there
        fingerprint((torch.ones(3),))
    assert fingerprint((torch.ones(3),)).sum() != 0


def test_complex_streams_differ_in_either_part():
    x = torch.randn(3, 4, dtype=torch.complex64)
    real, imaginary = x + 1, x + 1j
    a, b, c = (fingerprint((t,)) for t in (x, real, imaginary))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(fingerprint((x.conj().conj(),)), a)
    assert not torch.equal(fingerprint((x.conj(),)), a)
