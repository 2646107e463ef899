"""A parallel plan, the job that it is for, and what does not divide.

    N    devices = dp · cp · tp · pp           tp  tensor, cp  context (ring attention),
                                                   pp  pipeline, dp  data
    B    sequences a step, b a microbatch      m = B / (dp · b)  microbatches         v
                                               chunks a pipeline rank
                                               ep  ranks that share the experts, out of
                                                   dp · cp

Devices are numbered with tp innermost, then cp, dp, pp: a group along an axis spans
(its stride · its size) devices, and runs at NVLink's speed if every such group lies
inside a node. What a plan costs: `plan_memory`, `plan_time`; the search: `planner`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.parallelism.choosing.machines import Machine
from llmlab.parallelism.choosing.shapes import RECOMPUTE, Shape


@dataclass(frozen=True)
class Plan:
    """How a step is split. `sequence` is Megatron's sequence parallelism, which needs
    tp > 1.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    microbatch: int = 1
    zero: int = 1
    sequence: bool = False
    recompute: str = "selective"
    chunks: int = 1  # v of the interleaved schedule
    grad_bytes: int = 4

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "microbatch", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero} must be 0, 1, 2 or 3")
        if self.recompute not in RECOMPUTE:
            raise ValueError(
                f"recompute={self.recompute!r} must be one of {', '.join(RECOMPUTE)}"
            )

    @property
    def devices(self) -> int:
        """dp · cp · tp · pp."""
        return self.dp * self.cp * self.tp * self.pp


@dataclass(frozen=True)
class Job:
    """What is to be done: a model, sequences a step, tokens a sequence, and on what."""

    shape: Shape
    batch: int
    seq: int
    machine: Machine


@dataclass(frozen=True)
class Estimate:
    """What a plan costs. `memory` and `seconds` are by kind; `problems` is empty for a
    plan that can run.
    """

    plan: Plan
    memory: dict[str, float]
    seconds: dict[str, float]
    mfu: float
    problems: tuple[str, ...]

    @property
    def bytes(self) -> float:
        """On the fullest device."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())


def misfits(job: Job, plan: Plan) -> list[str]:
    """Why the plan does not divide the model or the batch; [] if it does."""
    x, found = job.shape, []
    uneven = [
        (x.heads, plan.tp, "attention heads", "tp"),
        (x.ffn, plan.tp, "feed-forward channels", "tp"),
        (x.layers, plan.pp * plan.chunks, "layers", "pp · chunks"),
        (
            job.batch,
            plan.dp * plan.microbatch,
            "sequences of the batch",
            "dp · microbatch",
        ),
        (
            job.seq,
            2 * plan.cp if plan.cp > 1 else 1,
            "tokens of a sequence",
            "2 · cp (zigzag)",
        ),
        (x.experts, plan.ep, "experts", "ep"),
        (plan.dp * plan.cp, plan.ep, "data-parallel ranks dp · cp", "ep"),
    ]
    found += [
        f"{n} {what} are not a multiple of {by} = {k}"
        for n, k, what, by in uneven
        if n % k
    ]
    if plan.tp > x.kv_heads:
        found.append(f"{x.kv_heads} key/value heads are fewer than tp = {plan.tp}")
    elif x.kv_heads % plan.tp:
        found.append(
            f"{x.kv_heads} key/value heads are not a multiple of tp = {plan.tp}"
        )
    if plan.sequence and job.seq % (plan.tp * plan.cp):
        found.append(
            f"{job.seq} tokens of a sequence are not a multiple of tp · cp ="
            f" {plan.tp * plan.cp}"
        )
    if plan.sequence and plan.tp == 1:
        found.append("sequence parallelism cuts along tp, which is 1")
    if plan.chunks > 1 and (plan.pp == 1 or microbatches(job, plan) % plan.pp):
        found.append(
            f"interleaved microbatches come in multiples of pp = {plan.pp}, with pp > 1"
        )
    if plan.zero >= 2 and plan.pp > 1:
        found.append(
            "ZeRO-2 and 3 with a pipeline would reduce gradients once a microbatch: use"
            " ZeRO-1"
        )
    if plan.ep > 1 and not x.experts:
        found.append("ep > 1 needs experts")
    return found


def microbatches(job: Job, plan: Plan) -> int:
    """m, at least 1."""
    return max(1, job.batch // (plan.dp * plan.microbatch))
