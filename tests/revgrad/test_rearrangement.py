import pytest
import torch
from torch import nn
from torch.nn import functional as F

from revgrad import (
    AdditiveCoupling,
    Concatenate,
    Inverse,
    LayerCall,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    ReversibleSequential,
    Split,
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
    "unshuffle a signal": (lambda: PixelUnshuffle(3), [(2, 2, 6)]),
    "shuffle a signal": (lambda: PixelShuffle(2, "irevnet"), [(2, 4, 3)]),
    "swap": (lambda: Swap(), [(2, 3), (4, 5), (1,)]),
    "unshuffle one stream": (lambda: PixelUnshuffle(2, target=1), [(2, 3), (1, 1, 2, 4), (5,)]),
    "split one stream": (lambda: Split((1, 3), target=1), [(2, 3), (2, 4), (5,)]),
    "concatenate two of four": (lambda: Concatenate(2, target=1), [(2, 1), (2, 3), (2, 3), (5,)]),
    "concatenate two of four, of sizes": (lambda: Concatenate((3, 1), target=1), [(2, 1), (2, 3), (2, 1), (5,)]),
    "permute one stream": (lambda: Permute(torch.tensor([1, 2, 0]), target=0), [(2, 3), (4,)]),
}


@pytest.fixture(params=CASES)
def case(request):
    build, shapes = CASES[request.param]
    return build(), tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


def test_undo_and_inverse_restore_every_bit(case):
    layer, x = case
    y = layer.run(x, LayerCall())
    # A bijection moves values and changes none.
    moved = torch.cat([t.flatten() for t in y]).sort().values
    assert torch.equal(moved, torch.cat([t.flatten() for t in x]).sort().values)
    for back in (layer.undo(y, LayerCall()), Inverse(layer).run(y, LayerCall())):
        assert len(back) == len(x)
        assert all(map(torch.equal, back, x))
    assert all(map(torch.equal, Inverse(layer).undo(x, LayerCall()), y))


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


def test_batched_gradients(case):
    layer, x = case
    chain = ReversibleSequential(layer)
    found = []
    for chain.mode in ("stored", "reversible"):
        y = chain(*x)
        y = y[0] if isinstance(y, tuple) else y
        v = torch.arange(2.0 * y.numel(), dtype=y.dtype).view(2, *y.shape)
        grads = torch.autograd.grad(y, x, v, is_grads_batched=True, allow_unused=True)
        found.append(
            [torch.zeros(2, *t.shape, dtype=t.dtype) if g is None else g for g, t in zip(grads, x, strict=True)]
        )
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_gradient_of_one_output_only(case):
    layer, x = case
    outputs = ReversibleSequential(layer)(*x)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    expected = torch.autograd.grad(layer.run(x, LayerCall())[0].square().sum(), x, allow_unused=True)
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


def test_permute_moves_its_order_with_the_module():
    assert Permute([1, 0]).to("meta").order.device.type == "meta"


def test_the_order_of_permute_is_saved():
    """It is drawn at random as a rule, and weights are made for it."""
    x = torch.arange(6.0).view(2, 3)
    saved, other = ReversibleSequential(Permute([2, 0, 1])), ReversibleSequential(Permute([1, 0, 2]))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    assert torch.equal(other.inverse(saved(x)), x)


