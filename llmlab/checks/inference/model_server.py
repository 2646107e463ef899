"""Checks of 07-inference/07-model-server.

An answer is run on a list of cases. What it does in all of them is compared with what
usual mistakes do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from llmlab.checks.judging import attempt, first_difference, integer
from llmlab.course.grading.checking import Checks, Mistake, expect
from llmlab.inference import model_server as ms
from llmlab.inference.model_server import NUMPY, Batching, Step, Waiting

check = Checks("07-inference/07-model-server")

Run = Callable[[Callable, int], Any]  # (function, case) → what it does, as plain data


def judge(
    answer: Callable,
    run: Run,
    right: Callable,
    mistakes: Mapping[str, Callable],
    cases: Sequence,
    show: Callable[[Any], str],
    why: Callable[[Any, Any, Any], str] = lambda case, mine, its: "",
) -> None:
    """Compare what an answer does in all cases with the right and the wrong ways.

    Args:
        show: a case in words.
        why: what is wrong with the first result that differs, where that can be seen.
    """
    found = [run(answer, n) for n in range(len(cases))]
    wanted = [run(right, n) for n in range(len(cases))]
    n = first_difference(
        found, wanted, mistakes, lambda wrong: attempt(run, wrong, len(cases), found)
    )
    if n is None:
        return
    words = why(cases[n], found[n], wanted[n])
    gave = f"this gave {found[n]}, which is not right"
    raise Mistake(f"{show(cases[n])}: {words or gave}", foreseen=bool(words))


# 1 ------------------------------------------------------------------------------------

Decision = tuple[list[Waiting], float, Batching]


def waiting(*sizes: int, shapes: str = "", arrived: float = 0.0) -> list[Waiting]:
    """Requests of these sizes, each an eighth of a second after the one before."""
    names = shapes or "a" * len(sizes)
    return [
        Waiting(arrived + n / 8, size, (name,))
        for n, (size, name) in enumerate(zip(sizes, names, strict=True))
    ]


def decision_cases() -> list[Decision]:
    """Each rule alone, and where two of them meet."""
    two = Batching((4, 8), 2.0, 12)
    none = Batching((), 2.0, 6)
    ones = [1] * 20
    return [
        (waiting(1), 0.5, two),
        (waiting(1, arrived=1.0), 1.5, two),
        (waiting(1, 1, 1), 2.0, two),
        (waiting(1, 1, 1), 2.25, two),
        (waiting(1, 1, 1), 1.0, two),
        (waiting(*ones[:4]), 1.0, two),
        (waiting(*ones[:6]), 1.0, two),
        (waiting(*ones[:6]), 2.0, two),
        (waiting(*ones[:9]), 1.5, two),
        (waiting(*ones[:14]), 1.75, two),
        (waiting(*ones[:14]), 3.0, two),
        (waiting(*ones[:12]), 3.0, two),
        (waiting(2, 1), 1.0, two),
        (waiting(2, 1), 2.0, two),
        (waiting(3, 3), 1.0, two),
        (waiting(3, 3, 3), 1.0, two),
        (waiting(3, 3, 3), 2.0, two),
        (waiting(1, 2, 2), 1.0, two),
        (waiting(2, 2, 2), 1.0, two),
        (waiting(1, 2, 2, 1), 1.0, two),
        (waiting(10), 0.5, two),
        (waiting(7, 7), 2.0, two),
        (waiting(7, 6), 1.0, two),
        (waiting(2, 1, shapes="ab"), 1.0, two),
        (waiting(2, 1, 1, shapes="aba"), 1.0, two),
        (waiting(1, 1, 1, 1, 1, shapes="aaabb"), 1.0, two),
        (waiting(1, 1, 1, shapes="aba"), 2.0, two),
        (waiting(*ones[:3]), 1.0, none),
        (waiting(*ones[:6]), 1.0, none),
        (waiting(*ones[:7]), 1.0, none),
        (waiting(*ones[:3]), 1.0, Batching((4,), 0.0, 12)),
        (waiting(*ones[:6]), 1.0, Batching((4,), 0.0, 12)),
        (waiting(1), 0.0, Batching((), 0.0, 6)),
        (waiting(*ones[:8]), 1.0, Batching((), 0.0, 6)),
    ]


def run_decision(answer: Callable, n: int, cases: Sequence | None = None) -> tuple:
    """Case n: (count, when to ask again)."""
    queue, now, batching = (cases or decision_cases())[n]
    what = "next_batch(queue, now, batching)"
    got = expect(answer(queue, now, batching), kind=(tuple, list), what=what)
    if len(got) != 2:
        raise Mistake(f"{what} returned {len(got)} things: (count, when to ask again)")
    count = integer(got[0], "the count")
    again = got[1]
    if again is not None:
        if isinstance(again, bool) or not isinstance(again, Real):
            raise Mistake(
                f"the time to ask again is {again!r:.60}, not a number or None"
            )
        again = float(again)
    return count, again


def shown_decision(case: Decision) -> str:
    """'sizes 1, 1 (shapes a, b) at 1.0, …'."""
    queue, now, batching = case
    sizes = ", ".join(str(w.size) for w in queue)
    shapes = {w.shape for w in queue}
    other = (
        "" if len(shapes) < 2 else f" (shapes {', '.join(w.shape[0] for w in queue)})"
    )
    return (
        f"sizes {sizes}{other}, the oldest from {queue[0].arrived:g}, now {now:g},"
        f" delay {batching.delay:g}, preferred {batching.preferred}, at most"
        f" {batching.max_batch}"
    )


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Go through the queue from its front and keep the sum of the sizes. Stop at"
            " a request that has another shape than the first, or would make the sum"
            " larger than `max_batch`: then the batch cannot grow."
        ),
        (
            "On the way remember `best`: how many requests there were when the sum was"
            " last a preferred size. If there is none yet and the next request would"
            " bring the sum over `preferred[-1]`, `best` is the count before it."
        ),
        (
            "At the end: late → `(count, None)`; else `best` → `(best, None)`; else"
            " stopped, or the sum has reached `preferred[-1]`, or delay 0 →"
            " `(count, None)`; else `(0, queue[0].arrived + batching.delay)`."
        ),
    ),
)
def next_batch(answer):
    """How many requests at the front of the queue leave now, as one batch."""
    cases = decision_cases()
    if run_decision(answer, 0, [([], 1.0, Batching((), 2.0, 6))]) != (0, None):
        raise Mistake("of an empty queue nothing leaves, and nothing is due: (0, None)")
    right, wrong = ms.next_batch, wrong_decisions()
    judge(answer, run_decision, right, wrong, cases, shown_decision, why_decision)
    more = [random_decision() for _ in range(150)]

    def run(function: Callable, n: int) -> tuple:
        return run_decision(function, n, more)

    judge(answer, run, right, {}, more, shown_decision, why_decision)


def why_decision(case: Decision, mine: tuple, its: tuple) -> str:
    """Which rule decides, or that a batch cannot be so large."""
    queue, now, batching = case
    front = front_of(queue, batching)
    if mine[0] > front:
        return (
            f"{mine[0]} leave, and only {front} may share a batch: of one shape, in"
            " their order, together at most `max_batch`"
        )
    totals = [sum(w.size for w in queue[:k]) for k in range(len(queue) + 1)]
    top = batching.preferred[-1]
    rules = {
        1: batching.delay > 0 and now >= queue[0].arrived + batching.delay,
        2: any(total in batching.preferred for total in totals[1 : front + 1]),
        3: any(total > top for total in totals[2 : front + 2]),
        4: front < len(queue) or totals[front] >= top,
        5: batching.delay == 0,
        6: True,
    }
    rule = next(number for number, holds in rules.items() if holds)
    return f"this gave {mine}, which is not right: rule {rule} of the text decides here"


def front_of(queue: Sequence[Waiting], batching: Batching) -> int:
    """How many requests may share a batch with the first."""
    total = queue[0].size
    for k, request in enumerate(queue[1:], start=1):
        total += request.size
        if request.shape != queue[0].shape or total > batching.max_batch:
            return k
    return len(queue)


def random_decision() -> Decision:
    """A queue of anything."""
    max_batch = random.randint(1, 9)
    preferred = [random.randint(1, max_batch) for _ in range(random.randint(0, 2))]
    sizes = [random.randint(1, max_batch) for _ in range(random.randint(1, 8))]
    shapes = "".join(random.choice("aaab") for _ in sizes)
    delay = random.choice([0.0, 1.0, 2.0])
    now = random.choice([0.0, 0.5, 1.0, 2.0]) + len(sizes) / 8
    queue = waiting(*sizes, shapes=shapes)
    return queue, now, Batching(tuple(preferred), delay, max_batch)


def deciding(
    oldest: Callable = lambda queue: queue[0].arrived,
    late: Callable = lambda now, due: now >= due,
    late_without_delay: bool = False,
    extent: Callable = lambda request: request.size,
    room: Callable = lambda total, most: total <= most,
    same: Callable = lambda a, b: a.shape == b.shape,
    best: Callable = max,
    wished: Callable = lambda total, count, preferred: total in preferred,
    wishes: bool = True,
    wishes_when_late: bool = False,
    passing: bool = True,
    stopping: bool = True,
    filled: bool = True,
    at_once: Callable = lambda delay: delay == 0,
    again: Callable = lambda queue, now, delay: queue[0].arrived + delay,
    all_late: Callable = lambda queue, front: front,
    result: Callable = lambda count, queue: count,
) -> Callable:
    """`next_batch`, and what comes out with one thing changed."""

    def way(queue: Sequence[Waiting], now: float, batching: Batching) -> tuple:
        if not queue:
            return 0, None
        totals = [sum(extent(w) for w in queue[:k]) for k in range(len(queue) + 1)]
        top = batching.preferred[-1]
        fronts = [1]
        for k in range(2, len(queue) + 1):
            fits = room(totals[k], batching.max_batch)
            if not fits or not same(queue[k - 1], queue[0]):
                break
            fronts.append(k)
        front = fronts[-1]

        def leave(count: int) -> tuple:
            return result(count, queue), None

        good = [k for k in fronts if wished(totals[k], k, batching.preferred)]
        over = [k for k in fronts if k < len(queue) and totals[k + 1] > top]
        due = oldest(queue) + batching.delay
        is_late = (batching.delay > 0 or late_without_delay) and late(now, due)
        if is_late and not (wishes_when_late and good):
            return leave(all_late(queue, front))
        if wishes and good:
            return leave(best(good))
        if passing and over:
            return leave(min(over))
        stopped = front < len(queue)
        full = filled and totals[front] >= top
        if (stopping and stopped) or full or at_once(batching.delay):
            return leave(front)
        return 0, again(queue, now, batching.delay)

    return way


def skipping(queue: Sequence[Waiting], now: float, batching: Batching) -> tuple:
    """Requests of another shape are passed over, and later ones counted."""
    like = [w for w in queue if w.shape == queue[0].shape] if queue else []
    return ms.next_batch(like, now, batching)


def wrong_decisions() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the newest request's age decides: the oldest has waited longest": deciding(
            oldest=lambda queue: queue[-1].arrived
        ),
        "at the very end of the delay the batch still waits: compare with"
        " `>=`": deciding(late=lambda now, due: now > due),
        "nobody is ever late here: after `delay` all that may go goes": deciding(
            late=lambda now, due: False
        ),
        "the age of the oldest is compared with nothing that passed: it is"
        " `now - queue[0].arrived`": deciding(late=lambda now, due: now >= due - now),
        "with a delay of 0 everybody counts as late: the first rule asks for a delay"
        " above 0, and preferred sizes come next": deciding(late_without_delay=True),
        "you count requests where inferences are meant: a request holds `size` of"
        " them": deciding(extent=lambda request: 1),
        "a batch of exactly `max_batch` is allowed": deciding(
            room=lambda total, most: total < most
        ),
        "the batch becomes larger than `max_batch`": deciding(
            room=lambda total, most: True
        ),
        "requests of different shapes share a batch: it ends before the first that is"
        " not like the front": deciding(same=lambda a, b: True),
        "you pass over requests of another shape and go on behind them: only requests"
        " at the front leave, in their order": skipping,
        "of two preferred sizes the smaller one was taken: the largest that the front"
        " makes up": deciding(best=min),
        "a sum above a preferred size is taken for one: it must be a preferred size"
        " exactly": deciding(
            wished=lambda total, count, preferred: total >= preferred[0], best=max
        ),
        "preferred sizes are compared with the number of requests: with the sum of"
        " their sizes": deciding(
            wished=lambda total, count, preferred: count in preferred
        ),
        "preferred sizes make no batch leave: a front that makes one up leaves at"
        " once": deciding(wishes=False),
        "when the oldest is late, only a preferred size leaves: then all that may go"
        " goes": deciding(wishes_when_late=True),
        "the next request would pass the largest preferred size, and you wait or take"
        " it along: then all before it leave at once": deciding(passing=False),
        "the batch cannot grow and waits nevertheless: the next request is another"
        " shape": deciding(stopping=False),
        "the fourth rule is missing: a front that cannot grow, or has reached the"
        " largest preferred size, does not wait": deciding(
            stopping=False, filled=False
        ),
        "a front that has reached the largest preferred size waits: it leaves": (
            deciding(filled=False)
        ),
        "with a delay of 0 requests wait: then the whole front leaves at"
        " once": deciding(at_once=lambda delay: False),
        "nothing ever waits: before its delay is over, a front that can grow and is no"
        " preferred size stays": deciding(at_once=lambda delay: True),
        "the time to ask again is `now + delay`: the delay counts from the arrival of"
        " the oldest": deciding(again=lambda queue, now, delay: now + delay),
        "the time to ask again is what remains of the delay: a point in time is"
        " asked": deciding(
            again=lambda queue, now, delay: queue[0].arrived + delay - now
        ),
        "the time to ask again counts from the newest request: from the"
        " oldest": deciding(again=lambda queue, now, delay: queue[-1].arrived + delay),
        "(0, None) means that nothing is due: as long as requests wait, say"
        " when": deciding(again=lambda queue, now, delay: None),
        "when the oldest is late the whole queue leaves: no more than `max_batch`, and"
        " of one shape": deciding(all_late=lambda queue, front: len(queue)),
        "when the oldest is late it leaves alone: with all that may share its"
        " batch": deciding(all_late=lambda queue, front: 1),
        "you return how many inferences leave: the number of requests": deciding(
            result=lambda count, queue: sum(w.size for w in queue[:count])
        ),
    }


# 2 ------------------------------------------------------------------------------------


def tensor(datatype: str, shape: list[int], data: list) -> dict:
    """A tensor as a client writes it."""
    return {"name": "X", "shape": shape, "datatype": datatype, "data": data}


def tensor_cases() -> list[dict]:
    """Flat and nested, each kind of datatype, odd shapes."""
    return [
        tensor("FP32", [2, 3], [0.1, 2, 3, 4, 5, 6]),
        tensor("FP64", [3], [0.1, 1e300, -2.0]),
        tensor("INT64", [2], [2**62 + 1, -(2**53) - 1]),
        tensor("INT32", [2, 2], [[1, 2], [3, 4]]),
        tensor("UINT8", [2, 1, 2], [1, 2, 3, 255]),
        tensor("BOOL", [2], [True, False]),
        tensor("BYTES", [2, 1], ["né", "a longer text"]),
        tensor("FP32", [2, 3], [[1, 2], [3, 4], [5, 6]]),
        tensor("FP32", [4], [[1, 2, 3], [4]]),
        tensor("INT32", [2, 1, 2], [[[1, 2]], [[3, 4]]]),
        tensor("FP32", [0, 3], []),
        tensor("INT16", [1], [7]),
    ]


def run_tensor(answer: Callable, n: int) -> tuple:
    """Case n: dtype, shape and values."""
    what, entry = "read_tensor(entry)", tensor_cases()[n]
    try:
        array = answer(entry)
    except (ValueError, TypeError, AttributeError) as error:
        raise Mistake(
            f"{shown_tensor(entry)} was refused ({type(error).__name__}: {error}): it"
            " is right, however its lists are nested"
        ) from None
    if not isinstance(array, np.ndarray):
        raise Mistake(f"{what} returned {type(array).__name__}: a NumPy array is asked")
    return str(array.dtype), array.shape, array.tolist()


def shown_tensor(entry: dict) -> str:
    """'BYTES [2, 1]'."""
    return f"{entry['datatype']} of the shape {entry['shape']}, data {entry['data']}"


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=3,
    hints=(
        (
            "Three steps: flatten the lists, hold their number to the shape, make the"
            " array with `NUMPY[datatype]`."
        ),
        (
            "Flatten with a function that calls itself for each list in the list."
            " `math.prod(shape)` is the number of elements, 1 for an empty shape."
        ),
        (
            "Texts: `[text.encode() for text in flat]`, in an array of dtype object."
            " `np.array(flat, dtype=NUMPY[datatype]).reshape(shape)` does for all."
        ),
    ),
)
def read_tensor(answer):
    """A tensor of KServe's JSON as an array."""
    judge(
        answer,
        run_tensor,
        ms.read_tensor,
        wrong_tensors(),
        tensor_cases(),
        shown_tensor,
    )
    refused = {
        "data has one element fewer than the shape asks for": tensor(
            "FP32", [3], [1, 2]
        ),
        "data has one element more than the shape asks for": tensor(
            "FP32", [1], [1, 2]
        ),
        "data is nested, and has too few elements": tensor(
            "FP32", [2, 2], [[1, 2], [3]]
        ),
        "the datatype is 'FLOAT', which the protocol has not": tensor(
            "FLOAT", [1], [1]
        ),
    }
    for words, entry in refused.items():
        try:
            got = answer(entry)
        except ValueError:
            continue
        except KeyError:
            raise Mistake(
                f"{words}: a ValueError is asked, and a KeyError came"
            ) from None
        raise Mistake(f"{words}: a ValueError is asked, and {got!r:.60} came")


