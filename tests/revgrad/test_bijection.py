import pytest
import torch
from torch.nn import functional as F

from revgrad import (
    AdditiveCoupling,
    Concatenate,
    Inverse,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    ReversibleSequential,
    Split,
    Step,
    StreamError,
    Swap,
)

# Name: layer, shapes of its input streams.
CASES = {
    "unshuffle 2D": (lambda: PixelUnshuffle(2), [(2, 3, 4, 6)]),
    "unshuffle 3D": (lambda: PixelUnshuffle(3), [(1, 2, 2, 3, 6), (1, 1, 2, 6, 3)]),
    "shuffle 2D": (lambda: PixelShuffle(2), [(2, 4, 3, 5)]),
    "shuffle 3D": (lambda: PixelShuffle(2), [(2, 8, 3, 1, 2)]),
    "split in parts": (lambda: Split(3), [(2, 6, 5)]),
    "split in sizes": (lambda: Split((1, 4, 2), dim=2), [(2, 3, 7)]),
    "concatenate": (lambda: Concatenate((3, 2)), [(1, 3, 7), (1, 2, 7)]),
    "permute": (lambda: Permute([2, 0, 3, 1]), [(2, 4, 5), (3, 4)]),
    "permute last": (lambda: Permute([1, 2, 0], dim=-1), [(2, 4, 3)]),
    "swap": (lambda: Swap(), [(2, 3), (4, 5), (1,)]),
}


@pytest.fixture(params=CASES)
def case(request):
    build, shapes = CASES[request.param]
    return build(), tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


def test_undo_and_inverse_restore_every_bit(case):
    layer, x = case
    y = layer.run(x, Step())
    # A bijection moves values and changes none.
    moved = torch.cat([t.flatten() for t in y]).sort().values
    assert torch.equal(moved, torch.cat([t.flatten() for t in x]).sort().values)
    for back in (layer.undo(y, Step()), Inverse(layer).run(y, Step())):
        assert len(back) == len(x)
        assert all(map(torch.equal, back, x))
    assert all(map(torch.equal, Inverse(layer).undo(x, Step()), y))


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_gradients_are_those_of_autograd(case, check, mode, arithmetic):
    layer, x = case
    for chain in (ReversibleSequential(layer), ReversibleSequential(layer, Inverse(layer))):
        chain.arithmetic = arithmetic
        check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"))


def test_gradcheck(case):
    layer, x = case
    assert torch.autograd.gradcheck(ReversibleSequential(layer), x)


def test_gradient_of_one_output_only(case):
    layer, x = case
    outputs = ReversibleSequential(layer)(*x)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    expected = torch.autograd.grad(layer.run(x, Step())[0].square().sum(), x, allow_unused=True)
    found = torch.autograd.grad(first.square().sum(), x, allow_unused=True)
    for x_i, a, b in zip(x, found, expected, strict=True):
        zero = torch.zeros_like(x_i)
        assert torch.equal(zero if a is None else a, zero if b is None else b)


def test_unshuffle_is_pytorchs():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ReversibleSequential(PixelUnshuffle(2))(x), F.pixel_unshuffle(x, 2))


def test_permute_order_is_output_from_input():
    x = torch.arange(3.0).view(1, 3)
    assert ReversibleSequential(Permute([2, 0, 1]))(x).tolist() == [[2.0, 0.0, 1.0]]


def test_permute_moves_its_order_with_the_module_and_keeps_it_out_of_the_weights():
    layer = Permute([1, 0])
    assert layer.state_dict() == {}
    assert layer.to("meta").order.device.type == "meta"


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        (Split(2), [(2, 5)], r"layer 1 \(Split\): dimension 1 of size 5 cannot be cut into 2 equal parts"),
        (Split((2, 2)), [(2, 5)], r"layer 1 \(Split\): sizes \(2, 2\) do not add up to dimension 1 of size 5"),
        (Split(2), [(2, 4), (2, 4)], r"layer 1 \(Split\): Split takes one stream, got 2"),
        (Permute([1, 0]), [(2, 3)], r"layer 1 \(Permute\): 3 channels, but the permutation orders 2"),
        (PixelUnshuffle(2), [(1, 1, 3, 4)], "3 x 4 pixels cannot be folded by 2"),
        (PixelShuffle(2), [(1, 3, 4, 4)], "3 channels are not a multiple of 2 x 2"),
    ],
)
@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
def test_shapes_that_do_not_fit(layer, shapes, message, mode):
    chain = ReversibleSequential(Swap(), layer, mode=mode)
    with pytest.raises(ValueError, match=message):
        chain(*(torch.zeros(s, requires_grad=True) for s in shapes))


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2]])
def test_permute_needs_a_permutation(order):
    with pytest.raises(StreamError, match=r"is not a permutation of 0 .. 1"):
        Permute(order)


def test_arguments_show_in_the_representation(make):
    chain = ReversibleSequential(PixelUnshuffle(4), Split(2, dim=1), AdditiveCoupling(make.net(4), 1, 0))
    for part in ("factor=4", "sizes=2, dim=1", "source=1, target=0", "mode='reversible', arithmetic='auto'"):
        assert part in repr(chain)
