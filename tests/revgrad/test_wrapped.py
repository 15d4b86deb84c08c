import copy

import pytest
import torch
from torch import nn

from revgrad import Inverse, ReversibilityError, ReversibleSequential, StreamError, check_invertible, plan, wrap

MODES = ["stored", "checkpoint", "reversible"]


class Flow(nn.Module):
    """Somebody's own bijection of two streams: one module with two methods."""

    def __init__(self, width=3):
        super().__init__()
        self.net = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.full((width,), 0.2))
        self.forwards, self.backwards = [], []

    def forward(self, x, y):
        self.forwards.append(1)
        return x * self.log_scale.exp(), y + self.net(x).tanh()

    def invert(self, x, y):
        self.backwards.append(1)
        x = x * torch.exp(-self.log_scale)
        return x, y - self.net(x).tanh()

    def log_det(self, x, y):
        return self.log_scale.sum().expand(len(x))


def modules():
    """An inverse in a module of its own, with the parameters of the first."""

    class Invert(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x, y):
            return self.flow.invert(x, y)

    flow = Flow().double()
    return wrap(flow, Invert(flow), flow.log_det)


def methods():
    flow = Flow().double()
    return wrap(flow.forward, flow.invert, flow.log_det)


def one_stream():
    return wrap(torch.asinh, torch.sinh, lambda x: -(x.square() + 1).log().sum(1) / 2)


@pytest.fixture(params=[modules, methods])
def flow(request):
    return request.param()


@pytest.mark.parametrize("turn", [lambda layer: layer, Inverse])
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Structure", "a bijection in two methods or two modules (wrap)")
def test_gradients_are_those_of_autograd(make, check, flow, turn, mode):
    chain = ReversibleSequential(turn(flow), turn(flow))
    x = make.streams(width=3, dtype=torch.float64)
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"), rtol=1e-12)
    assert torch.autograd.gradcheck(chain, x)


@pytest.mark.parametrize("mode", MODES)
def test_functions_of_one_stream(check, mode):
    chain, x = ReversibleSequential(one_stream()), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(chain(x), x.asinh())
    torch.testing.assert_close(chain.inverse(chain(x)), x)
    check.same(check.gradients(chain, (x,), mode), check.gradients(chain, (x,), "stored"), rtol=1e-12)


def test_parameters_are_found_once(flow):
    assert sum(p.numel() for p in flow.parameters()) == 3 * 3 + 3 + 3
    assert len({id(p) for p in flow.parameters()}) == len(list(flow.parameters())) == 3


def test_weights_are_saved_once():
    flow = Flow()
    assert len(wrap(flow.forward, flow.invert, flow.log_det).state_dict()) == 3
    assert len(wrap(flow, flow.invert, flow.log_det).state_dict()) == 3


def test_a_copy_has_parameters_of_its_own(make, flow):
    chain = ReversibleSequential(flow)
    other = copy.deepcopy(chain)
    x = make.streams(width=3, dtype=torch.float64)
    other(*x)[0].sum().backward()
    assert all(p.grad is None for p in chain.parameters())
    assert all(p.grad is not None for name, p in other.named_parameters() if name.endswith("log_scale"))


