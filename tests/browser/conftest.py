"""A headless Chromium and a server for the built book."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]
FLAGS += ["--disable-sync", "--no-first-run"]
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


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
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def book():
    """The built book's folder; it is built when it is not there."""
    out = ROOT / "jupyter-book" / "_build" / "html"
    if not (out / "index.html").is_file():
        from llmlab.course.book.build import build

        build(ROOT)
    return out


@pytest.fixture(scope="session")
def site(book):
    """The address at which the book is served."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(book))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Watched:
    """A page, and what went wrong on it.

    That is requests to other hosts, failed requests, and script errors.
    """

    def __init__(self, page, address: str) -> None:
        self.page, self.faults = page, []
        mine = (address, "data:", "blob:", address.replace("http", "ws"))
        page.on(
            "request",
            lambda r: (
                None if r.url.startswith(mine) else self.faults.append(f"asked {r.url}")
            ),
        )
        page.on(
            "response",
            lambda r: (
                self.faults.append(f"{r.status} {r.url}") if r.status >= 400 else None
            ),
        )
        page.on("pageerror", lambda e: self.faults.append(f"script error: {e}"))
        page.on(
            "console",
            lambda m: (
                self.faults.append(f"console: {m.text}") if m.type == "error" else None
            ),
        )


@pytest.fixture(scope="session")
def shared_contexts(chromium):
    """One browser context per theme.

    Its pages share a cache of scripts, styles and fonts.
    """
    contexts = {}
    yield contexts
    for context in contexts.values():
        context.close()


@pytest.fixture
def open_page(chromium, site, shared_contexts):
    """Opens a page, which is watched until the test ends.

    As in open_page('index.html', theme='dark', width=390).

    `fresh=True` gives it a context of its own: nothing that it stores meets other
    pages.
    """
    own_contexts, watched = [], []

    def open_(name: str, theme: str = "light", width: int = 1280, fresh: bool = False):
        if fresh or theme not in shared_contexts:
            context = chromium.new_context(color_scheme=theme)
            if fresh:
                own_contexts.append(context)
            else:
                shared_contexts[theme] = context
        else:
            context = shared_contexts[theme]
        watched.append(Watched(context.new_page(), site))
        page = watched[-1].page
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"{site}/{name}")
        return page

    yield open_
    for each in watched:
        # What a script asks for late is seen too.
        each.page.wait_for_load_state("networkidle")
        each.page.close()
    for context in own_contexts:
        context.close()
    faults = [fault for each in watched for fault in each.faults]
    assert not faults, faults
