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
  const wait = new Promise(resolve => setTimeout(resolve, 60000, 'late'));
  if (!window.MathJax?.startup?.promise) {
    return ['MathJax did not start'];
  }
  if (await Promise.race([MathJax.startup.promise, wait]) === 'late') {
    return ['MathJax was not done after 60 s'];
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
SLIDERS = """figures => [...document.querySelectorAll(figures)].map(
  figure => figure.querySelectorAll('.llmlab-control').length)"""
SLIDER_STATE = """(figure, k) => {
  const control = figure.querySelectorAll('.llmlab-control')[k];
  const slider = control.querySelector('input:not([type=radio]), :checked');
  const value = control.querySelector('output, :checked + span').innerText;
  const image = figure.querySelector('img');
  return {
    id: slider.id || slider.name,
    spoken: slider.getAttribute('aria-valuetext') ?? value,
    value,
    caption: figure.querySelector('figcaption').innerText,
    image: image.getAttribute('src'),
    alt: image.alt,
  };
}"""
# A name runs over two lines where its words, which Sphinx marks, do.
CUT_NAMES = """() => [...document.querySelectorAll('main table code .pre')].filter(
  word => word.checkVisibility() && word.getClientRects().length > 1).map(
  word => word.textContent)"""
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
    faults += axe_faults(page, "dark", "light")
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
    """Puts axe into the page, and ends the fading of colours when the theme changes.

    The theme's icons are drawn by now. Its script would go through each node that
    `contrast.js` puts back.
    """
    page.add_style_tag(content="* { transition: none !important }")
    page.evaluate("window.FontAwesome?.noAuto()")
    page.evaluate(AXE)
    page.evaluate(SAMPLING)


def axe_faults(page: Page, *themes: str) -> list[str]:
    """What axe finds serious or critical in these themes ("dark", "light").

    Leaves the page in the last of them.
    """
    found = page.evaluate(
        """themes => pageChecks.check(...themes).then(
            found => found.map(each => each.violations))""",
        themes,
    )
    return [
        f"{theme}: {fault['id']} ({fault['count']} ×): {fault['html'][:120]}"
        for theme, violations in zip(themes, found, strict=True)
        for fault in violations
        if fault["impact"] in ("serious", "critical")
    ]


def slider_faults(page: Page) -> list[str]:
    """Sliders that do not move their figure by keyboard, or do not say what they do."""
    faults = []
    counts = page.evaluate(SLIDERS, EXPLORE)
    for i, count in enumerate(counts):
        for k in range(count):
            faults += _one_slider(page, page.locator(EXPLORE).nth(i), k)
    return faults


def _one_slider(page: Page, figure: Locator, k: int) -> list[str]:
    """The faults of a figure's k-th slider, counted from 0."""

    def shown_after(key: str) -> dict:
        page.keyboard.press(key)
        return figure.evaluate(SLIDER_STATE, k)

    control = figure.locator(".llmlab-control").nth(k)
    choice = control.locator("input[type=radio]")
    if choice.count():
        # The arrows go round: from the last to the first.
        choice.last.focus()
        first = shown_after("ArrowRight")
        last = shown_after("ArrowLeft")
    else:
        control.locator("input").focus()
        first = shown_after("Home")
        last = shown_after("End")
    before_last = shown_after("ArrowLeft")
    name = f"slider {first['id']}"
    faults = []
    if first["image"] == last["image"]:
        faults.append(f"{name}: its figure is the same at both ends")
    if first["value"] == last["value"]:
        faults.append(f"{name}: its value reads {first['value']!r} at both ends")
    if last["spoken"] != last["value"]:
        faults.append(
            f"{name}: aria-valuetext is {last['spoken']!r}, shown is {last['value']!r}"
        )
    if last["caption"].split() != last["alt"].split():
        faults.append(f"{name}: the caption is not the figure's alternative text")
    if before_last["value"] == last["value"]:
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
    if cut := page.evaluate(CUT_NAMES):
        faults.append(f"phone: tables cut {len(cut)} names in two, as {cut[0]}")
    if small:
        faults.append(f"phone: the text of {small} figures is under 9 points")
    return faults
