"""Pipeline schedules as data: for each rank the list of what it computes, in order.
Nothing here knows a model or a wire.

A schedule is a list of p lists of ops, and an op is (kind, microbatch, chunk):

    >>> one_f_one_b(2, 3)[0]
    [('F', 0, 0), ('F', 1, 0), ('B', 0, 0), ('F', 2, 0), ('B', 1, 0), ('B', 2, 0)]

    F  forward                           I  gradient of the input      p  ranks
                                            v  chunks a rank
    B  backward: I and W in one          W  gradient of the weights    m  microbatches
                                            r  this rank, 0 … p − 1

Qi et al. write B for what is I here: theirs is always split. (The letters are those of
torch.distributed.pipelining.)

A chunk is a run of layers; all chunks, in the order of the layers, are the stages 0 … S
− 1, S = p·v. `stage_of` says who has which: in the "loop" layout rank r has stages r, p
+ r, 2p + r …; in the "v" layout every second lap runs backwards.

    schedule       source                                              bubble / work
                   microbatches that rank r holds
    naive          –                                                   p − 1
                   1
    gpipe          Huang et al. 2018, arXiv:1811.06965                 (p − 1) / m
                   m
    one_f_one_b    PipeDream-flush: Narayanan et al. 2020, 2006.09503  (p − 1) / m
                   min(p − r, m)
    interleaved    Megatron-LM: Narayanan et al. 2021, 2104.04473      (p − 1) / (v m)
                   p + (p − 2r − 1) / v
    zb_h1          Qi et al. 2023, arXiv:2401.10241                    (p − 1) / 3m
                   p − r, and r more wait for their W
    zb_h2          the same                                            0
                   2 (p − r) − 1, and 2r more
    zb_v           the same, "v" layout                                0               p

The bubbles of the last three are for F, I and W of one length, and enough microbatches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

Op = tuple[str, int, int]
Schedule = list[list[Op]]
KINDS = ("F", "B", "I", "W")
LAYOUTS = ("loop", "v")


def naive(p: int, m: int) -> Schedule:
    """One microbatch at a time goes all the way up and down: one rank works, p − 1
    wait.
    """
    _check(p, m)
    return [_unroll([(m, "F B")]) for _ in range(p)]


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards. (In the paper's figure the backwards run last
    in, first out: the same bubble.)
    """
    _check(p, m)
    return [_unroll([(m, "F"), (m, "B")]) for _ in range(p)]


def one_f_one_b(p: int, m: int) -> Schedule:
    """1F1B: min(p − r − 1, m) forwards to warm up, then a forward and a backward in
    turn; first in, first out.
    """
    _check(p, m)
    warmups = [min(p - r - 1, m) for r in range(p)]
    return [_unroll([(w, "F"), (m - w, "F B"), (w, "B")]) for w in warmups]


def interleaved(p: int, m: int, v: int = 2) -> Schedule:
    """Megatron's 1F1B over p·v stages: p microbatches pass a rank's first chunk, the
    same p its next chunk, and so on.

    Raises:
        ValueError: m is not a multiple of p, which this order needs; v is not 2 or
            more.
    """
    _check(p, m, v)
    if v == 1:
        raise ValueError("v=1 must be 2 chunks or more; with one, use one_f_one_b")
    if m % p:
        raise ValueError(
            f"m={m} must be a multiple of the p={p} ranks: microbatches are dealt in"
            " rounds of p"
        )

    def place(kind: str, k: int) -> Op:
        # the k-th forward, or backward, of any rank
        lap, i = k // p % v, k // (p * v) * p + k % p
        return kind, i, lap if kind == "F" else v - 1 - lap

    n, warmups = m * v, [min((v - 1) * p + 2 * (p - r - 1), m * v) for r in range(p)]
    return [_unroll([(w, "F"), (n - w, "F B"), (w, "B")], place) for w in warmups]


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B, but the gradient goes on before W is computed; rank r computes its W r
    microbatches late, in what was the bubble.
    """
    _check(p, m)
    return [_deferred(m, p - r - 1, r) for r in range(p)]


def zb_h2(p: int, m: int) -> Schedule:
    """Twice the warm-up and twice the delay of H1: no bubble, for almost twice the
    memory.

    Ranks end one after another, as they began: the optimizer step must not wait for all
    (section 4 of the paper).
    """
    _check(p, m)
    return [_deferred(m, 2 * (p - r - 1), 2 * r) for r in range(p)]


def zb_v(p: int, m: int) -> Schedule:
    """Two chunks a rank in the "v" layout, so that the last rank's turning point is
    near: no bubble, memory of 1F1B.
    """
    _check(p, m)
    n = max(m, 2 * p - 1)  # the pattern needs so many; what is too much is left out

    def rank(r: int) -> list[Op]:
        phases = [
            (2 * (p - r) - 1, "F0"),
            (r, "F1 F0"),
            (p - r, "F1 I1 W1"),
            (n - 2 * p + r + 1, "F0 I0 W0 F1 I1 W1"),
            (p - r - 1, "I0 W0 F1 I1 W1"),
            (r, "I0 I1"),
            (p - r, "I0 W0"),
            (r, "W1"),
            (r, "W0"),
        ]
        return [
            op
            for op in _unroll(phases, lambda kind, k: (kind[0], k, int(kind[1])))
            if op[1] < m
        ]

    return [rank(r) for r in range(p)]


def _unroll(
    phases: Iterable[tuple[int, str]],
    place: Callable[[str, int], Op] = lambda kind, k: (kind, k, 0),
) -> list[Op]:
    """The ops of a table of (times, pattern): each kind counts its own microbatches, so
    first in is first out.
    """
    counts: Counter[str] = Counter()
    ops = []
    for times, pattern in phases:
        for kind in pattern.split() * times:
            ops.append(place(kind, counts[kind]))
            counts[kind] += 1
    return ops


def _deferred(m: int, warmup: int, delay: int) -> list[Op]:
    """1F1B with I for B, and each W `delay` microbatches after its I."""
    w = min(warmup, m)
    a = min(delay, m - w)  # F I without a W
    b = min(delay - a, w)  # I without a W
    phases = [
        (w, "F"),
        (a, "F I"),
        (m - w - a, "F I W"),
        (b, "I"),
        (w - b, "I W"),
        (a + b, "W"),
    ]
    return _unroll(phases)


def stage_of(rank: int, chunk: int, p: int, layout: str = "loop") -> int:
    """The stage, 0 … S − 1, that is this rank's chunk."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    return chunk * p + (p - 1 - rank if layout == "v" and chunk % 2 else rank)


