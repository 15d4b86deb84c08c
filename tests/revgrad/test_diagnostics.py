import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from revgrad import (
    ActNorm,
    AdditiveCoupling,
    GatedCoupling,
    Inverse,
    ReversibleLayer,
    ReversibleSequential,
    Split,
    StreamError,
    Swap,
    check_invertible,
)


class Broken(ReversibleLayer):
    """Undoes its doubling a little wrong."""

    def __init__(self, error=0.01):
        super().__init__()
        self.error = error

    def run(self, streams, call):
        return tuple(2 * x for x in streams)

    def undo(self, streams, call):
        return tuple(0.5 * (1 + self.error) * x for x in streams)


class Constant(nn.Module):
    """Messages `(a, h)` of one value each, of any width."""

    def __init__(self, a, width):
        super().__init__()
        self.a, self.width = a, width

    def forward(self, x):
        like = x.new_zeros(len(x), self.width)
        return like + self.a, like + 0.25


def test_exact_chain_inverts_without_error(make):
    report = check_invertible(make.chain("mixed", 8), make.streams(20))
    assert report.exact
    assert report.invertible
    assert report.first_degraded is None
    assert report.tolerance == 0
    assert [(r.own_error, r.chain_error) for r in report.layers] == [(0, 0)] * 8
    assert [r.bits > 0 for r in report.layers] == [False, False, True, True] * 2
    assert report.bits == sum(r.bits for r in report.layers)
    assert [r.name for r in report.layers][:3] == [
        "layer 0 (AdditiveCoupling)",
        "layer 1 (AdditiveCoupling)",
        "layer 2 (GatedCoupling)",
    ]


@pytest.mark.parametrize(("gate", "width"), [(0.5, 4), (0.25, 1), (0.75, 9)])
def test_bits_per_element_are_the_entropy_of_the_gate(gate, width):
    """A gate g forgets -log2(1 - g) bits of each element of the stream that is updated, however large the other is."""
    chain = ReversibleSequential(GatedCoupling(Constant(math.log(gate / (1 - gate)), width)))
    report = check_invertible(chain, (torch.randn(3, 4), torch.randn(3, width)))
    assert report.invertible
    needed = -math.log2(1 - gate)
    assert needed <= report.bits <= needed + 2 / 512


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_names_the_first_layer_that_degrades(make, arithmetic):
    layers = [make.coupling("additive", 4, i) for i in range(3)]
    chain = ReversibleSequential(layers[0], layers[1], Broken(), layers[2], Swap(), arithmetic=arithmetic)
    report = check_invertible(chain, make.streams())
    assert not report.invertible
    assert report.first_degraded.name == "layer 2 (Broken)"
    by_name = {r.name: r for r in report.layers}
    assert by_name["layer 2 (Broken)"].own_error == pytest.approx(0.01, rel=0.1)
    assert by_name["layer 2 (Broken)"].chain_error == pytest.approx(0.01, rel=0.1)
    # The layers before it are sound themselves, but get a wrong output to start from.
    assert by_name["layer 1 (AdditiveCoupling)"].own_error < 1e-6
    assert by_name["layer 1 (AdditiveCoupling)"].chain_error > 1e-3
    assert by_name["layer 4 (Swap)"].chain_error == 0


def test_float_gated_chain_degrades(make):
    chain = ReversibleSequential(*(GatedCoupling(Constant(12.0, 4), i % 2, 1 - i % 2) for i in range(4)))
    x = make.streams()
    assert check_invertible(chain, x).invertible
    report = check_invertible(chain, x, arithmetic="float")
    assert not report.exact
    assert report.first_degraded is not None
    assert report.bits == 0


def test_table(make):
    report = check_invertible(make.chain("gated", 3), make.streams())
    lines = str(report).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert lines[0].split() == ["layer", "own", "error", "chain", "error", "residue", "bits/element"]
    assert lines[1].startswith("layer 0 (GatedCoupling)  ")
    assert lines[1].split()[-1] == f"{report.layers[0].bits:.3f}"
    assert lines[-1] == "inverts bit for bit"
    broken = check_invertible(ReversibleSequential(Swap(), Broken()), make.streams())
    assert str(broken).splitlines()[-1] == "does not invert within 0.001: degrades first at layer 1 (Broken)"
    sound = check_invertible(make.chain("additive", 1), make.streams())
    assert str(sound).splitlines()[-1] == "inverts within 0.001"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9), (torch.bfloat16, 5e-2)])
def test_tolerance_by_dtype(make, dtype, tolerance):
    x = make.streams(dtype=dtype)
    assert check_invertible(Broken(), x).tolerance == tolerance
    assert not check_invertible(Broken(3 * tolerance), x).invertible
    assert check_invertible(Broken(0), x).invertible
    assert check_invertible(Broken(3 * tolerance), x, tolerance=10 * tolerance).invertible


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_not_finite_is_not_inverted(make, error):
    report = check_invertible(Broken(error), make.streams(), tolerance=1e9)
    assert report.layers[0].own_error == math.inf
    assert not report.invertible


