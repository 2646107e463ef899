"""Wrong answers to the exercises of 05-parallelism/11-choosing, each with the diagnosis
that it must get.
"""

import math

import pytest

from llmlab.checks.parallelism.choosing import check
from llmlab.parallelism.choosing import planner
from llmlab.parallelism.choosing.plan import Plan
from tests.checks.rejecting import Wrong, rejects, verdict


def mfu_of(formula):
    def mfu(n, L, H, D, T, rate, devices, peak):
        return formula(n, 12 * L * H * D * T, rate, devices, peak, T, H)

    return mfu


MFU = [
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: r * 6 * n / (d * p)),
        "attention term is missing",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: r * (6 * n + a / 3) / (d * p)),
        "forward only: it is 12",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: r * (2 * n + a) / (d * p)),
        "6N, not 2N",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: r * (8 * n + a) / (d * p)),
        "counts recomputation",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: r * (6 * n + a / H) / (d * p)),
        "heads or head_dim",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: T * r * (6 * n + a) / (d * p)),
        "do not multiply by seq",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: r * (6 * n + a) / p),
        "number of chips",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: 100 * r * (6 * n + a) / (d * p)),
        "not percent",
    ),
]


def cut(kinds, divide=lambda n, dp, tp, pp: n / (tp * pp)):
    def state_bytes(parameters, dp, tp, pp, zero):
        held = divide(parameters, dp, tp, pp)
        return sum(each * held / (dp if zero >= stage else 1) for each, stage in kinds)

    return state_bytes


RIGHT = ((2, 3), (2, 2), (12, 1))
STATE = [
    Wrong(
        "state_bytes",
        lambda n, dp, tp, pp, zero: 16 * n / (dp * tp * pp),
        "cuts nothing",
    ),
    Wrong(
        "state_bytes",
        cut(RIGHT, lambda n, dp, tp, pp: n / tp),
        "pp cuts the parameters too",
    ),
    Wrong(
        "state_bytes",
        cut(RIGHT, lambda n, dp, tp, pp: n / pp),
        "tp cuts the parameters too",
    ),
    Wrong("state_bytes", cut(RIGHT, lambda n, dp, tp, pp: n), "tp and pp cut"),
    Wrong("state_bytes", cut(((2, 1), (2, 2), (12, 3))), "another order"),
    Wrong("state_bytes", cut(((2, 4), (2, 3), (12, 2))), "one stage too early"),
    Wrong("state_bytes", cut(((2, 2), (2, 1), (12, 0))), "one stage too far"),
    Wrong("state_bytes", cut(((2, 3), (2, 2), (8, 1))), "two averages"),
]


def grow(enough, step=lambda p, v: p if v > 1 else 1):
    def microbatches_needed(p, v, limit):
        m = step(p, v)
        while not enough(p, v, limit, m):
            m += step(p, v)
        return m

    return microbatches_needed


def fine(p, v, limit, m):
    return (p - 1) / v <= limit * (m + (p - 1) / v) * (1 + 1e-12)


NEEDED = [
    Wrong(
        "microbatches_needed",
        grow(lambda p, v, x, m: (p - 1) / v <= x * m * (1 + 1e-12)),
        "of the whole step",
    ),
    Wrong(
        "microbatches_needed",
        grow(lambda p, v, x, m: fine(p, 1, x, m)),
        "chunks are missing",
    ),
    Wrong("microbatches_needed", grow(fine, lambda p, v: 1), "in multiples of p"),
    Wrong("microbatches_needed", grow(fine, lambda p, v: p), "for v > 1 only"),
    Wrong(
        "microbatches_needed",
        grow(lambda p, v, x, m: p / v <= x * (m + p / v)),
        "p − 1 others",
    ),
    Wrong("microbatches_needed", lambda p, v, x: float(p), "int"),
]


def useful(n, a, r, d, p):
    return r * (6 * n + a) / (d * p)


def with_attention(factor):
    return mfu_of(lambda n, a, r, d, p, T, H: useful(n, a * factor(T), r, d, p))


MFU_MORE = [
    Wrong("mfu", with_attention(factor), says)
    for factor, says in (
        (lambda T: 1 / 2, "it is 12"),
        (lambda T: 1 / T, "seq is missing"),
        (lambda T: T, "seq stands twice"),
        (lambda T: 6, "belongs to N alone"),
    )
] + [
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: useful(n, a, r, d, p) / T),
        "do not divide by seq",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: useful(8 / 6 * n, 4 / 3 * a, r, d, p)),
        "in both terms",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: useful(n, a, r * d * d, d, p)),
        "do not multiply it",
    ),
    Wrong(
        "mfu",
        mfu_of(lambda n, a, r, d, p, T, H: 1 - useful(n, a, r, d, p)),
        "not used",
    ),
]


def by_hand(parameters, dp, tp, pp, zero):
    """Right: stage by stage."""
    held = parameters / tp / pp
    return [
        16 * held,
        4 * held + 12 * held / dp,
        2 * held + 14 * held / dp,
        16 * held / dp,
    ][zero]


