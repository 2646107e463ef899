"""A stepper in a page of its own, without a kernel: by keyboard, by pointer, edited."""

from __future__ import annotations

import json
import random

import pytest
import torch

from llmlab.course import inline
from llmlab.course.steppers import all_reduce_trace, player, schedule_trace
from llmlab.parallelism.collectives import halving, ring
from llmlab.parallelism.pipeline import (
    Costs,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    zb_h1,
)
from tests.browser import page_checks
from tests.course.test_steps import SCHEDULES

PAGE = """<!doctype html><html lang="en" data-theme="{theme}"><head>
<meta charset="utf-8"><title>Steppers</title>
<meta name="viewport" content="width=device-width">
<style>html[data-theme=dark] body {{ background: #14181e; color: #ddd }}</style>
</head><body><main><h1>Steppers</h1>{body}</main></body></html>"""


@pytest.fixture
def show(chromium):
    """show(html, …): a page with these steppers. It may fetch nothing, nor fail."""
    contexts = []
    faults = []

    def show_(*figures: str, theme="light", width=1280, **settings):
        context = chromium.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        page.on("request", lambda request: faults.append(f"asked {request.url}"))
        page.set_content(PAGE.format(theme=theme, body="".join(figures)))
        return page

    yield show_
    for context in contexts:
        context.close()
    assert not faults, faults


def html(trace, title="", start="last") -> str:
    traces = trace if isinstance(trace, dict) else {"": trace}
    return player.as_html(traces, title, start)


def told(page, i: int = 0) -> str:
    """The sentence of the i-th stepper."""
    return page.locator(".s-alt").nth(i).inner_text()


def focus(page, part: str = ".s-stage", i: int = 0):
    page.locator(f".llmlab-steps {part}").nth(i).focus()


