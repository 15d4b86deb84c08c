"""What user code is given to read must be the same when it returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from revgrad.errors import StreamError


class Unchanged(AbstractContextManager[None]):
    """Raises if the code inside changes one of these tensors in place.

    Args:
        tensors: The tensors.
        error: What to raise, given the first one that was changed.
    """

    __slots__ = ("_before", "_error")

    def __init__(self, tensors: Sequence[Tensor], error: Callable[[Tensor], StreamError]) -> None:
        # What is compiled has no versions.
        known = () if torch.compiler.is_compiling() else tensors
        self._before = [(x, x._version) for x in known if not x.is_inference()]
        self._error = error

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            for x, version in self._before:
                if x._version != version:
                    raise self._error(x)


@contextmanager
def explained() -> Iterator[None]:
    """Around fetching what a chain has saved: PyTorch finds what was changed in place, and calls an output of the chain
    one of `_Outputs`.
    """
    try:
        yield
    except RuntimeError as error:
        if "_Outputs" in str(error):
            error.add_note(
                "_Outputs is a reversible chain: what runs behind it changes its output in place, such as "
                "ReLU(inplace=True); make that out of place"
            )
        raise
