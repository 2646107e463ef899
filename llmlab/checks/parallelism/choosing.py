"""What marks the exercises of 05-parallelism/11-choosing.

Plans are timed by the cost model of the course.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch

from llmlab.checks.parallelism.ranks import explained
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.models.presets import preset
from llmlab.parallelism.choosing import Estimate, Job, Plan, machines, planner, shapes

check = Checks("05-parallelism/11-choosing")
TRIES = 400  # plans that an answer may estimate
SLACK = 1.08  # how much slower than the best plan it may be


def _whole(low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,)))


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "FLOPs that a token needs, times tokens per second, over FLOPs that all"
            " chips together could do in a second."
        ),
        "A token needs 6 · parameters + 12 · layers · heads · head_dim · seq FLOPs.",
        "rate · (6N + 12 L H D T) / (devices · peak).",
    ),
)
def mfu(answer):
    """MFU from a throughput: PaLM's appendix B."""
    n = 1e9 * _whole(300, 600)
    L = _whole(80, 120)
    H = 48
    D = 192
    T = 2048 * _whole(1, 4)
    rate = 1e3 * _whole(150, 250)
    chips = 5000
    peak = 275e12
    what = "mfu(…)"
    got = answer(n, L, H, D, T, rate, chips, peak)
    got = float(expect(got, kind=(int, float), what=what))
    attention = 12 * L * H * D * T
    useful = rate / (chips * peak)
    mistakes = {
        "the attention term is missing: 12 L H D T FLOPs per token": useful * 6 * n,
        (
            "attention is counted forward only: it is 12, not 4, L H D T with the"
            " backward pass"
        ): useful * (6 * n + attention / 3),
        "the matrices are counted forward only: 6N, not 2N, with the backward pass": (
            useful * (2 * n + attention)
        ),
        "8N counts recomputation, which is not useful: 6N": (
            useful * (8 * n + attention)
        ),
        "heads or head_dim is missing from the attention term": (
            useful * (6 * n + 12 * L * D * T)
        ),
        "rate is tokens per second already: do not multiply by seq": (
            useful * T * (6 * n + attention)
        ),
        "the peak is of one chip: divide by the number of chips too": (
            rate * (6 * n + attention) / peak
        ),
        "attention is counted with 6 L H D T; forward and backward it is 12": (
            useful * (6 * n + attention / 2)
        ),
        "seq is missing from the attention term: a token looks at up to T others": (
            useful * (6 * n + attention / T)
        ),
        "seq stands twice in the attention term: FLOPs are per token": (
            useful * (6 * n + attention * T)
        ),
        "layers is missing from the attention term": useful * (6 * n + attention / L),
        (
            "recomputation is counted, in both terms; it is not useful: 6N and 12 L H D"
            " T"
        ): useful * (8 * n + attention * 4 / 3),
        "the 6 belongs to N alone: 6N + 12 L H D T": useful * 6 * (n + attention),
        "rate is tokens per second already: do not divide by seq": (
            useful / T * (6 * n + attention)
        ),
        "rate is of all chips: do not multiply it by their number": (
            useful * chips**2 * (6 * n + attention)
        ),
        "this is the share that is not used": 1 - useful * (6 * n + attention),
        "a share between 0 and 1 is asked, not percent": (
            100 * useful * (6 * n + attention)
        ),
    }
    diagnose(
        got, right=useful * (6 * n + attention), mistakes=mistakes, tol=1e-9, what=what
    )


@check.exercise(
    points=2,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "First, how many parameters does a device hold before ZeRO cuts anything?"
            " dp does not matter for that."
        ),
        (
            "Stage 1 divides 12 bytes by dp, stage 2 also the 2 of the gradients, stage"
            " 3 also the 2 of the weights."
        ),
        "Ψ = parameters / (tp · pp). Stage 2: 2Ψ + (2 + 12) Ψ / dp.",
    ),
)
def state_bytes(answer):
    """Bytes of weights, gradients and optimizer under ZeRO, tp and pp."""
    found = []
    for zero in (0, 1, 2, 3):
        n = 1e9 * _whole(5, 50)
        dp = 2 ** _whole(2, 6)
        tp = 4
        pp = 3
        what = f"state_bytes({n:.0f}, {dp}, {tp}, {pp}, zero={zero})"
        got = float(expect(answer(n, dp, tp, pp, zero), kind=(int, float), what=what))
        found.append(((n, dp, tp, pp, zero), got))

    def same(a: float, b: float) -> bool:
        return close(a, b, 1e-9)

    if not all(same(got, _bytes(*args)) for args, got in found):
        explained(found, STATE, same)
    for args, got in found:
        n, dp, tp, pp, zero = args
        what = f"state_bytes({n:.0f}, {dp}, {tp}, {pp}, zero={zero})"
        diagnose(got, right=_bytes(*args), tol=1e-9, what=what)


