"""FSDP2: weights, gradients and Adam's moments in parts, one on each process.

A model is sharded as one: its weights are gathered when it is called, and kept until its backward pass is over. A
reversible chain uses the weights of its layers without calling each layer, and at every time step again.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from crevnet.video_model import VideoModel


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """Among so many processes, all of the run."""
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


@contextmanager
def views_are_fine(model: nn.Module) -> Iterator[None]:
    """Where FSDP does not warn of an output that is a view: what follows does not write into it."""
    with warnings.catch_warnings():
        if isinstance(model, FSDPModule):
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        yield


def whole(tree: Any) -> Any:
    """A tree of tensors with all parts of those that are sharded. All processes have to ask for it."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def own_part(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole_model(model: VideoModel) -> VideoModel:
    """The model, or where it is sharded a copy that is not. All processes have to ask for it.

    A process can call the copy alone, or more often than another.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = whole(model.state_dict())
    with torch.random.fork_rng([]):
        copy = model.config.build()
    copy.load_state_dict(weights)
    return copy.to(next(iter(weights.values())).device).train(model.training)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: _like(own[name], x) if name in own else x for name, x in weights.items()})


def load_moments(optimiser: Any, state: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    """Load the whole state of an optimiser of these parameters, sharded or not."""
    moments = {
        i: {name: _like(parameters[i], x) if x.shape == parameters[i].shape else x for name, x in own.items()}
        for i, own in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": moments})


def _like(template: Tensor, x: Tensor) -> Tensor:
    """A tensor sharded like another one; every process has it, so that none has to send its parts."""
    if not isinstance(template, DTensor):
        return x
    return distribute_tensor(x.to(template.device), template.device_mesh, template.placements, src_data_rank=None)
