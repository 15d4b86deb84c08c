"""Results that are measured piece by piece, by commands of which each may be cut off."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting import RESULTS, Row, environment

_SAME = ("commit", "device")


def joined(
    report: str,
    table: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    configuration: Mapping[str, Any],
    folder: Path = RESULTS,
    where: Row | None = None,
) -> list[Row]:
    """The rows that earlier commands have written and these, which replace what they measure again.

    Earlier rows count if they are of the same commit, device, versions and configuration.

    Args:
        report: Name of the report.
        table: Key of the table.
        rows: What has been measured now.
        columns: Keys that tell what a row is of.
        configuration: Of the report.
        folder: Where it is written.
        where: What `environment` says; by default, of the current CUDA device.

    Raises:
        ValueError: The commit is not known.
    """
    file = folder / f"{report}.json"
    written = json.loads(file.read_text()) if file.exists() else {}
    where = environment("", cuda=True) if where is None else where
    check_commit(where)
    same = written.get("configuration") == json.loads(json.dumps(configuration))
    if not same or any(written[key] != where[key] for key in _SAME):
        return list(rows)
    if any(where.get(key) != version for key, version in written["versions"].items()):
        return list(rows)
    now = {tuple(row[key] for key in columns) for row in rows}
    return [row for row in written.get(table, []) if tuple(row[key] for key in columns) not in now] + list(rows)


def check_commit(where: Row) -> None:
    """Raise unless it is known what is being measured.

    Args:
        where: What `reporting.commit` or `reporting.environment` says.

    Raises:
        ValueError: The commit is not known.
    """
    if where["commit"] is None:
        raise ValueError("it is not known what is being measured: outside of a git checkout, set REVGRAD_COMMIT")