def flat(data: list) -> list:
    """Nested lists taken apart, in order."""
    found: list = []
    for value in data:
        found += flat(value) if isinstance(value, list) else [value]
    return found


def reading(
    flatten: Callable = flat,
    kind: Callable = lambda datatype: NUMPY[datatype],
    texts: Callable = lambda text: text.encode(),
    shape: Callable = lambda array, shape: array.reshape(shape),
    before: Callable = lambda data, datatype: data,
) -> Callable:
    """`read_tensor`, and what comes out with one thing changed."""

    def way(entry: dict) -> np.ndarray:
        data = before(flatten(entry["data"]), entry["datatype"])
        if entry["datatype"] == "BYTES":
            data = [texts(text) for text in data]
        array = np.array(data, dtype=kind(entry["datatype"]))
        return shape(array, entry["shape"])

    return way


def narrowed(array: np.ndarray) -> np.ndarray:
    """As float32, whatever is lost."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def wrong_tensors() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "every tensor is float64: the datatype says what it is": lambda entry: (
            ms.read_tensor(entry)
            if entry["datatype"] == "BYTES"
            else ms.read_tensor(entry).astype(np.float64)
        ),
        "every tensor is float32: the datatype says what it is": lambda entry: (
            ms.read_tensor(entry)
            if entry["datatype"] == "BYTES"
            else narrowed(ms.read_tensor(entry))
        ),
        "you leave the dtype to NumPy: the datatype says what it is": lambda entry: (
            ms.read_tensor(entry)
            if entry["datatype"] == "BYTES"
            else np.array(flat(entry["data"])).reshape(entry["shape"])
        ),
        "texts stay str: BYTES are bytes, so encode them": reading(
            texts=lambda text: text
        ),
        "texts are not encoded in UTF-8": reading(
            texts=lambda text: text.encode("latin-1")
        ),
        "texts have a dtype of fixed length: an array of objects is asked": reading(
            kind=lambda datatype: "S" if datatype == "BYTES" else NUMPY[datatype]
        ),
        "the elements are in column-major order: the last index runs fastest": reading(
            shape=lambda array, shape: array.reshape(shape, order="F")
        ),
        "the array is flat: give it the shape": reading(
            shape=lambda array, shape: array
        ),
        "whole numbers went through float and lost their last digits": reading(
            before=lambda data, datatype: (
                [float(x) for x in data] if datatype.startswith("INT") else data
            )
        ),
        "BOOL became numbers: it is np.bool_": reading(
            kind=lambda datatype: np.uint8 if datatype == "BOOL" else NUMPY[datatype]
        ),
    }


# 3 ------------------------------------------------------------------------------------

Ensemble = tuple[list[Step], dict[str, str]]
OWN_OUTPUTS = ("out", "more")  # of every model in the cases


def ensemble_cases() -> list[Ensemble]:
    """A chain, written backwards, a diamond, one model twice, a model's own names."""
    a = Step("a", {"in": "start"}, {"out": "x"})
    b = Step("b", {"in": "x"}, {"out": "y"})
    c = Step("c", {"in": "x", "other": "y"}, {"out": "z", "more": "w"})
    d = Step("d", {"left": "y", "right": "start"}, {"out": "in"})
    same = Step("f", {"left": "x", "right": "x"}, {"out": "v"})
    twice = [Step("a", {"in": f"x{n}"}, {"out": f"x{n + 1}"}) for n in range(3)]
    return [
        ([a, b], {"start": "S"}),
        ([b, a], {"start": "S"}),
        ([c, d, b, a], {"start": "S"}),
        ([c, a, d, b], {"start": "S", "spare": "T"}),
        (twice[::-1], {"x0": "S"}),
        ([a, same], {"start": "S"}),
        ([Step("e", {"in": "p", "out": "q"}, {"out": "in"})], {"p": "S", "q": "T"}),
    ]


