import json
import re

import pytest

from llmlab.course import explore, plt, sliders
from llmlab.course.sliders import BUDGET, render


def draw(rank, noise=0.0):
    fig, ax = plt.subplots()
    ax.plot([0, 1], [rank, noise])
    ax.set(title=f"rank {rank}")
    return fig


def alt(rank, noise=0.0):
    return f"rank {rank} <{noise:g}>"


def frames(**controls):
    return render(draw, alt=alt, title="A & B", start=None, controls=controls)


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    return found


def test_every_combination_is_a_frame_with_its_own_alt():
    made = frames(rank=[1, 2, 4], noise=[0.0, 0.5])
    assert [f.alt for f in made.frames] == [
        alt(r, n) for r in (1, 2, 4) for n in (0.0, 0.5)
    ]
    assert made.at((2, 1)).alt == alt(4, 0.5)
    assert len({f.src for f in made.frames}) == 6
    assert made.start == (1, 0)


def test_html_is_usable_without_a_kernel():
    made = frames(rank=[1, 2, 4], noise=[0.1 + 0.2, 0.5])
    text = made.html()
    assert len(re.findall(r'<input type="range"', text)) == 2
    for name in ("rank", "noise"):
        (target,) = re.findall(rf'<label for="([^"]+)">{name}</label>', text)
        assert f'id="{target}"' in text
    assert 'aria-live="polite"' in text
    assert 'aria-valuetext="0.3"' in text
    assert 'alt="rank 2 &lt;0.3&gt;"' in text
    assert "A &amp; B" in text
    data = json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )
    assert [pair[1] for pair in data["frames"]] == [f.alt for f in made.frames]
    assert data["values"] == [["1", "2", "4"], ["0.3", "0.5"]]


def test_html_asks_nothing_of_another_host():
    assert not re.findall(
        r"(?:https?:)?//[a-z]", re.sub(r"data:[^\"]+", "", frames(rank=[1, 2]).html())
    )


def test_text_that_ends_a_script_cannot_break_out():
    made = render(
        draw,
        alt=lambda rank: "</script><b>",
        title="",
        start=None,
        controls={"rank": [1, 2]},
    )
    assert "</script><b>" not in made.html()


def test_many_busy_frames_fit_the_budget():
    def busy(k):
        fig, ax = plt.subplots()
        ax.scatter(
            range(400), [(i * 37 * (k + 1)) % 101 for i in range(400)], c=range(400)
        )
        return fig

    made = render(
        busy,
        alt=lambda k: f"k {k}",
        title="",
        start=None,
        controls={"k": list(range(12))},
    )
    assert sum(len(f.src) for f in made.frames) <= BUDGET + 12 * 30


def test_figures_are_closed():
    before = plt.get_fignums()
    frames(rank=[1, 2, 3])
    assert plt.get_fignums() == before


def test_same_figure_same_id():
    assert frames(rank=[1, 2]).uid == frames(rank=[1, 2]).uid != frames(rank=[1, 3]).uid


def test_output_holds_widget_and_html(shown):
    explore(draw, alt=alt, title="t", rank=[1, 2], start={"rank": 2})
    (data,) = shown
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert 'type="range"' in data["text/html"]
    assert "rank 2" in data["text/plain"]