def press(page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


# Playing ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [".s-stage", ".s-bar input", ".s-play"])
def test_the_keys_go_through_the_steps(show, part):
    trace = all_reduce_trace(ring.all_reduce(4), 4)
    page = show(html(trace, start="first"))
    alts = [step.alt for step in trace.steps]
    focus(page, part)
    assert told(page) == alts[0]
    press(page, "ArrowRight", "ArrowRight")
    assert told(page) == alts[2]
    press(page, "ArrowLeft")
    assert told(page) == alts[1]
    press(page, "End")
    assert told(page) == alts[-1]
    press(page, "ArrowRight")
    assert told(page) == alts[-1]
    press(page, "Home")
    assert told(page) == alts[0]
    assert page.locator("svg[role=img]").get_attribute("aria-label") == alts[0]
    assert page.locator(".s-alt").get_attribute("aria-live") == "polite"


def test_every_step_of_both_scenes_is_what_python_says(show):
    schedule = schedule_trace(one_f_one_b(3, 4))
    collective = all_reduce_trace(halving.all_reduce(4), 4)
    page = show(html(schedule, start="first"), html(collective, start="first"))
    for i, trace in enumerate((schedule, collective)):
        focus(page, i=i)
        for step in trace.steps:
            assert told(page, i) == step.alt
            press(page, "ArrowRight")
    assert told(page, 0) == schedule.steps[-1].alt, "the other one stays where it was"


def test_buttons_and_the_scrub_bar(show):
    trace = schedule_trace(gpipe(2, 2))
    page = show(html(trace))
    assert told(page) == trace.steps[-1].alt
    page.get_by_label("First step").click()
    assert told(page) == trace.steps[0].alt
    page.get_by_label("One step forward").click()
    page.get_by_label("One step forward").click()
    page.get_by_label("One step back").click()
    assert told(page) == trace.steps[1].alt
    scrub = page.locator(".s-bar input")
    scrub.fill("5")
    assert told(page) == trace.steps[5].alt
    assert scrub.get_attribute("aria-valuetext") == "step 5 of 8"
    assert page.locator(".s-count").inner_text() == "5 / 8"


def test_space_plays_and_pauses(show):
    trace = schedule_trace(gpipe(2, 2))
    page = show(html(trace))
    focus(page)
    press(page, " ")
    assert page.get_by_label("Pause").count() == 1
    assert page.locator(".s-alt").get_attribute("aria-live") == "off"
    page.wait_for_function("document.querySelector('.s-bar input').value === '3'")
    press(page, " ")
    now = page.locator(".s-count").inner_text()
    page.wait_for_timeout(1600)
    assert page.locator(".s-count").inner_text() == now
    assert page.get_by_label("Play", exact=True).count() == 1


def test_it_plays_to_the_end_and_stops(show):
    page = show(html(schedule_trace(naive(1, 1))))
    page.get_by_label("Play", exact=True).click()
    page.wait_for_function("document.querySelector('.s-bar input').value === '2'")
    assert page.get_by_label("Play", exact=True).count() == 1
    assert "All is done" in told(page)


def wrong(comm, x):
    """A ring that adds one round too long."""
    p, r = comm.size, comm.rank
    chunks = list(x.chunk(p))
    for s in range(2 * (p - 1)):
        place = (r - s - 1) % p
        got = comm.sendrecv(chunks[(r - s) % p], (r + 1) % p, (r - 1) % p)
        chunks[place] = chunks[place] + got if s < p else got
    return torch.cat(chunks)


def test_a_learners_own_stops_at_the_first_wrong_chunk(show):
    trace = all_reduce_trace(wrong, 3)
    page = show(html(trace, start="first"))
    page.get_by_label("Play", exact=True).click()
    page.wait_for_function("document.querySelector('.s-alt.s-fault')", timeout=20_000)
    page.wait_for_timeout(1500)
    assert page.locator(".s-count").inner_text() == f"{trace.stop} / 9"
    assert told(page) == trace.steps[trace.stop].alt
    assert "rank 0 adds chunk 0 (0+1+2)" in told(page)
    assert page.locator(".s-mark.k-wrong").count() == 3
    assert page.locator(".s-twice").count() == 3


def test_marks_say_their_value_and_line(show):
    trace = all_reduce_trace(wrong, 3)
    page = show(html(trace, start="first"))
    focus(page)
    press(page, "ArrowRight", "ArrowUp")
    look = page.locator(".s-look")
    assert look.locator("span").inner_text() == "rank 2 sends chunk 2 (2) to rank 0"
    assert look.locator("code").inner_text() == (
        "got = comm.sendrecv(chunks[(r - s) % p], (r + 1) % p, (r - 1) % p)"
    )
    assert look.get_attribute("aria-live") == "polite"
    press(page, "ArrowDown")
    assert look.locator("span").inner_text() == "rank 0, chunk 0: its own"
    page.locator("[data-id='1/2'] .s-cell").hover()
    assert look.locator("span").inner_text() == "rank 1, chunk 2: its own"
    assert page.locator(".s-looked").get_attribute("data-id") == "1/2"


def test_buttons_choose_what_is_played(show):
    traces = {
        "ring": all_reduce_trace(ring.all_reduce(4), 4),
        "halving": all_reduce_trace(halving.all_reduce(4), 4),
    }
    page = show(html(traces))
    page.get_by_role("button", name="halving").click()
    assert page.locator(".s-count").inner_text() == "9 / 9"
    pressed = page.locator(".s-choice [aria-pressed=true]")
    assert pressed.all_inner_texts() == ["halving"]


# The schedule's rules -----------------------------------------------------------------


def variants():
    """The course's schedules, and each with its lists disordered, also to deadlock."""
    dice = random.Random(5)
    for make, layout in SCHEDULES:
        for p, m in ((1, 1), (2, 4), (3, 6), (4, 8)):
            schedule = make(p, m)
            yield schedule, layout
            for _ in range(4):
                other = [list(ops) for ops in schedule]
                for ops in other:
                    for _ in range(dice.randint(0, 3)):
                        op = ops.pop(dice.randrange(len(ops)))
                        ops.insert(dice.randrange(len(ops) + 1), op)
                yield other, layout
                near = [list(ops) for ops in schedule]
                ops = dice.choice(near)
                k = dice.randrange(len(ops))
                ops.insert(max(0, k - 1), ops.pop(k))
                yield near, layout


@pytest.mark.parametrize(
    "costs", [Costs(), Costs(1.2, 0.9, 0.7, 0.3)], ids=["whole", "uneven"]
)
def test_the_page_and_python_find_the_same(show, costs):
    traces = [
        schedule_trace(schedule, layout=layout, costs=costs)
        for schedule, layout in variants()
    ]
    stuck = sum(trace.stop is not None for trace in traces)
    assert 50 < stuck < len(traces) - 50
    page = show()
    page.add_script_tag(content=inline.script("steps_pipeline.js"))
    # as text, which crosses faster than objects
    found = page.evaluate(
        "plans => JSON.stringify(JSON.parse(plans).map(llmlabPipeline))",
        json.dumps([dict(trace.plan) for trace in traces]),
    )
    for trace, here in zip(traces, json.loads(found), strict=True):
        del here["result"]
        assert here == json.loads(json.dumps(trace.data())), trace.plan["lists"]


# The editor ---------------------------------------------------------------------------


@pytest.fixture
def editor(show):
    trace = schedule_trace(gpipe(2, 4), goal={"time": 15, "peak": 2})
    return show(html(trace))


def said(page) -> str:
    return page.locator(".s-said").inner_text()


def to_place(page, rank: int, place: int) -> None:
    """Chooses an op by keyboard."""
    page.locator(".s-op[aria-pressed=true]").focus()
    press(page, *["ArrowUp"] * 2, "Home", *["ArrowDown"] * rank)
    press(page, *["ArrowRight"] * place)


def test_a_deadlock_is_named_at_once(editor):
    to_place(editor, 0, 4)
    press(editor, "Shift+ArrowLeft", "Shift+ArrowLeft")
    deadlock = (
        "Deadlock: rank 0 cannot begin B0: it waits for B0 of rank 1; rank 1 cannot"
        " begin F2: it waits for F2 of rank 0."
    )
    assert said(editor) == f"rank 0: B0 before F2. {deadlock}"
    assert told(editor) == deadlock
    assert editor.locator(".s-op.k-stuck").all_inner_texts() == ["B0", "F2"]
    assert editor.locator(".s-mark.k-stuck").count() == 2
    assert editor.locator(".s-goal").inner_text().startswith("Goal")


def test_the_goal_is_reached_by_keyboard(editor):
    # rank 1 first: each backward right after its forward
    for place, moves in ((4, 3), (5, 2), (6, 1)):
        to_place(editor, 1, place)
        press(editor, *["Shift+ArrowLeft"] * moves)
        assert "Deadlock" not in said(editor)
    assert editor.locator(".s-goal").inner_text().startswith("Goal")
    for place, moves in ((4, 2), (5, 1)):
        to_place(editor, 0, place)
        press(editor, *["Shift+ArrowLeft"] * moves)
    goal = editor.locator(".s-goal").inner_text()
    assert goal == (
        "✓ Reached: it takes at most 15, and no rank holds more than 2 microbatches at"
        " once."
    )
    assert said(editor).endswith("at most held 3, 1 → 2, 1. The goal is reached.")
    editor.get_by_role("button", name="as Python").click()
    found = eval(editor.locator("textarea").input_value())
    assert found == one_f_one_b(2, 4)


def test_moves_can_be_undone_and_begun_again(editor):
    before = editor.locator(".s-rows").inner_text()
    to_place(editor, 1, 4)
    press(editor, "Shift+ArrowLeft")
    after_one = editor.locator(".s-rows").inner_text()
    press(editor, "Shift+ArrowLeft")
    assert said(editor).startswith("rank 1: B0 before F2. Time")
    editor.get_by_role("button", name="undo").click()
    assert editor.locator(".s-rows").inner_text() == after_one != before
    editor.get_by_role("button", name="later").click()
    editor.get_by_role("button", name="start again").click()
    assert editor.locator(".s-rows").inner_text() == before
    editor.get_by_role("button", name="undo").click()
    assert said(editor) == "There is nothing to undo."


def test_what_it_was_before_stays_in_sight(editor):
    to_place(editor, 1, 4)
    press(editor, "Shift+ArrowLeft")
    assert editor.locator(".s-before").count() == 0, "the time is the same"
    to_place(editor, 0, 7)
    press(editor, "Shift+ArrowLeft")
    assert said(editor).startswith("rank 0: B3 before B2. Time 15 → 17; waiting 20% →")
    assert editor.locator(".s-before").count() == 1


def test_a_bar_chooses_its_op_and_an_end_is_an_end(editor):
    editor.locator("[data-id='1/B2'] rect").click()
    chosen = editor.locator(".s-op[aria-pressed=true]")
    assert chosen.get_attribute("aria-label") == "B2, place 7 of rank 1"
    to_place(editor, 0, 0)
    press(editor, "Shift+ArrowLeft")
    assert said(editor) == "It is the first of its list."


# For everybody ------------------------------------------------------------------------


@pytest.fixture
def all_kinds():
    """One of each: lanes with an editor, a deadlock, a ring, a fault."""
    return [
        html(
            {
                "zero bubble": schedule_trace(zb_h1(4, 8)),
                "two chunks": schedule_trace(interleaved(4, 8)),
            },
            "Schedules",
        ),
        html(
            schedule_trace(
                [one_f_one_b(1, 2)[0], gpipe(1, 2)[0]], goal={"time": 9, "peak": 1}
            ),
            "Stuck",
        ),
        html(all_reduce_trace(ring.all_reduce(6), 6), "Six ranks", "first"),
        html(all_reduce_trace(wrong, 3), "A wrong one"),
    ]


def test_axe_finds_nothing_in_either_theme(show, all_kinds):
    page = show(*all_kinds)
    page_checks.prepare(page)
    assert page_checks.axe_faults(page, "dark") == []
    assert page_checks.axe_faults(page, "light") == []


CONTRASTS = """() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / 255).map(
      x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((one, other) => other - one);
    return (x + 0.05) / (y + 0.05);
  };
  const style = (element, name) => getComputedStyle(element)[name];
  const found = [];
  for (const text of document.querySelectorAll('.llmlab-steps svg text')) {
    const figure = text.closest('.llmlab-steps');
    const rects = text.closest('g.s-mark')?.querySelectorAll('rect') || [];
    const under = [...rects].map(rect => style(rect, 'fill')).find(x => x !== 'none');
    const least = ratio(style(text, 'fill'), under || style(figure, 'backgroundColor'));
    if (least < 4.5) found.push([text.textContent, least, text.outerHTML]);
  }
  return found;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_in_pictures_has_contrast(show, all_kinds, theme):
    page = show(*all_kinds, theme=theme)
    assert page.evaluate(CONTRASTS) == []
    page.get_by_role("button", name="two chunks").click()
    assert page.evaluate(CONTRASTS) == []


def test_a_phone_shows_all_of_it(show, all_kinds):
    page = show(*all_kinds, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = """() => [...document.querySelectorAll('.llmlab-steps svg text')].filter(
        text => text.getBoundingClientRect().height < 11).map(text => text.outerHTML)"""
    assert page.evaluate(small) == []
    cut = """() => [...document.querySelectorAll('.s-stage')].filter(
        stage => stage.scrollWidth > stage.clientWidth + 1).length"""
    assert page.evaluate(cut) == 0
    low = """() => [...document.querySelectorAll('.llmlab-steps button')].filter(
        each => each.checkVisibility() && each.getBoundingClientRect().height < 24
    ).length"""
    assert page.evaluate(low) == 0


def test_focus_is_seen(show):
    page = show(html(schedule_trace(gpipe(2, 2))))
    press(page, *["Tab"] * 2)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize(
    ("motion", "name"), [("no-preference", "s-grow"), ("reduce", "none")]
)
def test_nothing_moves_for_who_wants_no_motion(show, motion, name):
    page = show(html(schedule_trace(gpipe(2, 2)), start="first"), reduced_motion=motion)
    focus(page)
    press(page, "ArrowRight")
    found = "getComputedStyle(document.querySelector('.s-fresh rect')).animationName"
    assert page.evaluate(found) == name
