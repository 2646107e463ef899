"""What marks the exercises of 05-parallelism/11-choosing.

Plans are timed by the cost model of the course.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
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
    D = 256
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
    for zero in (0, 1, 2, 3):
        n = 1e9 * _whole(5, 50)
        dp = 2 ** _whole(2, 6)
        tp = 4
        pp = 3
        what = f"state_bytes({n:.0f}, {dp}, {tp}, {pp}, zero={zero})"
        got = float(expect(answer(n, dp, tp, pp, zero), kind=(int, float), what=what))
        held = [_state(n / (tp * pp), dp, stage) for stage in range(4)]
        mistakes = {
            "dp copies hold the same: without ZeRO data parallelism cuts nothing": (
                16 * n / (tp * pp * dp)
            ),
            "pp cuts the parameters too": _state(n / tp, dp, zero),
            "tp cuts the parameters too": _state(n / pp, dp, zero),
            "tp and pp cut the parameters too": _state(n, dp, zero),
            (
                "stage 1 cuts the optimizer first, then gradients, then weights: yours"
                " are in another order"
            ): _reversed(n / (tp * pp), dp, zero),
            "this is one stage too early: stage 1 cuts the optimizer": held[
                max(0, zero - 1)
            ],
            "this is one stage too far: stage 1 cuts only the optimizer": held[
                min(3, zero + 1)
            ],
            (
                "the optimizer takes 12 bytes: a 32-bit copy of the weights and two"
                " averages"
            ): held[zero] - 4 * n / (tp * pp) / (dp if zero else 1),
        }
        diagnose(got, right=held[zero], mistakes=mistakes, tol=1e-9, what=what)


def _state(held: float, dp: int, zero: int, kinds=((2, 3), (2, 2), (12, 1))) -> float:
    return sum(each * held / (dp if zero >= stage else 1) for each, stage in kinds)


def _reversed(held: float, dp: int, zero: int) -> float:
    return _state(held, dp, zero, ((2, 1), (2, 2), (12, 3)))


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
    for p, v, limit in (
        (4, 1, 0.2),
        (8, 1, 0.1),
        (8, 4, 0.05),
        (6, 2, 0.1),
        (5, 1, 0.5),
        (1, 1, 0.1),
        (3, 1, 0.25),
    ):
        what = f"microbatches_needed({p}, {v}, {limit})"
        got = expect(answer(p, v, limit), kind=int, what=what)
        right = _needed(p, v, limit, p if v > 1 else 1)
        mistakes = {
            "the share is of the whole step, work and waiting, not of the work": (
                _needed_of_work(p, v, limit)
            ),
            "the chunks are missing: interleaving divides the waiting by v": _needed(
                p, 1, limit, p if v > 1 else 1
            ),
            "an interleaved schedule takes microbatches in multiples of p": _needed(
                p, v, limit, 1
            ),
            "multiples of p are needed for v > 1 only": _needed(p, v, limit, p),
            "p stages wait for p − 1 others, not p": _needed(
                p + 1, v, limit, p if v > 1 else 1
            ),
            "this m has too large a bubble: one step more": right - (p if v > 1 else 1),
            "a smaller m is enough": right + (p if v > 1 else 1),
        }
        mistakes = {text: m for text, m in mistakes.items() if m != right}
        diagnose(got, right=right, mistakes=mistakes, what=what)


def _needed(p: int, v: int, limit: float, step: int) -> int:
    m = step
    waiting = (p - 1) / v
    while waiting > limit * (m + waiting) * (1 + 1e-12):
        m += step
    return m


def _needed_of_work(p: int, v: int, limit: float) -> int:
    step = p if v > 1 else 1
    m = step
    while (p - 1) / v > limit * m * (1 + 1e-12):
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