def run_ensemble_case(answer: Callable, n: int) -> tuple:
    """Case n: all tensors, and each call of a model."""
    steps, tensors = ensemble_cases()[n]
    calls: list[tuple] = []

    def infer(step: Step, given: dict) -> dict:
        if len(calls) > 20:
            raise Mistake("a model runs again and again: each step runs once")
        if not isinstance(given, Mapping):
            raise Mistake(f"infer was given {given!r:.60}: a dict of tensors is asked")
        told = sorted((str(name), str(value)) for name, value in given.items())
        calls.append((step.model, tuple(told)))
        inside = ",".join(value for _, value in told)
        return {own: f"{step.model}.{own}({inside})" for own in OWN_OUTPUTS}

    what = "run_ensemble(steps, tensors, infer)"
    try:
        made = answer(steps, tensors, infer)
    except ValueError as error:
        raise Mistake(
            f"{shown_ensemble((steps, tensors))}: a ValueError came ({error}), and all"
            " inputs come here. Outputs are kept by the ensemble's names"
        ) from None
    except KeyError as error:
        words = "it is not there yet: run a step when all its inputs are"
        if str(error) in map(repr, OWN_OUTPUTS):
            words = "`step.outputs` does not ask for it: a model may return more"
        raise Mistake(
            f"{shown_ensemble((steps, tensors))}: KeyError, {error}: {words}"
        ) from None
    got = expect(made, kind=dict, what=what)
    return dict(sorted(got.items(), key=str)), sorted(calls)