def _state(held: float, dp: int, zero: int, kinds=((2, 3), (2, 2), (12, 1))) -> float:
    return sum(each * held / (dp if zero >= stage else 1) for each, stage in kinds)


def _bytes(n: float, dp: int, tp: int, pp: int, zero: int, **how) -> float:
    return _state(n / (tp * pp), dp, zero, **how)


STATE: dict[str, Callable[..., float]] = {
    "dp copies hold the same: without ZeRO data parallelism cuts nothing": (
        lambda n, dp, tp, pp, zero: 16 * n / (tp * pp * dp)
    ),
    "pp cuts the parameters too": lambda n, dp, tp, pp, zero: _bytes(
        n, dp, tp, 1, zero
    ),
    "tp cuts the parameters too": lambda n, dp, tp, pp, zero: _bytes(
        n, dp, 1, pp, zero
    ),
    "tp and pp cut the parameters too": lambda n, dp, tp, pp, zero: _bytes(
        n, dp, 1, 1, zero
    ),
    "tp and pp cut each other's pieces: tp · pp, not tp + pp": (
        lambda n, dp, tp, pp, zero: _bytes(n, dp, tp + pp, 1, zero)
    ),
    "ZeRO cuts over the dp copies, not over all devices": (
        lambda n, dp, tp, pp, zero: _state(n / (tp * pp), dp * tp * pp, zero)
    ),
    (
        "stage 1 cuts the optimizer first, then gradients, then weights: yours are in"
        " another order"
    ): partial(_bytes, kinds=((2, 1), (2, 2), (12, 3))),
    "this is one stage too early: stage 1 cuts the optimizer": (
        lambda n, dp, tp, pp, zero: _bytes(n, dp, tp, pp, zero - 1)
    ),
    "this is one stage too far: stage 1 cuts only the optimizer": (
        lambda n, dp, tp, pp, zero: _bytes(n, dp, tp, pp, zero + 1)
    ),
    "a stage cuts what the stages below it cut, too": (
        lambda n, dp, tp, pp, zero: (
            n
            / (tp * pp)
            * sum(
                each / (dp if zero == stage else 1)
                for each, stage in ((2, 3), (2, 2), (12, 1))
            )
        )
    ),
    "the optimizer takes 12 bytes: a 32-bit copy of the weights and two averages": (
        partial(_bytes, kinds=((2, 3), (2, 2), (8, 1)))
    ),
    "gradients take 2 bytes each": partial(_bytes, kinds=((2, 3), (4, 2), (12, 1))),
    "weights and gradients take 2 bytes each": partial(
        _bytes, kinds=((4, 3), (4, 2), (12, 1))
    ),
    "the weights are missing": partial(_bytes, kinds=((2, 2), (12, 1))),
    "the gradients are missing": partial(_bytes, kinds=((2, 3), (12, 1))),
    "the optimizer alone is counted; weights and gradients are held, too": partial(
        _bytes, kinds=((12, 1),)
    ),
    "these are the bytes of all devices together; one is asked": (
        lambda n, dp, tp, pp, zero: dp * tp * pp * _bytes(n, dp, tp, pp, zero)
    ),
    "these are the bytes of all dp copies; a device's own are asked": (
        lambda n, dp, tp, pp, zero: dp * _bytes(n, dp, tp, pp, zero)
    ),
}


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        "The waiting is (p − 1)/v units; the whole step is m + (p − 1)/v units.",
        (
            "Raise m until the waiting is at most `limit` times the step: by 1, or by p"
            " when v > 1."
        ),
        "while (p - 1) / v > limit * (m + (p - 1) / v): m += p if v > 1 else 1.",
    ),
)
def microbatches_needed(answer):
    """The smallest m whose bubble is small enough."""
    found = []
    for p, v, limit in (
        (4, 1, 0.21),
        (8, 1, 0.11),
        (8, 4, 0.05),
        (6, 2, 0.12),
        (5, 1, 0.3),
        (1, 1, 0.1),
        # a bubble of just the limit, in numbers that are exact
        (5, 1, 0.5),
        (3, 1, 0.25),
        (3, 2, 0.25),
    ):
        what = f"microbatches_needed({p}, {v}, {limit})"
        got = expect(answer(p, v, limit), kind=int, what=what)
        if got < 1:
            raise Mistake(f"{what} is {got}: a step has one microbatch at least")
        found.append(((p, v, limit), got))
    if any(got != _least(*args) for args, got in found):
        explained(found, MICROBATCHES)
    for args, got in found:
        right = _least(*args)
        step = args[0] if args[1] > 1 else 1
        mistakes = {
            "this m has too large a bubble": right - step,
            "a smaller m is enough": right + step,
        }
        what = f"microbatches_needed{args}"
        diagnose(
            got,
            right=right,
            mistakes={f"{what}: {text}": m for text, m in mistakes.items()},
            what=what,
        )


