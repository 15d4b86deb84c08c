"""The picture of how training memory grows with depth."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

_STYLES = {
    "stored": {"color": "#8a8a99", "marker": "s"},
    "checkpoint": {"color": "#d95f02", "marker": "^"},
    "reversible": {"color": "#2563cd", "marker": "o"},
}
_TEXT, _GRID = "#3c3c46", "#e4e4ea"

Rows = Sequence[Mapping[str, Any]]


def memory_against_depth(modules: Rows, blocks: Rows, subtitle: str) -> bytes:
    """Draw memory per sample of the three modes, and the recurrent states alone, as a PNG.

    Args:
        modules: Rows with `modules`, `mode`, `mb_per_sample` and, for the reversible mode, `states_mb`.
        blocks: The same with `blocks`.
        subtitle: What was measured.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, modules, "modules", "reversible predictive modules")
    _draw(right, blocks, "blocks", "autoencoder blocks (of three convolutions)")
    left.set_ylabel("training memory per sample (MB)", color=_TEXT)
    figure.suptitle(f"Training memory against depth\n{subtitle}", fontsize=11, color=_TEXT)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=_TEXT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, rows: Rows, key: str, label: str) -> None:
    for mode, style in _STYLES.items():
        mine = [row for row in rows if row["mode"] == mode]
        x, y = [row[key] for row in mine], [row["mb_per_sample"] for row in mine]
        axes.plot(x, y, label=mode, linewidth=2, markersize=6, **style)
        axes.annotate(
            f"{y[-1]:.1f}",
            (x[-1], y[-1]),
            (9, 0),
            textcoords="offset points",
            va="center",
            color=style["color"],
        )
    reversible = [row for row in rows if row["mode"] == "reversible"]
    x = [row[key] for row in reversible]
    states = [row["states_mb"] for row in reversible]
    axes.plot(x, states, "--", color=_TEXT, linewidth=1.2, label="recurrent states alone (formula)", zorder=1)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(x))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(label, color=_TEXT)
    axes.margins(x=0.12)
    axes.grid(True, axis="y", color=_GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT)