def shown_ensemble(case: Ensemble) -> str:
    """'steps c, d, b, a'."""
    return f"steps {', '.join(step.model for step in case[0])}"


@check.exercise(
    points=3,
    minutes=18,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Keep a dict of all tensors that are there, at first a copy of `tensors`,"
            " and a list of the steps that have not run."
        ),
        (
            "A step is ready when every name in `step.inputs.values()` is in that dict."
            " Run one, put its outputs in, take it off the list, and look again. If"
            " none is ready and some are left, raise a ValueError."
        ),
        (
            "`given = {own: found[name] for own, name in step.inputs.items()}`, then"
            " `made = infer(step, given)`, then `found[name] = made[own]` for each pair"
            " of `step.outputs.items()`."
        ),
    ),
)
def run_ensemble(answer):
    """All tensors of an ensemble, after each of its steps has run once."""
    judge(
        answer,
        run_ensemble_case,
        ms.run_ensemble,
        wrong_ensembles(),
        ensemble_cases(),
        shown_ensemble,
        why_ensemble,
    )
    circle = [
        Step("a", {"in": "y"}, {"out": "x"}),
        Step("b", {"in": "x"}, {"out": "y"}),
        Step("c", {"in": "start"}, {"out": "z"}),
    ]
    try:
        got = answer(circle, {"start": "S"}, lambda step, given: {"out": "made"})
    except ValueError:
        return
    except KeyError:
        raise Mistake(
            "inputs that never come: a ValueError is asked, and a KeyError came"
        ) from None
    raise Mistake(
        "two steps wait for each other, so their inputs never come: a ValueError is"
        f" asked, and {got!r:.80} came"
    )


