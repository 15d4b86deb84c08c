"""What a second evaluation leaves behind: nothing may refer to its graph once it has been differentiated."""

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from revgrad.deferred import current_checks
from revgrad.errors import ReversibilityError

_KEY = "revgrad"


class _Mark:
    """Lives as long as the node of the graph that it is attached to."""

    __slots__ = ("__weakref__",)


class Leftovers:
    """Notices a graph that outlives its use.

    Args:
        sources: Leaves that an evaluation has read.
        reached: What `check_closed` has returned for it.
    """

    def __init__(self, sources: Sequence[Tensor], reached: Mapping[int, Any]) -> None:
        mark = _Mark()
        self._mark = weakref.ref(mark)
        if not current_checks().waiting:
            return  # what captures a pass may hold everything in it
        # The node that accumulates a leaf's gradient lives for as long as any graph leads to it. Asking for it takes
        # longer than all else here; what the outputs do not depend on may still be read by what was put aside.
        for x in sources:
            if x.requires_grad:
                node = reached.get(id(x)) or get_gradient_edge(x).node
                node.metadata[_KEY] = mark

    def check(self, name: str) -> None:
        """Raise if the graph is still there.

        Raises:
            ReversibilityError: It is.
        """
        if self._mark() is None:
            return
        gc.collect()  # a reference cycle is nobody's loss
        if self._mark() is not None:
            raise ReversibilityError(
                f"{name}: something still refers to a tensor that its transform has computed, such as a list, a global "
                "variable or what a hook has kept. Transforms are run without a graph, so a loss made of it would give "
                "no gradient: keep x.detach() if it is only looked at; else return it, as part of a state or in a "
                "stream, or choose mode='stored'"
            )
