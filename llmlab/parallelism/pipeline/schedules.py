"""Pipeline schedules as data: for each rank the list of what it computes, in order.

Nothing here knows a model or a wire. A schedule is a list of p lists of ops, and an op
is (kind, microbatch, chunk):

    >>> one_f_one_b(2, 3)[0]
    [('F', 0, 0), ('F', 1, 0), ('B', 0, 0), ('F', 2, 0), ('B', 1, 0), ('B', 2, 0)]

    F    forward                            p    ranks
    B    backward: I and W in one           r    this rank, 0 … p − 1
    I    gradient of the input              v    chunks per rank
    W    gradient of the weights            m    microbatches
                                            i    a microbatch, 0 … m − 1

The letters are those of torch.distributed.pipelining. Qi et al. write B for what is I
here: their backward is always split.

A chunk is a run of layers. All chunks, in the order of the layers, are the stages
0 … S − 1, S = p·v. `stage_of` says which stage a rank's chunk is. In the "loop" layout
rank r has the stages r, p + r, 2p + r …; in the "v" layout every second round goes
backwards. In the "bidirectional" layout (see `dualpipe`) there are p stages, and rank r
has stage r for the microbatches of the first half, and a copy of stage p − 1 − r for
those of the second half, which go the other way.

    schedule       bubble / work        microbatches that rank r holds
    naive          p − 1                1
    gpipe          (p − 1) / m          m
    one_f_one_b    (p − 1) / m          min(p − r, m)
    interleaved    (p − 1) / (v m)      p + (p − 2r − 1) / v
    zb_h1          (p − 1) / 3m         p − r, and r more wait for their W
    zb_h2          0                    2 (p − r) − 1, and 2r more wait for their W
    zb_v           0                    p

The bubbles of the last three are for F, I and W of one length, and enough microbatches.

Sources
    gpipe          Huang et al. 2018, https://arxiv.org/abs/1811.06965
    one_f_one_b    Narayanan et al. 2020, https://arxiv.org/abs/2006.09503
                   (PipeDream-flush)
    interleaved    Narayanan et al. 2021, https://arxiv.org/abs/2104.04473 (Megatron-LM)
    zb_…           Qi et al. 2023, https://arxiv.org/abs/2401.10241
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum


class Kind(StrEnum):
    """What an op computes. A member equals its letter: `Kind.FORWARD == "F"`."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"

    def __repr__(self) -> str:
        return repr(self.value)


Op = tuple[str, int, int]
Schedule = list[list[Op]]
KINDS = tuple(Kind)
BIDIRECTIONAL = "bidirectional"
LAYOUTS = ("loop", "v", BIDIRECTIONAL)


def naive(p: int, m: int) -> Schedule:
    """One microbatch at a time goes through all ranks and back: p − 1 ranks wait."""
    _check_positive(p, m)
    return [unroll([(m, "F B")]) for _ in range(p)]


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards.

    In the paper's figure the backwards run last in, first out. The bubble is the same.
    """
    _check_positive(p, m)
    return [unroll([(m, "F"), (m, "B")]) for _ in range(p)]


def one_f_one_b(p: int, m: int) -> Schedule:
    """1F1B: some forwards ahead, then one forward and one backward in turn.

    Rank r is min(p − r − 1, m) forwards ahead. First in is first out.
    """
    _check_positive(p, m)
    schedule = []
    for r in range(p):
        warmup = min(p - r - 1, m)
        phases = [
            (warmup, "F"),  # warm-up
            (m - warmup, "F B"),  # steady state
            (warmup, "B"),  # cool-down
        ]
        schedule.append(unroll(phases))
    return schedule


def interleaved(p: int, m: int, v: int = 2) -> Schedule:
    """Megatron's 1F1B over p·v stages.

    p microbatches pass a rank's first chunk, then the same p its next chunk, and so on.

    Raises:
        ValueError: m is not a multiple of p, which this order needs; v is not 2 or
            more.
    """
    _check_positive(p, m, v)
    if v == 1:
        raise ValueError("v=1 must be 2 chunks or more; with one, use one_f_one_b")
    if m % p:
        raise ValueError(
            f"m={m} must be a multiple of the p={p} ranks: microbatches are dealt in"
            " rounds of p"
        )

    def place(kind: str, k: int) -> Op:
        """The k-th forward, or the k-th backward, of any rank."""
        group = k // (p * v)  # of p microbatches, which pass all v chunks
        i = group * p + k % p
        chunk = k // p % v
        if kind == Kind.BACKWARD:
            chunk = v - 1 - chunk  # backwards begin at the last chunk
        return kind, i, chunk

    forwards = m * v
    schedule = []
    for r in range(p):
        warmup = min((v - 1) * p + 2 * (p - r - 1), forwards)
        phases = [
            (warmup, "F"),  # warm-up
            (forwards - warmup, "F B"),  # steady state
            (warmup, "B"),  # cool-down
        ]
        schedule.append(unroll(phases, place))
    return schedule


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B, but the input's gradient is sent on before W is computed.

    Rank r computes its W r microbatches late, in what was the bubble.
    """
    _check_positive(p, m)
    return [deferred(m, warmup=p - r - 1, delay=r) for r in range(p)]


