"""The processes of a run: device, precision and process group."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from crevnet.config import TrainConfig
from crevnet.run import select_device
from crevnet.sharding import sharded_strategy

_T = TypeVar("_T")


class Autocast(MixedPrecision):
    """Mixed precision whose inputs stay in float32, as the exact streams that are made of them must be.

    Weights are rounded each time they are used. Were the first copy kept, stored training would add up the gradients
    of all time steps in bfloat16, and so be less accurate than reversible training, which makes the copies anew.
    """

    def forward_context(self) -> AbstractContextManager:
        """Around the forward pass."""
        return torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=False)

    def convert_input(self, data: Any) -> Any:
        """The data as they are."""
        return data


def launch(config: TrainConfig) -> Fabric:
    """Device, precision and process group as configured, and as torchrun says.

    Raises:
        ValueError: The batch cannot be divided among the processes; the device is of another kind, has a number, or is
            not there; one process is to be sharded.
    """
    world, processes = int(os.environ.get("WORLD_SIZE", "1")), local_processes()
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {world} processes")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = _kind_of_device(config.run.device)
    strategy: Any = "ddp" if "WORLD_SIZE" in os.environ else "auto"
    if config.run.strategy == "fsdp":
        if world == 1:
            raise ValueError("run.strategy fsdp shards a model among processes: start several with torchrun")
        strategy = sharded_strategy(world)
    fabric = Fabric(
        accelerator=device,
        devices=processes,
        num_nodes=world // processes,
        strategy=strategy,
        plugins=Autocast("bf16-mixed", device) if config.run.precision == "bf16-mixed" else None,
    )
    fabric.launch()
    return fabric


def from_first(fabric: Fabric, function: Callable[[], _T]) -> _T:
    """What a function returns in the first process of a run, in all of them; where it raises, it does in all.

    Were it to raise in one alone, the others would wait for that one, and hide its message behind theirs.

    Args:
        fabric: Launched.
        function: Its result and its error have to be ones that pickle knows.
    """
    result: _T | None = None
    error: Exception | None = None
    if fabric.global_rank == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _kind_of_device(name: str) -> str:
    """`cpu` or `cuda`; which of several CUDA devices a process takes is Fabric's choice, by the process's number."""
    device = select_device(name)
    if device.index is not None:
        raise ValueError(
            f"run.device {name!r} has a number, which processes of a run choose by themselves; for one certain device "
            "set run.device cuda and CUDA_VISIBLE_DEVICES"
        )
    return device.type


def local_processes() -> int:
    """How many processes of the run this machine has, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
