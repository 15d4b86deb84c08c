"""How much tensor memory a piece of code holds, counted from live storages: on any device, and under fake tensors."""

import weakref
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are made inside the context and still alive.

    Views share their storage and count once. Storages that existed before are not counted. Scratch memory inside an
    operator (a convolution's reordered weights) is not seen. Under autograd the backward pass is counted too, if it
    is called inside the context.

    Attributes:
        live: Bytes alive now.
        peak: Largest value of `live` so far; `reset_peak` starts over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> Self:
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "is_view", False):
            # Of a real tensor under fake tensors, the view would seem to have a storage of its own.
            return func(*args, **(kwargs or {}))
        before = {storage._cdata for x in _tensors((args, kwargs)) for storage in storages_of(x)}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            for storage in storages_of(x):
                self._count(storage, before)
        return out

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in before:
            return
        self._sizes[key] = storage.nbytes()
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self._storages.pop(key, None)
        self.live -= self._sizes.pop(key, 0)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live


def storages_of(x: torch.Tensor) -> list[torch.UntypedStorage]:
    """What holds a tensor's values: of a sparse one, its values and its indices."""
    if x.layout is torch.strided:
        return [x.untyped_storage()]
    return [part.untyped_storage() for part in _parts(x)]


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a sparse one consists of."""
    if x.layout is torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return []  # laid out by a library (oneDNN), which does not tell


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator."""
    # Every operator passes here: a general tree takes several times as long.
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for item in value if item is not None for x in _tensors(item)]
    return [x for item in value.values() for x in _tensors(item)] if isinstance(value, dict) else []
