"""Gradients that exist are added to as soon as they are complete."""

import pytest
import torch

from revgrad import (
    ReversibilityError,
    ReversibleSequential,
)
from revgrad.function import _order_of_release
from revgrad.links import chain_links
from revgrad.program import Program
from revgrad.replay import Snapshot
from tests.revgrad.test_function import KINDS, backward
from tests.revgrad.test_function_checks import Scale

pytestmark = pytest.mark.usefixtures("single_thread")


def with_gradients(chain):
    """A gradient of one everywhere, as if from a batch before."""
    for p in chain.parameters():
        p.grad = torch.ones_like(p)
    return chain


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_exist_are_added_to(make, check, kind):
    chain, x = make.chain(kind, 5), make.streams()
    expected = check.gradients(chain, x, "reversible")
    with_gradients(chain)[1].transform.first.weight.grad = None
    torch.manual_seed(3)
    backward(chain, x, check)
    for name, p in chain.named_parameters():
        found = expected[f"gradient of {name}"]
        assert torch.equal(p.grad, found if name == "layers.1.transform.first.weight" else 1 + found), name
    for i, t in enumerate(x):
        assert torch.equal(t.grad, expected[f"gradient of input {i}"])


def test_gradients_are_released_layer_by_layer_last_first(make, check):
    shared = make.coupling("additive")
    layers = [shared, *make.chain("additive", 3)]
    chain = with_gradients(ReversibleSequential(*layers, shared))
    order = []
    for i, layer in enumerate(layers):
        parameters = list(layer.parameters())

        def released(p, i=i, layer=layer, parameters=parameters):
            order.append(i)
            # A hook sees the module as its owner knows it, without stand-ins.
            assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
            assert [x.transform.count[0] - 1 for x in layers[1:]] == [int(i <= j) for j in (1, 2, 3)]

        for p in parameters:
            p.register_post_accumulate_grad_hook(released)
    backward(chain, make.streams(), check)
    assert order == [i for i in (3, 2, 1, 0) for _ in range(4)]


@pytest.mark.parametrize(("layers", "expected"), [(0, [0, 1, 2, 3, 4, 5]), (1.5, [0, 2, 4]), (100, [0])])
def test_gradients_wait_until_they_are_a_portion(make, layers, expected):
    chain = with_gradients(make.chain("additive", 6))
    size = sum(p.numel() * p.element_size() for p in chain[0].parameters())
    program = Program.of_chain(chain_links(chain), exact=False)
    stages, late = _order_of_release(program, Snapshot(chain), int(layers * size))
    assert [application for application, _ in stages] == expected
    assert sorted(i for _, indices in stages for i in indices) == list(range(24))
    assert late == []


@pytest.mark.composes("Hooks", "an optimizer step in the backward pass")
def test_weights_may_be_changed_as_soon_as_their_gradient_is_there(make, check):
    """An optimizer in the backward pass: what comes before in the chain has another transform's weights."""
    chain, x = make.chain("additive", 4, arithmetic="exact"), make.streams()
    expected = check.gradients(chain, x, "stored")
    before = {name: p.detach().clone() for name, p in with_gradients(chain).named_parameters()}

    def update(p):
        p.sub_(p.grad)

    for p in chain.parameters():
        p.grad.zero_()
        p.register_post_accumulate_grad_hook(update)
    torch.manual_seed(3)
    backward(chain, x, check)
    for name, p in chain.named_parameters():
        assert torch.equal(p, before[name] - expected[f"gradient of {name}"]), name


@pytest.mark.parametrize("layer", [0, 1])
def test_asked_for_late_weights_alone_an_inverse_that_is_wrong_is_still_seen(make, check, layer):
    chain = ReversibleSequential(make.coupling("additive"), Scale(0.4), make.coupling("additive"))
    weight = with_gradients(chain)[2 * layer].transform.first.weight
    for x in (make.streams(), make.streams(requires_grad=False)):
        with pytest.raises(ReversibilityError, match="an inverse does not invert"):
            torch.autograd.grad(check.loss(chain(*x)), weight)


def test_asked_for_some_weights_alone_these_are_the_same(make, check):
    chain, x = with_gradients(make.chain("mixed", 6, arithmetic="exact")), make.streams()
    expected = check.gradients(chain, x, "stored")
    torch.manual_seed(3)
    loss = check.loss(chain(*x))
    for i in (5, 2, 0, 3):
        (found,) = torch.autograd.grad(loss, chain[i].transform.first.weight, retain_graph=True)
        assert torch.equal(found, expected[f"gradient of layers.{i}.transform.first.weight"])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in chain.parameters())


def test_two_backward_passes_through_one_graph_do_not_meet(make, check):
    """The second begins inside of the first, in a hook between two layers."""
    chain, x = with_gradients(make.chain("mixed", 4, arithmetic="exact")), make.streams()
    expected = check.gradients(chain, x, "stored")
    torch.manual_seed(3)
    loss, inner = check.loss(chain(*x)), []

    def again(grad):
        if not inner:
            inner.append(None)
            inner[0] = torch.autograd.grad(loss, x, retain_graph=True)

    chain[2].transform.first.weight.register_hook(again)
    loss.backward(retain_graph=True)
    for i, t in enumerate(x):
        assert torch.equal(inner[0][i], expected[f"gradient of input {i}"])
        assert torch.equal(t.grad, inner[0][i])
    for name, p in chain.named_parameters():
        assert torch.equal(p.grad, 1 + expected[f"gradient of {name}"]), name
