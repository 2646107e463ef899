"""What every page of the book is held to. Each check returns the faults that it finds.

The checks change the page (theme, width, sliders), so their order matters: `all_faults`
has it.
"""

from __future__ import annotations

from pathlib import Path

import axe_playwright_python
from playwright.sync_api import Locator, Page

AXE_FILE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
AXE = AXE_FILE.read_text(encoding="utf-8")
SAMPLING = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
EXPLORE = ".llmlab-explore"
PHONE = 390  # CSS pixels

TYPESET = """async () => {
  const formulas = [...document.querySelectorAll('.math')];
  if (!formulas.length) {
    return [];
  }
  const wait = new Promise(resolve => setTimeout(resolve, 20000, 'late'));
  if (!window.MathJax?.startup?.promise) {
    return ['MathJax did not start'];
  }
  if (await Promise.race([MathJax.startup.promise, wait]) === 'late') {
    return ['MathJax was not done after 20 s'];
  }
  const plain = formulas.filter(formula => !formula.querySelector('mjx-container'));
  const wrong = document.querySelectorAll('mjx-merror, merror, [data-mjx-error]');
  // An unknown command is no error to MathJax: it is shown as it is, in red.
  const unknown = document.querySelectorAll('.math mtext[mathcolor=red]');
  return [
    ...[...unknown].map(name => 'unknown command: ' + name.textContent),
    ...plain.map(formula => 'not typeset: ' + formula.textContent.slice(0, 80)),
    ...[...wrong].map(error => 'wrong formula: ' + (
      error.getAttribute('data-mjx-error') || error.textContent).slice(0, 80)),
  ];
}"""
TWO_FRAMES = """() => new Promise(resolve =>
  requestAnimationFrame(() => requestAnimationFrame(resolve)))"""
SMALL_FIGURES = """() => [...document.querySelectorAll('.llmlab-scroll img')].filter(
  image => image.getBoundingClientRect().width < 0.6 * image.getAttribute('width') - 1
).length"""


def all_faults(page: Page, *, needs_slider: bool = False) -> list[str]:
    """Every fault of a page that was opened in the dark theme.

    Args:
        page: as it is after the `load` event, 1280 CSS pixels wide.
        needs_slider: whether a page without a slider is a fault.
    """
    faults = mathematics_faults(page)
    if theme(page) != "dark":
        faults.append(f"theme: the system's is dark, the page's is {theme(page)}")
    prepare(page)
    faults += axe_faults(page, "dark")
    faults += axe_faults(page, "light")
    if needs_slider and not page.locator(EXPLORE).count():
        faults.append("sliders: there is none")
    faults += slider_faults(page)
    faults += phone_faults(page)
    return faults


def theme(page: Page) -> str:
    """The theme that the page shows."""
    return page.evaluate("document.documentElement.dataset.theme")


def mathematics_faults(page: Page) -> list[str]:
    """Formulas that are not typeset, or wrong. Waits for MathJax where there are."""
    return [f"mathematics: {fault}" for fault in page.evaluate(TYPESET)]


def prepare(page: Page) -> None:
    """Puts axe into the page, and ends the fading of colours when the theme changes."""
    page.add_style_tag(content="* { transition: none !important }")
    page.evaluate(AXE)
    page.evaluate(SAMPLING)


def axe_faults(page: Page, in_theme: str) -> list[str]:
    """What axe finds serious or critical in this theme ("dark" or "light")."""
    page.evaluate(
        "theme => { document.documentElement.dataset.theme = theme }", in_theme
    )
    found = page.evaluate("pageChecks.check().then(found => found.violations)")
    return [
        f"{in_theme}: {fault['id']} ({fault['count']} ×): {fault['html'][:120]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


def slider_faults(page: Page) -> list[str]:
    """Sliders that do not move their figure by keyboard, or do not say what they do."""
    faults = []
    figures = page.locator(EXPLORE)
    for i in range(figures.count()):
        figure = figures.nth(i)
        for k in range(figure.locator("input").count()):
            faults += _one_slider(page, figure, k)
    return faults


def _one_slider(page: Page, figure: Locator, k: int) -> list[str]:
    """The faults of a figure's k-th slider, counted from 0."""
    slider = figure.locator("input").nth(k)
    output = figure.locator("output").nth(k)
    image = figure.locator("img")
    caption = figure.locator("figcaption")
    name = f"slider {slider.get_attribute('id')}"
    faults = []

    slider.focus()
    page.keyboard.press("Home")
    first_image, first_value = image.get_attribute("src"), output.inner_text()
    page.keyboard.press("End")
    last_image, last_value = image.get_attribute("src"), output.inner_text()
    if first_image == last_image:
        faults.append(f"{name}: its figure is the same at both ends")
    if first_value == last_value:
        faults.append(f"{name}: its value reads {first_value!r} at both ends")
    spoken = slider.get_attribute("aria-valuetext")
    if spoken != last_value:
        faults.append(f"{name}: aria-valuetext is {spoken!r}, shown is {last_value!r}")
    if caption.inner_text().split() != (image.get_attribute("alt") or "").split():
        faults.append(f"{name}: the caption is not the figure's alternative text")
    page.keyboard.press("ArrowLeft")
    if output.inner_text() == last_value:
        faults.append(f"{name}: the left arrow does not change its value")
    return faults


def phone_faults(page: Page) -> list[str]:
    """What does not fit, or gets too small, on a phone. Leaves the page that narrow."""
    page.set_viewport_size({"width": PHONE, "height": 900})
    page.evaluate(TWO_FRAMES)
    faults = []
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > PHONE:
        faults.append(f"phone: the page is {width} pixels wide, {PHONE} are there")
    small = page.evaluate(SMALL_FIGURES)
    if small:
        faults.append(f"phone: the text of {small} figures is under 9 points")
    return faults
