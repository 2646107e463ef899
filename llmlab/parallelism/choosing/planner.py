"""The planner: every plan for a model, a machine and a batch, ranked by time.

    >>> from llmlab.parallelism.choosing import machines, plan, planner, shapes
    >>> gpt3 = shapes.gpt(96, 12288, 96)
    >>> a100 = machines.machine("a100-80gb")
    >>> job = plan.Job(gpt3, batch=1536, seq=2048, machine=a100)
    >>> found = planner.search(job, devices=1024)
    >>> found.ranked[0].plan, found.rejected[0].problems

The search goes through all divisors. Nothing is learnt, so every plan that is rejected
comes with its reason.
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
    """What a search found."""

    ranked: list[Estimate]  # plans that can run, the fastest first
    rejected: list[Estimate]  # those that cannot, the nearest miss first

    def splits(self) -> list[Estimate]:
        """The fastest plan of each (dp, tp, pp, cp, ep), fastest first."""
        first = {}
        for found in self.ranked:
            p = found.plan
            first.setdefault((p.dp, p.tp, p.pp, p.cp, p.ep), found)
        return list(first.values())

    def reasons(self) -> Counter:
        """How many plans failed for which kind of reason."""
        return Counter(_kind(found.problems[0]) for found in self.rejected)


def estimate(job: Job, plan: Plan) -> Estimate:
    """Everything about one plan.

    A plan that is too large is timed too, so that one sees what it would bring.
    """
    problems = misfits(job, plan)
    if problems:
        return Estimate(plan, {}, {}, 0.0, tuple(problems))
    held = memory(job, plan)
    times = seconds(job, plan)
    utilisation = mfu(job, plan.devices, sum(times.values()))
    return Estimate(plan, held, times, utilisation, _too_large(job, held))


def _too_large(job: Job, held: dict[str, float]) -> tuple[str, ...]:
    needed = sum(held.values())
    available = job.machine.memory
    if needed <= available:
        return ()
    most = max(held, key=held.get)
    problem = (
        f"needs {needed / 1e9:.1f} GB per device of {available / 1e9:.0f}: most of it"
        f" {most}, {held[most] / 1e9:.1f} GB"
    )
    return (problem,)


def _kind(problem: str) -> str:
    if problem.startswith("needs"):
        return "too large for a device"
    return problem.partition(" = ")[0]


def mfu(job: Job, devices: int, step: float) -> float:
    """Model FLOPs utilisation: useful FLOPs over what the devices could have done.

    Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B.
    """
    useful = token_flops(job.shape, job.seq) * job.seq * job.batch
    possible = devices * job.machine.flops * step
    return useful / possible


def days(job: Job, step: float, tokens: float) -> float:
    """Days to train on so many tokens, at `step` seconds per step."""
    return tokens / (job.batch * job.seq) * step / 86_400


def dollars(devices: int, days: float, price: float) -> float:
    """What that costs, at a price per device and hour."""
    return devices * days * 24 * price


def divisors(n: int, most: int | None = None) -> list[int]:
    """All divisors of n, up to `most`."""
    return [k for k in range(1, min(n, most or n) + 1) if n % k == 0]


def candidates(job: Job, devices: int) -> Iterator[Plan]:
    """Every split of the devices that divides the model, in all its variants.

    Not all of them fit.
    """
    for dp, tp, pp, cp, ep in splits_of(job, devices):
        yield from _variants(job, dp, tp, pp, cp, ep)


def splits_of(job: Job, devices: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(dp, tp, pp, cp, ep) of every split of the devices that divides the model."""
    x = job.shape
    for tp in divisors(devices, x.heads):
        for pp in divisors(devices // tp, x.layers):
            for cp in divisors(devices // tp // pp, max(1, job.seq // 4096)):
                dp = devices // tp // pp // cp
                expert_ranks = divisors(dp * cp, x.experts) if x.experts else [1]
                for ep in expert_ranks:
                    yield dp, tp, pp, cp, ep


@dataclass(frozen=True)
class Uneven:
    """The splits that a search leaves out, since dp does not divide the batch.

    Attributes:
        left_out: how many.
        of: how many splits divide the model.
        better: a batch near the job's that leaves out fewest; None: there is none.
    """

    left_out: int
    of: int
    better: int | None


def uneven(job: Job, devices: int) -> Uneven:
    """How many splits do not divide the batch, and which batch near it would do.

    Near is within an eighth; of the batches that leave out fewest, the nearest.
    """
    dps = [split[0] for split in splits_of(job, devices)]
    now = _left_out(job.batch, dps)
    if now == 0:
        return Uneven(0, len(dps), None)
    reach = max(1, job.batch // 8)
    near = range(max(1, job.batch - reach), job.batch + reach + 1)
    best = min(near, key=lambda batch: (_left_out(batch, dps), abs(batch - job.batch)))
    better = best if _left_out(best, dps) < now else None
    return Uneven(now, len(dps), better)


def _left_out(batch: int, dps: list[int]) -> int:
    return sum(batch % dp != 0 for dp in dps)


def _variants(job: Job, dp: int, tp: int, pp: int, cp: int, ep: int) -> Iterator[Plan]:
    """One split, with every microbatch, schedule, recomputation and ZeRO stage."""
    layers = job.shape.layers
    chunks = [1]
    if pp > 1 and layers % pp == 0:
        chunks = divisors(layers // pp, 8)
    zero_stages = [1]
    if pp == 1 and dp * cp > 1:
        zero_stages = [1, 3]
    for b in MICROBATCHES:
        if job.batch % (dp * b):
            continue
        for v in chunks:
            for recompute, sequence in WAYS:
                if sequence and tp == 1:
                    continue  # it cuts along tp
                if recompute == "selective" and job.shape.family == "llama":
                    continue  # FlashAttention keeps no scores: nothing to select
                for zero in zero_stages:
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
    ranked = [e for e in found if not e.problems]
    rejected = [e for e in found if e.problems]
    ranked.sort(key=lambda e: (e.step, e.bytes))
    # First those that are only too large, then those that do not divide.
    rejected.sort(key=lambda e: (not e.memory, e.bytes))
    return Found(ranked, rejected)
