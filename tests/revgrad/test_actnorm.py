import copy
import io

import pytest
import torch
from torch import nn

from revgrad import ActNorm, AdditiveCoupling, Concatenate, Inverse, ReversibleSequential, Split, StreamError

MODES = ["stored", "checkpoint", "reversible"]
SHAPES = [(6, 4), (3, 4, 5), (2, 4, 3, 2), (2, 4, 2, 3, 1)]


def flow(make, norms=2):
    layers = []
    for _ in range(norms):
        layers += [ActNorm(4), Split(), AdditiveCoupling(make.net(2)), Concatenate()]
    return ReversibleSequential(*layers)


def batch(*shape, dtype=torch.float64):
    return (3 * torch.randn(shape, dtype=dtype) + 5).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
def test_first_training_batch_leaves_standardised(shape, mode, wrap):
    layer = ActNorm(4)
    chain = ReversibleSequential(wrap(layer), mode=mode).double()
    y = chain(batch(*shape)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(4, dtype=torch.float64))
    assert layer.initialised


@pytest.mark.parametrize("shape", SHAPES)
def test_is_its_formula_and_inverts(shape):
    layer, x = ActNorm(4).double(), batch(*shape)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.log_scale)
    layer.eval()
    chain = ReversibleSequential(layer)
    wide = [p.view(1, 4, *[1] * (len(shape) - 2)) for p in (layer.bias, layer.log_scale)]
    torch.testing.assert_close(chain(x), (x + wide[0]) * wide[1].exp())
    torch.testing.assert_close(chain.inverse(chain(x)), x)
    assert torch.autograd.gradcheck(chain, x)


@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Structure", "parameters that the first batch sets (ActNorm), also through Inverse")
def test_gradients_of_first_and_later_batches(make, check, wrap, mode):
    """Also on the batch that initialises: recomputation sees the parameters that the forward pass has set."""
    chain, x = ReversibleSequential(wrap(flow(make))).double(), batch(5, 4)
    for _ in range(2):
        check.same(check.gradients(chain, (x,), mode), check.gradients(chain, (x,), "stored"), rtol=1e-11)
        with torch.no_grad():
            chain(batch(5, 4))
    assert all(m.initialised for m in chain.modules() if isinstance(m, ActNorm))


def test_gradients_reach_parameters_with_and_without_grad(make, check):
    """The order in which gradients are released must not matter to what is initialised."""
    chain, x = flow(make).double(), batch(5, 4)
    twin = copy.deepcopy(chain)
    twin.mode = "stored"
    for model in (chain, twin):
        for _ in range(2):
            check.loss(model(x)).backward()
    for a, b in zip(chain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_only_the_first_training_batch_initialises():
    layer = ActNorm(4)
    chain = ReversibleSequential(layer).eval()
    x = batch(6, 4, dtype=torch.float32)
    assert torch.equal(chain(x), x)
    assert torch.equal(chain.inverse(x), x)
    assert not layer.initialised
    chain.train()
    chain(x)
    kept = layer.bias.clone()
    chain(batch(6, 4, dtype=torch.float32) * 10)
    assert layer.initialised
    assert torch.equal(layer.bias, kept)


def test_state_dict_remembers_that_it_has_happened():
    layer = ActNorm(4)
    with torch.no_grad():
        ReversibleSequential(layer)(batch(6, 4, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = ActNorm(4)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.initialised
    assert torch.equal(other.bias, layer.bias)
    assert not ActNorm(4).initialised
    assert copy.deepcopy(other).initialised


def test_constant_channels_keep_their_scale():
    layer, x = ActNorm(2), torch.randn(5, 2)
    x[:, 1] = 7
    y = ReversibleSequential(layer)(x)
    assert layer.log_scale[1] == 0
    assert torch.equal(y[:, 1], torch.zeros(5))


def test_only_its_stream_is_touched(check):
    chain = ReversibleSequential(ActNorm(3, target=1)).double()
    x = (batch(2, 5), batch(4, 3), batch(1))
    y = chain(*x)
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[2], x[2])
    assert chain[0].updates() == 1
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_not_for_streams(mode):
    chain, x = ReversibleSequential(ActNorm(4), mode=mode), batch(6, 4, dtype=torch.float32)
    chain(x)
    plain = chain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chain(x), plain)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (ActNorm(4), (1, 4), r"layer 0 \(ActNorm\): the first batch .* more than one value per channel"),
        (ActNorm(4), (3, 5), r"layer 0 \(ActNorm\): the stream must be \[B, 4, ...\], but has shape \(3, 5\)"),
        (ActNorm(4), (4,), r"must be \[B, 4, ...\]"),
        (ActNorm(4, target=1), (3, 4), r"layer 0 \(ActNorm\): there is no stream 1, only 1 stream"),
    ],
)
def test_streams_that_do_not_fit(layer, shape, message):
    with pytest.raises(StreamError, match=message):
        ReversibleSequential(layer)(torch.zeros(shape))


def test_has_no_exact_form():
    with pytest.raises(StreamError, match=r"ActNorm has no exact form; choose arithmetic='float'"):
        ReversibleSequential(ActNorm(4), arithmetic="exact")(torch.zeros(2, 4))


@pytest.mark.parametrize("arguments", [(0,), (4, -1)])
def test_arguments_are_checked(arguments):
    with pytest.raises(StreamError, match="ActNorm: needs at least one channel"):
        ActNorm(*arguments)


def test_samples_that_are_drawn_before_the_first_batch_set_nothing(make):
    chain, x = flow(make).double(), batch(6, 4)
    untouched = copy.deepcopy(chain.state_dict())
    chain.inverse(torch.randn(6, 4, dtype=torch.float64))
    ReversibleSequential(Inverse(chain)).inverse(x)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(untouched[k])) for k, a in chain.state_dict().items())
    chain(x)
    assert all(m.initialised for m in chain if isinstance(m, ActNorm))


def test_an_average_of_weights_that_was_made_before_the_first_batch_is_kept(make):
    chain = flow(make).double()
    average = torch.optim.swa_utils.AveragedModel(chain)
    chain(batch(6, 4))
    average.update_parameters(chain)
    kept = [p.clone() for p in average.parameters()]
    average(batch(6, 4) * 10)
    assert all(map(torch.equal, average.parameters(), kept))
    assert average.module[0].initialised