def why_ensemble(case: Ensemble, mine: tuple, its: tuple) -> str:
    """What is wrong with a result, or with the calls."""
    steps, (found, calls), (wanted, _) = case[0], mine, its
    for step in steps:
        given = [told for model, told in calls if model == step.model]
        if len(given) > sum(other.model == step.model for other in steps):
            return f"{step.model} ran too often: each step runs once"
        if any(len(told) < len(step.inputs) for told in given):
            return f"{step.model} ran without all its inputs: wait until they come"
    if missing := sorted(set(wanted) - set(found)):
        return f"these tensors are missing in the result: {', '.join(missing)}"
    if more := sorted(set(found) - set(wanted)):
        return f"nobody asked for these tensors: {', '.join(more)}"
    return ""


def joining(
    given: Callable = lambda step, found: {
        own: found[name] for own, name in step.inputs.items()
    },
    taken: Callable = lambda step, made: {
        name: made[own] for own, name in step.outputs.items()
    },
    ready: Callable = lambda step, found: all(
        name in found for name in step.inputs.values()
    ),
    times: int = 1,
    result: Callable = lambda found, tensors: found,
) -> Callable:
    """`run_ensemble`, and what comes out with one thing changed."""

    def way(steps: Sequence[Step], tensors: Mapping, infer: Callable) -> dict:
        found = dict(tensors)
        left = list(steps)
        while left:
            able = [step for step in left if ready(step, found)]
            if not able:
                raise ValueError("never")
            left.remove(able[0])
            for _ in range(times):
                made = infer(able[0], given(able[0], found))
            found |= taken(able[0], made)
        return result(found, tensors)

    return way