def test_wrong_shape_is_not_inverted(make):
    class Short(Broken):
        def undo(self, streams, call):
            return tuple(x[:1] for x in streams)

    assert check_invertible(Short(), make.streams()).layers[0].own_error == math.inf


def test_takes_layers_lists_and_inverses_and_a_lone_stream(make):
    x = torch.randn(2, 8)
    layers = [Split(2), make.coupling("additive"), make.coupling("additive", 4, 1)]
    names = [r.name for r in check_invertible([*layers, Inverse(ReversibleSequential(*layers))], x).layers]
    assert names[2:5] == [
        "layer 2 (AdditiveCoupling)",
        "inverse of layer 3.2 (AdditiveCoupling)",
        "inverse of layer 3.1 (AdditiveCoupling)",
    ]
    assert check_invertible(Split(2), x).invertible


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_an_inverse_has_the_arithmetic_of_its_chain(make, arithmetic):
    report = check_invertible(Inverse(make.chain("additive", 2, arithmetic=arithmetic)), make.streams(8))
    assert report.exact is (arithmetic == "exact")


@pytest.mark.parametrize("carries", [0, 1])
def test_states(make, carries):
    chain = make.recurrent("gated", 4, states=1, carries=carries)
    assert check_invertible(chain, make.streams(), make.state(chain)).invertible
    with pytest.raises(StreamError, match=r"layer 0 \(GatedCoupling\) is stateful, but no state was given"):
        check_invertible(chain, make.streams())


def test_a_carry_of_the_wrong_size_is_named(make):
    chain = make.recurrent("gated", 2, states=1, carries=1)
    state = make.state(chain)
    with pytest.raises(StreamError, match=r"layer 0 \(GatedCoupling\): takes a carry of 1 tensor.* carries 2"):
        check_invertible(chain, make.streams(), state._replace(carry=state.carry * 2))


def test_random_numbers_are_replayed_and_statistics_left_alone(make):
    def inner():
        return nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))

    chain = make.chain("mixed", 4, inner=inner)
    before = {k: b.clone() for k, b in chain.named_buffers()}
    assert check_invertible(chain, make.streams(20)).invertible
    assert all(torch.equal(b, before[k]) for k, b in chain.named_buffers())


def test_transform_that_is_not_deterministic_is_found(make):
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = [0]

        def forward(self, x):
            self.count[0] += 1
            return x * self.count[0]

    report = check_invertible([Swap(), AdditiveCoupling(Drifting())], make.streams())
    assert report.first_degraded.name == "layer 1 (AdditiveCoupling)"


def test_leaves_no_graph_and_no_gradients(make):
    chain, x = make.chain("mixed", 4), make.streams()
    check_invertible(chain, x)
    assert all(t.grad is None for t in (*x, *chain.parameters()))
    assert torch.is_grad_enabled()


def test_conditioning_is_handed_to_the_transforms():
    class Told(nn.Linear):
        def forward(self, x, context):
            return super().forward(x) * context

    chain = ReversibleSequential(AdditiveCoupling(Told(4, 4)), AdditiveCoupling(Told(4, 4), 1, 0))
    x = tuple(torch.randn(3, 4) for _ in range(2))
    assert check_invertible(chain, x, conditioning={"context": torch.ones(4)}).first_degraded is None
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'contxt'"):
        check_invertible(chain, x, conditioning={"contxt": 1})


@pytest.mark.parametrize(("inputs", "found"), [((), "none"), ([1.0], "a float")])
def test_streams_must_be_tensors(make, inputs, found):
    with pytest.raises(StreamError, match=f"check_invertible: the streams must be tensors, at least one; got {found}"):
        check_invertible(make.chain("additive", 2), inputs)


def test_a_stream_of_integers_comes_first(make):
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 8)

        def forward(self, i, x):
            return self.table(i).chunk(2, dim=1)

    model = ReversibleSequential(GatedCoupling(Looking(), (0, 1), 2), GatedCoupling(Looking(), (0, 2), 1))
    report = check_invertible(model, (torch.randint(0, 9, (3,)), *make.streams()))
    assert report.invertible
    assert report.exact
    x = (torch.randint(0, 9, (3,)), *make.streams(dtype=torch.float64))
    assert check_invertible(model.double(), x, arithmetic="float").tolerance == 1e-9


def test_buffers_that_a_transform_changes_are_left_alone(make):
    model = ReversibleSequential(ActNorm(4), AdditiveCoupling(spectral_norm(nn.Linear(4, 4))))
    before = {name: b.clone() for name, b in model.named_buffers()}
    check_invertible(model, make.streams(8))
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]) == ("transform" in name), name


def test_a_norm_without_a_batch_is_left_without_one():
    chain = ReversibleSequential(ActNorm(2))
    assert check_invertible(chain, torch.randn(64, 2)).invertible
    assert not chain[0].initialised
    assert not any(p.any() for p in chain.parameters())
    y = chain(torch.randn(64, 2) * 5 + 7)
    torch.testing.assert_close(y.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
