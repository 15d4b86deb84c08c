"""The logs of a run: one CSV file per kind of entry, and TensorBoard. Both go on where an interrupted run stopped."""

import csv
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from crevnet.files import naming, written_whole


class RunLog(AbstractContextManager["RunLog"]):
    """Writes scalars under a step; entries from `first_step` on, left by a run that died after its last checkpoint,
    are dropped.

    Args:
        folder: Folder of the run.
        first_step: The step at which this process starts.

    Raises:
        ValueError: The log of training or of validation is damaged; names the line. It is found here, and not when
            steps have been taken.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._first_step = first_step
        self._files: dict[str, TextIO] = {}
        for kind in ("train", "validation"):
            _entries(folder / f"{kind}.csv")
        self._board_folder = folder / "tensorboard"
        with naming(self._board_folder):
            self._board = SummaryWriter(str(self._board_folder), purge_step=first_step)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one entry, `train` or `validation` for instance.

        Raises:
            OSError: Say that the disk is full; names the log.
        """
        if kind not in self._files:
            self._files[kind] = self._open(kind, ["step", *values])
        with naming(self._path(kind)):
            csv.writer(self._files[kind]).writerow([step, *(f"{v:.8g}" for v in values.values())])
        with naming(self._board_folder):
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush TensorBoard, and close the files.

        Raises:
            OSError: Say that the disk is full; names the log.
        """
        with naming(self._board_folder):
            self._board.close()
        for kind, file in self._files.items():
            with naming(self._path(kind)):
                file.close()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # What has ended the run says more than that its logs cannot be closed.
        with suppress(*() if kind is None else (OSError,)):
            self.close()

    def _path(self, kind: str) -> Path:
        return self._folder / f"{kind}.csv"

    def _open(self, kind: str, columns: list[str]) -> TextIO:
        path = self._path(kind)
        kept = [row for row in _entries(path, columns)[1] if int(row[0]) < self._first_step]
        with written_whole(path) as part, part.open("w", newline="") as f:
            csv.writer(f).writerows([columns, *kept])
        # Line-buffered: what was logged survives a killed process.
        return path.open("a", newline="", buffering=1)


def read_column(path: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column of a log; none where there is no file.

    Args:
        path: `train.csv` or `validation.csv` in the folder of a run.
        column: Its name.

    Raises:
        ValueError: The file is damaged; names the line.
    """
    columns, rows = _entries(path)
    if not rows:
        return [], []
    if column not in columns:
        raise ValueError(f"{path}, line 1: names no column {column}; mend this line, or delete the file")
    at = columns.index(column)
    return [int(row[0]) for row in rows], [float(row[at]) for row in rows]


def _entries(path: Path, columns: list[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a log; none where there is no file.

    Args:
        path: The file.
        columns: What they have to be; None for what the file says. A row of another length, which a process that died
            has begun, is left out.

    Raises:
        ValueError: A row holds something else than numbers; names the line.
    """
    if not path.exists():
        return [], []
    with path.open(newline="", errors="replace") as f:
        header, *rows = list(csv.reader(f)) or [[]]
    columns = columns or header
    numbered = [(line, row) for line, row in enumerate(rows, start=2) if len(row) == len(columns)]
    for line, row in numbered:
        _check_numbers(path, line, row)
    return columns, [row for _, row in numbered]


def _check_numbers(path: Path, line: int, row: list[str]) -> None:
    try:
        int(row[0])
        for value in row[1:]:
            float(value)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {line}: {error}; delete this line, or the file to begin the log anew"
        ) from error
