"""Hooks and what works on gradients. Hooks of parameters are in tests/revgrad/test_function.py."""

import copy

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.composes(
    "Hooks", "forward hooks of a transform", "fire twice: once more in backward, as the transform runs again"
)
def test_forward_hooks_of_a_transform_fire_in_the_recomputation_too(small, make, check):
    chain, fired = small.chain(), []
    chain[1].transform.register_forward_pre_hook(lambda module, args: fired.append("before"))
    chain[1].transform.register_forward_hook(lambda module, args, output: fired.append("after"))
    for mode, again in (("stored", 0), ("reversible", 1)):
        chain.mode = mode
        fired.clear()
        y = chain(*make.streams())
        assert fired == ["before", "after"]
        check.loss(y).backward()
        assert fired == ["before", "after"] * (1 + again)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Hooks", "a forward hook that changes the message, a pre-hook that changes the source")
def test_forward_hooks_may_change_what_passes(small, make, as_stored, mode):
    chain = small.chain()
    chain[1].transform.register_forward_hook(lambda module, args, output: 2 * output)
    chain[2].transform.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    as_stored(chain, make.streams(), mode)


@pytest.mark.composes("Hooks", "full backward hooks of a transform", "fire once, with the gradients of stored mode")
def test_backward_hooks_of_a_transform(small, make, check):
    chain, x = small.chain().double(), make.streams(dtype=torch.float64)
    seen = {}
    for mode in ("stored", "reversible"):
        model = copy.deepcopy(chain)
        model.mode, seen[mode] = mode, []
        model[1].transform.register_full_backward_hook(
            lambda m, inputs, outputs, to=seen[mode]: to.append(inputs + outputs)
        )
        check.loss(model(*x)).backward()
        assert len(seen[mode]) == 1
    for a, b in zip(seen["reversible"][0], seen["stored"][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.composes("Hooks", "hooks of the sequence", "fire once")
def test_hooks_of_the_sequence(small, make, check):
    chain, x = small.chain().double(), make.streams(dtype=torch.float64)
    found = {}
    for mode in ("stored", "reversible"):
        model, fired = copy.deepcopy(chain), []
        model.mode = mode
        model.register_forward_hook(lambda module, args, output, fired=fired: fired.append("forward"))
        model.register_full_backward_hook(lambda module, inputs, outputs, fired=fired: fired.extend(inputs))
        check.loss(model(*x)).backward()
        found[mode] = dict(enumerate(fired[1:]))
        assert fired[0] == "forward"
        assert len(found[mode]) == 2
    check.same(found["reversible"], found["stored"], rtol=1e-9)


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
@pytest.mark.composes("Hooks", "hooks of a coupling", "never fire, in no mode: the sequence calls its transform")
def test_hooks_of_a_coupling_do_not_fire(small, make, check, mode):
    chain = small.chain(mode=mode)
    chain[0].register_forward_hook(lambda *args: pytest.fail("fired"))
    check.loss(chain(*make.streams())).backward()


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
@pytest.mark.composes("Hooks", "clipping, after gradients of two passes have been added up")
def test_clipping(small, make, check, clip):
    chain, batches = small.chain().double(), [make.streams(dtype=torch.float64) for _ in range(2)]
    found = {}
    for mode in ("stored", "reversible"):
        model = copy.deepcopy(chain)
        model.mode = mode
        for x in batches:
            check.loss(model(*x)).backward()
        before = [p.grad.clone() for p in model.parameters()]
        clip(model.parameters(), 0.5)
        assert not all(map(torch.equal, before, (p.grad for p in model.parameters())))
        found[mode] = {name: p.grad for name, p in model.named_parameters()}
    check.same(found["reversible"], found["stored"], rtol=1e-9)


@pytest.mark.composes("Hooks", "a GradScaler's scaled loss")
def test_scaled_loss(small, make, check):
    chain, x = small.chain().double(), make.streams(dtype=torch.float64)
    found = {}
    for mode in ("stored", "reversible"):
        model = copy.deepcopy(chain)
        model.mode = mode
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler.scale(check.loss(model(*x))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        found[mode] = dict(model.named_parameters())
    check.same(found["reversible"], found["stored"], rtol=1e-9)
