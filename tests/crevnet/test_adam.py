"""The oracle is PyTorch's Adam, a weight at a time, in double precision."""

import copy

import pytest
import torch

from crevnet.adam import adam
from crevnet.convolution import use_channels_last
from crevnet.model import CrevNetConfig
from revgrad import LiveMemory

BETAS = (0.8, 0.95)
LAYOUTS = ["contiguous", "channels last"]

pytestmark = pytest.mark.usefixtures("single_thread")


def build(layout="channels last", dtype=torch.float32):
    torch.manual_seed(0)
    model = CrevNetConfig(image_size=16, clip=2, blocks=(1,), modules=2).build().to(dtype)
    if layout == "channels last":
        use_channels_last(model)
    return model


def give_gradients(model, step, layout):
    """The same ones, whatever the layout."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        if layout == "channels last" and p.ndim == 5:
            gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        p.grad = gradient


def taught(optimiser, model, steps=range(5), layout="channels last"):
    for step in steps:
        give_gradients(model, step, layout)
        optimiser.step()
    return model


def plain(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2, betas=BETAS, foreach=False)


def fused(model):
    return adam(model.parameters(), 1e-2, BETAS)


def assert_close(found, wanted, tolerance):
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=0, atol=tolerance), name


@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6)])
def test_it_is_adam_in_every_layout_of_weights_and_gradients(weights, gradients, dtype, tolerance):
    """PyTorch's own fused step moves other weights where the layouts differ, which is why they are made the same."""
    wanted, found = build(dtype=torch.float64), build(weights, dtype)
    if dtype is torch.float32:
        wanted.load_state_dict(found.state_dict())
    taught(plain(wanted), wanted)
    taught(fused(found), found, layout=gradients)
    assert_close(found, wanted, tolerance)
    assert not torch.allclose(next(found.parameters()), next(build(dtype=dtype).parameters()), rtol=0, atol=1e-2)


def test_a_weight_without_a_gradient_stays():
    model = build()
    before = copy.deepcopy(model.state_dict())
    first = next(iter(before))
    give_gradients(model, 0, "contiguous")
    next(model.parameters()).grad = None
    fused(model).step()
    same = [name for name, x in model.state_dict().items() if torch.equal(x, before[name])]
    assert same == [first]


@pytest.mark.parametrize("saved", LAYOUTS)
@pytest.mark.parametrize("make", [plain, fused])
def test_it_goes_on_from_the_moments_of_any_adam_in_any_layout(make, saved, tmp_path):
    """As a checkpoint of a run that was not fused, or of one whose weights were sharded, has them."""
    source = build(saved)
    optimiser = make(source)
    taught(optimiser, source)
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    going_on = build()
    going_on.load_state_dict(source.state_dict())
    other = fused(going_on)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.param_groups[0]["fused"]
    taught(optimiser, source, range(5, 8))
    taught(other, going_on, range(5, 8))
    # Which elements are left over when a vector is filled, and rounded otherwise, depends on the layout.
    assert_close(going_on, source, 0 if (make, saved) == (fused, "channels last") else 1e-6)
    counts = {float(state["step"]) for state in other.state.values()}
    assert counts == {8.0}


def test_its_state_can_be_loaded_by_any_adam():
    source = build()
    optimiser = fused(source)
    taught(optimiser, source)
    going_on = copy.deepcopy(source)
    other = plain(going_on)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    other.param_groups[0]["fused"] = None
    taught(optimiser, source, range(5, 8))
    taught(other, going_on, range(5, 8))
    assert_close(going_on, source, 1e-6)


def test_the_options_of_the_configuration_stay_when_moments_are_loaded():
    model = build()
    saved = plain(model)
    taught(saved, model)
    other = adam(model.parameters(), 3e-4, (0.7, 0.9), capturable=True)
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["capturable"]
    assert (other.param_groups[0]["lr"], other.param_groups[0]["betas"]) == (3e-4, (0.7, 0.9))


def test_a_step_makes_no_tensor():
    model = build()
    optimiser = fused(model)
    taught(optimiser, model)
    with LiveMemory() as memory:
        optimiser.step()
    assert memory.peak == 0
