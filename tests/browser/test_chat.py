"""The chat page of `llmlab serve`: by keyboard, read aloud, in the dark, on a phone."""

from __future__ import annotations

import re

import pytest

from tests.browser import page_checks
from tests.browser.conftest import LIMIT
from tests.inference.serving import live as living

PIECES = (
    {"piece": "free", "exercise": "03", "whose": "yours", "why": ""},
    {"piece": "accept", "exercise": "05", "whose": "ours", "why": "not done yet"},
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = living.make_folder(tmp_path_factory.mktemp("tiny"))
    adapter = living.make_adapter(tmp_path_factory.mktemp("adapter"))
    with living.live(folder, {"sea": adapter}, pieces=PIECES) as server:
        yield server


@pytest.fixture
def page(chromium, server):
    """The page, on which nothing goes wrong and nothing is asked elsewhere."""
    context = chromium.new_context(color_scheme="dark")
    context.set_default_timeout(LIMIT)
    page = context.new_page()
    faults = []
    page.on("console", lambda m: m.type == "error" and faults.append(m.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.base)
    page.locator("#model option").first.wait_for(state="attached")
    page.locator("#most").evaluate("field => field.value = 12")
    yield page
    context.close()
    assert all(url.startswith((server.base, "data:")) for url in asked), asked
    wanted = [fault for fault in faults if "status of 4" not in fault]
    assert not wanted, wanted


def answers(page) -> list[str]:
    """What the model has said, once it is done."""
    page.wait_for_selector("#log[aria-busy=false]")
    return page.locator(".turn.assistant p").all_inner_texts()


def test_a_conversation_by_keyboard(page, server):
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("What is the sea?")
    page.keyboard.press("Enter")
    (said,) = answers(page)
    assert said
    status = page.get_by_role("status").inner_text()
    form = r"Done: \d+ tokens · first after \d+\.\d\d s · \d+\.\d tokens/s"
    assert re.match(form, status), status
    assert page.locator(".turn small").inner_text() in status
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("And")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("the land?")
    page.keyboard.press("Enter")
    assert len(answers(page)) == 2
    turns = page.locator(".turn.user p").all_inner_texts()
    assert turns == ["What is the sea?", "And\nthe land?"]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    assert page.evaluate("document.activeElement.id") == "text"
    server.settles()


def test_the_order_of_focus(page):
    order = ["text", "send", "stop", "SUMMARY", "count"]
    for wanted in order:
        here = "document.activeElement"
        assert page.evaluate(f"{here}.id || {here}.tagName") == wanted
        page.keyboard.press("Tab")
    for wanted in ("model", "fresh", "log"):
        page.locator(f"#{wanted}").focus()
        assert page.evaluate("document.activeElement.id") == wanted


def test_an_answer_can_be_stopped(page, server):
    page.locator("#most").evaluate("field => field.value = 190")
    # a token takes a fifth of a second, so that there is something to stop
    page.locator("#text").fill("Tell me everything.")
    page.evaluate(
        """() => {
          const plain = window.fetch;
          const words = new TextDecoder(), bytes = new TextEncoder();
          window.fetch = async (path, options) => {
            const answer = await plain(path, options);
            if (!path.startsWith('/v1/')) return answer;
            // several tokens may come at once: they go on one after the other
            const stop = control => options.signal.addEventListener('abort', () =>
              control.error(new DOMException('stopped', 'AbortError')));
            const slow = new TransformStream({start: stop,
                transform: async (chunk, control) => {
              for (const part of words.decode(chunk).split(/(?<=\\n\\n)/)) {
                await new Promise(go => setTimeout(go, 200));
                control.enqueue(bytes.encode(part));
              }
            }}, {highWaterMark: 1}, {highWaterMark: 0});
            const body = answer.body.pipeThrough(slow);
            return new Response(body, {status: answer.status});
          };
        }"""
    )
    page.locator("#send").click()
    begun = page.locator(".turn.assistant p").filter(has_text=re.compile("."))
    begun.wait_for()
    page.get_by_role("button", name="Stop").click(timeout=20_000)
    assert len(answers(page)) == 1
    assert page.get_by_role("status").inner_text() == "Stopped."
    assert page.locator(".turn small").inner_text() == "stopped"
    server.settles()


def test_what_goes_wrong_is_said_and_can_be_mended(page):
    page.locator("#text").fill("sea " * 400)
    page.locator("#send").click()
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "may have 200" in alert.inner_text()
    assert answers(page) == []
    assert page.locator("#text").input_value().startswith("sea sea")
    page.locator("#text").fill("sea")
    page.locator("#send").click()
    assert len(answers(page)) == 1
    assert not alert.is_visible()


def test_the_adapter_is_chosen(page):
    page.get_by_label("Model").select_option("sea")
    page.locator("#text").fill("Hello")
    page.locator("#send").click()
    assert answers(page)
    assert page.locator(".turn.assistant h2").inner_text() == "sea"


def test_what_a_model_writes_is_text(page):
    page.evaluate("turn('assistant', '<img src=x onerror=alert(1)><b>bold</b>')")
    assert page.locator(".turn img, .turn b").count() == 0


def test_whose_pieces_they_are_is_shown(page):
    page.get_by_text("1 of 2 pieces of this engine are yours").click()
    rows = page.locator("#pieces tr").all_inner_texts()
    assert [row.split("\t")[:3] for row in rows] == [
        ["free", "yours", "passed its check"],
        ["accept", "ours", "not done yet"],
    ]


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [1280, page_checks.PHONE])
def test_nothing_is_hard_to_read_or_to_reach(page, theme, width):
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#text").fill("Hello " * 20 + "x" * 90)
    page.locator("#send").click()
    answers(page)
    for each in page.locator("summary").all():
        each.click()
    page.evaluate("fault('Something has gone wrong: ' + 'y'.repeat(90))")
    page.evaluate(page_checks.AXE)
    found = page.evaluate("axe.run().then(found => found.violations)")
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
