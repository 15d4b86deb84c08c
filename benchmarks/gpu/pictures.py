"""Pictures of what was measured on a GPU."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.drawing import TEXT, legend_below, png, style_axes

_LINES = {
    "of_copy": ("fused", "#2563cd"),
    "compiled_of_copy": ("torch.compile", "#d95f02"),
    "plain_of_copy": ("plain PyTorch", "#8a8a99"),
}
_DASHES = {"forward": "-", "backward": "--"}
_COLUMNS = 4


def speed_of_operators(rows: Sequence[Mapping[str, Any]], dtype: str) -> bytes:
    """Draw the share of a copy's bandwidth that every operator reaches against size, as a PNG.

    Args:
        rows: Rows with `operator`, `pass`, `layout`, `size` and a share under each key of `_LINES`.
        dtype: What was measured.
    """
    names = list(dict.fromkeys(r["operator"] for r in rows))
    lines = math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.6 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        for direction, dashes in _DASHES.items():
            mine = [r for r in rows if (r["operator"], r["pass"], r["layout"]) == (name, direction, "contiguous")]
            if not mine:
                continue
            for key, (label, color) in _LINES.items():
                axes.plot(
                    [r["size"].removesuffix(" MB") for r in mine],
                    [r[key] for r in mine],
                    dashes,
                    color=color,
                    marker="o",
                    markersize=4,
                    label=f"{label}, {direction}",
                )
        axes.set_title(name, fontsize=9, color=TEXT)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
        style_axes(axes, "y", labelsize=8)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(f"Share of a copy's bandwidth against MB of a stream, {dtype}", fontsize=11, color=TEXT)
    legend_below(figure, *grid, columns=len(_LINES), fontsize=8)
    return png(figure)