def zb_h2(p: int, m: int) -> Schedule:
    """Twice the warm-up and delay of H1: no bubble, for almost twice the memory.

    Ranks end one after another, as they began: the optimizer step must not wait for all
    (section 4 of the paper).
    """
    _check_positive(p, m)
    return [deferred(m, warmup=2 * (p - r - 1), delay=2 * r) for r in range(p)]


def zb_v(p: int, m: int) -> Schedule:
    """Two chunks per rank in the "v" layout: no bubble, and the memory of 1F1B.

    Rank 0 has the first stage and the last, so the first gradient is soon there.
    """
    _check_positive(p, m)
    n = max(m, 2 * p - 1)  # the pattern needs so many; those above m are left out

    def place(kind_and_chunk: str, k: int) -> Op:
        kind, chunk = kind_and_chunk
        return kind, k, int(chunk)

    schedule = []
    for r in range(p):
        phases = [
            # warm-up
            (2 * (p - r) - 1, "F0"),
            (r, "F1 F0"),
            (p - r, "F1 I1 W1"),
            # steady state
            (n - 2 * p + r + 1, "F0 I0 W0 F1 I1 W1"),
            # cool-down
            (p - r - 1, "I0 W0 F1 I1 W1"),
            (r, "I0 I1"),
            (p - r, "I0 W0"),
            (r, "W1"),
            (r, "W0"),
        ]
        ops = unroll(phases, place)
        schedule.append([(kind, i, chunk) for kind, i, chunk in ops if i < m])
    return schedule


def in_order(kind: str, k: int) -> Op:
    """The k-th op of a kind is that of microbatch k, in the only chunk."""
    return kind, k, 0


def unroll(
    phases: Iterable[tuple[int, str]], place: Callable[[str, int], Op] = in_order
) -> list[Op]:
    """The ops of a table of phases.

    Args:
        phases: (times, pattern) for each; a pattern is kinds with spaces between.
        place: which op is the k-th of its kind. Each kind counts its own, so first in
            is first out.
    """
    counts: Counter[str] = Counter()
    ops = []
    for times, pattern in phases:
        for kind in pattern.split() * times:
            ops.append(place(kind, counts[kind]))
            counts[kind] += 1
    return ops


def deferred(m: int, warmup: int, delay: int) -> list[Op]:
    """1F1B with I in place of B, and each W `delay` microbatches after its I."""
    warmup = min(warmup, m)
    # The first I's come without a W, until `delay` of them are pending: in the steady
    # state if it is long enough, and the rest in the cool-down.
    steady_delay = min(delay, m - warmup)
    cooldown_delay = min(delay - steady_delay, warmup)
    phases = [
        # warm-up
        (warmup, "F"),
        # steady state
        (steady_delay, "F I"),
        (m - warmup - steady_delay, "F I W"),
        # cool-down
        (cooldown_delay, "I"),
        (warmup - cooldown_delay, "I W"),
        (steady_delay + cooldown_delay, "W"),
    ]
    return unroll(phases)


def stage_of(rank: int, chunk: int, p: int, layout: str = "loop") -> int:
    """The stage, 0 … S − 1, that is this rank's chunk."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    runs_backwards = layout != "loop" and chunk % 2 == 1
    place_in_round = p - 1 - rank if runs_backwards else rank
    if layout == BIDIRECTIONAL:
        return place_in_round
    return chunk * p + place_in_round


def stage_count(p: int, v: int, layout: str = "loop") -> int:
    """S, the number of stages that a microbatch passes."""
    return p if layout == BIDIRECTIONAL else p * v


def chunks_of(i: int, m: int, v: int, layout: str = "loop") -> tuple[int, ...]:
    """The chunks that microbatch i passes on every rank."""
    if layout == BIDIRECTIONAL:
        return (0,) if i < m // 2 else (1,)
    return tuple(range(v))


def chunks_per_share(v: int, layout: str = "loop") -> int:
    """How many of a rank's chunks are the p-th part of the model."""
    return 1 if layout == BIDIRECTIONAL else v


