"""The pictures of memory, FLOPs and time that the benchmarks draw."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from benchmarks.drawing import TEXT, legend_below, png, style_axes

_STYLES = {
    "stored": {"color": "#8a8a99", "marker": "s"},
    "checkpoint": {"color": "#d95f02", "marker": "^"},
    "reversible": {"color": "#2563cd", "marker": "o"},
}
_PALETTE = (
    "#8a8a99",
    "#1b9e77",
    "#d95f02",
    "#7570b3",
    "#e7298a",
    "#66a61e",
    "#2563cd",
    "#b8860b",
    "#0f766e",
    "#111827",
)
_ENGINES = ("#8a8a99", "#d95f02", "#b8860b", "#7570b3", "#e7298a", "#66a61e", "#2563cd", "#60a5fa", "#111827")

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
    left.set_ylabel("training memory per sample (MB)", color=TEXT)
    figure.suptitle(f"Training memory against depth\n{subtitle}", fontsize=11, color=TEXT)
    legend_below(figure, left, columns=4)
    return png(figure)


def memory_frontier(rows: Rows, subtitle: str) -> bytes:
    """Draw memory per sample against FLOPs over those of stored autograd, one panel per cell, as a PNG.

    Args:
        rows: Rows with `cell`, `variant`, `label`, `mb_per_sample` and `flops_over_stored`; a variant begins with its
            mode.
        subtitle: What was measured.
    """
    cells = list(dict.fromkeys(r["cell"] for r in rows))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, cell in zip(panels, cells, strict=True):
        mine = [r for r in rows if r["cell"] == cell]
        for row in mine:
            style = _STYLES[row["variant"].split()[0]]
            x, y = row["flops_over_stored"], row["mb_per_sample"]
            # Labels of neighbours make room for each other.
            ratios = [r["mb_per_sample"] / y for r in mine if abs(r["flops_over_stored"] - x) < 0.1]
            lift = 6 * (any(1 / 1.2 < q < 1 for q in ratios) - any(1 < q < 1.2 for q in ratios))
            axes.plot(x, y, markersize=7, linestyle="none", **style)
            text, shift = f"{row['label']}, {y:.1f}", (9, lift)
            axes.annotate(text, (x, y), shift, textcoords="offset points", va="center", color=style["color"])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(0.95, 2)
        axes.set_xticks([1, 4 / 3, 5 / 3], ["1", "4/3", "5/3"])
        axes.set_title({"stlstm": "ST-LSTM", "convlstm": "ConvLSTM"}[cell], fontsize=10, color=TEXT)
        axes.set_xlabel("FLOPs of a training step over those of stored autograd", color=TEXT)
        style_axes(axes)
    panels[0].set_ylabel("training memory per sample (MB)", color=TEXT)
    figure.suptitle(f"Training memory against operations\n{subtitle}", fontsize=11, color=TEXT)
    return png(figure)


def memory_of_systems(length: Rows, depth: Rows) -> bytes:
    """Draw the memory of table 1's systems against the number of frames and against depth, as a PNG.

    Args:
        length: Rows with `system`, `mode`, `frames` and `mb`.
        depth: The same with `times`, how often as deep as in table 1.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, rows, key, label in (
        (left, length, "frames", "frames of a sequence"),
        (right, depth, "times", "depth, as a multiple of that in table 1"),
    ):
        for i, (system, mode) in enumerate(dict.fromkeys((r["system"], r["mode"]) for r in rows)):
            mine = [r for r in rows if (r["system"], r["mode"]) == (system, mode)]
            line = {"linewidth": 2.6} if mode == "reversible" else {"linewidth": 1.4}
            axes.plot(
                [r[key] for r in mine],
                [r["mb"] for r in mine],
                label=system if mode == "stored" else f"{system}, reversible",
                color=_PALETTE[i % len(_PALETTE)],
                marker="o" if mode == "reversible" else "s",
                markersize=5,
                **line,
            )
        axes.set_xlabel(label, color=TEXT)
        _log_axes(axes, sorted({r[key] for r in rows}))
    left.set_ylabel("memory of one more sample (MB)", color=TEXT)
    figure.suptitle("Training memory of the systems of table 1, 64 x 64 pixels", fontsize=11, color=TEXT)
    legend_below(figure, left, columns=5, fontsize=8)
    return png(figure)


