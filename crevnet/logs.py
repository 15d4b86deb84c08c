"""The logs of a run: one CSV file per kind of entry, and TensorBoard. Both go on where an interrupted run stopped."""

import csv
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from crevnet.files import written_whole


class RunLog:
    """Writes scalars under a step; entries from `first_step` on, left by a run that died after its last checkpoint,
    are dropped.

    Args:
        folder: Folder of the run.
        first_step: The step at which this process starts.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._first_step = first_step
        self._files: dict[str, Any] = {}
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one entry, `train` or `validation` for instance."""
        if kind not in self._files:
            self._files[kind] = self._open(kind, ["step", *values])
        self._files[kind].writerow([step, *(f"{v:.8g}" for v in values.values())])
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def read(self, kind: str, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column."""
        path = self._folder / f"{kind}.csv"
        if not path.exists():
            return [], []
        with path.open(newline="") as f:
            rows = list(csv.DictReader(f))
        return [int(r["step"]) for r in rows], [float(r[column]) for r in rows]

    def close(self) -> None:
        """Flush TensorBoard."""
        self._board.close()

    def _open(self, kind: str, columns: list[str]) -> Any:
        path = self._folder / f"{kind}.csv"
        kept: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as f:
                kept = [
                    row
                    for row in list(csv.reader(f))[1:]
                    if len(row) == len(columns) and int(row[0]) < self._first_step
                ]
        with written_whole(path) as part, part.open("w", newline="") as f:
            csv.writer(f).writerows([columns, *kept])
        # Line-buffered: what was logged survives a killed process.
        return csv.writer(path.open("a", newline="", buffering=1))
