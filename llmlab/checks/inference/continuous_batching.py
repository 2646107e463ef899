"""Checks of 07-inference/04-continuous-batching.

The plans of an answer are compared on many states of an engine, with what is right and
with what usual mistakes plan.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Real

from llmlab.checks.judging import attempt, first_difference, integer
from llmlab.course.grading.checking import Checks, Mistake
from llmlab.inference import continuous_batching as batching
from llmlab.inference.continuous_batching import (
    Job,
    Limits,
    Plan,
)

check = Checks("07-inference/04-continuous-batching")

State = tuple  # the arguments of an answer
Plain = object  # a result as plain data that can be compared


def judge(
    answer: Callable,
    right: Callable,
    wrongs: Mapping[str, Callable],
    cases: Sequence[State],
    plain: Callable[[object], Plain],
    shown: Callable[[State], str],
    why: Callable[[State, Plain, Plain], str] = lambda case, mine, its: "",
) -> None:
    """Compare an answer in all cases with the right and the wrong ways.

    Args:
        plain: makes a result comparable, or raises a `Mistake`.
        shown: a case in words.
        why: what is wrong with the first result that differs, where that can be seen.
    """
    found = [plain(answer(*case)) for case in cases]
    wanted = [plain(right(*case)) for case in cases]
    n = first_difference(
        found, wanted, wrongs, lambda wrong: results(wrong, cases, plain)
    )
    if n is None:
        return
    case, mine = cases[n], found[n]
    if words := why(case, mine, wanted[n]):
        raise Mistake(f"{words} ({shown(case)})")
    raise Mistake(
        f"for {shown(case)} the result is {mine}, which is not right",
        foreseen=False,
    )


def results(way: Callable, cases: Sequence[State], plain: Callable) -> list | None:
    """What a way gives in all cases, None where it breaks down."""
    return attempt(lambda f, n: plain(f(*cases[n])), way, len(cases))


# States of an engine ------------------------------------------------------------------


def decoding(id: int, computed: int, b: int, own: int | None = None) -> Job:
    """A running request with one token left."""
    blocks = -(-computed // b)
    return Job(id, computed, 1, blocks, blocks if own is None else own)


def drawn(b: int) -> State:
    """A state that an engine can be in."""
    limits = Limits(
        random.choice((4, 9, 20, 40)),
        random.randint(2, 6),
        b,
        chunked=random.random() < 0.7,
    )
    running = []
    for id in range(random.randint(0, limits.max_sequences)):
        computed = random.choice((b, 2 * b, random.randint(1, 4 * b)))
        blocks = -(-computed // b)
        left = random.choice((1, 1, 1, random.randint(2, 15)))
        own = random.choice((blocks, blocks, random.randint(0, blocks)))
        running.append(Job(id, computed, left, blocks, own))
    waiting = []
    for id in range(random.randint(0, 4)):
        found = b * random.choice((0, 0, 1, 2))
        used = random.randint(0, found // b)
        waiting.append(Job(10 + id, found, random.randint(1, 14), used))
    return running, waiting, random.choice((0, 1, 2, 4, 8, 20)), limits


def states() -> list[State]:
    """Those in which one rule alone decides, then many others."""
    b = 4
    limits = Limits(max_tokens=12, max_sequences=4, block_size=b)
    short = Limits(max_tokens=4, max_sequences=4, block_size=b)
    small = Limits(max_tokens=12, max_sequences=4, block_size=b, chunked=False)
    three = [decoding(0, 8, b), decoding(1, 8, b), decoding(2, 8, b)]
    waiting = [Job(10, 0, 20), Job(11, 0, 3), Job(12, 0, 2)]
    fixed: list[State] = [
        ([], [], 9, limits),
        ([], [Job(10 + id, 0, 1) for id in range(6)], 9, limits),
        ([decoding(0, 5, b), Job(1, 8, 30, 2, 2), decoding(2, 6, b)], [], 9, limits),
        ([Job(0, 8, 8, 2, 2), decoding(1, 8, b)], [], 1, short),
        (three, [Job(10, 0, 2)], 0, limits),
        (three, [Job(10, 0, 2)], 3, limits),
        ([decoding(0, 7, b), decoding(1, 8, b)], [Job(10, 0, 1)], 0, limits),
        (three[:1], waiting, 9, limits),
        (three[:1], waiting, 4, limits),
        (three[:1], waiting, 9, small),
        (three[:1], [Job(10, 0, 12)], 9, small),
        ([], [Job(10, 8, 3, 1)], 2, limits),
        ([], [Job(10, 8, 3, 1), Job(11, 0, 4)], 3, limits),
        (
            [decoding(0, 8, b), Job(1, 8, 1, 2, 0), Job(2, 8, 1, 2, 1)],
            [Job(10, 0, 1)],
            0,
            limits,
        ),
    ]
    return fixed + [drawn(random.choice((1, 2, 3, 4))) for _ in range(120)]


def in_words(case: State) -> str:
    """A state of the engine."""
    *jobs, available, limits = case
    names = ("running", "waiting")
    parts = [f"{n}={list(j)}" for n, j in zip(names, jobs, strict=False)]
    return ", ".join([*parts, f"available={available}, limits={limits}"])


def plain_plan(plan: object) -> dict:
    """A plan as plain data."""
    if not isinstance(plan, Plan):
        raise Mistake(f"return a Plan, not a {type(plan).__name__}")
    tokens = {
        id: integer(count, f"the number of tokens of request {id}")
        for id, count in plan.tokens.items()
    }
    found = {"tokens": tokens}
    for name in ("admitted", "preempted"):
        what = f"a request in `{name}`"
        found[name] = [integer(id, what) for id in getattr(plan, name)]
    for id in tokens:
        integer(id, "a request in `tokens`")
    return found


# 1 ------------------------------------------------------------------------------------


def block_cases() -> list[State]:
    """Jobs at every place of a block, with tables that fit or not."""
    cases = []
    for b in (1, 4, 16):
        for computed in (0, 1, b - 1, b, b + 1, 3 * b):
            for count in (1, b - 1, b, b + 1, 2 * b + 3):
                has = -(-computed // b)
                for blocks in {0, has, has + 2, max(0, has - 1)}:
                    if count > 0:
                        own, left = max(0, blocks - 1), count + b
                        cases.append((Job(0, computed, left, blocks, own), count, b))
    return cases


def plain_number(value: object) -> int:
    """A whole number."""
    return integer(value, "the result")


@check.exercise(
    points=1,
    minutes=5,
    difficulty=1,
    importance=4,
    hints=(
        "How many blocks hold `job.computed + count` tokens? Round up.",
        "⌈n / b⌉ is `-(-n // b)`. Those of `job.blocks` are there; never below 0.",
    ),
)
def blocks_needed(answer):
    """Blocks that must be taken before some more tokens can be stored."""
    judge(
        answer,
        batching.blocks_needed,
        wrong_blocks(),
        block_cases(),
        plain_number,
        lambda case: f"{case[0]}, count={case[1]}, block_size={case[2]}",
    )


def wrong_blocks() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""

    def up(n: int, b: int) -> int:
        return -(-n // b)

    return {
        "the tokens that are stored already are left out: the blocks must hold"
        " `job.computed + count`": lambda j, n, b: max(0, up(n, b) - j.blocks),
        "neither what is stored nor the blocks that it has are looked at: the blocks"
        " must hold `job.computed + count`, less `job.blocks`": lambda j, n, b: up(
            n, b
        ),
        "a block that is not full is left out: round up": lambda j, n, b: max(
            0, (j.computed + n) // b - j.blocks
        ),
        "one block too many where the last one is full: ⌈n / b⌉. The token that is"
        " written next is not stored in this step": lambda j, n, b: max(
            0, (j.computed + n) // b + 1 - j.blocks
        ),
        "the blocks that it has are not taken away": lambda j, n, b: up(
            j.computed + n, b
        ),
        "`own` are the blocks that come back when it is sent away; those that it has"
        " are `blocks`": lambda j, n, b: max(0, up(j.computed + n, b) - j.own),
        "a request that has more than it needs takes 0 blocks, not fewer": (
            lambda j, n, b: up(j.computed + n, b) - j.blocks
        ),
        "stored and new tokens are rounded up apart: new ones fill the last block"
        " first": lambda j, n, b: max(0, up(j.computed, b) + up(n, b) - j.blocks),
        "one token too few is counted: all of `computed + count` are stored": (
            lambda j, n, b: max(0, up(j.computed + n - 1, b) - j.blocks)
        ),
        "all that is left was counted: only the `count` tokens of this step": (
            lambda j, n, b: max(0, up(j.computed + j.left, b) - j.blocks)
        ),
        "the blocks that its stored tokens fill were taken off: it may have more, so"
        " take `job.blocks`": lambda j, n, b: up(j.computed + n, b) - up(j.computed, b),
        "blocks of 16 tokens were counted: `block_size` says how many": (
            lambda j, n, b: max(0, up(j.computed + n, 16) - j.blocks)
        ),
    }


# 2 ------------------------------------------------------------------------------------


def running_cases() -> list[State]:
    """States without those who wait."""
    return [(running, available, limits) for running, _, available, limits in states()]


def plain_three(result: object) -> tuple:
    """(plan, budget, available) as plain data."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise Mistake("return three things: the plan, tokens left, blocks left")
    plan, budget, available = result
    return (
        plain_plan(plan),
        integer(budget, "the number of tokens left"),
        integer(available, "the number of blocks left"),
    )


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Go through the list from its front, with an index, for it gets shorter at"
            " its end while you do so: `running = list(running)` first."
        ),
        (
            "A request gets `count = min(job.left, budget)`. While"
            " `blocks_needed(job, count, …) > available`: take the last of the list"
            " away, note it in `preempted`, and add its `own` to `available`."
        ),
        (
            "If the one taken away is the request itself, nobody stands behind it: stop"
            " there. Otherwise take its blocks and its tokens off, and go on."
        ),
    ),
)
def give_running(answer):
    """Tokens for those that run; where no block is left, the last one goes."""
    judge(
        answer,
        batching.give_running,
        wrong_running(),
        running_cases(),
        plain_three,
        in_words_2,
        why_running,
    )


