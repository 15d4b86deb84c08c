"""The model computes the same with kernels as without, whichever of its operators have one."""

import copy
from contextlib import contextmanager

import pytest
import torch
from revgrad_kernels import backend
from torch import nn
from torch.nn.utils import prune

from crevnet.cells import CELLS
from crevnet.convolution import convolution, convolve
from crevnet.model import CrevNetConfig
from tests.kernels.cases import DEVICE, needs_triton

pytestmark = needs_triton

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """cuDNN rounds what it multiplies to TF32 otherwise, up or down by the last bits that kernels may differ in."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def computed_by(monkeypatch, name):
    """What `auto` means."""
    with monkeypatch.context() as patch:
        patch.setattr(backend, "AUTO", name)
        yield


def tiny_model(cell, dtype, arithmetic="exact", mode="reversible", stacking="depth"):
    config = CrevNetConfig(
        image_size=8, clip=2, blocks=(1, 1), modules=2, cell=cell, arithmetic=arithmetic, mode=mode, stacking=stacking
    )
    model = config.build()
    for name, p in model.named_parameters():
        if name.endswith(("peephole", "bias")):
            nn.init.normal_(p, std=0.3)
    return model.to(DEVICE, dtype)


def gradients(model, clips):
    model = copy.deepcopy(model)
    loss = model.loss(clips)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_close(found, expected, dtype):
    for name, wanted in expected.items():
        error, size = float((found[name] - wanted).abs().max()), float(wanted.abs().max())
        assert error <= TOLERANCES[dtype] * max(size, 1e-3), f"{name}: off by {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("cell", CELLS)
def test_loss_and_gradients_are_the_same_with_kernels_and_without(monkeypatch, cell, arithmetic, dtype):
    torch.manual_seed(0)
    model = tiny_model(cell, dtype, arithmetic)
    clips = torch.rand(2, 4, 1, 2, 8, 8).to(DEVICE, dtype)
    results = {}
    for name in ("triton", "reference"):
        with computed_by(monkeypatch, name):
            results[name] = gradients(model, clips)
    assert_close(results["triton"], results["reference"], dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_reversible_training_is_that_of_stored_activations_also_with_kernels(monkeypatch, cell):
    torch.manual_seed(0)
    model = tiny_model(cell, torch.float64)
    stored = tiny_model(cell, torch.float64, mode="stored")
    stored.load_state_dict(model.state_dict())
    clips = torch.rand(1, 3, 1, 2, 8, 8).to(DEVICE, torch.float64)
    with computed_by(monkeypatch, "triton"):
        assert_close(gradients(model, clips), gradients(stored, clips), torch.float64)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_keep_the_layout_and_dtype_of_their_states(monkeypatch, cell, channels_last):
    module = CELLS[cell](3, (4, 5)).to(DEVICE)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 4, 5, device=DEVICE).contiguous(memory_format=layout)
    state = (x,) * (module.states + module.carries)
    for name in ("triton", "reference"):
        with computed_by(monkeypatch, name), torch.autocast(DEVICE, torch.bfloat16):
            hidden, new = module(x, state)
        assert hidden is new[0]
        assert {s.dtype for s in new} == {torch.float32}
        if name == "triton":
            assert all(s.is_contiguous(memory_format=layout) for s in new)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_leaves_its_bias_to_a_kernel(monkeypatch, dimensions, bias):
    layer = convolution(dimensions, 2, 3, bias=bias).to(DEVICE)
    x = torch.randn(2, 2, *(4, 5, 3)[:dimensions]).to(DEVICE)
    with computed_by(monkeypatch, "reference"):
        whole, none = convolve(layer, x)
    assert none is None
    assert torch.equal(whole, layer(x))
    with computed_by(monkeypatch, "triton"):
        output, left = convolve(layer, x)
    assert left is layer.bias
    if bias:
        output = output + left.view(-1, *(1,) * dimensions)
    torch.testing.assert_close(output, whole)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "parametrisation", "old"])
def test_what_else_a_convolution_does_when_it_is_called_is_done(monkeypatch, register):
    layer = convolution(2, 2, 3).to(DEVICE)
    x = torch.randn(2, 2, 4, 5).to(DEVICE)
    if register == "parametrisation":
        nn.utils.parametrizations.weight_norm(layer)
    elif register == "old":
        prune.random_unstructured(layer, "weight", 0.5)
        with torch.no_grad():
            layer.weight_orig.mul_(2)
    else:
        getattr(layer, register)(lambda module, inputs, *output: 2 * (output or inputs)[0])
    with computed_by(monkeypatch, "triton"):
        output, left = convolve(layer, x)
    assert left is None
    assert torch.equal(output, layer(x))


def test_a_backward_hook_of_a_convolution_is_called(monkeypatch):
    layer, seen = convolution(2, 2, 3).to(DEVICE), []
    layer.register_full_backward_hook(lambda *_: seen.append("called"))
    with computed_by(monkeypatch, "triton"):
        convolve(layer, torch.randn(2, 2, 4, 5, requires_grad=True).to(DEVICE))[0].sum().backward()
    assert seen == ["called"]
