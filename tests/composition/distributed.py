"""One of two processes of test_systems.py: trains in every distributed way and compares with one process.

Usage: python distributed.py RANK STORE OUT; the file OUT receives, by name, the largest error or the exception.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from revgrad import AdditiveCoupling, ReversibleSequential

STEPS = 3


class Transform(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Model(nn.Module):
    """Two chains and a head, and where asked for a layer that is not used."""

    def __init__(self, mode="reversible", unused=False):
        super().__init__()
        torch.manual_seed(0)
        self.chains = nn.ModuleList(
            ReversibleSequential(*(AdditiveCoupling(Transform(), i % 2, 1 - i % 2) for i in range(3)), mode=mode)
            for _ in range(2)
        )
        self.head = nn.Linear(4, 1)
        self.unused = nn.Linear(4, 4) if unused else nn.Identity()

    def forward(self, x):
        streams = x, 2 * x
        for chain in self.chains:
            streams = chain(*streams)
        return self.head(streams[0] + streams[1]).square().mean()


def batch(rank, step):
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model, losses):
    """A few steps on the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses(step).backward()
        optimizer.step()
    return dict(model.named_parameters())


def shard(*choose):
    """Shard what each function chooses of a model, then the model."""

    def wrap(model, mesh):
        for parts in choose:
            for part in parts(model):
                fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrap


WAYS = {
    "DDP": lambda model, mesh: DistributedDataParallel(model),
    "DDP find_unused_parameters": lambda model, mesh: DistributedDataParallel(model, find_unused_parameters=True),
    "DDP static_graph": lambda model, mesh: DistributedDataParallel(model, static_graph=True),
    "DDP gradient_as_bucket_view": lambda model, mesh: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "FSDP2 model": shard(),
    "FSDP2 sequences": shard(lambda model: model.chains),
    "FSDP2 couplings": shard(lambda model: [layer for chain in model.chains for layer in chain]),
    "FSDP2 transforms": shard(lambda model: [layer.transform for chain in model.chains for layer in chain]),
}


def error(name, rank, mesh, expected):
    model = Model(unused="unused" in name).double()
    wrapped = WAYS[name](model, mesh)
    found = train(wrapped, lambda step: wrapped(batch(rank, step)))
    full = {k.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p for k, p in found.items()}
    return max(float((full[k] - p).detach().abs().max()) for k, p in expected.items())


def main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    alone = Model("stored").double()
    expected = train(alone, lambda step: (alone(batch(0, step)) + alone(batch(1, step))) / 2)
    results = {}
    for name in WAYS:
        try:
            results[name] = error(name, int(rank), mesh, expected)
        except RuntimeError as e:
            results[name] = str(e)
    if rank == "0":
        with open(out, "w") as file:
            json.dump(results, file)
    dist.barrier()  # whoever leaves after the other has may abort in the group's threads
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