def only_last(steps: Sequence[Step], tensors: Mapping, infer: Callable) -> dict:
    """What the step that ran last has made."""
    last: dict = {}

    def kept(step: Step, given: dict) -> Mapping:
        made = infer(step, given)
        last.clear()
        last.update({name: made[own] for own, name in step.outputs.items()})
        return made

    ms.run_ensemble(steps, tensors, kept)
    return last


def wrong_ensembles() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a model is given its inputs by the ensemble's names: by its own, the keys of"
        " `step.inputs`": joining(
            given=lambda step, found: {n: found[n] for n in step.inputs.values()}
        ),
        "a model is given all tensors: those of `step.inputs`, by its own"
        " names": joining(given=lambda step, found: dict(found)),
        "a model is given all tensors besides its own inputs: only those of"
        " `step.inputs`": joining(
            given=lambda step, found: {
                **found,
                **{own: found[name] for own, name in step.inputs.items()},
            }
        ),
        "an input is missing where two of a step read one tensor: go by the model's own"
        " names, the keys of `step.inputs`": joining(
            given=lambda step, found: {
                own: found[name]
                for name, own in {n: o for o, n in step.inputs.items()}.items()
            }
        ),
        "outputs that `step.outputs` does not name are kept, too: they stay"
        " inside the model": joining(
            taken=lambda step, made: {
                step.outputs.get(own, own): value for own, value in made.items()
            }
        ),
        "outputs are kept under both names: only under the ensemble's": joining(
            taken=lambda step, made: {
                **{own: made[own] for own in step.outputs},
                **{name: made[own] for own, name in step.outputs.items()},
            }
        ),
        "each model runs twice: once": joining(times=2),
        "the ensemble's inputs are missing in the result: all tensors are"
        " asked": joining(
            result=lambda found, tensors: {
                name: value for name, value in found.items() if name not in tensors
            }
        ),
        "only what the last step made is in the result: all tensors are"
        " asked": only_last,
    }


