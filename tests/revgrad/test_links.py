"""A chain as a list of layers with names, and what is said of what is none."""

import pytest
import torch
from torch import nn

from revgrad import (
    Inverse,
    ReversibleSequential,
    StreamError,
    Swap,
    check_invertible,
    plan,
)
from revgrad.links import chain_links, describe


def test_links_are_flat_and_named(make):
    a, b = make.coupling("additive"), make.coupling("gated")
    inner = ReversibleSequential(a, Swap())
    chain = ReversibleSequential(inner, Inverse(inner), b, Inverse(b), Inverse(Inverse(inner)))
    links = chain_links(chain)
    assert [name for name, _ in links] == [
        "layer 0.0 (AdditiveCoupling)",
        "layer 0.1 (Swap)",
        "inverse of layer 1.1 (Swap)",
        "inverse of layer 1.0 (AdditiveCoupling)",
        "layer 2 (GatedCoupling)",
        "layer 3 (Inverse(GatedCoupling))",
        "layer 4.0 (AdditiveCoupling)",
        "layer 4.1 (Swap)",
    ]
    assert links[0].layer is links[6].layer is a
    assert links[3].layer.layer is a
    assert describe(Inverse(Inverse(a))) == "Inverse(Inverse(AdditiveCoupling))"
    assert [name for name, _ in chain_links(a)] == ["layer 0 (AdditiveCoupling)"]
    assert [name for name, _ in chain_links([a, b])] == ["layer 0 (AdditiveCoupling)", "layer 1 (GatedCoupling)"]
    assert chain_links(()) == ()


def test_what_is_no_chain_is_told_where_the_chain_is(make):
    chain = make.chain("additive", 2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"stem": nn.Linear(4, 8), "core": chain})

    for model, name in ((Model(), "body.core"), (nn.Sequential(nn.Linear(4, 8), chain), "1")):
        for call in (check_invertible, plan):
            with pytest.raises(StreamError, match=rf"pass the chain that is inside, \.{name}, and the streams"):
                call(model, torch.zeros(3, 4))
    with pytest.raises(StreamError, match="a Linear is no chain of reversible layers: put it inside a coupling"):
        plan(nn.Linear(4, 4), torch.zeros(3, 4))
    assert len(chain_links(nn.ModuleList([chain, chain]))) == 4


def test_a_chain_that_was_given_no_layer_is_not_told_to_pass_itself(make):
    chain = make.chain("additive", 2)
    chain.layers[1] = nn.Linear(4, 4)
    with pytest.raises(StreamError, match=r"^layer 1 is a Linear, not a reversible layer: put it inside a coupling"):
        chain_links(chain)


def test_all_chains_inside_are_named(make):
    model = nn.ModuleDict({"a": make.chain("additive", 2), "b": make.chain("additive", 2)})
    with pytest.raises(StreamError, match=r"pass the chain that is inside, one of \.a, \.b, and the streams"):
        chain_links(model)
