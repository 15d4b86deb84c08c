"""The mode of all chains inside a model at once."""

from torch import nn

from revgrad.errors import StreamError
from revgrad.links import Mode, check_mode
from revgrad.sequential import ReversibleSequential


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Set the mode of every chain inside a model, such as `stored` to compare with.

    Args:
        model: Any module.
        mode: As in `ReversibleSequential`.

    Raises:
        StreamError: There is no such mode, or no chain inside.
    """
    check_mode(mode)
    chains = [m for m in model.modules() if isinstance(m, ReversibleSequential)]
    if not chains:
        raise StreamError(f"set_mode: there is no chain inside the {type(model).__name__}")
    for chain in chains:
        chain.mode = mode
