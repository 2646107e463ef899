"""The built book, as a reader meets it. Run after `make book`."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

from llmlab.course.book.build import KINDS, STATIC_PAGES
from llmlab.course.book.pages import BEHIND
from llmlab.course.syllabus import PARTS, built_lessons
from tests.browser.page_checks import EXPLORE, all_faults

ROOT = Path(__file__).resolve().parents[2]
LESSONS = [
    lesson.slug for lesson in built_lessons(ROOT) if lesson.notebook(ROOT).is_file()
]
PAGES = [f"{name}.html" for name in (*STATIC_PAGES, *BEHIND.values(), "search")]
PAGES += [f"parts/{part}.html" for part in PARTS]
PAGES += [f"{kind}/{slug}.html" for slug in LESSONS for kind in KINDS]
FILES = pytest.mark.xdist_group("files")  # in one process: they share what was read
SLIDER = f"{EXPLORE} input[type=range]"


@pytest.mark.parametrize("name", PAGES)
def test_page(open_page, name):
    """In one load: mathematics, axe in both themes, sliders by keyboard, a phone.

    The fixture holds the page to no outside request, no failed one and no script error.
    """
    page = open_page(name, "dark")
    faults = all_faults(page, needs_slider=name.startswith("notebooks/"))
    assert not faults, "\n".join(faults)


def test_every_page_of_the_book_is_checked(book):
    found = {path.relative_to(book).as_posix() for path in book.rglob("*.html")}
    found = {name for name in found if not name.startswith("_static/")}
    # Sphinx writes an index that no page links to.
    assert found - {"genindex.html"} == set(PAGES)


def test_the_reader_gets_the_theme_that_the_system_has(open_page):
    page = open_page("index.html", "light")  # dark: on every page, above
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_slider_by_mouse(open_page):
    page = open_page(f"notebooks/{LESSONS[0]}.html")
    slider = page.locator(SLIDER).first
    image = page.locator(".llmlab-explore img").first
    slider.press("Home")
    # Both wait until the slider stands still: pictures move it, and so does scrolling.
    middle = slider.bounding_box()["height"] / 2
    slider.click(position={"x": 3, "y": middle})
    slider.hover(position={"x": 8, "y": middle})
    before = image.get_attribute("src")
    page.mouse.down()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + middle, steps=5)
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
    # Results are shown one after the other.
    page.wait_for_selector("#search-results li a[href*='glossary.html']")


def test_search_from_any_page_by_keyboard(open_page):
    page = open_page("run.html")
    page.keyboard.press("Control+k")
    page.wait_for_selector("dialog[open] input[type=search]:focus")
    page.keyboard.type("quantization")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li")
    assert "search.html" in page.url


def test_one_search_bar(open_page):
    page = open_page("index.html")
    shown = [
        x
        for x in page.locator(
            ".search-button-field, .bd-search input, form.bd-search"
        ).all()
        if x.is_visible()
    ]
    assert len(shown) == 1


def test_theme_can_be_switched_and_is_kept(open_page):
    page = open_page("index.html", "light", fresh=True)
    before = page.evaluate("document.documentElement.dataset.theme")
    for _ in range(3):
        page.locator(".theme-switch-button").first.click()
        if page.evaluate("document.documentElement.dataset.theme") != before:
            break
    assert page.evaluate("document.documentElement.dataset.theme") != before
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") != before


# The files themselves -----------------------------------------------------------------


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
        loads = attrs.get("src") or (
            attrs.get("href")
            if tag == "link" and attrs.get("rel") != "canonical"
            else None
        )
        if loads and not loads.startswith("data:"):
            self.loaded.append(loads)


@pytest.fixture(scope="module")
def crawled(book):
    pages = [p for p in book.rglob("*.html") if "_static" not in p.parts]
    return {
        "/" + p.relative_to(book).as_posix(): Links(p.read_text(encoding="utf-8"))
        for p in pages
    }


@FILES
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
            if not file.is_file() or (
                anchor and ids is not None and unquote(anchor) not in ids
            ):
                broken.append(f"{page} → {target}")
    assert not broken, broken[:20]


@FILES
def test_no_page_loads_from_another_host(crawled):
    outside = {
        f"{page}: {x}"
        for page, links in crawled.items()
        for x in links.loaded
        if urlparse(x).netloc
    }
    assert not outside


@FILES
@pytest.mark.parametrize("slug", LESSONS)
def test_downloads_are_the_courses_own_notebooks(book, crawled, slug):
    for kind in ("notebooks", "exercises", "solutions"):
        page = f"/{kind}/{slug}.html"
        (target,) = {
            t
            for t in crawled[page].targets
            if t.endswith(f"_sources/{kind}/{slug}.ipynb")
        }
        file = book / urljoin(page, target).lstrip("/")
        assert file.read_bytes() == (ROOT / kind / f"{slug}.ipynb").read_bytes()


@FILES
@pytest.mark.parametrize("slug", LESSONS)
def test_lesson_leads_to_exercises_and_those_to_solutions(crawled, slug):
    for kind, then in (("notebooks", "exercises"), ("exercises", "solutions")):
        targets = crawled[f"/{kind}/{slug}.html"].targets
        assert any(target.endswith(f"{then}/{slug}.html") for target in targets), (
            f"{kind} → {then}"
        )


@FILES
def test_no_path_of_this_machine_is_published(book):
    here = str(ROOT)
    assert not [
        p.name for p in book.rglob("*.html") if here in p.read_text(encoding="utf-8")
    ]
