"""Follows a learner's list of messages, and names the first that goes wrong."""

from __future__ import annotations

from collections import Counter

from llmlab.course.grading.checking import Mistake
from llmlab.course.grading.diagnosis import describe, is_number

Moves = list[tuple[int, int, int, int]]


def read_moves(moves: list, p: int, what: str) -> Moves:
    """The list as tuples of four integers, in order of steps.

    Raises:
        Mistake: an entry is not four integers, or has a rank, chunk or step that does
            not exist; a rank sends twice in a step.
    """
    for m in moves:
        if (
            not isinstance(m, tuple | list)
            or len(m) != 4
            or not all(is_number(i) and int(i) == i for i in m)
        ):
            shown = describe(m) if not isinstance(m, tuple | list) else f"{m!r}"
            raise Mistake(
                f"{what} holds {shown}, where (step, src, dst, chunk) is asked, four"
                " integers"
            )
        step, src, dst, chunk = m
        if not (0 <= src < p and 0 <= dst < p and 0 <= chunk < p):
            raise Mistake(
                f"{what} holds {tuple(m)}: ranks and chunks are 0 … {p - 1}; take them"
                " modulo p"
            )
        if dst != (src + 1) % p:
            raise Mistake(
                f"{what} holds {tuple(m)}: rank {src} sends to its right neighbour"
                f" only, rank {(src + 1) % p}"
            )
        if p == 1:
            raise Mistake(
                f"{what} holds {tuple(m)}: a rank that is alone sends no message"
            )
        if not 0 <= step < 2 * (p - 1):
            if {int(m[0]) for m in moves} == set(range(1, 2 * p - 1)):
                raise Mistake(f"{what} numbers the steps from 1; they begin with 0")
            raise Mistake(
                f"{what} holds {tuple(m)}: steps are 0 … {2 * (p - 1) - 1}, p − 1 for"
                " each half"
            )
    moves = sorted((int(a), int(b), int(c), int(d)) for a, b, c, d in moves)
    twice = [key for key, n in Counter((m[0], m[1]) for m in moves).items() if n > 1]
    if twice:
        raise Mistake(
            f"{what}: in step {twice[0][0]} rank {twice[0][1]} sends more than one"
            " message"
        )
    return moves


def follow_ring(moves: Moves, p: int, what: str) -> None:
    """Play the list with the sets of ranks whose part is in each chunk.

    Raises:
        Mistake: a part is added twice; a half ends too early; an unfinished chunk is
            handed around.
    """
    for step, src, _, chunk in moves:
        if step == 0 and chunk != src:
            raise Mistake(
                f"{what}: in step 0 rank {src} sends chunk {chunk}; asked is that rank"
                " r begins with chunk r"
            )
    # held[rank][chunk]: whose parts, how often
    held = [[Counter([r]) for _ in range(p)] for r in range(p)]
    everyone = Counter(range(p))
    for step in range(2 * (p - 1)):
        now = [m for m in moves if m[0] == step]
        if len(now) < p:
            if step == p - 1 and not now:
                raise Mistake(
                    f"{what}: only the first half is there: p − 1 more steps hand the"
                    " finished chunks around"
                )
            raise Mistake(
                f"{what}: in step {step} only {len(now)} of {p} ranks send: in each of"
                f" the {2 * (p - 1)} steps all do"
            )
        letters = [
            (src, dst, chunk, held[src][chunk].copy()) for _, src, dst, chunk in now
        ]
        for src, dst, chunk, parts in letters:
            if step < p - 1:
                both = sorted((held[dst][chunk] & parts).elements())
                if both:
                    raise Mistake(
                        f"{what}: in step {step} rank {src} sends chunk {chunk} to rank"
                        f" {dst}, and rank {both[0]}'s part is then in the sum twice:"
                        " send on the chunk that has just arrived"
                    )
                held[dst][chunk] += parts
            else:
                _must_be_whole(parts, everyone, step, src, chunk, p, what)
                held[dst][chunk] = parts
        if step == p - 2:
            _first_half(held, everyone, p, what)
    if any(parts != everyone for row in held for parts in row):
        raise Mistake(f"{what}: at the end not every rank has every chunk")


def _first_half(held: list, everyone: Counter, p: int, what: str) -> None:
    for chunk in range(p):
        if not any(held[r][chunk] == everyone for r in range(p)):
            most = max(len(held[r][chunk]) for r in range(p))
            raise Mistake(
                f"{what}: after the first {p - 1} steps no rank has the whole sum of"
                f" chunk {chunk}, at most {most} of {p} parts: a sum must travel on, so"
                " send the chunk that has just arrived"
            )


def _must_be_whole(
    parts: Counter,
    everyone: Counter,
    step: int,
    src: int,
    chunk: int,
    p: int,
    what: str,
) -> None:
    if parts != everyone:
        raise Mistake(
            f"{what}: in step {step} rank {src} hands on chunk {chunk}, but has only"
            f" {len(parts)} of {p} parts of it: which chunk did rank {src} complete in"
            f" step {p - 2}?"
        )