def test_a_step_costs_one_inverse_and_two_forwards(make):
    flow = Flow()
    chain = ReversibleSequential(wrap(flow.forward, flow.invert))
    for calls in (1, 2):  # the first use checks, with one inverse more
        y = chain(*make.streams(width=3))
        (y[0].sum() + y[1].sum()).backward()
        assert (len(flow.forwards), len(flow.backwards)) == (2 * calls, calls + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("turn", [lambda layer: layer, Inverse])
def test_first_use_finds_an_inverse_that_does_not_invert(mode, grad, turn):
    layer = turn(wrap(lambda x: 2 * x, lambda x: 0.45 * x))
    chain = ReversibleSequential(layer, mode=mode)
    with torch.set_grad_enabled(grad), pytest.raises(ReversibilityError, match=r"layer 0 .*the inverse is off by 0.1"):
        chain(torch.randn(4, 3, requires_grad=True))


def test_wrong_shapes_and_lost_streams_are_named():
    with pytest.raises(
        ReversibilityError, match=r"returned streams of shapes \[\(4,\)\] for an input of shapes \[\(2,"
    ):
        ReversibleSequential(wrap(torch.flatten, torch.flatten))(torch.randn(2, 2))
    with pytest.raises(ReversibilityError, match=r"returned streams of shapes \[\(2,\)\] for .* \[\(2,\), \(2,\)\]"):
        ReversibleSequential(wrap(torch.add, torch.neg))(torch.randn(2), torch.randn(2))


@pytest.mark.parametrize(("result", "found"), [(None, "a NoneType"), ((), "nothing"), ((torch.ones(1), 3), "a int")])
def test_result_must_be_tensors(result, found):
    with pytest.raises(StreamError, match=rf"layer 0 \(Wrapped\): .*<lambda> must return .*, returned {found}"):
        ReversibleSequential(wrap(lambda x: result, lambda x: x))(torch.ones(1))


def test_drift_after_the_first_use_is_found_in_backward():
    factor = [2.0]
    chain = ReversibleSequential(wrap(lambda x: factor[0] * x, lambda x: x / factor[0]))
    x = torch.randn(4, 3, requires_grad=True)
    y = chain(x)
    factor[0] = 3.0
    with pytest.raises(ReversibilityError, match="the input recovered in the backward pass differs"):
        y.sum().backward()


def test_closure_over_a_parameter_raises_instead_of_losing_its_gradient():
    scale = torch.tensor(2.0, requires_grad=True)
    chain = ReversibleSequential(wrap(lambda x: scale * x, lambda x: x / scale))
    x = torch.randn(4, 3)
    with pytest.raises(ReversibilityError, match=r"layer 0 \(Wrapped\): the transform reads a tensor of shape \(\)"):
        chain(x.requires_grad_()).sum().backward()
    chain.mode = "stored"
    chain(x).sum().backward()
    assert scale.grad is not None


def test_closure_of_the_log_determinant_raises_too():
    scale = torch.tensor(2.0, requires_grad=True)
    layer = wrap(lambda x: 2 * x, lambda x: x / 2, lambda x: scale.log().expand(len(x)))
    y, log_det = ReversibleSequential(layer)(torch.randn(4, 3, requires_grad=True), log_det=True)
    with pytest.raises(ReversibilityError, match="the transform reads a tensor"):
        (y.sum() + log_det.sum()).backward()


def test_has_no_exact_form():
    with pytest.raises(StreamError, match="a wrapped function has no exact form; choose arithmetic='float'"):
        ReversibleSequential(one_stream(), arithmetic="exact")(torch.zeros(2, 3))


def test_transforms_of_functions_leave_the_check_to_the_first_real_use():
    chain, x = ReversibleSequential(wrap(lambda x: 2 * x, lambda x: x)), torch.randn(4, 3)
    assert torch.equal(torch.func.vmap(chain)(x), 2 * x)
    with pytest.raises(ReversibilityError, match="the inverse is off"):
        chain(x)


def test_a_plan_before_the_first_use_leaves_the_check_to_it():
    inverse = torch.sin
    layer = wrap(torch.asinh, lambda x: inverse(x))
    chain = ReversibleSequential(layer)
    for x in (torch.randn(5, 3), torch.empty(5, 3, device="meta")):
        assert plan(chain, x).layers == 1
        assert not layer._checked
    assert chain(torch.empty(5, 3, device="meta")).shape == (5, 3)
    with pytest.raises(ReversibilityError, match="the inverse is off"):
        chain(torch.randn(5, 3))
    inverse = torch.sinh
    chain(torch.randn(5, 3))
    assert layer._checked


def test_diagnosis_and_representation():
    assert check_invertible(ReversibleSequential(one_stream()), torch.randn(5, 3)).invertible
    assert "asinh" in repr(one_stream())
    assert "Flow.invert" in repr(methods())


@pytest.mark.parametrize("zeros", [(0,), (0, 1)])
def test_streams_of_zeros_may_come_back_a_rounding_off(zeros):
    x = [torch.zeros(4, 3) if i in zeros else torch.randn(4, 3) for i in range(2)]
    ReversibleSequential(wrap(lambda *x: x, lambda *x: tuple(t + 1e-6 for t in x)))(*x)
    with pytest.raises(ReversibilityError, match=r"the inverse is off by 0\.[1-9]"):
        ReversibleSequential(wrap(lambda *x: x, lambda *x: tuple(t + 0.5 for t in x)))(*x)


def test_an_inverse_in_place_raises():
    x = torch.ones(2, 2)
    chain = ReversibleSequential(wrap(lambda a: a * 2, lambda b: b.div_(2)))
    with pytest.raises(StreamError, match="<lambda> changed its input in place"):
        chain(x)
    chain = ReversibleSequential(wrap(lambda a: a.mul_(2), lambda b: b / 2))
    with pytest.raises(StreamError, match="changed its input in place, a stream of shape"):
        chain(x)


def test_an_error_in_a_function_names_the_layer_and_what_it_was_given():
    chain = ReversibleSequential(wrap(lambda x: 2 * x, lambda x: x / 2))
    with pytest.raises(TypeError) as error:
        chain(torch.zeros(2, 3), torch.zeros(2, 4))
    note = error.value.__notes__[0]
    assert "layer 0 (Wrapped): in " in note
    assert note.endswith("given 2 stream(s) of shape (2, 3), (2, 4)")
