"""Draws the picture of exact arithmetic, one gated merge and its inverse on one value: `python docs/pictures.py`."""

from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from revgrad_kernels.reservoir import forget, recall

PICTURE = Path(__file__).parent / "images" / "gated-merge.png"
_STREAM, _RESERVOIR, _DIGIT, _TEXT = "#2563cd", "#d95f02", "#3c3c46", "#3c3c46"
_TOP, _BOTTOM = 1.0, 0.0


class Merge(NamedTuple):
    """One gated merge of integers, `X n / 2^bits + t`, with all that lies in between."""

    value: int
    reservoir: int
    numerator: int
    bits: int
    message: int

    @property
    def digit_out(self) -> int:
        """What leaves the reservoir, in radix n."""
        return self.reservoir % self.numerator

    @property
    def rest(self) -> int:
        """What stays in it."""
        return self.reservoir // self.numerator

    @property
    def product(self) -> int:
        """The value scaled up, with the digit."""
        return self.value * self.numerator + self.digit_out

    @property
    def scaled(self) -> int:
        """The value scaled."""
        return self.product >> self.bits

    @property
    def digit_in(self) -> int:
        """What is cut off, in radix 2^bits."""
        return self.product & ((1 << self.bits) - 1)

    @property
    def merged(self) -> int:
        """The value after the merge."""
        return self.scaled + self.message

    @property
    def filled(self) -> int:
        """The reservoir after the merge."""
        return (self.rest << self.bits) | self.digit_in

    def agrees(self) -> bool:
        """Whether the arithmetic of the kernels finds the same, there and back."""
        x, r, n = (torch.tensor([i]) for i in (self.value, self.reservoir, self.numerator))
        scaled, filled = forget(x, n, r, self.bits)
        back = recall(scaled, n, filled, self.bits)
        return (int(scaled), int(filled), *map(int, back)) == (self.scaled, self.filled, self.value, self.reservoir)


# Gates of 4 bits instead of 16, so that the numbers are small.
EXAMPLE = Merge(value=45, reservoir=17, numerator=6, bits=4, message=9)


def draw(merge: Merge = EXAMPLE) -> Figure:
    """The merge above, and below it the inverse, with the same boxes and the arrows turned round."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    there, back = figure.subplots(2, 1)
    m, radix = merge, 1 << merge.bits
    _panel(there, m, "merge", forward=True)
    _arrow(there, (0, _TOP), (1, _TOP), f"× {m.numerator}")
    _arrow(there, (0, _BOTTOM), (1, _BOTTOM), f"div {m.numerator}")
    _arrow(there, (0, _BOTTOM), (1, _TOP), f"digit {m.digit_out}  (mod {m.numerator})", digit=True)
    _arrow(there, (1, _TOP), (2, _TOP), f"div {radix}")
    _arrow(there, (1, _BOTTOM), (2, _BOTTOM), f"× {radix}")
    _arrow(there, (1, _TOP), (2, _BOTTOM), f"digit {m.digit_in}  (mod {radix})", digit=True)
    _arrow(there, (2, _TOP), (3, _TOP), f"+ g h = {m.message}")
    _arrow(there, (2, _BOTTOM), (3, _BOTTOM), "")
    _panel(back, m, "unmerge", forward=False)
    _arrow(back, (3, _TOP), (2, _TOP), f"− g h = {m.message}")
    _arrow(back, (3, _BOTTOM), (2, _BOTTOM), "")
    _arrow(back, (2, _TOP), (1, _TOP), f"× {radix}")
    _arrow(back, (2, _BOTTOM), (1, _BOTTOM), f"div {radix}")
    _arrow(back, (2, _BOTTOM), (1, _TOP), f"digit {m.digit_in}  (mod {radix})", digit=True)
    _arrow(back, (1, _TOP), (0, _TOP), f"div {m.numerator}")
    _arrow(back, (1, _BOTTOM), (0, _BOTTOM), f"× {m.numerator}")
    _arrow(back, (1, _TOP), (0, _BOTTOM), f"digit {m.digit_out}  (mod {m.numerator})", digit=True)
    others = [m._replace(value=x) for x in range(m.value - radix, m.value + radix)]
    twins = [other for other in others if other.scaled == m.scaled]
    figure.suptitle(
        f"Scaled by 1 − g = {m.numerator}/{radix}, {_listed([t.value for t in twins])} all become {m.scaled}. "
        f"The digit that enters the reservoir tells which it was: {_listed([t.digit_in for t in twins])}",
        fontsize=11,
        color=_TEXT,
    )
    return figure


def _panel(axes: Axes, m: Merge, title: str, *, forward: bool) -> None:
    axes.set(xlim=(-0.75, 3.35), ylim=(-0.42, 1.42))
    axes.axis("off")
    axes.text(-0.72, 1.36, f"{title} {'→' if forward else '←'}", fontsize=13, weight="bold", color=_TEXT, va="center")
    axes.text(-0.72, _TOP, "stream", fontsize=11, color=_STREAM, va="center")
    axes.text(-0.72, _BOTTOM, "reservoir", fontsize=11, color=_RESERVOIR, va="center")
    for place, number in enumerate((m.value, m.product, m.scaled, m.merged)):
        _box(axes, place, _TOP, number, _STREAM, given=place == (0 if forward else 3))
    for place, number in enumerate((m.reservoir, m.rest, m.filled, m.filled)):
        _box(axes, place, _BOTTOM, number, _RESERVOIR, given=place == (0 if forward else 3))


def _box(axes: Axes, x: float, y: float, number: int, colour: str, *, given: bool) -> None:
    fill = colour if given else "white"
    axes.plot(x, y, "s", markersize=40, markerfacecolor=fill, markeredgecolor=colour, markeredgewidth=1.8, zorder=2)
    axes.text(x, y, str(number), fontsize=14, color="white" if given else colour, ha="center", va="center", zorder=3)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str, *, digit: bool = False
) -> None:
    colour = _DIGIT if digit else _STREAM if start[1] == _TOP else _RESERVOIR
    axes.annotate(
        "", end, start, zorder=1,
        arrowprops={
            "arrowstyle": "-|>", "color": colour, "lw": 1.6, "ls": "--" if digit else "-", "shrinkA": 24, "shrinkB": 24
        },
    )  # fmt: skip
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    if not digit:
        axes.text(x, y + 0.1, label, fontsize=10.5, color=colour, ha="center", va="bottom")
    else:
        axes.text(
            x, y, label, fontsize=10.5, color=colour, ha="center", va="center", bbox={"fc": "white", "ec": "none"}
        )


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=130)