def _least(p: int, v: int, limit: float) -> int:
    return _needed(p, v, limit, p if v > 1 else 1)


def _waiting(
    p: int, v: int, limit: float, waiting: float, of_work: bool = False
) -> int:
    """The smallest m when the waiting is another."""
    step = m = p if v > 1 else 1
    while waiting > limit * (m + (0 if of_work else waiting)) * (1 + 1e-12):
        m += step
    return m


def _rounded(p: int, v: int, limit: float, one: Callable, many: Callable) -> int:
    """m by a formula, `one` making it whole and `many` a number of multiples of p."""
    m = max(1, one((p - 1) / v * (1 - limit) / limit))
    return m if v == 1 else p * max(1, many(m / p))


MICROBATCHES: dict[str, Callable[..., int]] = {
    "the share is of the whole step, work and waiting, not of the work": (
        lambda p, v, limit: _waiting(p, v, limit, (p - 1) / v, of_work=True)
    ),
    "the chunks are missing: interleaving divides the waiting by v": (
        lambda p, v, limit: _waiting(p, v, limit, p - 1)
    ),
    "interleaving divides the waiting by v; it does not multiply it": (
        lambda p, v, limit: _waiting(p, v, limit, (p - 1) * v)
    ),
    "p stages wait for p − 1 others, not p": (
        lambda p, v, limit: _waiting(p, v, limit, p / v)
    ),
    "the waiting is (p − 1)/v units, once: a unit is a forward and a backward": (
        lambda p, v, limit: _waiting(p, v, limit, 2 * (p - 1) / v)
    ),
    "an interleaved schedule takes microbatches in multiples of p": (
        lambda p, v, limit: _needed(p, v, limit, 1)
    ),
    "multiples of p are needed for v > 1 only": (
        lambda p, v, limit: _needed(p, v, limit, p)
    ),
    "fewer microbatches than stages may do where v = 1": (
        lambda p, v, limit: max(p, _least(p, v, limit))
    ),
    "microbatches come in multiples of p, not of v": (
        lambda p, v, limit: _needed(p, v, limit, v)
    ),
    "microbatches come in multiples of p, not of p · v": (
        lambda p, v, limit: _needed(p, v, limit, p * v if v > 1 else 1)
    ),
    "m is rounded down: then the bubble is larger than the limit": partial(
        _rounded, one=math.floor, many=math.ceil
    ),
    "the multiple of p is rounded down: then the bubble is larger than the limit": (
        partial(_rounded, one=math.ceil, many=math.floor)
    ),
    "m is rounded to the nearest: then the bubble may be larger than the limit": (
        partial(_rounded, one=round, many=math.ceil)
    ),
    "a bubble of exactly the limit is small enough": (
        lambda p, v, limit: _needed(p, v, limit * (1 - 1e-9), p if v > 1 else 1)
    ),
    "one step more than needed: a smaller m is enough": (
        lambda p, v, limit: _least(p, v, limit) + (p if v > 1 else 1)
    ),
    "one more than needed: a smaller m is enough": (
        lambda p, v, limit: _least(p, v, limit) + 1
    ),
}


