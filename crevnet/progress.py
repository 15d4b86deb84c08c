"""What is told of a run while it trains: its logs, a progress bar, and a warning where it learns nothing."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crevnet.config import TrainConfig
from crevnet.logs import RunLog
from crevnet.standstill import Standstill


class Progress(AbstractContextManager["Progress"]):
    """Of the process that tells.

    Args:
        config: The run.
        folder: Folder of the run.
        step: How many steps have been taken.

    Raises:
        ValueError: A log is damaged; names the line.
    """

    def __init__(self, config: TrainConfig, folder: Path, step: int) -> None:
        self._config = config
        self._step = step
        self._log = RunLog(folder, step + 1)
        self._standstill = Standstill()
        self._figures: dict[str, str] = {}

    def __enter__(self) -> "Progress":
        self._bar = tqdm(total=self._config.steps, initial=self._step, desc="train", file=sys.stderr)
        return self

    def step(self, step: int, *, loss: float, norm: float, learning_rate: float, seconds: float, peak: int) -> None:
        """Tell of a training step.

        Args:
            step: Its number.
            loss: Its loss.
            norm: Norm of the whole gradient, before it is clipped.
            learning_rate: That it was taken with.
            seconds: That it took.
            peak: Most bytes of activations alive in a step.

        Raises:
            OSError: Say that the disk is full; names the log.
        """
        config, rate = self._config, self._config.batch_size / seconds
        self._figures |= {
            "loss": f"loss {loss:.5f}",
            "rate": f"{rate:.1f} sequences/s",
            "peak": f"peak activations {peak / 1e6:.1f} MB",
        }
        self._bar.update(1)
        self._bar.set_postfix_str(", ".join(self._figures.values()), refresh=False)
        if step % config.run.log_every == 0 or step == config.steps:
            values = {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate, "sequences_per_second": rate}
            self._log.write("train", step, values)
        self._standstill.see(step, loss, norm)

    def validated(self, step: int, result: dict[str, Any]) -> None:
        """Tell of a validation: metrics by name.

        Raises:
            OSError: Say that the disk is full; names the log.
        """
        self._log.write("validation", step, {k: result[k] for k in ("mse", "ssim", "psnr")})
        self._figures["validation"] = f"validation MSE {result['mse']:.2f}"
        self._bar.set_postfix_str(", ".join(self._figures.values()))

    def __exit__(self, *error: Any) -> None:
        try:
            self._log.__exit__(*error)
        finally:
            self._bar.close()
