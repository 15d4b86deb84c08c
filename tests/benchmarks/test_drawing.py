from matplotlib.colors import same_color
from matplotlib.figure import Figure

from benchmarks.drawing import GRID, TEXT, legend_below, png, style_axes


def test_a_picture_is_the_same_bytes_every_time():
    def draw():
        figure = Figure()
        style_axes(figure.subplots())
        return png(figure)

    assert draw() == draw()
    assert draw().startswith(b"\x89PNG")


def test_axes_have_a_light_grid_and_no_frame():
    axes = Figure().subplots()
    style_axes(axes, "y", labelsize=8)
    assert [axes.spines[side].get_visible() for side in ("top", "right", "left", "bottom")] == [
        False,
        False,
        True,
        True,
    ]
    assert all(line.get_visible() and same_color(line.get_color(), GRID) for line in axes.get_ygridlines())
    assert not any(line.get_visible() for line in axes.get_xgridlines())
    label = axes.get_xticklabels()[0]
    assert (label.get_size(), same_color(label.get_color(), TEXT)) == (8, True)


def test_what_panels_have_in_common_is_in_the_legend_once():
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, labels in ((left, "ab"), (right, "bc")):
        for label in labels:
            axes.plot([0, 1], label=label)
    legend = legend_below(figure, left, right, columns=3, fontsize=7)
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert {text.get_size() for text in legend.get_texts()} == {7}