@pytest.mark.parametrize("order", ["pytorch", "irevnet"])
def test_a_signal_is_folded_as_an_image_of_one_row_would_be(order):
    """Of an image of such rows, one in n and equal to the others, the channels of the row offset 0 are the signal's."""
    x = torch.randn(2, 3, 8)
    folded = ReversibleSequential(PixelUnshuffle(2, order))(x)
    image = ReversibleSequential(PixelUnshuffle(2, order))(x[:, :, None].expand(-1, -1, 2, -1).contiguous())[:, :, 0]
    rows = image.unflatten(1, (3, 2, 2))[:, :, 0] if order == "pytorch" else image.unflatten(1, (2, 2, 3))[:, 0]
    assert torch.equal(folded, rows.flatten(1, 2))
    assert torch.equal(ReversibleSequential(PixelShuffle(2, order))(folded), x)


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        (Split(2), [(2, 5)], r"layer 1 \(Split\): dimension 1 of size 5 cannot be cut into 2 equal parts"),
        (Split((2, 2)), [(2, 5)], r"layer 1 \(Split\): sizes \(2, 2\) do not add up to dimension 1 of size 5"),
        (Split(2), [(2, 4), (2, 4)], r"layer 1 \(Split\): Split takes one stream, got 2; target= says which"),
        (Split(2, target=2), [(2, 4), (2, 4)], r"layer 1 \(Split\): there is no stream 2, only 2 stream\(s\)"),
        (Concatenate(), [(2, 2), (2, 6)], r"joins equal streams, got sizes \(6, 2\) along dimension 1; give these"),
        (Concatenate((6, 1)), [(2, 2), (2, 6)], r"joins streams of sizes \(6, 1\) along dimension 1, got \(6, 2\)"),
        (Concatenate(), [(2, 2)] * 3, r"layer 1 \(Concatenate\): joins 2 streams, got 3; the first argument says"),
        (Concatenate(2, target=1), [(2, 2)] * 2, r"joins 2 streams, from stream 1 on, got 1"),
        (Permute([1, 0], target=3), [(2, 2)], r"layer 1 \(Permute\): there is no stream 3, only 1 stream\(s\)"),
        (Permute([1, 0]), [(2, 3)], r"layer 1 \(Permute\): 3 channels, but the permutation orders 2"),
        (PixelUnshuffle(2), [(1, 1, 3, 4)], "3 x 4 pixels cannot be folded by 2"),
        (PixelUnshuffle(2), [(1, 1, 3)], "a signal of length 3 cannot be folded by 2"),
        (PixelShuffle(2), [(1, 3, 4, 4)], "3 channels are not a multiple of 2 x 2"),
        (PixelShuffle(2), [(1, 3, 4)], "3 channels are not a multiple of 2"),
    ],
)
@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
def test_shapes_that_do_not_fit(layer, shapes, message, mode):
    chain = ReversibleSequential(Swap(), layer, mode=mode)
    with pytest.raises(ValueError, match=message) as error:
        chain(*(torch.zeros(s, requires_grad=True) for s in shapes))
    assert f"layer 1 ({type(layer).__name__})" in "".join([str(error.value), *getattr(error.value, "__notes__", ())])


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2]])
def test_permute_needs_a_permutation(order):
    with pytest.raises(StreamError, match=r"is not a permutation of 0 .. 1"):
        Permute(order)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PixelUnshuffle(0), "factor"),
        (lambda: PixelShuffle(2, "tensorflow"), "order"),
        (lambda: Split(0), "Split: sizes=0 must be at least 1"),
        (lambda: Permute([0], target=-1), "Permute: streams are counted from 0; got target=-1"),
    ],
)
def test_arguments_that_make_no_sense(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.composes("Structure", "several scales: half of a stream is factored out while the rest is folded further")
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_streams_that_are_factored_out_wait_while_the_others_go_on(check, arithmetic):
    """[B, 1, 8, 8] to 4 channels, two of which leave as stream 1; the rest to 8, four of which leave; then 4."""

    def mix(i, j, width):
        return AdditiveCoupling(nn.Conv2d(width, width, 3, padding=1), i, j)

    net = ReversibleSequential(
        *(PixelUnshuffle(2), Split(2), mix(0, 1, 2), mix(1, 0, 2)),
        *(PixelUnshuffle(2, target=0), Permute(torch.randperm(8), target=0), Split(2, target=0)),
        *(mix(0, 1, 4), mix(1, 0, 4)),
        arithmetic=arithmetic,
    ).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    y = net(x)
    assert [tuple(s.shape[1:]) for s in y] == [(4, 2, 2), (4, 2, 2), (2, 4, 4)]
    check.same(
        check.gradients(net, (x,), "reversible"),
        check.gradients(net, (x,), "stored"),
        rtol=0 if arithmetic == "exact" else 1e-9,
    )
    torch.testing.assert_close(net.inverse(*net(x)), x, rtol=0, atol=1e-9)


def test_a_u_net_joins_what_comes_up_with_what_has_waited(check):
    """Down: the upper half of the channels waits; up: both are joined again."""

    def mix(i, j, width):
        return AdditiveCoupling(nn.Conv2d(width, width, 3, padding=1), i, j)

    net = ReversibleSequential(
        *(Split(2), mix(0, 1, 2), mix(1, 0, 2)),
        *(PixelUnshuffle(2, target=0), Split(2, target=0), mix(0, 1, 4), mix(1, 0, 4), Concatenate(2, target=0)),
        *(PixelShuffle(2, target=0), mix(0, 1, 2), mix(1, 0, 2), Concatenate()),
    ).double()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    assert net(x).shape == x.shape
    check.same(check.gradients(net, (x,), "reversible"), check.gradients(net, (x,), "stored"), rtol=1e-9)


def test_arguments_show_in_the_representation(make):
    chain = ReversibleSequential(PixelUnshuffle(4), Split(2, dim=1), AdditiveCoupling(make.net(4), 1, 0))
    assert "sizes=2, dim=1, target=3" in repr(Split(2, target=3))
    for part in ("factor=4", "sizes=2, dim=1", "source=1, target=0", "mode='reversible', arithmetic='auto'"):
        assert part in repr(chain)
