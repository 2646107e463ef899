"""A parallel plan, the job that it is for, and what does not divide.

    N     devices = dp · cp · tp · pp
    tp    tensor-parallel ranks
    cp    context-parallel ranks (ring attention)
    dp    data-parallel ranks
    pp    pipeline ranks
    ep    ranks that share the experts, out of dp · cp
    B     sequences per step
    b     sequences per microbatch
    m     microbatches, B / (dp · b)
    v     chunks per pipeline rank

Devices are numbered with tp innermost, then cp, dp, pp. A group along an axis spans
(its stride · its size) devices, and runs at the speed of NVLink if every such group
lies inside a node. What a plan costs is in `memory` and `time`, the search in
`planner`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.parallelism.choosing.machines import Machine
from llmlab.parallelism.choosing.shapes import RECOMPUTE, Shape


@dataclass(frozen=True)
class Plan:
    """How a step is split.

    Raises:
        ValueError: a number is out of its range, named in the message.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    microbatch: int = 1  # b
    zero: int = 1  # stage of ZeRO, 0 to 3
    sequence: bool = False  # Megatron's sequence parallelism, which needs tp > 1
    recompute: str = "selective"  # one of `RECOMPUTE`
    chunks: int = 1  # v of the interleaved schedule
    grad_bytes: int = 4  # per parameter

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
    """What is to be trained, and on what."""

    shape: Shape
    batch: int  # sequences per step
    seq: int  # tokens per sequence
    machine: Machine


@dataclass(frozen=True)
class Estimate:
    """What a plan costs."""

    plan: Plan
    memory: dict[str, float]  # bytes by kind, on the fullest device
    seconds: dict[str, float]  # of a step, by kind
    mfu: float
    problems: tuple[str, ...]  # empty for a plan that can run

    @property
    def bytes(self) -> float:
        """All bytes on the fullest device."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())


def misfits(job: Job, plan: Plan) -> list[str]:
    """Why the plan does not divide the model or the batch; [] if it does."""
    x = job.shape
    replicas = plan.dp * plan.cp
    sequences = plan.dp * plan.microbatch
    zigzag = 2 * plan.cp if plan.cp > 1 else 1
    must_divide = [
        # what there is, and of what; what must divide it, and its name
        (x.heads, "attention heads", plan.tp, "tp"),
        (x.ffn, "feed-forward channels", plan.tp, "tp"),
        (x.layers, "layers", plan.pp * plan.chunks, "pp · chunks"),
        (job.batch, "sequences of the batch", sequences, "dp · microbatch"),
        (job.seq, "tokens of a sequence", zigzag, "2 · cp (zigzag)"),
        (x.experts, "experts", plan.ep, "ep"),
        (replicas, "data-parallel ranks dp · cp", plan.ep, "ep"),
    ]
    found = []
    for count, what, divisor, name in must_divide:
        if count % divisor:
            found.append(f"{count} {what} are not a multiple of {name} = {divisor}")
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
            "ZeRO-2 and 3 with a pipeline would reduce gradients once per microbatch:"
            " use ZeRO-1"
        )
    if plan.ep > 1 and not x.experts:
        found.append("ep > 1 needs experts")
    return found


def microbatches(job: Job, plan: Plan) -> int:
    """m, at least 1."""
    return max(1, job.batch // (plan.dp * plan.microbatch))