# 4 ------------------------------------------------------------------------------------

Choice = tuple[dict[float, list[float]], float, float]


def choice_cases() -> list[Choice]:
    """Ranks on and beside a border, bounds that are met exactly, none that is."""
    hundred = [float(n) for n in range(1, 101)]  # the p99 is 99
    shuffled = hundred[37:] + hundred[:37]
    low = [float(n) / 2 for n in range(1, 101)]  # 49.5
    outlier = [1.0] * 99 + [900.0]  # 1
    two = [1.0] * 98 + [900.0] * 2  # 900
    few = [1.0, 2.0, 3.0]  # 3
    many = [1.0] * 148 + [50.0, 60.0]  # 149 of 150 are needed: 50
    return [
        ({0.0: low, 1.0: shuffled}, 99.0, 99),
        ({0.0: low, 1.0: shuffled}, 98.5, 99),
        ({0.0: low, 1.0: shuffled}, 40.0, 99),
        ({0.0: outlier, 2.0: two}, 5.0, 99),
        ({2.0: outlier, 0.0: two}, 5.0, 99),
        ({0.0: two, 1.0: two, 2.0: outlier}, 5.0, 99),
        ({0.0: few, 3.0: [4.0]}, 3.0, 99),
        ({0.0: few, 3.0: [4.0]}, 2.5, 99),
        ({0.0: many}, 50.0, 99),
        ({0.0: many}, 49.0, 99),
        ({0.0: shuffled, 1.0: low, 2.0: hundred}, 99.0, 99),
        ({0.0: hundred, 5.0: shuffled}, 90.0, 90),
        ({0.0: shuffled, 5.0: hundred}, 95.0, 90),
        ({0.0: hundred, 5.0: shuffled}, 89.0, 90),
        ({0.0: hundred, 5.0: shuffled}, 50.0, 50),
        ({4.0: hundred, 1.0: low}, 100.0, 100),
        ({4.0: hundred, 1.0: low}, 99.0, 100),
    ]


def run_choice(answer: Callable, n: int) -> float | None:
    """Case n: a delay, or None."""
    latencies, bound, percent = choice_cases()[n]
    try:
        got = answer(latencies, bound, percent)
    except ValueError as error:
        raise Mistake(
            f"{shown_choice(choice_cases()[n])}: a ValueError came ({error}). Where no"
            " delay does it, None is asked"
        ) from None
    if got is None:
        return None
    if isinstance(got, bool) or not isinstance(got, Real):
        raise Mistake(f"choose_delay returned {got!r:.60}: a delay, or None")
    return float(got)


def shown_choice(case: Choice) -> str:
    """'delays 0, 1 with 100, 100 latencies, bound 99, percent 99'."""
    latencies, bound, percent = case
    counts = ", ".join(str(len(values)) for values in latencies.values())
    delays = ", ".join(f"{delay:g}" for delay in latencies)
    return (
        f"delays {delays} with {counts} latencies, bound {bound:g}, percent {percent:g}"
    )


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "First a function for the percentile of one list. Then a loop over the delays.",
        (
            "Sort the latencies. At least `percent` % of n values do not exceed the"
            " one at rank ⌈n · percent / 100⌉, counted from 1."
        ),
        (
            "`math.ceil(len(values) * percent / 100) - 1` is its place in the sorted"
            " list. Return the `max` of the delays whose percentile is `<= bound`, with"
            " `default=None`."
        ),
    ),
)
def choose_delay(answer):
    """The longest delay with which enough requests stay within a bound."""
    judge(
        answer,
        run_choice,
        ms.choose_delay,
        wrong_choices(),
        choice_cases(),
        shown_choice,
    )


