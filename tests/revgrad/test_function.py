"""The contracts of the autograd Function on one chain. Time steps: test_unrolling.py; memory: test_memory.py."""

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    GatedCoupling,
    Inverse,
    ReversibleSequential,
    StreamError,
)

pytestmark = pytest.mark.usefixtures("single_thread")

KINDS = ["additive", "mixed"]


def backward(chain, x, check):
    check.loss(chain(*x)).backward()


# Parameters and gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Structure", "frozen parameters")
def test_frozen_parameters_get_no_gradient_and_change_no_other(make, check, kind):
    chain, x = make.chain(kind, 4), make.streams()
    everything = check.gradients(chain, x, "reversible")
    chain[0].requires_grad_(False)
    chain[2].transform.last.bias.requires_grad_(False)
    found = check.gradients(chain, x, "reversible")
    for name, value in found.items():
        if "layers.0." in name or name == "gradient of layers.2.transform.last.bias":
            assert value is None
        else:
            assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_frozen_still_gives_the_inputs_gradients(make, check, kind):
    chain, x = make.chain(kind, 4).requires_grad_(False), make.streams()
    arithmetic = {"additive": 1e-5, "mixed": 0}[kind]
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=arithmetic)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Structure", "shared layers and shared weights")
def test_shared_parameters(make, check, mode):
    """The same coupling twice, its inverse in the same chain, and a weight tied across two transforms."""
    a, b, c = (make.coupling("additive", 4, i) for i in range(3))
    c.transform.last.weight = a.transform.last.weight
    gated = GatedCoupling(make.net(4, 2))
    chain = ReversibleSequential(a, b, gated, a, Inverse(b), c, gated, Inverse(a))
    x = make.streams()
    check.same(check.gradients(chain, x, mode), check.gradients(chain, x, "stored"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Structure", "parameters that are not used")
def test_unused_parameter_is_no_exception(make, check, kind):
    chain, x = make.chain(kind, 3), make.streams()
    chain[1].transform.register_parameter("unused", nn.Parameter(torch.ones(2)))
    chain[2].register_parameter("also_unused", nn.Parameter(torch.ones(2)))
    found = check.gradients(chain, x, "reversible")
    for name in ("gradient of layers.1.transform.unused", "gradient of layers.2.also_unused"):
        assert found[name] is None or not found[name].any()
    assert all(v is not None for name, v in found.items() if "unused" not in name)


def test_recurrent_layers_of_pytorch_see_the_stand_ins(make, check):
    """nn.GRU keeps a list of its weights beside its parameters."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            return self.gru(x[:, None])[0][:, 0]

    chain = ReversibleSequential(AdditiveCoupling(Recurrent()), AdditiveCoupling(Recurrent(), 1, 0), arithmetic="exact")
    x = make.streams()
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"))


@pytest.mark.composes("Autograd", "torch.autograd.grad for inputs and weights", "works: .grad stays empty")
def test_autograd_grad_leaves_grad_alone(make, check):
    chain, x = make.chain("mixed", 4), make.streams()
    expected = check.gradients(chain, x, "stored")
    torch.manual_seed(3)
    loss = check.loss(chain(*x))
    weight = chain[2].transform.first.weight
    found = torch.autograd.grad(loss, (x[0], weight))
    assert torch.equal(found[0], expected["gradient of input 0"])
    assert torch.equal(found[1], expected["gradient of layers.2.transform.first.weight"])
    assert all(t.grad is None for t in (*x, *chain.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Hooks", "hooks of parameters and post-accumulate-grad hooks", "fire once, on the final gradient")
def test_hooks_fire_once_on_the_final_gradient(make, check, kind):
    shared = make.coupling("additive")
    chain = ReversibleSequential(shared, *make.chain(kind, 4), shared)
    x = make.streams()
    plain = check.gradients(chain, x, "reversible")
    name = "layers.0.transform.first.weight"
    weight = dict(chain.named_parameters())[name]
    fired, accumulated = [], []
    weight.register_hook(lambda grad: fired.append(grad.clone()) or grad * 0.5)
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    x[0].register_hook(lambda grad: fired.append("input"))
    torch.manual_seed(3)
    backward(chain, x, check)
    expected = plain[f"gradient of {name}"]
    assert len(fired) == 2
    assert torch.equal(next(g for g in fired if not isinstance(g, str)), expected)
    assert len(accumulated) == 1
    assert torch.equal(weight.grad, expected * 0.5)


@pytest.mark.parametrize("exist", [False, True])
def test_hooks_where_the_loss_does_not_reach_are_not_called_with_none(make, check, exist):
    """The second coupling updates an output that the loss does not read."""
    chain, x = make.chain("additive", 2), make.streams()
    leaves = (x[1], *chain.parameters())
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf) if exist else None
    chain(*x)[1].square().sum().backward()
    expected = [leaf.grad for leaf in leaves]
    assert exist or None in expected
    for leaf in leaves:
        leaf.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        leaf.grad = torch.zeros_like(leaf) if exist else None
    chain(*x)[1].square().sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert not leaf.grad.any() if grad is None else torch.equal(leaf.grad, grad.clamp(-0.1, 0.1))


@pytest.mark.composes("Hooks", "gradients added up over several passes")
def test_gradients_accumulate_over_backward_passes(make, check):
    chain, x = make.chain("mixed", 4), make.streams()
    backward(chain, x, check)
    once = [p.grad.clone() for p in chain.parameters()]
    backward(chain, x, check)
    for p, g in zip(chain.parameters(), once, strict=True):
        assert torch.equal(p.grad, g + g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.composes("Autograd", "retain_graph and a second backward")
def test_retain_graph_gives_the_same_gradient_again(make, check, kind):
    chain, x = make.chain(kind, 5), make.streams()
    loss = check.loss(chain(*x))
    wanted = (*x, *chain.parameters())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    third = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [(False, False), (True, False), (False, True)])
@pytest.mark.composes("Autograd", "inputs without gradient")
def test_inputs_without_gradient(make, check, kind, which):
    chain = make.chain(kind, 4, arithmetic="exact")
    x = tuple(t.requires_grad_(w) for t, w in zip(make.streams(requires_grad=False), which, strict=True))
    found = check.gradients(chain, x, "reversible")
    check.same(found, check.gradients(chain, x, "stored"))
    assert (found["gradient of input 0"] is None) == (not which[0])


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.composes("Autograd", "half of the output unused")
def test_only_part_of_the_outputs_used(make, used, depth):
    chain = make.chain("mixed", depth, arithmetic="exact")
    x = make.streams()
    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        y = chain(*x)[used]
        found[mode] = torch.autograd.grad(y.square().sum(), (*x, *chain.parameters()), allow_unused=True)
    for a, b in zip(found["reversible"], found["stored"], strict=True):
        zero = torch.zeros(1)
        assert torch.equal(zero if a is None else a, zero if b is None else b) or not (a if b is None else b).any()


def test_stream_that_nothing_touches_is_no_alias_of_the_input(make):
    x = make.streams()
    chain = ReversibleSequential(make.coupling("additive"))
    y = chain(*x)
    assert torch.equal(y[0], x[0])
    assert y[0].data_ptr() != x[0].data_ptr()
    (grad,) = torch.autograd.grad(y[0].sum() + y[1].sum() * 0, x[:1])
    assert torch.equal(grad, torch.ones(3, 4))


def test_state_that_is_also_a_stream(make):
    """A transform may hand on the very tensor that it was given."""

    class Pass(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, state):
            return torch.tanh(self.linear(x) + state[0]), (x,)

    chain = ReversibleSequential(make.coupling("additive", 4, 1), AdditiveCoupling(Pass(), stateful=True))
    chain.arithmetic = "exact"
    x, h = make.streams(), torch.randn(3, 4, requires_grad=True)
    found = {}
    for mode in ("stored", "reversible"):
        chain.mode = mode
        y, state = chain(*x, states=ChainState(((), (h,))))
        loss = (1.5 * y[0]).sum() + y[1].square().sum() + (3 * state.layers[1][0]).square().sum()
        found[mode] = torch.autograd.grad(loss, (*x, h, *chain.parameters()))
    assert all(map(torch.equal, found["stored"], found["reversible"]))


@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.parametrize("carries", [0, 1])
def test_gradients_of_conditioning_states(make, check, kind, carries):
    chain = make.recurrent(kind, 4, states=2, carries=carries, arithmetic="exact")
    x, state = make.streams(), make.state(chain, requires_grad=True)
    found = {}
    for mode in ("stored", "checkpoint", "reversible"):
        chain.mode = mode
        y, new = chain(*x, states=state)
        assert len(new.carry) == carries
        loss = check.loss(y) + check.loss(tuple(new.tensors()))
        found[mode] = [*y, *new.tensors(), *torch.autograd.grad(loss, (*x, *state.tensors(), *chain.parameters()))]
    for mode in ("checkpoint", "reversible"):
        assert all(map(torch.equal, found[mode], found["stored"]))


def test_carry_goes_from_layer_to_layer():
    """Each layer multiplies the carry by its own factor: the carry sees the product."""

    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x, state):
            own, carry = state
            return x, (own + carry, carry * self.factor)

    chain = ReversibleSequential(
        *(AdditiveCoupling(Times(f), i % 2, 1 - i % 2, stateful=True, carries=1) for i, f in enumerate((2, 3, 5)))
    )
    one, zero = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1)
    _, new = chain(zero, zero, states=ChainState(((zero,),) * 3, (one,)))
    assert new.carry[0].item() == 30
    assert [own[0].item() for own in new.layers] == [1, 2, 6]
    (grad,) = torch.autograd.grad(new.carry[0] + 100 * new.layers[2][0], one)
    assert grad.item() == 30 + 600


@pytest.mark.composes("Structure", "parameters with attributes, and of classes of their own")
def test_attributes_and_classes_of_parameters_are_seen_and_shared():
    class Mine(nn.Parameter):
        pass

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))
            self.weight.scale = 0.5
            self.other = Mine(torch.eye(4))

        def forward(self, x):
            self.weight.seen = True
            return self.weight.scale * x @ self.weight + (x @ self.other if isinstance(self.other, Mine) else 0)

    found = []
    for mode in ("stored", "reversible"):
        torch.manual_seed(0)
        x = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
        chain = ReversibleSequential(AdditiveCoupling(Reading()), mode=mode)
        chain(*x)[1].square().sum().backward()
        found.append([p.grad for p in chain.parameters()] + [x[0].grad])
        assert chain.layers[0].transform.weight.seen
    for stored, reversible in zip(*found, strict=True):
        torch.testing.assert_close(reversible, stored)


@pytest.mark.parametrize("container", [list, dict], ids=["list", "dict"])
def test_a_tensor_put_into_conditioning_raises(container):
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, cache):
            y = self.inner(x)
            if isinstance(cache, dict):
                cache["loss"] = y.mean()
            else:
                cache.append(y.mean())
            return y

    x = [torch.ones(3, 4) for _ in range(2)]
    with pytest.raises(StreamError, match="a transform has put a tensor into a list or dictionary"):
        ReversibleSequential(AdditiveCoupling(Caching()))(*x, cache=container())