def _needed(p: int, v: int, limit: float, step: int) -> int:
    m = step
    waiting = (p - 1) / v
    while waiting > limit * (m + waiting) * (1 + 1e-12):
        m += step
    return m


def _jobs() -> list[tuple[str, Job, int]]:
    a100 = machines.machine("a100-40gb")
    slow = machines.machine("a100-80gb", network=6e9, node=4)
    h100 = machines.machine("h100-80gb")
    gpt_18b = shapes.gpt(40, 6144, 48)
    llama_8b = shapes.llama(preset("llama-3-8b"))
    llama_13b = shapes.llama(preset("llama-13b"))
    llama_70b = shapes.llama(preset("llama-2-70b"))
    return [
        # the job in words; the job; devices
        ("a GPT of 18B on 32 A100 of 40 GB", Job(gpt_18b, 256, 2048, a100), 32),
        (
            "a 13B Llama, nodes of 4, a slow network",
            Job(llama_13b, 256, 2048, slow),
            16,
        ),
        ("Llama 2 70B on 64 H100", Job(llama_70b, 1024, 4096, h100), 64),
        (
            "8B with 65,536 tokens per sequence on 32 H100",
            Job(llama_8b, 32, 65_536, h100),
            32,
        ),
    ]


@check.exercise(
    points=5,
    minutes=40,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Loop over tp and pp; dp follows. Which values of tp stay inside a node?"
            " Which ways to save memory cost no time?"
        ),
        (
            "Try microbatch = 1, sequence parallelism wherever tp > 1, and for each"
            " split: nothing recomputed, then more. Keep the fastest that has no"
            " problems. A pipeline gains from chunks = 2 or 4 where the layers divide."
        ),
        (
            "ZeRO-1 always, ZeRO-3 where pp = 1. Long sequences (above 16,384 tokens)"
            " need cp = 2, 4 or 8. Skip what does not divide before you ask for an"
            " estimate."
        ),
    ),
)
def choose(answer):
    """Plans for four jobs, near the best there is."""
    for name, job, devices in _jobs():
        best = planner.search(job, devices).ranked[0].step
        with _counting(name) as asked:
            plan = expect(
                answer(job, devices), kind=Plan, what=f"choose(job, devices) for {name}"
            )
        if asked[0] > TRIES:
            raise Mistake(
                f"{name}: {asked[0]} plans were estimated; {TRIES} are allowed: skip"
                " what cannot be good"
            )
        _judge(name, planner.estimate(job, plan), devices, best)


@contextmanager
def _counting(name: str) -> Iterator[list[int]]:
    """Count estimates, and refuse the exhaustive search."""
    asked = [0]
    misfits = planner.misfits

    def counted(job: Job, plan: Plan) -> list[str]:
        asked[0] += 1
        return misfits(job, plan)

    def refused(*_):
        raise Mistake(
            f"{name}: planner.search and planner.candidates try everything; choose"
            " yourself what to try"
        )

    with (
        mock.patch.object(planner, "misfits", counted),
        mock.patch.object(planner, "candidates", refused),
    ):
        yield asked


def _judge(name: str, e: Estimate, devices: int, best: float) -> None:
    if e.plan.devices != devices:
        raise Mistake(
            f"{name}: your plan uses {e.plan.devices} devices, there are {devices}: dp"
            " · cp · tp · pp"
        )
    if e.problems:
        raise Mistake(f"{name}: your plan cannot run: {e.problems[0]}")
    if e.step > SLACK * best:
        kind = max((k for k in e.seconds if k != "products"), key=e.seconds.get)
        raise Mistake(
            f"{name}: it fits, but a step takes {e.step:.3g} s where {best:.3g} s are"
            f" possible (8% more is allowed). Besides products, most of it is {kind}:"
            f" {e.seconds[kind]:.2g} s"
        )
