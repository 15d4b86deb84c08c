import pytest
from torch import nn

from revgrad import AdditiveCoupling, Inverse, StreamError
from revgrad.arithmetic import forgets, is_exact
from revgrad.links import chain_links


def test_auto_looks_inside(make):
    additive, gated = chain_links(make.chain("additive", 2)), chain_links(make.chain("gated", 1))
    undoing = chain_links(Inverse(make.chain("gated", 1)))
    assert not is_exact("auto", additive)
    assert is_exact("exact", additive)
    assert is_exact("auto", [*additive, *gated])
    assert not is_exact("float", gated)
    assert is_exact("auto", [*gated, *additive, *undoing])
    assert not is_exact("auto", [*undoing, *gated])
    with pytest.raises(StreamError, match="and no layer before it has forgotten that much"):
        is_exact("exact", [*additive, *undoing])
    assert is_exact("auto", chain_links(AdditiveCoupling(make.chain("gated", 1))))


def test_what_forgets_is_found_inside(make):
    assert forgets(make.coupling("gated"))
    assert forgets(Inverse(make.coupling("gated")))
    assert not forgets(AdditiveCoupling(nn.Tanh()))


def test_an_unknown_arithmetic_is_named():
    with pytest.raises(StreamError, match="arithmetic must be 'auto', 'exact' or 'float', got 'int'"):
        is_exact("int", [])


def test_auto_says_why_it_is_exact_where_a_coupling_cannot_be(make):
    links = chain_links([make.coupling("affine"), make.coupling("gated", i=1)])
    with pytest.raises(
        StreamError,
        match=r"layer 0 \(AffineCoupling\) has no exact form, which arithmetic='auto' has chosen because layer 1 "
        r"\(GatedCoupling\) forgets; choose arithmetic='float'",
    ):
        is_exact("auto", links)
    assert not is_exact("float", links)