def one_stage_alone(parameters, dp, tp, pp, zero):
    held = parameters / (tp * pp)
    kinds = ((2, 3), (2, 2), (12, 1))
    return sum(each * held / (dp if zero == stage else 1) for each, stage in kinds)


def over_all_devices(parameters, dp, tp, pp, zero):
    return by_hand(parameters, dp * tp * pp, tp, pp, zero)


def all_devices(parameters, dp, tp, pp, zero):
    return dp * tp * pp * by_hand(parameters, dp, tp, pp, zero)


def all_copies(parameters, dp, tp, pp, zero):
    return dp * by_hand(parameters, dp, tp, pp, zero)


STATE_MORE = [
    Wrong(
        "state_bytes", cut(RIGHT, lambda n, dp, tp, pp: n / (tp + pp)), "not tp + pp"
    ),
    Wrong("state_bytes", cut(((2, 3), (4, 2), (12, 1))), "gradients take 2"),
    Wrong("state_bytes", cut(((4, 3), (4, 2), (12, 1))), "weights and gradients take"),
    Wrong("state_bytes", cut(((2, 2), (12, 1))), "weights are missing"),
    Wrong("state_bytes", cut(((2, 3), (12, 1))), "gradients are missing"),
    Wrong("state_bytes", cut(((12, 1),)), "the optimizer alone"),
    Wrong("state_bytes", one_stage_alone, "the stages below it"),
    Wrong("state_bytes", over_all_devices, "not over all devices"),
    Wrong("state_bytes", all_devices, "all devices together"),
    Wrong("state_bytes", all_copies, "all dp copies"),
]


def rounded(one, many):
    def microbatches_needed(p, v, limit):
        m = max(1, one((p - 1) / v * (1 - limit) / limit))
        return m if v == 1 else p * max(1, many(m / p))

    return microbatches_needed


def strictly(p, v, limit, m):
    return (p - 1) / v < limit * (m + (p - 1) / v) * (1 - 1e-12)


def at_least_p(p, v, limit):
    return max(p, grow(fine)(p, v, limit))


def both_ways(p, v, limit, m):
    return 2 * (p - 1) / v <= limit * (m + 2 * (p - 1) / v) * (1 + 1e-12)


NEEDED_MORE = [
    Wrong("microbatches_needed", rounded(math.floor, math.ceil), "m is rounded down"),
    Wrong("microbatches_needed", rounded(math.ceil, math.floor), "the multiple of p"),
    Wrong("microbatches_needed", rounded(round, math.ceil), "to the nearest"),
    Wrong("microbatches_needed", grow(strictly), "exactly the limit"),
    Wrong("microbatches_needed", at_least_p, "fewer microbatches than stages"),
    Wrong("microbatches_needed", grow(fine, lambda p, v: v), "not of v"),
    Wrong(
        "microbatches_needed",
        grow(fine, lambda p, v: p * v if v > 1 else 1),
        "not of p · v",
    ),
    Wrong(
        "microbatches_needed",
        grow(lambda p, v, x, m: fine((p - 1) * v * v + 1, v, x, m)),
        "does not multiply it",
    ),
    Wrong(
        "microbatches_needed",
        lambda p, v, x: grow(fine)(p, v, x) if p > 1 else 0,
        "one microbatch at least",
    ),
    Wrong(
        "microbatches_needed",
        lambda p, v, x: grow(fine)(p, v, x) + 1,
        "one more than needed",
    ),
    Wrong("microbatches_needed", grow(both_ways), "once: a unit"),
]


def everything(job, devices):
    return planner.search(job, devices).ranked[0].plan


def candidates(job, devices):
    return next(planner.candidates(job, devices))


def data_parallel(job, devices):
    return Plan(dp=devices)


def one_device(job, devices):
    return Plan()


def megatron(job, devices):
    """tp = 8 whatever the node, full recomputation: it fits, slowly."""
    tp = min(8, job.shape.kv_heads)
    return Plan(dp=devices // tp // 4, tp=tp, pp=4, sequence=True, recompute="full")


def does_not_divide(job, devices):
    return Plan(dp=1, tp=1, pp=devices)


def asks_for_too_many(job, devices):
    for _ in range(500):
        planner.estimate(job, Plan(dp=devices))
    return Plan(dp=devices)


def a_tuple(job, devices):
    return (devices, 1, 1)


CHOOSE = [
    Wrong("choose", everything, "choose yourself"),
    Wrong("choose", candidates, "choose yourself"),
    Wrong("choose", data_parallel, "needs"),
    Wrong("choose", one_device, "uses 1 devices"),
    Wrong("choose", megatron, "it fits, but a step takes"),
    Wrong("choose", does_not_divide, "not a multiple of"),
    Wrong("choose", asks_for_too_many, "500 plans were estimated"),
    Wrong("choose", a_tuple, "Plan"),
]

test_wrong_answers = rejects(
    "05-parallelism/11-choosing",
    [*MFU, *MFU_MORE, *STATE, *STATE_MORE, *NEEDED, *NEEDED_MORE, *CHOOSE],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("state_bytes", by_hand),
        # 7 · 0.89 / 0.11 and its like: a formula may round otherwise than a loop
        ("microbatches_needed", rounded(math.ceil, math.ceil)),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
