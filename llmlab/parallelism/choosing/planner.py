"""The planner: a model, a machine, a batch → every plan that divides them, the ones
that can run ranked by time.

    >>> from llmlab.parallelism.choosing import machines, plan, planner, shapes
    >>> gpt3 = shapes.gpt(96, 12288, 96)
    >>> a100 = machines.machine("a100-80gb")
    >>> job = plan.Job(gpt3, batch=1536, seq=2048, machine=a100)
    >>> found = planner.search(job, devices=1024)
    >>> found.ranked[0].plan, found.rejected[0].problems

The search is exhaustive over divisors: nothing is learnt, so whatever is rejected can
say why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llmlab.parallelism.choosing.memory import memory
from llmlab.parallelism.choosing.plan import Estimate, Job, Plan, misfits
from llmlab.parallelism.choosing.shapes import token_flops
from llmlab.parallelism.choosing.time import seconds

MICROBATCHES = (1, 2, 4, 8, 16)
# (recompute, sequence)
WAYS = (
    ("none", False),
    ("none", True),
    ("selective", True),
    ("full", False),
    ("full", True),
)


@dataclass(frozen=True)
class Found:
    """What a search found: plans that can run, fastest first, and those that cannot,
    the nearest miss first.
    """

    ranked: list[Estimate]
    rejected: list[Estimate]

    def splits(self) -> list[Estimate]:
        """The fastest plan of each (dp, tp, pp, cp, ep), fastest first."""
        first = {}
        for e in self.ranked:
            first.setdefault((e.plan.dp, e.plan.tp, e.plan.pp, e.plan.cp, e.plan.ep), e)
        return list(first.values())

    def reasons(self) -> Counter:
        """How many plans failed for which kind of reason."""
        return Counter(
            _kind(problem) for e in self.rejected for problem in e.problems[:1]
        )


def estimate(job: Job, plan: Plan) -> Estimate:
    """Everything about one plan. A plan that is too large is still timed, so that one
    sees by how much it fails.
    """
    if problems := misfits(job, plan):
        return Estimate(plan, {}, {}, 0.0, tuple(problems))
    held, times = memory(job, plan), seconds(job, plan)
    return Estimate(
        plan,
        held,
        times,
        mfu(job, plan.devices, sum(times.values())),
        _too_large(job, held),
    )


def _too_large(job: Job, held: dict[str, float]) -> tuple[str, ...]:
    needed, there = sum(held.values()), job.machine.memory
    if needed <= there:
        return ()
    most = max(held, key=held.get)
    return (
        (
            f"needs {needed / 1e9:.1f} GB a device of {there / 1e9:.0f}: most of it"
            f" {most}, {held[most] / 1e9:.1f} GB"
        ),
    )


def _kind(problem: str) -> str:
    return (
        "too large for a device"
        if problem.startswith("needs")
        else problem.partition(" = ")[0]
    )


def mfu(job: Job, devices: int, step: float) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): useful FLOPs over
    what the devices could have done.
    """
    return (
        token_flops(job.shape, job.seq)
        * job.seq
        * job.batch
        / (devices * job.machine.flops * step)
    )


def days(job: Job, step: float, tokens: float) -> float:
    """Days to train on so many tokens at so many seconds a step."""
    return tokens / (job.batch * job.seq) * step / 86_400


def dollars(devices: int, days: float, price: float) -> float:
    """What that costs at a price a device and hour."""
    return devices * days * 24 * price


def divisors(n: int, most: int | None = None) -> list[int]:
    """All divisors of n, up to `most`."""
    return [k for k in range(1, min(n, most or n) + 1) if n % k == 0]


def candidates(job: Job, devices: int) -> Iterator[Plan]:
    """Every split of the devices that divides the model, and for each the ways to fill
    memory. Not all of them fit.
    """
    x = job.shape
    for tp in divisors(devices, x.heads):
        for pp in divisors(devices // tp, x.layers):
            for cp in divisors(devices // tp // pp, max(1, job.seq // 4096)):
                dp = devices // tp // pp // cp
                for ep in divisors(dp * cp, x.experts) if x.experts else (1,):
                    yield from _variants(job, dp, tp, pp, cp, ep)


def _variants(job: Job, dp: int, tp: int, pp: int, cp: int, ep: int) -> Iterator[Plan]:
    for b in MICROBATCHES:
        if job.batch % (dp * b):
            continue
        chunks = (
            [1]
            if pp == 1
            else [
                v
                for v in divisors(job.shape.layers // pp, 8)
                if job.shape.layers % pp == 0
            ]
        )
        for v in chunks or [1]:
            for recompute, sequence in WAYS:
                if (sequence and tp == 1) or (
                    recompute == "selective" and job.shape.family == "llama"
                ):
                    continue  # FlashAttention keeps no scores: nothing to select
                for zero in (1, 3) if pp == 1 and dp * cp > 1 else (1,):
                    yield Plan(dp, tp, pp, cp, ep, b, zero, sequence, recompute, v)


def search(job: Job, devices: int) -> Found:
    """All plans for so many devices.

    Raises:
        ValueError: devices or the batch make no sense.
    """
    for name, value in (("devices", devices), ("batch", job.batch), ("seq", job.seq)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    found = [estimate(job, plan) for plan in candidates(job, devices)]
    ranked = sorted(
        (e for e in found if not e.problems), key=lambda e: (e.step, e.bytes)
    )
    rejected = [e for e in found if e.problems]
    return Found(
        ranked,
        sorted(rejected, key=lambda e: (not e.memory, e.bytes if e.memory else 0)),
    )