def flops_against_memory(rows: Rows) -> bytes:
    """Draw the systems of table 1 by FLOPs and memory, ours and the paper's figures, as a PNG.

    Args:
        rows: Rows of table 1.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        color = _PALETTE[i % len(_PALETTE)]
        measured = row["reversible_mb_per_sample"] or row["stored_mb_per_sample"]
        axes.plot([row["paper_gflops"], row["gflops_per_frame"]], [row["paper_mb"], measured], ":", color=color)
        axes.plot(row["paper_gflops"], row["paper_mb"], "o", color=color, fillstyle="none", markersize=8)
        axes.plot(row["gflops_per_frame"], measured, "o", color=color, markersize=8)
        axes.annotate(
            row["system"], (row["gflops_per_frame"], measured), (8, -3), textcoords="offset points", color=color
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("GFLOPs per predicted frame", color=TEXT)
    axes.set_ylabel("training memory per sample (MB)", color=TEXT)
    axes.set_title("Filled: measured (CrevNet reversible). Open: the paper's table 1", fontsize=10, color=TEXT)
    axes.margins(x=0.2, y=0.1)
    style_axes(axes)
    return png(figure)


def scaling_curves(rows: Rows) -> bytes:
    """Draw memory and step time against modules, frames and pixels, as a PNG.

    Args:
        rows: Rows with `axis`, `value`, `variant`, `mb` and `seconds`.
    """
    labels = {"modules": "predictive modules", "frames": "frames of a sequence", "pixels": "pixels along a side"}
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for column, (axis, label) in enumerate(labels.items()):
        mine = [r for r in rows if r["axis"] == axis]
        for line, (key, unit) in enumerate((("mb", "memory of one more sample (MB)"), ("seconds", "step time (s)"))):
            axes = grid[line][column]
            for i, variant in enumerate(dict.fromkeys(r["variant"] for r in mine)):
                points = [r for r in mine if r["variant"] == variant]
                color = (*(style["color"] for style in _STYLES.values()), "#0f766e")[i]
                axes.plot(
                    [r["value"] for r in points],
                    [r[key] for r in points],
                    "o-",
                    label=variant,
                    color=color,
                    markersize=5,
                )
            _log_axes(axes, sorted({r["value"] for r in mine}))
            if not column:
                axes.set_ylabel(unit, color=TEXT)
        grid[1][column].set_xlabel(label, color=TEXT)
    figure.suptitle("A training step of CrevNet with ST-LSTM, batch 1", fontsize=11, color=TEXT)
    legend_below(figure, grid[0][0], columns=4)
    return png(figure)


def engine_memory(rows: Rows) -> bytes:
    """Draw the peak memory of the engine and its peers against depth, one panel per workload, as a PNG.

    Args:
        rows: Rows with `workload`, `contender`, `depth` and `peak_mib`; those without a peak are left out.
    """
    workloads = list(dict.fromkeys(r["workload"] for r in rows))
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        measured = [r for r in rows if r["workload"] == workload and r["peak_mib"] is not None]
        for contender, style in _contenders(rows).items():
            mine = [r for r in measured if r["contender"] == contender]
            axes.plot([r["depth"] for r in mine], [r["peak_mib"] for r in mine], label=contender, **style)
        _log_axes(axes, sorted({r["depth"] for r in measured}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(workload, fontsize=10, color=TEXT)
        axes.set_xlabel("blocks of two couplings", color=TEXT)
    panels[0].set_ylabel("peak of a training step (MiB)", color=TEXT)
    figure.suptitle("Activation memory against depth, same weights", fontsize=11, color=TEXT)
    legend_below(figure, panels[0], columns=4, fontsize=9)
    return png(figure)


def engine_time(rows: Rows) -> bytes:
    """Draw the step time of the engine and its peers over that of stored autograd as bars, as a PNG.

    Args:
        rows: Rows with `workload`, `contender`, `depth`, `time_ratio`, and `p20` and `p80` or None.
    """
    workloads = list(dict.fromkeys(r["workload"] for r in rows))
    styles = _contenders(rows)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        mine = [r for r in rows if r["workload"] == workload and r["time_ratio"] is not None]
        depths = sorted({r["depth"] for r in mine})
        for i, contender in enumerate(styles):
            bars = [r for r in mine if r["contender"] == contender]
            x = [depths.index(r["depth"]) + (i - (len(styles) - 1) / 2) * 0.8 / len(styles) for r in bars]
            y = [r["time_ratio"] for r in bars]
            color = styles[contender]["color"]
            axes.bar(x, y, 0.8 / len(styles), label=contender, color=color, yerr=_percentiles(bars), ecolor=TEXT)
        axes.axhline(4 / 3, color=TEXT, linewidth=1, linestyle="--", zorder=0)
        axes.set_xticks(range(len(depths)), [f"{d} blocks" for d in depths])
        axes.set_title(workload, fontsize=10, color=TEXT)
        axes.set_axisbelow(True)
        style_axes(axes, "y")
    panels[0].set_ylabel("step time over stored autograd", color=TEXT)
    figure.suptitle(
        "Step time, same weights; dashed: 4/3, the operations of one recomputation", fontsize=11, color=TEXT
    )
    legend_below(figure, panels[0], columns=4, fontsize=9)
    return png(figure)


def time_against_budget(rows: Rows, subtitle: str) -> bytes:
    """Draw the step time over that of stored autograd against the memory budget, and what FLOPs predict, as a PNG.

    Args:
        rows: Rows with `budget_mib`, `time_ratio`, `p20`, `p80` and `predicted`.
        subtitle: What was measured.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    x, y = [r["budget_mib"] for r in rows], [r["time_ratio"] for r in rows]
    axes.plot(x, [r["predicted"] for r in rows], "--", color=TEXT, linewidth=1.2, label="operations, as planned")
    style = _STYLES["reversible"]
    axes.errorbar(
        x,
        y,
        yerr=_percentiles(rows),
        linewidth=2.4,
        markersize=6,
        capsize=3,
        label="measured: p20, median, p80",
        **style,
    )
    axes.set_xlabel("memory budget (MiB)", color=TEXT)
    axes.set_ylabel("step time over stored autograd", color=TEXT)
    axes.set_title(f"Speed bought with memory\n{subtitle}", fontsize=11, color=TEXT)
    style_axes(axes, "y")
    axes.legend(frameon=False, labelcolor=TEXT)
    return png(figure)


def _contenders(rows: Rows) -> dict[str, dict[str, Any]]:
    """A style for each, in the order of the rows; ours thicker."""
    names = dict.fromkeys(r["contender"] for r in rows)
    return {
        name: {
            "color": color,
            "marker": "o" if name.startswith("revgrad") else "s",
            "markersize": 5,
            "linewidth": 2.6 if name.startswith("revgrad") else 1.4,
            "linestyle": "--" if name.endswith("exact") else "-",  # it lies on the line of float
        }
        for name, color in zip(names, _ENGINES, strict=False)
    }


def _percentiles(rows: Rows) -> list[list[float]]:
    """How far p20 and p80 are from the median, by row; 0 where too few rounds have none."""
    ends = [(r["time_ratio"], r["p20"] or r["time_ratio"], r["p80"] or r["time_ratio"]) for r in rows]
    return [[median - p20 for median, p20, _ in ends], [p80 - median for median, _, p80 in ends]]


def _log_axes(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    style_axes(axes, "y")


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
    axes.plot(x, states, "--", color=TEXT, linewidth=1.2, label="recurrent states alone (formula)", zorder=1)
    _log_axes(axes, x)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label, color=TEXT)
    axes.margins(x=0.12)
