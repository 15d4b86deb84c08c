"""Who is given what. Gradients, memory and misuse are in tests/composition/test_conditioning.py."""

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, Inverse, StreamError, Swap, wrap
from revgrad.conditioning import Placeholder, bind, distinct_leaves, replaced
from revgrad.links import chain_links


class Told(nn.Module):
    def forward(self, x, context=None, *, scale=1.0):
        return x


class Other(nn.Module):
    def forward(self, x, *, mask):
        return x


LINKS = chain_links([AdditiveCoupling(Told()), Swap(), Inverse(AdditiveCoupling(Other()))])


def test_each_layer_gets_what_it_takes():
    assert bind(LINKS, {}) == ()
    assert bind(LINKS, {"scale": 2, "mask": 3}) == ({"scale": 2}, {}, {"mask": 3})


def test_a_layers_own_arguments_go_before_those_of_all():
    own = [{"scale": 5, "context": None}, None, {}]
    assert bind(LINKS, {"scale": 2, "mask": 3}, own) == ({"scale": 5, "context": None}, {}, {"mask": 3})
    assert bind(LINKS, {}, [None, None, None]) == ({}, {}, {})
    assert bind((), {}, []) == ()


def test_what_does_not_fit_is_named():
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'x'"):
        bind(LINKS, {"x": 1})
    with pytest.raises(StreamError, match=r"layer 1 \(Swap\) takes no argument 'scale'"):
        bind(LINKS, {}, [None, {"scale": 1}, None])
    with pytest.raises(StreamError, match="has 3 layers, but per_layer has 0 entries"):
        bind(LINKS, {}, [])


@pytest.mark.parametrize("layer", [Swap(), wrap(torch.asinh, torch.sinh), Inverse(Swap())])
def test_layers_that_take_no_arguments_at_all_say_so(layer):
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'x': none takes any"):
        bind(chain_links([layer]), {"x": 1})
    for coupling in (AdditiveCoupling(Told()), Inverse(AdditiveCoupling(Told()))):
        with pytest.raises(StreamError, match="no layer of the chain takes an argument 'x': give the forward method"):
            bind(chain_links([layer, coupling]), {"x": 1})


def test_a_sequential_that_hides_what_takes_an_argument_is_pointed_out():
    inside = AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), Told()))
    with pytest.raises(StreamError, match=r"of this name \(an nn.Sequential hands nothing on to what is in it"):
        bind(chain_links([inside]), {"scale": 1})


def test_tensors_are_taken_out_once_and_put_back():
    a, b = torch.ones(1), torch.ones(2)
    arguments = ({"context": (a, [b, "text"]), "scale": None}, {}, {"mask": a})
    tensors = distinct_leaves(arguments)
    assert [id(x) for x in tensors] == [id(a), id(b)]
    places = [Placeholder(), Placeholder()]
    emptied = replaced(arguments, tensors, places)
    assert distinct_leaves(emptied) == []
    assert distinct_leaves(emptied, Placeholder) == places
    assert emptied == ({"context": (places[0], [places[1], "text"]), "scale": None}, {}, {"mask": places[0]})
    again = replaced(emptied, places, tensors)
    assert again[0]["context"][1][0] is b
    assert again[2]["mask"] is a


class Graph:
    def __init__(self, edges):
        self.edges = edges


def test_an_object_that_hides_tensors_is_refused():
    links = chain_links([AdditiveCoupling(Told())])
    for given in (Graph(torch.zeros(2)), [Graph(torch.zeros(2))]):
        with pytest.raises(
            StreamError, match=r"argument 'context' has a Graph with tensors in it.*pass a tuple or a dict"
        ):
            bind(links, {"context": given})
    bind(links, {"context": Graph("no tensor")})