def choosing(
    place: Callable = lambda n, percent: -(-n * percent // 100) - 1,
    order: Callable = sorted,
    within: Callable = lambda value, bound: value <= bound,
    best: Callable = max,
    of: Callable | None = None,
    none: float | None = None,
) -> Callable:
    """`choose_delay`, and what comes out with one thing changed."""

    def way(latencies: dict, bound: float, percent: float = 99) -> float | None:
        good = []
        for delay, values in latencies.items():
            at = int(min(max(place(len(values), percent), 0), len(values) - 1))
            value = of(values, percent) if of else order(values)[at]
            if within(value, bound):
                good.append(delay)
        return best(good) if good else none

    return way


def by_percentile(best: Callable, what: Callable) -> Callable:
    """The delay with the best percentile, if it does."""

    def way(latencies: dict, bound: float, percent: float = 99) -> float | None:
        told = {d: ms.percentile(values, percent) for d, values in latencies.items()}
        good = [delay for delay in told if told[delay] <= bound]
        return what(best(good, told), told) if good else None

    return way


def more_than_percent(
    latencies: dict, bound: float, percent: float = 99
) -> float | None:
    """Exactly so many are not enough."""
    good = [
        delay
        for delay, values in latencies.items()
        if 100 * sum(value <= bound for value in values) > percent * len(values)
    ]
    return max(good, default=None)


def until_first_miss(
    latencies: dict, bound: float, percent: float = 99
) -> float | None:
    """The delays in order, up to the first that does not do."""
    found = None
    for delay in sorted(latencies):
        if ms.percentile(latencies[delay], percent) > bound:
            break
        found = delay
    return found


def wrong_choices() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the mean is compared with the bound: it hides the slow ones": choosing(
            of=lambda values, percent: sum(values) / len(values)
        ),
        "the slowest request of all decides: one in a hundred may be slower": choosing(
            of=lambda values, percent: max(values)
        ),
        "the median decides: the percentile is asked": choosing(
            of=lambda values, percent: ms.percentile(values, 50)
        ),
        "99 is used, whatever `percent` says": choosing(
            of=lambda values, percent: ms.percentile(values, 99)
        ),
        "the place in the sorted list is one too far: ranks count from 1": choosing(
            place=lambda n, percent: -(-n * percent // 100)
        ),
        "the rank is rounded down: then fewer than `percent` of the requests are within"
        " it. Round up": choosing(place=lambda n, percent: n * percent // 100 - 1),
        "one request too many must be within the bound: `percent` % of them are"
        " enough": choosing(place=lambda n, percent: n * percent // 100),
        "more than `percent` % must be within the bound: exactly so many are"
        " enough": more_than_percent,
        "the delay with the least percentile was taken: the longest that does": (
            by_percentile(lambda good, told: min(good, key=told.get), lambda d, _: d)
        ),
        "the percentile was returned: the delay is asked": by_percentile(
            lambda good, told: max(good), lambda delay, told: told[delay]
        ),
        "a delay of 0 is taken for none (`or`, `if delay`): it is a delay": choosing(
            best=lambda good: max(good) or None
        ),
        "the percentile lies between two measured values: take one of them, without"
        " interpolation": choosing(
            of=lambda values, percent: float(np.percentile(values, percent))
        ),
        "the latencies are not sorted": choosing(order=list),
        "the latencies are sorted from the slowest: this is the other end": choosing(
            order=lambda values: sorted(values, reverse=True)
        ),
        "a percentile that is just the bound is within it: `<=`": choosing(
            within=lambda value, bound: value < bound
        ),
        "the shortest delay was taken: the longest that does, for the fewest"
        " executions": choosing(best=min),
        "the last delay in the dict was taken: the longest": choosing(
            best=lambda good: good[-1]
        ),
        "the first delay in the dict was taken: the longest": choosing(
            best=lambda good: good[0]
        ),
        "you stop at the first delay that does not do: a longer one may": (
            until_first_miss
        ),
        "where no delay does it, None is asked": choosing(none=0.0),
        "these are the delays that do not do": choosing(
            within=lambda value, bound: value > bound
        ),
    }