def chunks(schedule: Schedule) -> int:
    """v, the number of chunks that each rank has."""
    return 1 + max((chunk for ops in schedule for _, _, chunk in ops), default=0)


def microbatch_count(schedule: Schedule) -> int:
    """m, the number of microbatches that the schedule names."""
    return 1 + max((i for ops in schedule for _, i, _ in ops), default=-1)


def check(schedule: Schedule, m: int | None = None, layout: str = "loop") -> None:
    """Each rank does each microbatch of each chunk once: F, later B, or I and later W.

    Args:
        m: the number of microbatches; None: as many as the schedule names.
        layout: "bidirectional": each microbatch in one chunk only, see `chunks_of`.
    Raises:
        ValueError: the first rank and op that is missing, double, out of order or
            unknown.
    """
    v = chunks(schedule)
    if m is None:
        m = microbatch_count(schedule)
    for rank, ops in enumerate(schedule):
        done: set[Op] = set()
        for op in ops:
            _check_op(op, rank, m, done)
            if op[2] not in chunks_of(op[1], m, v, layout):
                raise ValueError(
                    f"rank {rank} does {op[0]} of microbatch {op[1]} in chunk {op[2]},"
                    " which is the other half's"
                )
            done.add(op)
        for i in range(m):
            for chunk in chunks_of(i, m, v, layout):
                if ("B", i, chunk) not in done and ("W", i, chunk) not in done:
                    raise ValueError(
                        f"rank {rank} never finishes the backward of microbatch {i},"
                        f" chunk {chunk}"
                    )


# What must be done before an op of this kind, and what must not be done yet.
BEFORE = {"F": None, "B": "F", "I": "F", "W": "I"}
EXCLUDES = {"F": ("F",), "B": ("B", "I"), "I": ("B", "I"), "W": ("W",)}


def _check_op(op: Op, rank: int, m: int, done: set[Op]) -> None:
    """Whether a rank that has done `done` may do this op next."""
    kind, i, chunk = op
    if kind not in KINDS or not 0 <= i < m:
        raise ValueError(
            f"rank {rank}: {(kind, i, chunk)} is no op for m={m} microbatches;"
            f" kinds are {KINDS}"
        )
    this_op = f"rank {rank} does {kind} of microbatch {i}, chunk {chunk}"
    if any((excluded, i, chunk) in done for excluded in EXCLUDES[kind]):
        raise ValueError(f"{this_op} twice")
    before = BEFORE[kind]
    if before is not None and (before, i, chunk) not in done:
        raise ValueError(f"{this_op} before its {before}")


def peak_microbatches(
    schedule: Schedule,
    full: float = 1.0,
    pending: float = 0.0,
    layout: str = "loop",
) -> list[float]:
    """The most that each rank holds at once, in microbatches of all its layers.

    In the "bidirectional" layout: of the p-th part of the model.

    Args:
        full: what a microbatch holds from F to B or I (Qi et al.: M_B).
        pending: what it holds from I to W (M_W).
    """
    per_share = chunks_per_share(chunks(schedule), layout)
    change = {"F": full, "B": -full, "I": pending - full, "W": -pending}
    peaks = []
    for ops in schedule:
        now = 0.0
        peak = 0.0
        for kind, _, _ in ops:
            now += change[kind]
            peak = max(peak, now)
        peaks.append(peak / per_share)
    return peaks


def bubble_fraction(p: int, m: int, v: int = 1) -> float:
    """(p − 1) / (v m + p − 1): the share of a step in which a rank waits.

    It holds for GPipe, 1F1B and, with v > 1, interleaved 1F1B.
    """
    _check_positive(p, m, v)
    return (p - 1) / (v * m + p - 1)


CHUNK_LETTERS = "abcdefghijklmnop"


def as_text(schedule: Schedule) -> str:
    """One line per rank: 'rank 0  F0 F1 B0 B1'; with several chunks 'F0a F1a F0b …'."""
    v = chunks(schedule)
    lines = []
    for rank, ops in enumerate(schedule):
        names = []
        for kind, i, chunk in ops:
            letter = CHUNK_LETTERS[chunk] if v > 1 else ""
            names.append(f"{kind}{i}{letter}")
        lines.append(f"rank {rank}  " + " ".join(names))
    return "\n".join(lines)


def _check_positive(p: int, m: int, v: int = 1) -> None:
    for name, value in (("p", p), ("m", m), ("v", v)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive number")
