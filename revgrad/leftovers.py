"""What a second evaluation leaves behind: nothing may refer to its graph once it has been differentiated."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from revgrad.attributes import check_attributes
from revgrad.checks import current_checks
from revgrad.errors import ReversibilityError
from revgrad.gradients import Closed, newest_node
from revgrad.modules import modules_of

_KEY = "revgrad"


class _Mark:
    """Lives as long as the node of the graph that it is attached to."""

    __slots__ = ("__weakref__",)


class Leftovers:
    """Notices a graph that outlives its use.

    Args:
        sources: Leaves that an evaluation has read.
        others: States, parameters and conditioning tensors, leaves as well.
        graph: What `check_closed` has returned for it.
        first_node: `newest_node` before the evaluation.
    """

    def __init__(self, sources: Sequence[Tensor], others: Sequence[Tensor], graph: Closed, first_node: int) -> None:
        self._first_node = first_node
        self._may_wait = current_checks().may_wait
        self._aside = newest_node() - first_node != graph.inner
        """Whether something was computed that the outputs do not depend on."""
        if self._may_wait:  # what captures a pass may hold everything in it
            self._of_sources = _marked(sources, graph)
            self._of_others = _marked(others, graph)

    def check(self, name: str, layer: nn.Module) -> None:
        """Raise if the graph is still there.

        Args:
            name: How the error calls the layer.
            layer: Whose modules may have put it into an attribute.

        Raises:
            ReversibilityError: It is.
        """
        if self._may_wait and not self._aside and self._of_sources() is None and self._of_others() is None:
            return
        # Looking through all attributes takes longer than all else here.
        check_attributes(modules_of(layer), self._first_node)
        # What hooks compute from weights alone, before every call, may stay.
        if not self._may_wait or self._of_sources() is None:
            return
        gc.collect()  # a reference cycle is nobody's loss
        if self._of_sources() is not None:
            raise ReversibilityError(
                f"{name}: something still refers to a tensor that its transform has computed, such as a list, a global "
                "variable or what a hook has kept. Transforms are run without a graph, so a loss made of it would give "
                "no gradient: keep x.detach() if it is only looked at; else return it, as part of a state or in a "
                "stream, or choose mode='stored'"
            )


def _marked(leaves: Sequence[Tensor], graph: Closed) -> "weakref.ref[_Mark]":
    """A mark that lives for as long as a graph leads to one of these leaves: so long lives the node that accumulates
    its gradient.
    """
    mark = _Mark()
    for x in leaves:
        if x.requires_grad:
            # What the outputs do not depend on may be read all the same.
            node: Any = graph.leaves.get(id(x)) or get_gradient_edge(x).node
            node.metadata[_KEY] = mark
    return weakref.ref(mark)
