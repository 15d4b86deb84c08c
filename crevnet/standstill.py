"""Notices that training has come to a standstill: gradients have vanished while there is still a loss."""

import warnings

VANISHED = 1e-4
"""A gradient counts as vanished whose norm is below this part of the loss."""
PATIENCE = 50
"""Steps in a row until it is said."""


class Standstill:
    """Warns, once, of a gradient that stays vanished.

    A predictor that is shown slow films at too high a learning rate learns within a few steps to close its gates, which
    copies the last frame. Closed gates let no gradient through, and the loss looks fine.
    """

    def __init__(self) -> None:
        self._steps = 0

    def see(self, step: int, loss: float, norm: float) -> None:
        """Take notice of a step.

        Args:
            step: Its number.
            loss: Its loss.
            norm: Norm of the whole gradient, before it is clipped.

        Warns:
            RuntimeWarning: The gradient has been vanished for `PATIENCE` steps.
        """
        self._steps = self._steps + 1 if norm < VANISHED * loss else 0
        if self._steps == PATIENCE:
            warnings.warn(
                f"step {step}: gradients have vanished ({norm:.1g}, beside a loss of {loss:.2g}) for {PATIENCE} steps, "
                "so nothing is learnt any more: gates have closed, which copies the last frame, or something has "
                "saturated. Start anew with a lower optimiser.learning_rate and more optimiser.warmup_steps, or "
                "CrevNet with model.attention_norm group",
                RuntimeWarning,
                stacklevel=2,
            )
