"""Wrong answers to 07-inference/07-model-server, each with its diagnosis."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from llmlab.checks.inference import model_server as checks
from llmlab.checks.inference.model_server import check
from llmlab.inference import model_server as ms
from llmlab.inference.model_server import NUMPY
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    all_foreseen,
    kept_apart,
    rejects,
    verdict,
)

SLUG = "07-inference/07-model-server"

# Right, written otherwise ------------------------------------------------------------


def decided_by_prefixes(queue, now, batching):
    """As questions about prefixes."""
    return checks.deciding()(queue, now, batching)


def decided_by_accumulation(queue, now, batching):
    """With NumPy's cumulative sum, and counts that are NumPy's."""
    if len(queue) == 0:
        return [0, None]
    totals = np.cumsum([w.size for w in queue])
    alike = np.array([w.shape == queue[0].shape for w in queue])
    fits = alike & (totals <= batching.max_batch)
    fits[0] = True
    count = len(queue) if fits.all() else int(np.argmin(fits))
    if batching.delay and now - queue[0].arrived >= batching.delay:
        return count, None
    exact = [k + 1 for k in range(count) if totals[k] in batching.preferred]
    if exact:
        return np.int64(exact[-1]), None
    for k in range(min(count, len(queue) - 1)):
        if totals[k + 1] > max(batching.preferred):
            return k + 1, None
    full = count < len(queue) or totals[count - 1] >= max(batching.preferred)
    if full or not batching.delay:
        return count, None
    return 0, batching.delay + queue[0].arrived


def tensor_by_recursion(entry):
    kind = NUMPY.get(entry["datatype"])
    if kind is None:
        raise ValueError(entry["datatype"])
    flat = checks.flat(entry["data"])
    if len(flat) != math.prod(entry["shape"]):
        raise ValueError("the number of elements")
    if entry["datatype"] == "BYTES":
        flat = [bytes(text, "utf-8") for text in flat]
    return np.array(flat, dtype=kind).reshape(entry["shape"])


def tensor_by_filling(entry):
    if entry["datatype"] not in NUMPY:
        raise ValueError("unknown")
    array = np.empty(entry["shape"], NUMPY[entry["datatype"]])
    values = checks.flat(entry["data"])
    if array.size != len(values):
        raise ValueError("size")
    for at, value in zip(np.ndindex(*array.shape), values, strict=True):
        array[at] = value.encode() if isinstance(value, str) else value
    return array


def ensemble_by_recursion(steps, tensors, infer):
    found = dict(tensors)
    maker = {name: step for step in steps for name in step.outputs.values()}

    def get(name, asked=()):
        if name not in found:
            if name in asked or name not in maker:
                raise ValueError(name)
            step = maker[name]
            given = {own: get(n, (*asked, name)) for own, n in step.inputs.items()}
            made = infer(step, given)
            found.update({n: made[own] for own, n in step.outputs.items()})
        return found[name]

    for name in maker:
        get(name)
    return found


def ensemble_in_rounds(steps, tensors, infer):
    found, left = {**tensors}, [*steps]
    while left:
        able = [s for s in left if set(s.inputs.values()) <= set(found)]
        if not able:
            raise ValueError("a circle")
        for step in able:
            made = infer(step, {k: found[v] for k, v in step.inputs.items()})
            for key, name in step.outputs.items():
                found[name] = made[key]
        left = [s for s in left if s not in able]
    return found


def delay_by_counting(latencies, bound, percent=99):
    best = None
    for delay, values in latencies.items():
        inside = sum(value <= bound for value in values)
        if 100 * inside >= percent * len(values) and (best is None or delay > best):
            best = delay
    return best


def delay_by_numpy(latencies, bound, percent=99):
    good = [
        delay
        for delay, values in latencies.items()
        if np.percentile(values, percent, method="inverted_cdf") <= bound
    ]
    return np.float64(max(good)) if good else None


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("next_batch", decided_by_prefixes),
        ("next_batch", decided_by_accumulation),
        ("read_tensor", tensor_by_recursion),
        ("read_tensor", tensor_by_filling),
        ("run_ensemble", ensemble_by_recursion),
        ("run_ensemble", ensemble_in_rounds),
        ("choose_delay", delay_by_counting),
        ("choose_delay", delay_by_numpy),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


# No two mistakes alike ----------------------------------------------------------------

KINDS = {
    "next_batch": ByCases(
        checks.run_decision,
        ms.next_batch,
        checks.wrong_decisions,
        checks.decision_cases,
    ),
    "read_tensor": ByCases(
        checks.run_tensor,
        ms.read_tensor,
        checks.wrong_tensors,
        checks.tensor_cases,
    ),
    "run_ensemble": ByCases(
        checks.run_ensemble_case,
        ms.run_ensemble,
        checks.wrong_ensembles,
        checks.ensemble_cases,
    ),
    "choose_delay": ByCases(
        checks.run_choice,
        ms.choose_delay,
        checks.wrong_choices,
        checks.choice_cases,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


# Wrong, in other ways -----------------------------------------------------------------


def empty_queue_breaks(queue, now, batching):
    due = queue[0].arrived + batching.delay
    return ms.next_batch(queue, now, batching) if due else (0, None)


def empty_queue_is_due(queue, now, batching):
    return ms.next_batch(queue, now, batching) if queue else (0, now)


def count_alone(queue, now, batching):
    return ms.next_batch(queue, now, batching)[0]


def three_things(queue, now, batching):
    return (*ms.next_batch(queue, now, batching), now)


def count_as_float(queue, now, batching):
    count, again = ms.next_batch(queue, now, batching)
    return float(count), again


def false_for_none(queue, now, batching):
    count, again = ms.next_batch(queue, now, batching)
    return count, again or False


def the_requests(queue, now, batching):
    count, again = ms.next_batch(queue, now, batching)
    return list(queue[:count]), again


def takes_them_out(queue, now, batching):
    count, again = ms.next_batch(queue, now, batching)
    del queue[:count]
    return count, again


def no_rule_for_two(queue, now, batching):
    """Right where there are at most five requests."""
    if len(queue) > 5:
        return len(queue), None
    return ms.next_batch(queue, now, batching)


def skips_and_counts(queue, now, batching):
    """Requests of other shapes are left out of the batch, not of the queue."""
    count, again = ms.next_batch(queue, now, batching)
    more = [w for w in queue[count:] if w.shape == queue[0].shape]
    if count and len({w.shape for w in queue}) > 1 and more:
        return count + 1, again
    return count, again


def as_many_requests(queue, now, batching):
    """As many requests as a preferred size, too, if no sum is one."""
    count, again = ms.next_batch(queue, now, batching)
    if count == 0 and len(queue) in batching.preferred:
        return len(queue), None
    return count, again


def never_above_preferred(queue, now, batching):
    """Who is late leaves with a batch of the largest preferred size at most."""
    count, again = ms.next_batch(queue, now, batching)
    while count > 1 and sum(w.size for w in queue[:count]) > batching.preferred[-1]:
        count -= 1
    return count, again


def tensor_as_list(entry):
    return ms.read_tensor(entry).tolist()


def tensor_without_look(entry):
    flat = checks.flat(entry["data"])
    if entry["datatype"] == "BYTES":
        flat = [text.encode() for text in flat]
    if entry["datatype"] not in NUMPY:
        raise ValueError
    return np.resize(np.array(flat, NUMPY[entry["datatype"]]), entry["shape"])


def tensor_keyerror(entry):
    if entry["datatype"] not in NUMPY:
        raise KeyError(entry["datatype"])
    return ms.read_tensor(entry)


def tensor_unknown_is_float(entry):
    known = entry["datatype"] if entry["datatype"] in NUMPY else "FP32"
    return ms.read_tensor({**entry, "datatype": known})


def tensor_not_nested(entry):
    data = entry["data"]
    if entry["datatype"] == "BYTES":
        data = [text.encode() for text in data]
    return np.array(data, NUMPY[entry["datatype"]]).reshape(entry["shape"])


def tensor_of_one_level(entry):
    data = entry["data"]
    if data and isinstance(data[0], list):
        data = [value for row in data for value in row]
    if len(data) != math.prod(entry["shape"]):
        raise ValueError(f"{len(data)} elements")
    return ms.read_tensor({**entry, "data": data})


def tensor_popping(entry):
    made = ms.read_tensor(entry)
    entry.pop("data")
    return made


def ensemble_as_written(steps, tensors, infer):
    found = dict(tensors)
    for step in steps:
        made = infer(step, {own: found[n] for own, n in step.inputs.items()})
        found |= {n: made[own] for own, n in step.outputs.items()}
    return found


def ensemble_of_what_is_there(steps, tensors, infer):
    """In the order of the list, with the inputs that are there."""
    found = dict(tensors)
    for step in steps:
        given = {own: found[n] for own, n in step.inputs.items() if n in found}
        made = infer(step, given)
        found |= {n: made[own] for own, n in step.outputs.items()}
    return found


def ensemble_of_all_outputs(steps, tensors, infer):
    def named(step, given):
        return {step.outputs[own]: value for own, value in infer(step, given).items()}

    return ms.run_ensemble(steps, tensors, named)


def ensemble_under_own_names(steps, tensors, infer):
    own = [replace(step, outputs={n: n for n in step.outputs}) for step in steps]
    return ms.run_ensemble(own, tensors, infer)


def ensemble_of_the_last(steps, tensors, infer):
    found = ms.run_ensemble(steps, tensors, infer)
    last = {*tensors, *steps[-1].outputs.values()}
    return {name: value for name, value in found.items() if name in last}


def ensemble_twice(steps, tensors, infer):
    """Goes through all steps as often as there are steps."""
    found = dict(tensors)
    for _ in steps:
        for step in steps:
            if set(step.inputs.values()) <= set(found):
                made = infer(step, {own: found[n] for own, n in step.inputs.items()})
                found |= {n: made[own] for own, n in step.outputs.items()}
    return found


def ensemble_in_place(steps, tensors, infer):
    found = ms.run_ensemble(steps, tensors, infer)
    tensors.update(found)
    return tensors


def ensemble_leaves_circles(steps, tensors, infer):
    found, left = dict(tensors), list(steps)
    while left:
        able = [s for s in left if set(s.inputs.values()) <= set(found)]
        if not able:
            break
        step = able[0]
        left.remove(step)
        made = infer(step, {own: found[n] for own, n in step.inputs.items()})
        found |= {n: made[own] for own, n in step.outputs.items()}
    return found


def ensemble_keyerror(steps, tensors, infer):
    try:
        return ms.run_ensemble(steps, tensors, infer)
    except ValueError:
        raise KeyError("never") from None


def ensemble_by_passes(steps, tensors, infer):
    """Goes through all steps again and again, as often as there are steps."""
    found = dict(tensors)
    for _ in range(9):
        for step in steps:
            if set(step.inputs.values()) <= set(found):
                made = infer(step, {own: found[n] for own, n in step.inputs.items()})
                found |= {n: made[own] for own, n in step.outputs.items()}
    return found


def ensemble_with_names(steps, tensors, infer):
    return ms.run_ensemble(steps, tensors, lambda s, given: infer(s, tuple(given)))


def ensemble_returns_nothing(steps, tensors, infer):
    ms.run_ensemble(steps, tensors, infer)


def delay_as_text(latencies, bound, percent=99):
    found = ms.choose_delay(latencies, bound, percent)
    return None if found is None else str(found)


def delay_and_percentile(latencies, bound, percent=99):
    return ms.choose_delay(latencies, bound, percent), bound


def delay_interpolated(latencies, bound, percent=99):
    good = [d for d, v in latencies.items() if np.percentile(v, percent) <= bound]
    return max(good, default=None)


def delay_or_error(latencies, bound, percent=99):
    return max(
        delay
        for delay, values in latencies.items()
        if ms.percentile(values, percent) <= bound
    )


N, T, E, D = "next_batch", "read_tensor", "run_ensemble", "choose_delay"
test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong(N, empty_queue_breaks, "IndexError"),
        Wrong(N, empty_queue_is_due, "empty queue"),
        Wrong(N, count_alone, "tuple"),
        Wrong(N, three_things, "3 things"),
        Wrong(N, count_as_float, "a whole number is asked"),
        Wrong(N, false_for_none, "not a number or None"),
        Wrong(N, the_requests, "a whole number is asked"),
        Wrong(N, takes_them_out, "queue"),
        Wrong(N, no_rule_for_two, "rule 2 of the text decides"),
        Wrong(N, skips_and_counts, "only 1 may share a batch"),
        Wrong(N, as_many_requests, "rule 6 of the text decides"),
        Wrong(N, never_above_preferred, "rule 1 of the text decides"),
        Wrong(T, tensor_as_list, "NumPy array"),
        Wrong(T, tensor_without_look, "one element fewer"),
        Wrong(T, tensor_keyerror, "a KeyError came"),
        Wrong(T, tensor_unknown_is_float, "'FLOAT'"),
        Wrong(T, tensor_not_nested, "however its lists are nested"),
        Wrong(T, tensor_of_one_level, "however its lists are nested"),
        Wrong(T, tensor_popping, "entry"),
        Wrong(E, ensemble_as_written, "it is not there yet"),
        Wrong(E, ensemble_of_what_is_there, "ran without all its inputs"),
        Wrong(E, ensemble_of_all_outputs, "a model may return more"),
        Wrong(E, ensemble_under_own_names, "by the ensemble's names"),
        Wrong(E, ensemble_of_the_last, "are missing in the result"),
        Wrong(E, ensemble_in_place, "tensors"),
        Wrong(E, ensemble_leaves_circles, "never come"),
        Wrong(E, ensemble_keyerror, "a KeyError came"),
        Wrong(E, ensemble_by_passes, "each step runs once"),
        Wrong(E, ensemble_twice, "ran too often"),
        Wrong(E, ensemble_with_names, "a dict of tensors"),
        Wrong(E, ensemble_returns_nothing, "None"),
        Wrong(D, delay_as_text, "a delay, or None"),
        Wrong(D, delay_and_percentile, "a delay, or None"),
        Wrong(D, delay_interpolated, "interpolation"),
        Wrong(D, delay_or_error, "Where no delay does it, None is asked"),
    ],
)


def test_every_exercise_has_enough_wrong_answers():
    counts = Counter()
    for exercise, kind in KINDS.items():
        counts[exercise] = len(kind[2]())
    assert min(counts.values()) >= 8
