"""The pale trace that a figure's state before leaves."""

import re

import pytest

from llmlab.course import plt
from llmlab.course.figures import SHOWN_DPI
from llmlab.course.sliders import render
from llmlab.course.traces import MOST, traces


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(*draws):
    """A figure for each function, drawn: labels are known only then."""
    figures = []
    for draw in draws:
        fig, ax = plt.subplots(figsize=(4, 3), layout="none")
        draw(ax)
        fig.canvas.draw()
        figures.append(fig)
    return figures


def bars(*heights, top=10):
    def draw(ax):
        ax.bar(range(len(heights)), heights, color="#0072b2")
        ax.set(xlim=(-1, len(heights)), ylim=(0, top), xticks=[], yticks=[])

    return draw


def corners(svg):
    """The corners of the path in some SVG, as points of CSS pixels."""
    path = re.search(r'd="([^"]*)"', svg)[1]
    x = y = 0
    found = []
    for kind, a, b in re.findall(r"([Ml])(-?\d+) (-?\d+)", path):
        x, y = (int(a), int(b)) if kind == "M" else (x + int(a), y + int(b))
        found.append((x, y))
    return found


def test_the_bar_that_changed_is_outlined_where_it_was_and_no_other():
    figures = drawn(bars(4, 7), bars(4, 2))
    svg = traces(figures).between(0, 1)
    assert svg.count("<path") == 2 and svg.count('stroke="#0072b2"') == 1
    ax = figures[0].axes[0]
    corner = ax.transData.transform([(0.6, 7)])[0] * SHOWN_DPI / figures[0].dpi
    height = 3 * SHOWN_DPI
    assert (round(corner[0]), round(height - corner[1])) in corners(svg)


def test_a_frame_leaves_nothing_in_itself():
    assert traces(drawn(bars(4, 7), bars(4, 2))).between(1, 1) == ""


def other_labels(ax):
    bars(4, 2)(ax)
    ax.set_xticks([0, 1], labels=["a", "b"])


@pytest.mark.parametrize(
    "other",
    [
        bars(4, 2, top=20),
        other_labels,
        lambda ax: (bars(4, 2)(ax), ax.set_yscale("symlog"), ax.set_yticks([])),
        lambda ax: (bars(4, 2)(ax), ax.set_position([0.3, 0.3, 0.4, 0.4])),
    ],
    ids=["limits", "labels", "scale", "place"],
)
def test_axes_that_say_something_else_are_not_traced(other):
    figures = drawn(bars(4, 7), other, bars(3, 7))
    found = traces(figures)
    assert not found.between(0, 1) and not found.between(1, 0)
    assert found.between(0, 2)


def test_a_logarithmic_scale_is_heeded():
    def line(end):
        def draw(ax):
            ax.plot([1, 10, 100], [1, 10, end])
            ax.set(xscale="log", yscale="log", xlim=(1, 100), ylim=(1, 1000))

        return draw

    figures = drawn(line(100), line(1000))
    data = figures[0].axes[0].transData
    for at in ((1, 1), (100, 100)):
        x, y = data.transform(at) * SHOWN_DPI / figures[0].dpi
        near = min(
            abs(x - a) + abs(3 * SHOWN_DPI - y - b)
            for a, b in corners(traces(figures).between(0, 1))
        )
        assert near <= 2, at


def test_lines_are_clipped_to_their_axes():
    def line(slope):
        def draw(ax):
            ax.plot([0, 1], [0, slope])
            ax.set(xlim=(0, 1), ylim=(0, 1))

        return draw

    figures = drawn(line(5), line(1))
    box = figures[0].axes[0].bbox.extents * SHOWN_DPI / figures[0].dpi
    for x, y in corners(traces(figures).between(0, 1)):
        assert box[0] - 2 <= x <= box[2] + 2
        assert box[1] - 2 <= 3 * SHOWN_DPI - y <= box[3] + 2


def test_a_dot_that_moves_leaves_a_circle():
    def dot(x):
        def draw(ax):
            ax.plot(x, 0.5, "o")
            ax.set(xlim=(0, 1), ylim=(0, 1))

        return draw

    svg = traces(drawn(dot(0.2), dot(0.8))).between(0, 1)
    assert svg.count("a") >= 2 and "0 1 0" in svg


def sloped(slope, also=lambda ax: None):
    """A line that could be traced, and what `also` draws."""

    def draw(ax):
        also(ax)
        ax.plot([0, 1], [0, slope])
        ax.set(xlim=(0, 1), ylim=(0, 50))

    return draw


@pytest.mark.parametrize(
    "also", [lambda ax: ax.imshow([[0, 1], [1, 0]]), lambda ax: ax.axis("off")]
)
def test_a_picture_and_a_text_are_not_traced(also):
    assert traces(drawn(sloped(1), sloped(2))) is not None
    assert traces(drawn(sloped(1, also), sloped(2, also))) is None


def test_a_crowd_is_not_traced():
    few = bars(*range(1, MOST + 1), top=50), bars(*range(2, MOST + 2), top=50)
    assert traces(drawn(*few)) is not None
    many = bars(*range(1, MOST + 2), top=50), bars(*range(2, MOST + 3), top=50)
    assert traces(drawn(*many)) is None


def test_a_figure_may_do_without():
    def draw(rank):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, rank])
        ax.set_ylim(0, 9)
        return fig

    def made(**options):
        return render(
            draw,
            alt=lambda rank: f"rank {rank}",
            title="",
            start=None,
            controls={"rank": [1, 2, 4]},
            **options,
        )

    line = '<p class="llmlab-before">'
    assert made().traces is not None and line in made().html()
    without = made(trace=False)
    assert without.traces is None and line not in without.html()
