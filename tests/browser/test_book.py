"""The built book, as a reader meets it. Run after `make book`."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import axe_playwright_python
import pytest

from llmlab.course.syllabus import built_lessons

ROOT = Path(__file__).resolve().parents[2]
LESSONS = [lesson.slug for lesson in built_lessons(ROOT) if lesson.notebook(ROOT).is_file()]
PAGES = [
    "index.html",
    "run.html",
    "glossary.html",
    "bibliography.html",
    "coverage.html",
    "verified.html",
    "search.html",
]
PAGES += ["parts/04-peft.html"]
PAGES += [f"{kind}/{slug}.html" for slug in LESSONS for kind in ("notebooks", "exercises", "solutions")]
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
SLIDER = ".llmlab-explore input[type=range]"


def violations(page) -> list[str]:
    """What axe finds serious on the page as it is now."""
    found = page.evaluate("axe.run({preload: false})")["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("name", PAGES)
def test_accessible_in_both_themes_self_contained_and_fits_a_phone(open_page, name):
    """axe finds nothing serious; the fixture holds the page to no outside request and no script error.

    One load serves both themes and the phone.
    """
    page = open_page(name, "dark")
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.add_style_tag(content="* { transition: none !important }")
    page.evaluate(AXE)
    for theme in ("dark", "light"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        assert not (bad := violations(page)), f"{theme}: {bad}"
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate(
        """() => [...document.querySelectorAll('.llmlab-scroll img')].filter(i => i.getBoundingClientRect().width
        < 0.6 * (+i.getAttribute('width')) - 1).length"""
    )
    assert small == 0, "a figure is so small that its text is under 9 points"


def test_the_reader_gets_the_theme_that_the_system_has(open_page):
    page = open_page("index.html", "light")  # dark: above, on every page
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


@pytest.mark.parametrize("slug", LESSONS)
def test_every_slider_moves_its_figure(open_page, slug):
    page = open_page(f"notebooks/{slug}.html")
    figures = page.locator(".llmlab-explore")
    assert figures.count() >= 1
    for i in range(figures.count()):
        figure = figures.nth(i)
        image, caption = figure.locator("img"), figure.locator("figcaption")
        for k in range(figure.locator("input").count()):
            slider, output = figure.locator("input").nth(k), figure.locator("output").nth(k)
            slider.focus()
            page.keyboard.press("Home")
            first = image.get_attribute("src"), image.get_attribute("alt"), output.inner_text()
            page.keyboard.press("End")
            last = image.get_attribute("src"), image.get_attribute("alt"), output.inner_text()
            assert first[0] != last[0] and first[2] != last[2]
            assert slider.get_attribute("aria-valuetext") == last[2]
            assert caption.inner_text().split() == last[1].split()
            page.keyboard.press("ArrowLeft")
            assert output.inner_text() != last[2]


def test_slider_by_mouse(open_page):
    page = open_page(f"notebooks/{LESSONS[0]}.html")
    slider = page.locator(SLIDER).first
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(500)
    box, image = slider.bounding_box(), page.locator(".llmlab-explore img").first
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    before = image.get_attribute("src")
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert slider.input_value() == slider.get_attribute("max")
    assert image.get_attribute("src") != before


def test_slider_on_the_landing_page(open_page):
    page = open_page("index.html")
    slider, image = page.locator(SLIDER).first, page.locator(".hero-figure img")
    slider.focus()
    page.keyboard.press("Home")
    before = image.get_attribute("alt")
    page.keyboard.press("End")
    assert image.get_attribute("alt") != before


def test_search_finds_a_term(open_page):
    page = open_page("search.html?q=perplexity")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert "glossary.html" in " ".join(a.get_attribute("href") for a in page.locator("#search-results li a").all())


def test_search_from_any_page_by_keyboard(open_page):
    page = open_page("run.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("quantization")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert "search.html" in page.url


def test_one_search_bar(open_page):
    page = open_page("index.html")
    shown = [x for x in page.locator(".search-button-field, .bd-search input, form.bd-search").all() if x.is_visible()]
    assert len(shown) == 1


def test_theme_can_be_switched_and_is_kept(open_page):
    page = open_page("index.html", "light")
    before = page.evaluate("document.documentElement.dataset.theme")
    for _ in range(3):
        page.locator(".theme-switch-button").first.click()
        if page.evaluate("document.documentElement.dataset.theme") != before:
            break
    assert page.evaluate("document.documentElement.dataset.theme") != before
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") != before


@pytest.mark.parametrize("slug", LESSONS)
def test_mathematics_is_typeset(open_page, slug):
    page = open_page(f"notebooks/{slug}.html")
    if page.locator(".math").count():
        page.wait_for_selector("mjx-container", state="attached", timeout=20_000)
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


# The files themselves -----------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """All that a page points to, and all that can be pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets, self.ids, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"):
            self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"):
            self.targets.append(attrs["href"])
        loads = attrs.get("src") or (attrs.get("href") if tag == "link" and attrs.get("rel") != "canonical" else None)
        if loads and not loads.startswith("data:"):
            self.loaded.append(loads)


@pytest.fixture(scope="module")
def crawled(book):
    pages = [p for p in book.rglob("*.html") if "_static" not in p.parts]
    return {"/" + p.relative_to(book).as_posix(): Links(p.read_text(encoding="utf-8")) for p in pages}


def test_every_internal_link_resolves(book, crawled):
    broken = []
    for page, links in crawled.items():
        for target in links.targets + links.loaded:
            path, anchor = urldefrag(urljoin(page, target))
            if urlparse(path).scheme:
                continue
            path = unquote(urlparse(path).path)
            file = book / path.lstrip("/")
            ids = crawled[path].ids if path in crawled else None
            if not file.is_file() or (anchor and ids is not None and unquote(anchor) not in ids):
                broken.append(f"{page} → {target}")
    assert not broken, broken[:20]


def test_no_page_loads_from_another_host(crawled):
    outside = {f"{page}: {x}" for page, links in crawled.items() for x in links.loaded if urlparse(x).netloc}
    assert not outside


@pytest.mark.parametrize("slug", LESSONS)
def test_downloads_are_the_courses_own_notebooks(book, crawled, slug):
    for kind in ("notebooks", "exercises", "solutions"):
        page = f"/{kind}/{slug}.html"
        (target,) = {t for t in crawled[page].targets if t.endswith(f"_sources/{kind}/{slug}.ipynb")}
        file = book / urljoin(page, target).lstrip("/")
        assert file.read_bytes() == (ROOT / kind / f"{slug}.ipynb").read_bytes()


@pytest.mark.parametrize("slug", LESSONS)
def test_lesson_leads_to_exercises_and_those_to_solutions(crawled, slug):
    for kind, then in (("notebooks", "exercises"), ("exercises", "solutions")):
        targets = crawled[f"/{kind}/{slug}.html"].targets
        assert any(target.endswith(f"{then}/{slug}.html") for target in targets), f"{kind} → {then}"


def test_no_path_of_this_machine_is_published(book):
    here = str(ROOT)
    assert not [p.name for p in book.rglob("*.html") if here in p.read_text(encoding="utf-8")]