def test_without_ipywidgets_the_html_remains(shown, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    explore(draw, alt=alt, rank=[1, 2])
    assert set(shown[0]) == {"text/html", "text/plain"}


def test_the_widget_shows_the_frame_that_its_sliders_choose():
    import ipywidgets

    made = frames(rank=[1, 2, 4], noise=[0.0, 0.5])
    view = sliders._widget(made)
    box = (
        ipywidgets.Widget._instances[view["model_id"]]
        if hasattr(ipywidgets.Widget, "_instances")
        else None
    )
    box = box or ipywidgets.widgets.widget._instances[view["model_id"]]
    _, picture, first, second, caption = box.children
    first.index, second.index = 2, 1
    assert made.at((2, 1)).src in picture.value
    assert "rank 4 &lt;0.5&gt;" in picture.value
    assert (
        "rank 4 &lt;0.5&gt;" in caption.value and 'aria-live="polite"' in caption.value
    )


def moving(rank, noise=0.0):
    """A figure whose axes stay: only its line moves."""
    fig, ax = plt.subplots()
    ax.plot([0, 1], [rank, noise])
    ax.set(xlim=(0, 1), ylim=(0, 5))
    return fig


CHALLENGE = {
    "challenge": "The largest rank below 3?",
    "missing": lambda rank, noise=0.0: "" if rank == 2 else f"{rank} is not it",
}


def widgets_of(made):
    import ipywidgets.widgets.widget as known

    return known._instances[sliders._widget(made)["model_id"]].children


def test_the_widget_leaves_a_trace_and_says_of_what():
    made = render(moving, alt=alt, title="", start=None, controls={"rank": [1, 2, 4]})
    _, picture, slider, _ = widgets_of(made)
    assert "<path" not in picture.value
    slider.index = 2
    assert picture.value.count("<path") == 2 and "before: rank 2" in picture.value
    slider.index = 0
    assert made.traces.between(2, 0) in picture.value
    assert "before: rank 4" in picture.value


def test_the_widget_judges_a_challenge_where_its_sliders_stand():
    made = render(
        draw,
        alt=alt,
        title="",
        start={"rank": 4},
        controls={"rank": [1, 2, 4]},
        **CHALLENGE,
    )
    _, _, slider, challenge, _ = widgets_of(made)
    text, row = challenge.children
    button, told = row.children
    assert "The largest rank" in text.value
    button.click()
    assert "Not yet: 4 is not it" in told.value and 'role="status"' in told.value
    slider.index = 1
    assert "Not yet" not in told.value
    button.click()
    assert "Yes: rank 2." in told.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"challenge": "What?"}, "needs `missing`"),
        ({"missing": str}, "needs `missing`"),
        (CHALLENGE | {"start": {"rank": 2}}, "meets it already"),
        (CHALLENGE | {"missing": lambda rank: "no"}, "no position meets it"),
    ],
)
def test_a_challenge_can_be_met_and_is_not_met_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        explore(draw, alt=alt, rank=[1, 2, 4], **options)


def test_names_are_buttons_and_no_slider(shown):
    explore(
        lambda cut, on: draw(len(cut)),
        alt=lambda cut, on: f"{cut} {on}",
        start={"cut": "zigzag"},
        cut=["plain", "zigzag"],
        on=[False, True],
    )
    (data,) = shown
    text = data["text/html"]
    assert '<input type="range"' not in text
    assert len(re.findall('role="radiogroup"', text)) == 2
    for label in re.findall('aria-labelledby="([^"]+)"', text):
        assert f'<span id="{label}">' in text
    assert len(re.findall(" checked", text)) == 2
    assert re.search(r"value=\"1\" checked[^>]*><span>zigzag</span>", text)
    assert "<span>off</span>" in text and "<span>on</span>" in text
    # ipywidgets' radio buttons are not reached by arrow keys
    assert "application/vnd.jupyter.widget-view+json" not in data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one or two"),
        ({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, "one or two"),
        ({"rank": [1]}, "two values or more"),
        ({"rank": list(range(31))}, "31 frames"),
        ({"rank": list(range(8)), "noise": list(range(4))}, "32 frames"),
        ({"rank": [1, 2], "start": {"rank": 3}}, "not among"),
        ({"rank": [1, 2], "start": {"noise": 3}}, "noise"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        explore(draw, alt=alt, **arguments)


def test_draw_must_return_a_figure_and_alt_must_speak():
    with pytest.raises(ValueError, match="must return a matplotlib Figure"):
        explore(lambda rank: None, alt=alt, rank=[1, 2])
    with pytest.raises(ValueError, match="must say what"):
        explore(draw, alt=lambda rank: " ", rank=[1, 2])


def two_axes(scale):
    """A figure whose tick labels are as wide as `scale` is long."""
    fig, axes = plt.subplots(1, 2, figsize=(4.8, 3))
    for ax in axes:
        ax.plot([0, scale])
        ax.set(ylabel="height", title="a title")
    return fig


def test_the_axes_of_all_frames_stand_in_the_same_places():
    figures = [two_axes(scale) for scale in (1, 10, 100_000, 100, 10)]
    sliders.align(figures)
    places = {str([ax.get_position().bounds for ax in fig.axes]) for fig in figures}
    assert len(places) == 1
    for fig in figures:
        width, height = fig.bbox.size
        for ax in fig.axes:
            box = ax.get_tightbbox(fig.canvas.get_renderer())
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        left, right = (ax.get_tightbbox() for ax in fig.axes)
        assert left.x1 < right.x0
        plt.close(fig)


def test_frames_with_other_axes_keep_their_own_layout():
    one, _ = plt.subplots(figsize=(4.8, 3))
    figures = [two_axes(1), one, two_axes(1)]
    sliders.align(figures)
    assert all(fig.get_layout_engine() is not None for fig in figures)
    for fig in figures:
        plt.close(fig)
