"""Errors that the engine raises instead of returning a wrong gradient."""


class ReversibilityError(RuntimeError):
    """The recomputed activations are not those of the forward pass, so a gradient would be wrong."""


class ResidueOverflow(ReversibilityError):  # noqa: N818
    """Gated merges have forgotten more than there is room for, where checks are deferred. Measuring anew helps."""


class StreamError(ValueError):
    """A stream, message or state has the wrong number, shape or type."""
