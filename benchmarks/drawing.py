"""What all pictures of the benchmarks have in common: colours, axes, legends, PNG files."""

import io
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

TEXT, GRID = "#3c3c46", "#e4e4ea"


def style_axes(axes: Axes, grid: Literal["both", "y"] = "both", **ticks: Any) -> None:
    """A light grid, no frame but the axes; further options are those of the ticks' labels."""
    axes.grid(True, axis=grid, color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT, **ticks)


def legend_below(figure: Figure, *panels: Axes, columns: int, **options: Any) -> Legend:
    """One legend for all panels, under them; what several call the same is in it once."""
    labelled = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style = {"ncols": columns, "frameon": False, "labelcolor": TEXT, **options}
    return figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", **style)


def png(figure: Figure) -> bytes:
    """The picture; the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
