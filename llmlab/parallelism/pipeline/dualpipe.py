"""DualPipe and DualPipeV: microbatches enter a pipeline at both ends.

DeepSeek-V3 (DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 3.2.1), in the
order of the authors' code, https://github.com/deepseek-ai/DualPipe.

    dualpipe      p ranks, p stages, two copies of each: rank r has stage r, and p − 1 −
                  r for the microbatches that come from the other end
    dualpipe_v    Sea AI Lab's half of it: p ranks, 2p stages in the "v" layout, and no
                  second copy: what would come from the other end has turned round

In the middle of the step a rank always has a forward of one direction and a backward of
the other. It runs the two as one, F&B, so that the messages of one are on the wire
while the other computes. `dualpipe_pairs` says where; `simulate` gives such a pair the
time `Costs.pair`.

                  bubble                            a rank holds        parameters
    dualpipe      (p/2 − 1) (F&B + B − 3W)          p + 1 microbatches  2 / p
    dualpipe_v    (p − 1) (F&B + B − 3W) / 2        p + 1/2             1 / p

(the authors' table, in seconds of the p-th part of the model. Their bubble is what the
rank at the turn waits when F = I; with others it is F&B + F − 2W: see the test.)

    n    ranks of one half (dualpipe), all ranks (dualpipe_v)
    r    a rank of that half, counted from its outer end
    m    microbatches of one direction
    0    the direction that begins at the outer end of the half, 1  the other

Simplified: the executor runs a pair one op after the other, and its messages are small.
"""

from __future__ import annotations

from collections import Counter, deque

from llmlab.parallelism.pipeline.schedules import Kind, Op, Schedule

Phases = list[tuple[int, str]]


def dualpipe(p: int, m: int) -> Schedule:
    """Bidirectional: half of the microbatches enter at rank 0, half at rank p − 1.

    Layout "bidirectional". Chunk 0 of a rank is its stage for the first half of the
    microbatches, chunk 1 for the second half.

    Raises:
        ValueError: p or m is odd; fewer than 2p microbatches.
    """
    return [ops for ops, _ in _bidirectional(p, m)]


def dualpipe_v(p: int, m: int) -> Schedule:
    """Two chunks per rank, layout "v". For the same pipeline half as many ranks.

    Raises:
        ValueError: fewer than 2p microbatches.
    """
    return [ops for ops, _ in _v(p, m)]


def dualpipe_pairs(p: int, m: int, layout: str = "bidirectional") -> list[set[int]]:
    """For each rank where in its list a forward and a backward run as one.

    Args:
        layout: "bidirectional" for `dualpipe`, "v" for `dualpipe_v`.
    """
    if layout not in ("bidirectional", "v"):
        raise ValueError(f"layout={layout!r} must be bidirectional or v")
    make = _v if layout == "v" else _bidirectional
    return [pairs for _, pairs in make(p, m)]


def phases(n: int, r: int, m: int) -> Phases:
    """The authors' eight steps. A word is a kind and a direction, & joins a pair.

    A W without a direction is the oldest that waits.
    """
    # at the turn the first two are not joined: the next rank wants the F sooner
    first = "F0 B1 F1&B0" if r == n - 1 else "F0&B1 F1&B0"
    half = (r + 1) // 2
    # the backwards after the middle leave their W for the gaps at the end
    middle = "I1 I0" if r % 2 else "B1 I0"
    return [
        # warm-up
        (2 * (n - r - 1), "F0"),
        (r + 1, "F0 F1"),
        (n - r - 1, "I1 W F1"),
        # steady state
        (1, first),
        (m - 2 * n + r, "F0&B1 F1&B0"),
        # cool-down
        (n - r - 1, "B1 F1&B0"),
        (half, "B1 B0"),
        (1, middle),
        (r - half, "I1 I0"),
        (n - r - 1, "W I0"),
        (r + 1, "W"),
    ]


def unroll_pairs(table: Phases) -> tuple[list[Op], set[int]]:
    """(ops, where the pairs begin). Microbatches of a direction go first in, first out;
    an op's last entry is its direction.
    """
    counts: Counter[tuple[bool, int]] = Counter()
    waiting: deque[tuple[int, int]] = deque()
    ops: list[Op] = []
    pairs: set[int] = set()
    for times, pattern in table:
        for words in pattern.split() * times:
            if "&" in words:
                pairs.add(len(ops))
            for word in words.split("&"):
                kind = Kind(word[0])
                if kind == Kind.WEIGHT_GRAD:
                    i, direction = waiting.popleft()
                else:
                    direction = int(word[1])
                    counted = (kind == Kind.FORWARD, direction)
                    i = counts[counted]
                    counts[counted] += 1
                if kind == Kind.INPUT_GRAD:
                    waiting.append((i, direction))
                ops.append((kind.value, i, direction))
    return ops, pairs


def _v(p: int, m: int) -> list[tuple[list[Op], set[int]]]:
    _check_sizes(p, m)
    return [unroll_pairs(phases(p, r, m)) for r in range(p)]


def _bidirectional(p: int, m: int) -> list[tuple[list[Op], set[int]]]:
    _check_sizes(p, m)
    for name, value in (("p", p), ("m", m)):
        if value % 2:
            raise ValueError(f"{name}={value} must be even: half of them each way")
    each_way = m // 2
    ranks = []
    for rank in range(p):
        in_second_half = rank >= p // 2
        r = p - 1 - rank if in_second_half else rank
        found, pairs = unroll_pairs(phases(p // 2, r, each_way))
        ops = []
        for kind, i, direction in found:
            # for the second half of the ranks direction 0 comes from rank p − 1
            chunk = 1 - direction if in_second_half else direction
            ops.append((kind, i + chunk * each_way, chunk))
        ranks.append((ops, pairs))
    return ranks


def _check_sizes(p: int, m: int) -> None:
    for name, value, least in (("p", p, 1), ("m", m, 2 * p if p else 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}={value!r} must be a number of at least {least}: DualPipe fills"
                " the pipeline with 2p microbatches"
            )