def in_words_2(case: State) -> str:
    """A state without those who wait."""
    running, available, limits = case
    return f"running={list(running)}, available={available}, limits={limits}"


def why_running(case: State, mine: tuple, its: tuple) -> str:
    """What is wrong with a plan for those that run."""
    running = case[0]
    (plan, _, free), (right, _, right_free) = mine, its
    if words := broken(plan):
        return words
    if sorted(plan["preempted"]) == sorted(right["preempted"]):
        if plan["preempted"] != right["preempted"]:
            return "`preempted` is not in the order of going: the last one goes first"
        for job in running:
            asked = right["tokens"].get(job.id)
            if asked and job.id not in plan["tokens"]:
                return (
                    f"request {job.id} gets no token: as many of its {job.left} as the"
                    " budget allows, whether `chunked` or not"
                )
        own = {job.id: job.own for job in running}
        last = right["preempted"][-1:]
        if plan == right and last and right_free - free == own[last[0]]:
            return (
                f"request {last[0]} is sent away, and its `own` blocks are not"
                " available afterwards"
            )
    if running and plan["preempted"] and plan["preempted"][0] != running[-1].id:
        first = plan["preempted"][0]
        return f"request {first} is sent away first: the last of all that run goes"
    if plan != right and plan["tokens"] == right["tokens"]:
        gone, first = plan["preempted"], right["preempted"]
        if first and gone == first[:-1]:
            return (
                f"request {first[-1]} finds no blocks, and nobody is"
                " behind it: it is sent away itself, so note it"
            )
        if len(gone) > len(first) and gone[: len(first)] == first:
            return (
                f"request {gone[-1]} is sent away, though the blocks were"
                " enough for the tokens that the budget allows"
            )
    return ""


