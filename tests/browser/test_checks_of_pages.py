"""The checks of the book's pages, on pages with planted faults: each is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmlab.course.syllabus import find
from tests.browser import page_checks
from tests.browser.conftest import Watched

ROOT = Path(__file__).resolve().parents[2]
LESSON = f"notebooks/{find('01-welcome').slug}.html"
FORMULA = r'<span class="math">\(\begin{none}x\end{none}\)</span>'
PLANT_CONTRAST = """() => {
  const words = [...document.querySelectorAll('.highlight span')].filter(
    word => /^\\w{3,}$/.test(word.textContent) && word.checkVisibility());
  words.at(-1).classList.add('planted-dark');
  words.at(-2).classList.add('planted-unseen');
  const paragraphs = [...document.querySelectorAll('main p')].filter(
    paragraph => paragraph.checkVisibility() && paragraph.textContent.length > 40);
  paragraphs.at(-1).parentElement.classList.add('planted-light');
  const style = document.createElement('style');
  style.textContent = `
    html[data-theme=dark] .planted-dark { color: #606060 !important }
    html[data-theme=dark] .planted-unseen { color: #2a313d !important }
    html[data-theme=light] .planted-light { background: #666 !important }`;
  document.head.append(style);
}"""
PLANT_COLOURS = """seed => {
  const undecided = seed === 1;
  // A linear congruential generator: the same texts each time.
  const random = () => (seed = (seed * 1103515245 + 12345) % 2147483648) / 2147483648;
  const all = [...document.querySelectorAll('main *')].filter(
    element => element.checkVisibility());
  const colours = ['#777', '#444', '#999', '#222'];
  for (let i = 0; i < 150; i++) {
    const { style } = all[Math.floor(random() * all.length)];
    const colour = colours[Math.floor(random() * colours.length)];
    style[random() < 0.7 ? 'color' : 'backgroundColor'] = colour;
  }
  // Painted beneath a text that it does not hold: no ancestor says so.
  const texts = all.filter(element => element.localName === 'p');
  const text = texts[Math.floor(texts.length / 2)];
  text.style.position = 'relative';
  text.style.zIndex = 1;
  const box = text.getBoundingClientRect();
  const patch = document.createElement('div');
  patch.style.cssText = `position: absolute; z-index: 0; background: #888;
    left: ${box.left + scrollX}px; top: ${box.top + scrollY}px;
    width: ${box.width}px; height: ${box.height}px`;
  document.body.prepend(patch);
  if (undecided) {
    // A ground on which axe cannot decide: the samples do not do, it has to see all.
    const codes = [...document.querySelectorAll('.highlight pre')];
    codes.sort((a, b) => b.childElementCount - a.childElementCount);
    codes[0].style.setProperty(
      'background', 'linear-gradient(#888, #999)', 'important');
  }
}"""


@pytest.fixture
def open_faulty(tabs, site, book):
    """open_faulty(old, new): the lesson with one text replaced, and what went wrong."""
    address = f"{site}/{LESSON}"
    opened = []

    def open_(old: str = "", new: str = "") -> Watched:
        html = (book / LESSON).read_text(encoding="utf-8")
        assert old in html
        html = html.replace(old, new, 1) if old else html
        watched = tabs.watch("dark")
        opened.append(watched)
        watched.page.route(
            address, lambda route: route.fulfill(body=html, content_type="text/html")
        )
        watched.page.goto(address)
        return watched

    yield open_
    for watched in opened:
        watched.page.unroute(address)
        tabs.take_back("dark")


def test_what_axe_sees_is_found_in_the_theme_that_has_it(open_faulty):
    page = open_faulty().page
    page_checks.prepare(page)
    page.evaluate(PLANT_CONTRAST)
    page.evaluate("document.querySelector('main img').removeAttribute('alt')")
    dark = page_checks.axe_faults(page, "dark")
    light = page_checks.axe_faults(page, "light")
    for faults in (dark, light):
        assert [fault for fault in faults if "image-alt" in fault]
    (contrast,) = (fault for fault in dark if "color-contrast" in fault)
    assert "(2 ×)" in contrast and "planted-unseen" in contrast, contrast
    (contrast,) = (fault for fault in light if "color-contrast" in fault)
    assert "planted-dark" not in contrast and "planted-unseen" not in contrast


@pytest.mark.parametrize("seed", [1, 2])
def test_samples_find_what_the_whole_contrast_rule_finds(open_page, seed):
    page = open_page(LESSON.replace("notebooks", "exercises"), "dark")
    page_checks.prepare(page)
    page.evaluate(PLANT_COLOURS, seed)
    found = page.evaluate("pageChecks.compare()")
    assert found["again"] == (seed == 1), found
    assert found["judged"] > 100 and found["violations"] > 10, found
    assert not found["missed"] and not found["invented"] and not found["unlisted"], (
        found
    )


def test_a_broken_formula_is_found(open_faulty):
    faults = page_checks.mathematics_faults(
        open_faulty("</h1>", f"</h1>{FORMULA}").page
    )
    assert [fault for fault in faults if "wrong formula" in fault], faults


def test_an_unknown_command_is_found(open_faulty):
    formula = r'<span class="math">\(\notACommand{x}\)</span>'
    faults = page_checks.mathematics_faults(
        open_faulty("</h1>", f"</h1>{formula}").page
    )
    assert faults == [r"mathematics: unknown command: \notACommand"]


def test_a_formula_that_is_left_as_it_is_is_found(open_faulty):
    plain = '<span class="math">no marks around it</span>'
    faults = page_checks.mathematics_faults(open_faulty("</h1>", f"</h1>{plain}").page)
    assert faults == ["mathematics: not typeset: no marks around it"]


def test_mathematics_without_mathjax_is_found(open_faulty):
    watched = open_faulty("mathjax/tex-mml-chtml.js", "mathjax/none.js")
    plant = "html => document.body.insertAdjacentHTML('beforeend', html)"
    watched.page.evaluate(plant, FORMULA)
    faults = page_checks.mathematics_faults(watched.page)
    assert faults == ["mathematics: MathJax did not start"]
    assert [fault for fault in watched.faults if fault.startswith("404 ")]


def test_a_slider_that_does_not_move_is_found(open_faulty):
    page = open_faulty().page
    assert not page_checks.slider_faults(page)
    # A copy has no listeners.
    page.evaluate("""() => {
          const figure = document.querySelector('.llmlab-explore');
          figure.replaceWith(figure.cloneNode(true));
        }""")
    faults = page_checks.slider_faults(page)
    assert [fault for fault in faults if "figure is the same" in fault], faults
    assert [fault for fault in faults if "left arrow" in fault], faults


def test_what_is_too_wide_or_too_small_for_a_phone_is_found(open_faulty):
    page = open_faulty().page
    assert not page_checks.phone_faults(page)
    page.evaluate("""() => {
          document.body.insertAdjacentHTML(
            'beforeend', '<table style="width: 600px"><tr><td>1</td></tr></table>');
          const name = document.querySelector('main table code .pre');
          name.style.cssText = 'overflow-wrap: anywhere; white-space: normal';
          name.closest('td').style.cssText = 'max-width: 2rem; min-width: 0';
          name.textContent = 'q_proj_and_more';
          const image = document.querySelector('.llmlab-scroll img');
          image.style.cssText = 'width: 100px !important; min-width: 0 !important';
        }""")
    faults = page_checks.phone_faults(page)
    assert faults == [
        "phone: the page is 600 pixels wide, 390 are there",
        "phone: tables cut 1 names in two, as q_proj_and_more",
        "phone: the text of 1 figures is under 9 points",
    ]


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ('<img alt="" src="http://other.invalid/x.png">', "asked http://other.invalid"),
        ("<script>missingFunction()</script>", "script error: "),
        ('<img alt="" src="no-such-file.png">', "404 "),
        (
            (
                "<script>setTimeout(() => fetch('http://other.invalid/').catch(_ => 0),"
                " 99)</script>"
            ),
            "asked http://other.invalid",
        ),
    ],
    ids=["outside", "script", "missing", "outside-late"],
)
def test_what_a_page_must_not_load_is_found(open_faulty, planted, fault):
    watched = open_faulty("</h1>", f"</h1>{planted}")
    watched.settle()
    assert [text for text in watched.faults if text.startswith(fault)], watched.faults
