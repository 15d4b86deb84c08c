import pytest
import torch

from revgrad import AdditiveCoupling, ChainState, Inverse, Split, StreamError, Swap
from revgrad.chain import (
    ChainGradients,
    Link,
    first_updates,
    run_chain,
    stateless,
    undo_chain,
)
from revgrad.links import chain_links


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


def test_gradients_that_are_sparse_and_dense_are_added_in_either_order():
    weight = torch.zeros(4, 2)
    dense = torch.ones(4, 2)
    sparse = torch.ones(4, 2).to_sparse(1)
    for grads in ([sparse, dense], [dense, sparse], [sparse, sparse, dense], [sparse, dense, sparse, dense]):
        total = ChainGradients([weight], 0, 0)
        for grad in grads:
            total.add([0], (grad,))
        (found,) = total.take([0])
        assert torch.equal(found.to_dense() if found.is_sparse else found, len(grads) * dense)


def test_a_state_without_its_graph():
    h = torch.ones(2, requires_grad=True)
    state = ChainState(((h * 2,), ()), (h * 3,))
    assert not any(x.requires_grad for x in state.detach().tensors())
    assert all(map(torch.equal, state.detach().tensors(), state.tensors()))
    assert state.detach().layers[1] == ()
