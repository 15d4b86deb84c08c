"""Offloading: what a run keeps for its backward pass waits in host memory.

States and anchors leave the device when they have been noted, and come back one time step (or anchor) ahead of their
use. On CUDA both copies run on a stream of their own, beside the computation.

Copied are whole storages, as bytes: views come back with their strides and alignment, so that what is computed from
them rounds as before, and tensors that share memory share one copy.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from revgrad.errors import ReversibilityError


class Transfer(Protocol):
    """Moves flat tensors of bytes between a device and the host."""

    def out(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor to the host; returns a handle of the copy, which holds the tensor until settled."""

    def settle(self, handle: Any) -> None:
        """Let go of the tensor on the device once its copy is complete."""

    def prefetch(self, handle: Any) -> Any:
        """Begin to copy back to the device; returns what `back` takes. A handle may be fetched any number of times."""

    def back(self, coming: Any) -> Tensor:
        """The tensor on the device, in a storage of its own."""


class Keeper:
    """Keeps tensors from the forward to the backward pass where they are: nothing is offloaded."""

    def out(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take tensors; what is returned stands for them until they are wanted."""
        return tuple(tensors)

    def settle(self) -> None:
        """Let go of all that has been copied out."""

    def prefetch(self, kept: Iterable[Any]) -> None:
        """Say what will be wanted next."""

    def back(self, kept: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors that were taken."""
        return tuple(kept)

    def anew(self) -> "Keeper":
        """For one backward pass, of which there may be several."""
        return self


class Offloaded(Keeper):
    """Takes the tensors of one device to the host.

    Args:
        transfer: Moves them.
        device: Tensors elsewhere stay where they are, and so do parameters and subclasses of tensors.
        theirs: Tensors that stay on the device in any case, and so does what shares their memory.
    """

    def __init__(self, transfer: Transfer, device: torch.device, theirs: Iterable[Tensor] = ()) -> None:
        self._transfer = transfer
        self._device = device
        self._theirs = {StorageWeakRef(x.untyped_storage()) for x in theirs if _is_plain(x.data)}
        self._copies: dict[tuple[StorageWeakRef, int], _Copy] = {}
        self._leaving: list[_Copy] = []

    def out(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Begin to copy tensors to the host, each storage once. Tensors that stay are returned as they are."""
        # What stands for a tensor goes where the tensor would, as in a packed tape.
        return tuple(cast(Tensor, self._stowed(x)) if self._leaves(x) else x for x in tensors)

    def _leaves(self, x: Any) -> bool:
        return _is_plain(x) and x.device == self._device and StorageWeakRef(x.untyped_storage()) not in self._theirs

    def _stowed(self, x: Tensor) -> "Stowed":
        storage = x.untyped_storage()
        key = (StorageWeakRef(storage), x._version)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _Copy(self._transfer.out(_bytes_of(storage, x.device)))
            self._leaving.append(copy)
        return Stowed(copy, x.dtype, int(x.storage_offset()), x.size(), x.stride(), weakref.ref(x), x._version)

    def settle(self) -> None:
        """Free on the device what has been copied out, unless somebody else holds it."""
        for copy in self._leaving:
            self._transfer.settle(copy.handle)
        self._leaving.clear()

    def anew(self) -> Keeper:
        """Copies come back, and nothing more goes."""
        return Returning(self._transfer)


class Returning(Keeper):
    """Brings back to the device what was offloaded; what a backward pass itself keeps stays there.

    Args:
        transfer: The one that took it out.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._coming: dict[_Copy, Any] = {}

    def prefetch(self, kept: Iterable[Any]) -> None:
        """Begin to copy back what is not on its way yet."""
        for x in kept:
            if isinstance(x, Stowed) and x.copy not in self._coming:
                self._coming[x.copy] = self._transfer.prefetch(x.copy.handle)

    def back(self, kept: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors on the device; those that shared memory share it again."""
        self.prefetch(kept)
        # Each copy is taken once: what is on the device is then held by the tensors alone.
        copies = {x.copy: None for x in kept if isinstance(x, Stowed)}
        flat = {copy: self._transfer.back(self._coming.pop(copy)) for copy in copies}
        return tuple(x.on(flat[x.copy]) if isinstance(x, Stowed) else x for x in kept)

    def anew(self) -> Keeper:
        """Nothing on its way."""
        return Returning(self._transfer)


@dataclass(eq=False)
class _Copy:
    """A storage that has been copied to the host."""

    handle: Any


@dataclass(frozen=True, eq=False)
class Stowed:
    """Stands for a tensor whose storage is on the host."""

    copy: _Copy
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    source: weakref.ref[Tensor]
    version: int

    def on(self, flat: Tensor) -> Tensor:
        """The tensor, in the storage of its bytes."""
        x = torch.empty(0, dtype=self.dtype, device=flat.device)
        return x.set_(flat.untyped_storage(), self.offset, self.size, self.stride)

    def check(self) -> None:
        """Raise if the tensor has been changed in place, as autograd does for what it has saved.

        Raises:
            ReversibilityError: Gives shape and versions.
        """
        source = self.source()
        if source is not None and source._version != self.version:
            raise ReversibilityError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"state or stream of shape {tuple(self.size)} that offload=True has copied to the host is at version "
                f"{source._version}; expected version {self.version} instead. Change it after the backward pass, or "
                "out of place"
            )


def keeper_for(offload: bool, device: torch.device, theirs: Iterable[Tensor]) -> Keeper:
    """What keeps the tensors of a run; `theirs` are kept in any case, or by somebody else."""
    transfer = transfer_to_host(device) if offload else None
    return Keeper() if transfer is None else Offloaded(transfer, device, theirs)


def transfer_to_host(device: torch.device) -> Transfer | None:
    """The way from a device to the host; None where there is none to go."""
    return CudaTransfer(device) if device.type == "cuda" else None


def _is_plain(x: Any) -> bool:
    """Whether a tensor is its storage, offset, size and strides."""
    return type(x) is Tensor and x.layout is torch.strided and not (x.is_conj() or x.is_neg() or x.is_quantized)


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class CudaTransfer:
    """Copies to and from pinned host memory, on one stream per device beside the stream of the computation.

    All memory on the device is the computation's stream's, and is freed when that stream has been told to wait for the
    copy. So what is allocated when does not depend on how far the host runs ahead, as it would with `record_stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side_stream(device)

    def out(self, tensor: Tensor) -> "_Pinned":
        """Begin to copy to the host what the computation has made so far."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return _Pinned(host, self._fly(host, tensor, tensor))

    def settle(self, handle: "_Pinned") -> None:
        """Have the computation wait for the copy."""
        handle.leaving = None

    def prefetch(self, handle: "_Pinned") -> "_Flight":
        """Begin to copy to the device."""
        tensor = torch.empty_like(handle.host, device=self._device)
        return self._fly(tensor, handle.host, tensor)

    def back(self, coming: "_Flight") -> Tensor:
        """Have the computation wait for the copy, and give away its result."""
        coming.land()
        return coming.tensor

    def _fly(self, target: Tensor, source: Tensor, tensor: Tensor) -> "_Flight":
        compute = torch.cuda.current_stream(self._device)
        self._side.wait_stream(compute)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        return _Flight(tensor, compute, self._side.record_event())


@dataclass
class _Pinned:
    """A copy on the host, and the flight that makes it."""

    host: Tensor
    leaving: "_Flight | None"


@dataclass
class _Flight:
    """A copy under way on the side stream. Its tensor on the device is never freed before the copy has ended."""

    tensor: Tensor
    compute: torch.cuda.Stream
    end: torch.cuda.Event

    def land(self) -> None:
        """What the computation does from now on comes after the copy."""
        self.compute.wait_event(self.end)

    def __del__(self) -> None:
        self.land()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
