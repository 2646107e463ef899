"""A headless Chromium and a server for the built book."""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "jupyter-book" / "_build" / "html"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]
FLAGS += ["--disable-sync", "--no-first-run"]
LIMIT = 120_000  # milliseconds for one step: a busy machine is several times slower
LATE_TIMERS = """() => new Promise(resolve =>
  setTimeout(resolve, Math.max(0, 500 - performance.now() +
    performance.getEntriesByType('navigation')[0].loadEventEnd)))"""
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)


def pytest_collection_modifyitems(items):
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.browser)
    # The largest pages first, so that two processes end at the same time.
    own = set(mine)
    places = [i for i, item in enumerate(items) if item in own]
    for i, item in zip(places, sorted(mine, key=page_size, reverse=True), strict=True):
        items[i] = item


def page_size(item) -> int:
    """Bytes of the page that a test is about; 0 for any other test."""
    name = getattr(item, "callspec", None) and item.callspec.params.get("name")
    page = HTML / str(name)
    return page.stat().st_size if page.is_file() else 0


@pytest.fixture(scope="session")
def chromium():
    """A browser, found by the environment variable CHROMIUM or by a common name."""
    from playwright.sync_api import sync_playwright

    path = shutil.which(os.environ.get("CHROMIUM", "")) or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if path is None:
        pytest.fail("no Chromium: install one, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=FLAGS, timeout=LIMIT
        )
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files over connections that stay open, and says nothing.

    A file that was had once is not asked for again by the same browser context.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a file waits 40 ms behind its own headers

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """A server with room for all connections that a browser opens at once."""

    request_queue_size = 128


@pytest.fixture(scope="session")
def book():
    """The built book's folder; it is built when it is not there."""
    if not (HTML / "index.html").is_file():
        from llmlab.course.book.build import build

        build(ROOT)
    return HTML


@pytest.fixture(scope="session")
def site(book):
    """The address at which the book is served."""
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(book)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Watched:
    """A page, and what goes wrong on it until `end`.

    That is requests to other hosts, failed requests, and script errors.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.faults: list[str] = []
        self.mine = (address, "data:", "blob:", address.replace("http", "ws"))
        self.unanswered: set[Request] = set()
        self.crashed = False
        self.listeners = {
            "request": self._asks,
            "response": self._answered,
            "requestfinished": self._ends,
            "requestfailed": self._ends,
            "pageerror": lambda error: self.faults.append(f"script error: {error}"),
            "console": self._says,
            "crash": self._crashes,
        }
        for event, listener in self.listeners.items():
            page.on(event, listener)

    def _asks(self, request: Request) -> None:
        if not request.url.startswith(self.mine):
            self.faults.append(f"asked {request.url}")
        if request.url.startswith("http"):
            self.unanswered.add(request)

    def _ends(self, request: Request) -> None:
        self.unanswered.discard(request)

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status} {response.url}")

    def _says(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def _crashes(self, _) -> None:
        self.crashed = True
        self.faults.append("the page crashed")

    def settle(self) -> None:
        """Waits until the page's scripts have asked what they ask late, and for that.

        Timers count in the page's own time: where it is busy, the network is silent
        long before they are due.
        """
        if not self.crashed:
            self.page.evaluate(LATE_TIMERS)
            self.page.wait_for_load_state("networkidle")
        deadline = time.monotonic() + LIMIT / 1000
        while self.unanswered and not self.crashed:
            assert time.monotonic() < deadline, [r.url for r in self.unanswered]
            self.page.wait_for_timeout(10)

    def end(self) -> None:
        """Looks away: what the page does from here on is another test's."""
        for event, listener in self.listeners.items():
            self.page.remove_listener(event, listener)


class Tabs:
    """A tab per theme that one test after the other gets.

    A new tab is a new process with nothing in its memory: it has to read each script
    and style anew, which costs more than the page itself.
    """

    def __init__(self, chromium: Browser, address: str) -> None:
        self.chromium = chromium
        self.address = address
        self.pages: dict[str, Page] = {}
        self.given: dict[str, Watched] = {}

    def watch(self, theme: str, width: int = 1280) -> Watched:
        """The theme's tab, watched; it still shows the last test's page."""
        if theme in self.given:  # the last test ended in the middle of something
            self.given.pop(theme)
            self.pages.pop(theme).context.close()
        if theme not in self.pages:
            context = self.chromium.new_context(color_scheme=theme)
            context.set_default_timeout(LIMIT)
            self.pages[theme] = context.new_page()
        page = self.pages[theme]
        page.set_viewport_size({"width": width, "height": 900})
        self.given[theme] = Watched(page, self.address)
        return self.given[theme]

    def take_back(self, theme: str) -> None:
        """Ends the watch; the next test gets the same tab, unless it crashed."""
        watched = self.given[theme]
        if not watched.crashed:
            watched.end()
            watched.page.evaluate("sessionStorage.clear()")
            del self.given[theme]


@pytest.fixture(scope="session")
def tabs(chromium, site):
    """The tabs that all tests of this process share."""
    tabs = Tabs(chromium, site)
    yield tabs
    for page in tabs.pages.values():
        page.context.close()


@pytest.fixture
def open_page(tabs, chromium, site):
    """Opens a page, which is watched until the test ends.

    As in open_page('index.html', theme='dark', width=390).

    `fresh=True` gives it a context of its own: nothing that it stores meets other
    pages.
    """
    opened = []
    fresh_contexts = []
    themes = []

    def open_(name: str, theme: str = "light", width: int = 1280, fresh: bool = False):
        if fresh:
            context = chromium.new_context(color_scheme=theme)
            context.set_default_timeout(LIMIT)
            fresh_contexts.append(context)
            watched = Watched(context.new_page(), site)
            watched.page.set_viewport_size({"width": width, "height": 900})
        else:
            watched = tabs.watch(theme, width)
            themes.append(theme)
        opened.append(watched)
        watched.page.goto(f"{site}/{name}")
        return watched.page

    yield open_
    for watched in opened:
        watched.settle()
    for theme in themes:
        tabs.take_back(theme)
    for context in fresh_contexts:
        context.close()
    faults = [fault for watched in opened for fault in watched.faults]
    assert not faults, faults
