"""A figure that moves, by keyboard: its trace, its buttons, its challenge."""

from __future__ import annotations

import pytest

from llmlab.course import plt
from llmlab.course.sliders import render
from tests.browser import page_checks

RANKS = [1, 2, 4]


def draw(rank, cut):
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, rank + (cut == "zigzag")])
    ax.set(ylim=(0, 9))
    return fig


@pytest.fixture(scope="module")
def made():
    return render(
        draw,
        alt=lambda rank, cut: f"{cut}, {rank}",
        title="",
        start={"rank": 1, "cut": "plain"},
        controls={"rank": RANKS, "cut": ["plain", "zigzag"]},
        challenge="The zigzag of rank 2?",
        missing=lambda rank, cut: "" if (rank, cut) == (2, "zigzag") else "not it",
    )


@pytest.fixture
def page(chromium, made):
    page = chromium.new_page()
    page.set_content(made.html() * 2)  # two tabs of JupyterLab are one page
    yield page
    page.close()


def test_arrows_choose_and_the_other_copy_stays(page, made):
    group = page.get_by_role("radiogroup", name="cut").first
    assert group.get_by_role("radio", name="plain").is_checked()
    group.get_by_role("radio", name="plain").press("ArrowRight")
    assert group.get_by_role("radio", name="zigzag").is_checked()
    images = page.locator("img")
    assert images.first.get_attribute("src") == made.at((0, 1)).src
    assert images.last.get_attribute("src") == made.at((0, 0)).src
    assert page.get_by_role("radio", name="plain").last.is_checked()
    assert not page_checks.slider_faults(page)


def test_the_page_traces_what_python_traces(page, made):
    svg = page.locator(".llmlab-picture svg").first
    note = page.locator(".llmlab-before").first
    assert svg.inner_html() == "" and note.inner_text() == ""
    slider = page.get_by_role("slider").first
    slider.press("End")
    page.get_by_role("radio", name="zigzag").first.check(force=True)
    before, now = made.number((2, 0)), made.number((2, 1))
    assert made.traces.between(before, now)
    drawn = svg.locator("path").evaluate_all("paths => paths.map(p => p.outerHTML)")
    expected = made.traces.between(before, now).replace("/>", "></path>")
    assert "".join(drawn) == expected
    assert note.inner_text() == "before: rank 4, cut plain"
    for width in (1280, 300):  # on a phone the picture is as wide as its text needs
        page.set_viewport_size({"width": width, "height": 900})
        image = page.locator("img").first.bounding_box()
        assert svg.bounding_box() == pytest.approx(image, abs=1)
        assert image["width"] >= 0.6 * made.size[0] * 120 - 1


def test_the_challenge_is_settled_where_the_sliders_stand(page, made):
    page.get_by_role("button", name="Check").first.focus()
    told = page.locator("[role=status]").first
    for position in ((0, 0), (1, 1)):
        page.get_by_role("slider").first.fill(str(position[0]))
        choice = page.get_by_role("radio").nth(position[1])
        choice.check(force=True)
        page.locator(".llmlab-challenge button").first.press("Enter")
        assert told.inner_text() == made.verdict(position)
    page.get_by_role("slider").first.press("Home")
    assert told.inner_text() == ""
    assert made.verdict((1, 1)) == "Yes: rank 2, cut zigzag."
