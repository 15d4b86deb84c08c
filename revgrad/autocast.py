"""Autocast, which merges and channelwise maps are computed without: it is for transforms."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Merges compute in the target's own dtype, in the forward pass and in the rewind alike."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
