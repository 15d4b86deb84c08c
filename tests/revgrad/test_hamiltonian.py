import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revgrad import (
    HamiltonianStep,
    Inverse,
    LayerCall,
    LeapfrogStep,
    ReflectionCoupling,
    Residue,
    ReversibleSequential,
    StreamError,
    SymmetricTransform,
    check_invertible,
    snap,
)

pytestmark = pytest.mark.usefixtures("single_thread")


def hamiltonian(make, depth=4, h=0.5, **options):
    steps = [HamiltonianStep(make.net(4), make.net(4), h) for _ in range(depth)]
    return ReversibleSequential(*steps, **options)


def leapfrog(make, depth=4, h=0.5, **options):
    return ReversibleSequential(*(LeapfrogStep(make.net(4), h) for _ in range(depth)), **options)


NETWORKS = {"hamiltonian": hamiltonian, "leapfrog": leapfrog}


@pytest.fixture(params=NETWORKS)
def build(request):
    return NETWORKS[request.param]


def test_steps_are_their_formulas(make):
    f, g = make.net(4).double(), make.net(4).double()
    y, z = make.streams(dtype=torch.float64, requires_grad=False)
    found = HamiltonianStep(f, g, 0.25)(y, z)
    torch.testing.assert_close(found[0], y + 0.25 * f(z))
    torch.testing.assert_close(found[1], z - 0.25 * g(found[0]))
    found = LeapfrogStep(f, 0.25)(y, z)
    torch.testing.assert_close(found[0], 2 * y - z + 0.0625 * f(y))
    assert found[1] is not y
    assert torch.equal(found[1], y)


@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
def test_gradients_in_float(make, check, build, wrap):
    chain = ReversibleSequential(wrap(build(make))).double()
    x = make.streams(dtype=torch.float64)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-11)
    assert torch.autograd.gradcheck(chain, x)


@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_in_exact_arithmetic_bit_for_bit(make, check, build, wrap, dtype):
    chain = ReversibleSequential(wrap(build(make, 6)), arithmetic="exact").to(dtype)
    x = make.streams(dtype=dtype)
    stored = check.gradients(chain, x, "stored")
    for mode in ("reversible", "checkpoint"):
        check.same(check.gradients(chain, x, mode), stored)
    assert check_invertible(chain, x).invertible


@pytest.mark.parametrize("step", [lambda f: HamiltonianStep(f, f), LeapfrogStep])
def test_functions_are_told_what_the_chain_is_told(make, step):
    class Told(nn.Module):
        def forward(self, x, *, context):
            return torch.sin(x * context)

    chain, x = ReversibleSequential(step(Told()), step(Told())).double(), make.streams(dtype=torch.float64)
    context = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, c: chain(a, b, context=c), (*x, context))


@given(seed=st.integers(0, 1000), size=st.floats(0.01, 30))
def test_reflection_is_its_own_inverse_to_the_bit(seed, size):
    torch.manual_seed(seed)
    layer = ReflectionCoupling(nn.Linear(3, 3))
    x = tuple(snap(t) for t in size * torch.randn(2, 4, 3))
    y = layer.run(x, LayerCall(residue=Residue()))
    assert torch.equal(y[1] + x[1], snap(layer.transform(x[0])))
    for back in (layer.run(y, LayerCall(residue=Residue())), layer.undo(y, LayerCall(residue=Residue()))):
        assert all(map(torch.equal, back, x))


def test_backward_evaluates_every_function_once(make, build):
    chain = build(make, 3)
    sum(y.sum() for y in chain(*make.streams())).backward()
    nets = [m for m in chain.modules() if isinstance(m, make.net)]
    assert len(nets) in (3, 6)
    assert all(net.count[0] == 2 for net in nets)


OPERATORS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (2, 3, 5)),
    "conv 1D": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 6)),
    "conv 2D": (lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), groups=2), (1, 4, 5, 6)),
    "conv 2D, dilated, no padding": (lambda: nn.Conv2d(2, 3, 3, dilation=2), (1, 2, 7, 6)),
    "conv 3D": (lambda: nn.Conv3d(2, 2, 3, padding=1), (1, 2, 3, 2, 3)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_symmetric_transform_has_a_symmetric_semidefinite_jacobian(name):
    build, shape = OPERATORS[name]
    operator = build().double()
    z = torch.randn(shape, dtype=torch.float64)
    for factor in (1.0, -0.5):
        transform = SymmetricTransform(operator, factor=factor)
        jacobian = torch.autograd.functional.jacobian(transform, z).reshape(z.numel(), -1)
        torch.testing.assert_close(jacobian, jacobian.t())
        assert torch.linalg.eigvalsh(jacobian / factor).min() > -1e-12
        assert torch.linalg.eigvalsh(jacobian / factor).max() > 1e-3


@pytest.mark.parametrize("name", OPERATORS)
def test_stable_networks_stay_bounded_at_any_depth(name):
    build, shape = OPERATORS[name]
    for chain in (
        ReversibleSequential(*[HamiltonianStep(SymmetricTransform(build()), SymmetricTransform(build()), 0.1)] * 500),
        ReversibleSequential(*[LeapfrogStep(SymmetricTransform(build(), factor=-1), 0.1)] * 500),
    ):
        with torch.no_grad():
            x = torch.randn(shape)
            y = chain(x, x)
        assert float(max(t.abs().max() for t in y)) < 150


@pytest.mark.parametrize(
    "operator",
    [
        nn.Conv2d(2, 2, 3, stride=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.ReLU(),
    ],
    ids=str,
)
def test_operators_without_a_transpose_here(operator):
    with pytest.raises(StreamError, match=r"the operator must be nn\.Linear, or nn\.Conv1d to nn\.Conv3d"):
        SymmetricTransform(operator)