def broken(plan: dict) -> str:
    """What no plan may hold."""
    for id, count in plan["tokens"].items():
        if id in plan["preempted"]:
            return f"request {id} is sent away, and has tokens in the plan all the same"
        if not count:
            return f"request {id} is in `tokens` with 0: leave it out"
    return ""


def giving(
    count: Callable = lambda job, budget, limits: min(job.left, budget),
    victim: Callable = lambda running, place: len(running) - 1,
    back: Callable = lambda job: job.own,
    often: bool = True,
    none: str = "send away",
    pay_budget: Callable = lambda job, count: count,
    pay_blocks: Callable = lambda job, count, b: batching.blocks_needed(job, count, b),
    order: Callable = list,
    note: bool = True,
    itself: bool = False,
) -> Callable:
    """`give_running`, and what comes out with one thing changed."""

    def way(running: Sequence[Job], available: int, limits: Limits) -> tuple:
        plan, budget, b = Plan(), limits.max_tokens, limits.block_size
        running = order(running)
        place = 0
        while place < len(running) and budget > 0:
            job = running[place]
            n = count(job, budget, limits)
            gone = False
            while batching.blocks_needed(job, n, b) > available and running:
                if none == "stop":
                    return plan, budget, available
                if none == "skip":
                    gone = True
                    break
                if itself:
                    last = running.pop(place)
                else:
                    last = running.pop(victim(running, place))
                plan.tokens.pop(last.id, None)
                if note:
                    plan.preempted.append(last.id)
                available += back(last)
                gone = last is job
                if gone or not often:
                    break
            if gone and none == "skip":
                place += 1
                continue
            if gone and not itself and place == len(running):
                break
            if gone:
                continue
            place = running.index(job)
            available -= pay_blocks(job, n, b)
            plan.tokens[job.id] = n
            budget -= pay_budget(job, n)
            place += 1
        return plan, budget, available

    return way