def chunks(schedule: Schedule) -> int:
    """v, the number of chunks that each rank has."""
    return 1 + max((chunk for ops in schedule for _, _, chunk in ops), default=0)


def check(schedule: Schedule, m: int | None = None) -> None:
    """Each rank does each microbatch of each chunk once: F, later B, or I and later W.

    Args:
        m: the number of microbatches; None: as many as the schedule names.
    Raises:
        ValueError: the first rank and op that is missing, double, out of order or
            unknown.
    """
    v = chunks(schedule)
    m = (
        1 + max((i for ops in schedule for _, i, _ in ops), default=-1)
        if m is None
        else m
    )
    for rank, ops in enumerate(schedule):
        done: set[Op] = set()
        for kind, i, chunk in ops:
            if kind not in KINDS or not 0 <= i < m:
                raise ValueError(
                    f"rank {rank}: {(kind, i, chunk)} is no op for m={m} microbatches;"
                    f" kinds are {KINDS}"
                )
            before = {"F": None, "W": "I"}.get(kind, "F")
            again = {(kind, i, chunk)} | (
                {("B", i, chunk), ("I", i, chunk)} if kind in "BI" else set()
            )
            if done & again:
                raise ValueError(
                    f"rank {rank} does {kind} of microbatch {i}, chunk {chunk} twice"
                )
            if before and (before, i, chunk) not in done:
                raise ValueError(
                    f"rank {rank} does {kind} of microbatch {i}, chunk {chunk} before"
                    f" its {before}"
                )
            done.add((kind, i, chunk))
        for i, chunk in ((i, chunk) for i in range(m) for chunk in range(v)):
            if ("B", i, chunk) not in done and ("W", i, chunk) not in done:
                raise ValueError(
                    f"rank {rank} never finishes the backward of microbatch {i}, chunk"
                    f" {chunk}"
                )


def held(schedule: Schedule, full: float = 1.0, kept: float = 0.0) -> list[float]:
    """The most that each rank holds at once, in microbatches of all its layers.

    Args:
        full: what a microbatch holds from F to B or I (Qi et al.: M_B).
        kept: what it holds from I to W (M_W).
    """
    v, most = chunks(schedule), []
    change = {"F": full, "B": -full, "I": kept - full, "W": -kept}
    for ops in schedule:
        now = peak = 0.0
        for kind, _, _ in ops:
            now += change[kind]
            peak = max(peak, now)
        most.append(peak / v)
    return most


def bubble_fraction(p: int, m: int, v: int = 1) -> float:
    """(p − 1) / (v m + p − 1): the share of a step in which a rank waits, under GPipe,
    1F1B and (v > 1) interleaved 1F1B.
    """
    _check(p, m, v)
    return (p - 1) / (v * m + p - 1)


def as_text(schedule: Schedule) -> str:
    """A line a rank: 'rank 0  F0 F1 B0 B1'; with several chunks 'F0a F1a F0b …'."""
    v = chunks(schedule)

    def name(kind, i, chunk):
        return f"{kind}{i}" + ("abcdefghijklmnop"[chunk] if v > 1 else "")

    return "\n".join(
        f"rank {r}  " + " ".join(name(*op) for op in ops)
        for r, ops in enumerate(schedule)
    )


def _check(p: int, m: int, v: int = 1) -> None:
    for name, value in (("p", p), ("m", m), ("v", v)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive number")
