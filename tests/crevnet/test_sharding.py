"""With a process group of one process, which shards into one part; see `test_train.py` for two."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from crevnet.adam import adam
from crevnet.model import CrevNetConfig
from crevnet.sharding import load_moments, load_weights, own_part, whole, whole_model


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build(seed=0):
    torch.manual_seed(seed)
    return CrevNetConfig(image_size=16, clip=2, blocks=(1,), modules=2, norm="batch").build()


def optimiser_of(model):
    return adam(model.parameters(), 1e-2, (0.9, 0.999))


def one_step(model):
    optimiser = optimiser_of(model)
    model.loss(torch.rand(2, 3, 1, 2, 16, 16, generator=torch.Generator().manual_seed(1))).backward()
    optimiser.step()
    return optimiser


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert not any(isinstance(x, DTensor) for x in found.values())


@pytest.fixture
def sharded(mesh):
    """A model and the same one sharded."""
    plain, other = build(), build()
    fully_shard(other, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in other.parameters())
    return plain, other


def test_sharded_weights_are_assembled(sharded):
    plain, other = sharded
    assert_equal(whole(other.state_dict()), plain.state_dict())
    assert_equal(whole(plain.state_dict()), plain.state_dict())
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert own_part(p) is p
        assert torch.equal(own_part(q), p)
        assert not isinstance(own_part(q), DTensor)


def test_a_copy_that_is_whole_predicts_the_same(sharded):
    plain, other = sharded
    one_step(plain), one_step(other)
    copy = whole_model(other.eval())
    assert not copy.training
    assert_equal(copy.state_dict(), plain.state_dict())
    frames = torch.rand(1, 3, 1, 16, 16)
    assert torch.equal(copy.predict(frames, 2), plain.eval().predict(frames, 2))


def test_a_copy_leaves_the_random_state_alone(sharded):
    before = torch.get_rng_state()
    whole_model(sharded[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_is_whole_is_not_copied():
    model = build()
    assert whole_model(model) is model


@pytest.mark.parametrize("to_sharded", [True, False])
def test_whole_checkpoints_go_into_any_model(to_sharded, sharded):
    source, target = sharded if to_sharded else reversed(sharded)
    optimiser = one_step(source)
    weights, state = whole(source.state_dict()), whole(optimiser.state_dict())
    other = optimiser_of(target)
    load_weights(target, weights)
    load_moments(other, state, list(target.parameters()))
    assert_equal(whole(target.state_dict()), weights)
    found = whole(other.state_dict())
    assert found["param_groups"] == state["param_groups"]
    for i, moments in state["state"].items():
        assert_equal(found["state"][i], moments)
    assert {type(p) for p in target.parameters()} == {
        type(m["exp_avg"]) for m in other.state.values()
    } or not to_sharded


def test_weights_of_another_model_are_refused(sharded):
    for model in sharded:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            load_weights(model, whole(model.state_dict()) | {"other": torch.zeros(1)})