def wrong_running() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "everyone gets one token: a prompt that is not read yet gets all that is left"
        " of it, if the budget allows": giving(count=lambda job, budget, limits: 1),
        "more tokens than the budget: a request gets `min(job.left, budget)`": giving(
            count=lambda job, budget, limits: job.left
        ),
        "each is compared with the whole budget: compare with what the others have left"
        " of it": giving(
            count=lambda job, budget, limits: min(job.left, limits.max_tokens)
        ),
        "the budget does not go down": giving(pay_budget=lambda job, count: 0),
        "the budget goes down by 1 for each request: by its tokens": giving(
            pay_budget=lambda job, count: 1
        ),
        "the blocks do not go down: a request takes what `blocks_needed` says": giving(
            pay_blocks=lambda job, count, b: 0
        ),
        "a request takes all blocks of its text again: only what it has not": giving(
            pay_blocks=lambda job, count, b: -(-(job.computed + count) // b)
        ),
        "where no block is left you stop: send the last one away and look": giving(
            none="stop"
        ),
        "who has no block is passed over: send the last one away for it": giving(
            none="skip"
        ),
        "the one that has no block goes: the one that was admitted last does": giving(
            itself=True
        ),
        "the oldest is sent away: the one that was admitted last goes": giving(
            victim=lambda running, place: 0
        ),
        "the next one behind it is sent away: the last of the list goes": giving(
            victim=lambda running, place: min(place + 1, len(running) - 1)
        ),
        "the blocks of those who were sent away do not come back: add `own`": giving(
            back=lambda job: 0
        ),
        "blocks that others share stay theirs: add `own`, not `blocks`": giving(
            back=lambda job: job.blocks
        ),
        "one is sent away at most: go on until the blocks are enough (while, not"
        " if)": giving(often=False),
        "who was sent away is not in `preempted`": giving(note=False),
        "the newest is served first: those who were admitted first come first": giving(
            order=lambda running: list(reversed(running))
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    hints=(
        (
            "First those that run: `plan, budget, available = give_running(…)`."
            " If somebody was sent away, that is the plan."
        ),
        (
            "Then go through `waiting` in its order, with"
            " `room = limits.max_sequences - len(running)`. At the first request that"
            " cannot come in, stop: nobody overtakes."
        ),
        (
            "It cannot come in if there is no room, no token of the budget, no blocks"
            " for its whole text (`job.left`), or if it would be cut and `chunked` is"
            " False. If it comes in, it takes the blocks of `count` tokens only."
        ),
    ),
)
def schedule(answer):
    """The whole plan of a step: those that run, then those that wait."""
    judge(
        answer,
        batching.schedule,
        wrong_schedules(),
        states(),
        plain_plan,
        in_words,
        why_schedule,
    )


def why_schedule(case: State, mine: dict, its: dict) -> str:
    """What is wrong with a whole plan."""
    running, waiting, _, limits = case
    if words := broken(mine):
        return words
    if mine["admitted"] and mine["preempted"]:
        return "somebody comes in while another is sent away"
    for id in mine["admitted"]:
        if id not in mine["tokens"]:
            return f"request {id} comes in, and no tokens are noted for it"
    if len(running) + len(mine["admitted"]) > limits.max_sequences:
        return "more requests run than `max_sequences`"
    if sum(mine["tokens"].values()) > limits.max_tokens:
        return "the plan has more tokens than `max_tokens`"
    for id in its["admitted"]:
        if id not in mine["admitted"]:
            return (
                f"request {id} does not come in, and could: there is room, there are"
                " tokens, and blocks for all that is left of it (`blocks_needed`)"
            )
    stops = next((j for j in waiting if j.id not in its["admitted"]), None)
    for id in mine["admitted"]:
        if stops is None or id in its["admitted"]:
            continue
        if id != stops.id:
            return f"request {id} overtakes request {stops.id}, which cannot come in"
        if mine["tokens"][id] < stops.left and not limits.chunked:
            return f"request {id} is cut, and `chunked` is False"
        return (
            f"request {id} comes in, and cannot: look at what `blocks_needed` says of"
            " all that is left of it, after those before it took theirs"
        )
    return ""


def planning(
    gone: Callable = lambda plan: bool(plan.preempted),
    room: Callable = lambda running, limits: limits.max_sequences - len(running),
    count: Callable = lambda job, budget, limits: min(job.left, budget),
    must_fit: Callable = lambda job, count: job.left,
    short: str = "stop",
    cut: Callable = lambda limits: limits.chunked,
    is_cut: Callable = lambda job, n, limits: n < job.left,
    pays: bool = True,
    pays_blocks: bool = True,
    note: bool = True,
    empty: bool = False,
    order: Callable = list,
    fewer: int = 1,
) -> Callable:
    """`schedule`, and what comes out with one thing changed."""

    def way(
        running: Sequence[Job], waiting: Sequence[Job], available: int, limits: Limits
    ) -> Plan:
        plan, budget, available = batching.give_running(running, available, limits)
        if gone(plan):
            return plan
        places, b = room(running, limits), limits.block_size
        for job in order(waiting):
            n = count(job, budget, limits)
            if places <= 0 or (n == 0 and not empty):
                break
            cannot = is_cut(job, n, limits) and not cut(limits)
            cannot |= batching.blocks_needed(job, must_fit(job, n), b) > available
            if cannot and short == "stop":
                break
            if cannot:
                continue
            if pays_blocks:
                available -= batching.blocks_needed(job, n, b)
            plan.tokens[job.id] = n
            if note:
                plan.admitted.append(job.id)
            budget -= n if pays else 0
            places -= fewer
        return plan

    return way


def prompts_first(
    running: Sequence[Job], waiting: Sequence[Job], available: int, limits: Limits
) -> Plan:
    """Those who wait take from the budget before those that run."""
    room = limits.max_sequences - len(running)
    first = planning(room=lambda *_: room)([], waiting, available, limits)
    spent = sum(first.tokens.values())
    if spent == limits.max_tokens:
        return first
    taken = sum(
        batching.blocks_needed(job, first.tokens.get(job.id, 0), limits.block_size)
        for job in waiting
        if job.id in first.tokens
    )
    rest = Limits(
        limits.max_tokens - spent,
        limits.max_sequences,
        limits.block_size,
        limits.chunked,
    )
    plan, _, _ = batching.give_running(running, available - taken, rest)
    return Plan({**first.tokens, **plan.tokens}, first.admitted, plan.preempted)


def wrong_schedules() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "somebody comes in while another is sent away: return the plan of those that"
        " run if `preempted` is not empty": planning(gone=lambda plan: False),
        "more requests run than `max_sequences`": planning(
            room=lambda running, limits: 10**6
        ),
        "those that run count, too: there is room for"
        " `max_sequences - len(running)`": planning(
            room=lambda running, limits: limits.max_sequences
        ),
        "the room does not get smaller while requests come in": planning(fewer=0),
        "nobody comes in": planning(room=lambda running, limits: 0),
        "only one comes in: as many as the limits allow": planning(fewer=10**6),
        "a request that does not fit is passed over, and others overtake it: stop at"
        " the first that cannot come in": planning(short="skip"),
        "blocks for its first part are not enough: a prompt comes in only if there are"
        " blocks for all that is left of it": planning(must_fit=lambda job, n: n),
        "the blocks were not looked at": planning(
            must_fit=lambda job, n: -job.computed
        ),
        "the blocks that it takes do not go down": planning(pays_blocks=False),
        "a prompt is cut though `chunked` is False": planning(cut=lambda limits: True),
        "a prompt is cut that has no more than `max_tokens` left: others took from the"
        " budget before it": planning(
            is_cut=lambda job, n, limits: job.left > limits.max_tokens
        ),
        "a prompt is never cut: with `chunked` it gets what is left of the"
        " budget": planning(cut=lambda limits: False),
        "a request came in with 0 tokens: stop when the budget is spent": planning(
            empty=True
        ),
        "those that came in do not use up the budget": planning(pays=False),
        "who comes in gets more than what those that run have left of the"
        " budget": planning(
            count=lambda job, budget, limits: min(job.left, limits.max_tokens)
        ),
        "tokens that were found in the cache are computed again: `left` is without"
        " them": planning(
            count=lambda job, budget, limits: min(job.computed + job.left, budget)
        ),
        "who comes in is not in `admitted`": planning(note=False),
        "the last that came goes first: `waiting` is in the right order": planning(
            order=lambda waiting: list(reversed(waiting))
        ),
        "the shortest prompt goes first: first come, first served": planning(
            order=lambda waiting: sorted(waiting, key=lambda job: job.left)
        ),
        "prompts take from the budget before those that run, whose users see their text"
        " stop": prompts_first,
    }


# 4 ------------------------------------------------------------------------------------


def latency_cases() -> list[State]:
    """Requests that come while others run; one token, and many."""
    cases: list[State] = [
        ([1.0, 2.0], [[3.0, 3.5, 4.5], [2.5]]),
        ([0.0], [[0.25, 1.0, 1.5, 4.0]]),
    ]
    for _ in range(3):
        arrivals = sorted(random.random() * 9 for _ in range(4))
        times = []
        for arrival in arrivals:
            now, written = arrival, []
            for _ in range(random.randint(2, 5)):
                now += 0.1 + random.random()
                written.append(now)
            times.append(written)
        cases.append((arrivals, times))
    return cases


def plain_latencies(result: object) -> tuple:
    """Two lists of numbers, rounded so that they can be compared."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Mistake("return two lists: times to first tokens, times between tokens")
    found = []
    for name, values in zip(("TTFT", "ITL"), result, strict=True):
        if not isinstance(values, list | tuple):
            raise Mistake(f"{name} is a {type(values).__name__}, where a list is asked")
        for value in values:
            if isinstance(value, list | tuple):
                raise Mistake(
                    f"{name} holds a list for each request: one list of numbers over"
                    " all requests"
                )
            if not isinstance(value, Real):
                raise Mistake(f"{name} holds {value!r}, where numbers are asked")
        found.append([round(float(value), 9) for value in values])
    return tuple(found)


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "TTFT is one number per request: its first time minus its arrival. ITL are"
            " many: each token but the first has one."
        ),
        (
            "`zip(written, written[1:])` pairs each time with the next one of the same"
            " request. Put all differences into one list."
        ),
    ),
)
def latencies(answer):
    """Times to first tokens, and times between tokens, of all requests."""
    judge(
        answer,
        batching.latencies,
        wrong_latencies(),
        latency_cases(),
        plain_latencies,
        lambda case: f"arrivals={case[0]}, times={case[1]}",
    )


def wrong_latencies() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    right = batching.latencies

    def gaps(written: Sequence[float]) -> list[float]:
        return [b - a for a, b in pairwise(written)]

    def with_ttft(change: Callable) -> Callable:
        return lambda a, t: (change(a, t), right(a, t)[1])

    def with_itl(change: Callable) -> Callable:
        return lambda a, t: (right(a, t)[0], change(a, t))

    return {
        "TTFT is counted from the start of the clock: from each request's"
        " arrival": with_ttft(lambda a, t: [w[0] for w in t]),
        "TTFT is counted from the first arrival of all: from its own": with_ttft(
            lambda a, t: [w[0] - a[0] for w in t]
        ),
        "TTFT runs to the last token: to the first": with_ttft(
            lambda a, t: [w[-1] - x for x, w in zip(a, t, strict=True)]
        ),
        "TTFT is negative: the token's time minus the arrival": with_ttft(
            lambda a, t: [x - w[0] for x, w in zip(a, t, strict=True)]
        ),
        "the time to the first token is among the ITL: it is TTFT": with_itl(
            lambda a, t: [g for x, w in zip(a, t, strict=True) for g in gaps([x, *w])]
        ),
        "ITL is one mean per request, which hides its longest gap: give all"
        " gaps": with_itl(
            lambda a, t: [sum(gaps(w)) / len(gaps(w)) for w in t if len(w) > 1]
        ),
        "ITL is one mean over all: give all gaps": with_itl(
            lambda a, t: [
                sum(g for w in t for g in gaps(w)) / sum(len(w) - 1 for w in t)
            ]
        ),
        "the gaps run across requests: each user sees only their own tokens": with_itl(
            lambda a, t: gaps(sorted(x for w in t for x in w))
        ),
        "the gaps run from the end of one request to the start of the next": with_itl(
            lambda a, t: gaps([x for w in t for x in w])
        ),
        "ITL is counted from the first token: from the token before": with_itl(
            lambda a, t: [x - w[0] for w in t for x in w[1:]]
        ),
        "ITL is negative: later minus earlier": with_itl(
            lambda a, t: [-g for w in t for g in gaps(w)]
        ),
        "the gaps are sorted: leave them in the order of the tokens": with_itl(
            lambda a, t: sorted(right(a, t)[1])
        ),
        "a request with one token has an ITL of 0: it has none": with_itl(
            lambda a, t: [g for w in t for g in gaps(w) or [0.0]]
        ),
        "both differences are the wrong way round: later minus earlier": (
            lambda a, t: tuple([-x for x in part] for part in right(a, t))
        ),
        "the last gap of each request is missing": with_itl(
            lambda a, t: [g for w in t for g in gaps(w)[:-1]]
        ),
        "the first gap of each request is missing": with_itl(
            lambda a, t: [g for w in t for g in gaps(w)[1:]]
        ),
        "the two lists are the wrong way round": lambda a, t: right(a, t)[::-1],
    }
