"""What marks the exercises of 05-parallelism/01-collectives.

Lists of messages are followed with labels for numbers, so that the first message that
goes wrong can be named. Rank functions run on a `World` whose clock counts rounds: a
message takes one second, whatever its size.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from llmlab.checks.parallelism.collectives.moves import follow_ring, read_moves
from llmlab.checks.parallelism.ranks import at_most
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.parallelism.runtime import (
    CollectiveMismatch,
    DeadlockError,
    Ledger,
    Link,
    World,
)

check = Checks("05-parallelism/01-collectives")


class _Noting:
    """A communicator that notes in `used` which of its methods were asked for."""

    def __init__(self, comm, used: set[str]) -> None:
        self._comm = comm
        self._used = used

    def __getattr__(self, name: str):
        self._used.add(name)
        return getattr(self._comm, name)


def tree_rounds(ledger: Ledger, root: int) -> int:
    """Rounds of a tree of messages if each rank serves its deepest branch first.

    The order of its isends does not count.
    """
    children = defaultdict(list)
    for event in ledger.events("send"):
        children[event.rank].append(event.peer)

    def rounds_below(rank: int) -> int:
        deepest_first = sorted(map(rounds_below, children[rank]), reverse=True)
        # the message to a child arrives in round `sent`, and its branch begins then
        branches = [sent + below for sent, below in enumerate(deepest_first, start=1)]
        return max(branches, default=0)

    return rounds_below(root)


def on_the_clock(p: int, fn) -> tuple[list, Ledger]:
    """As `ranks.on_ranks`, with a clock that counts messages.

    `ledger.time` is the number of messages on the longest chain.
    """
    world = World(p, link=Link(latency=1.0, bandwidth=1e15))
    try:
        return world.run(fn), world.ledger
    except (DeadlockError, CollectiveMismatch) as error:
        raise Mistake(f"the ranks do not fit together\n{error}") from None


@check.exercise(
    points=2,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "In step 0 rank r sends chunk r, and gets chunk r − 1. What does it send in"
            " step 1, so that sums travel on?"
        ),
        (
            "A rank sends in each step the chunk that it got in the step before: r, r −"
            " 1, r − 2, … modulo p. Which chunk is complete on rank r after p − 1"
            " steps?"
        ),
        (
            "The same formula serves both halves: in step s rank r sends chunk (r − s)"
            " mod p to (r + 1) mod p, for s = 0 … 2(p − 1) − 1."
        ),
    ),
)
def ring_moves(answer):
    """The messages of a ring all-reduce, as a list."""
    for p in (3, 2, 5, 1):
        what = f"ring_moves({p})"
        moves = read_moves(expect(answer(p), kind=list, what=what), p, what)
        follow_ring(moves, p, what)


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "Set the two times equal and collect the terms with n on one side.",
        "(p − 1 − L) α = (L − (p − 1)/p) n/β with L = ⌈log₂ p⌉.",
        "n = α β (p − 1 − L) / (L − (p − 1)/p); `math.ceil(math.log2(p))` rounds up.",
    ),
)
def crossover(answer):
    """The size at which ring and tree all-reduce are equally fast."""
    link = Link(1e-5, 1e10)
    for cases in (
        (
            (16, Link(1e-5, 25e9)),
            (5, Link(2e-6, 4e9)),
            (64, Link(3e-5, 1e9)),
            (100, link),
        ),
        ((2, link), (3, link)),  # here a ring is never slower: 0 bytes
    ):
        found = []
        for p, link in cases:
            what = f"crossover({p}, {link})"
            got = expect(answer(p, link), kind=float, what=what)
            found.append((p, link.latency, link.bandwidth, got, what))
        _judge_crossover(found)


def _judge_crossover(found: list[tuple[int, float, float, float, str]]) -> None:
    """`found`: ranks, α, β, the size, how to call it; a mistake must explain all."""
    rights = []
    for p, a, b, *_ in found:
        L = math.ceil(math.log2(p))
        rights.append(a * b * (p - 1 - L) / (L - (p - 1) / p))
    sizes = [got for *_, got, _ in found]
    if not close(sizes, rights):
        mistakes = [_crossover_mistakes(p, a, b) for p, a, b, *_ in found]
        for text in mistakes[0]:
            # NaN, where a formula has no value, stands for any
            pairs = zip(sizes, [m[text] for m in mistakes], strict=True)
            if all(math.isnan(value) or close(got, value) for got, value in pairs):
                raise Mistake(text)
    for (*_, got, what), right in zip(found, rights, strict=True):
        diagnose(got, right=right, what=what)


def _crossover_mistakes(p: int, a: float, b: float) -> dict[str, float]:
    """Diagnosis → the size that this mistake leads to; NaN where there is none."""
    exact = math.log2(p)
    L = math.ceil(exact)
    part = (p - 1) / p

    def size(latencies: float, volumes: float) -> float:
        return a * b * latencies / volumes if volumes else math.nan

    mistakes = {
        "α / β instead of α · β: a latency times a bandwidth is a size": (
            size(p - 1 - L, L - part) / b**2
        ),
        "this is in bits, or something else is 8 times too large": (
            8 * size(p - 1 - L, L - part)
        ),
        (
            "the ring's volume is not (p−1)/p · n here: each of its steps sends a"
            " chunk of n/p, not n"
        ): size(p - 1 - L, L - (p - 1)),
        (
            "the tree is counted once: an all-reduce is a reduce and then a broadcast"
        ): size(2 * (p - 1) - L, L - 2 * part),
        (
            "the ring is counted once: it takes p − 1 steps to sum and p − 1 to hand"
            " the sums around"
        ): size(p - 1 - 2 * L, 2 * L - part),
        "the fraction is upside down: α goes with what the latencies differ by": (
            size(L - part, p - 1 - L)
        ),
        "a 2 is left over: it stands on both sides and cancels": (
            2 * size(p - 1 - L, L - part)
        ),
        "the latencies of the tree are missing": size(p - 1, L - part),
        "the volumes are added: n/β stands on both sides, take it away": (
            size(p - 1 - L, L + part)
        ),
        (
            "a tree of p ranks has ⌈log₂ p⌉ levels; p.bit_length() counts digits, one"
            " more where p is a power of two"
        ): size(p - 1 - p.bit_length(), p.bit_length() - part),
        "the sign is wrong": -size(p - 1 - L, L - part),
    }
    down = math.floor(exact)
    tens = math.ceil(math.log10(p))
    return mistakes | {
        "log₂ p is not rounded up, and a tree of p ranks has ⌈log₂ p⌉ levels": (
            size(p - 1 - exact, exact - part)
        ),
        "log₂ p is rounded down; a tree of p ranks has ⌈log₂ p⌉ levels": (
            size(p - 1 - down, down - part)
        ),
        "log₁₀ stands where log₂ belongs: the tree doubles in each round": (
            size(p - 1 - tens, tens - part)
        ),
        "the ring's volume is missing: it sends 2(p − 1)/p · n, too": (
            size(p - 1 - L, L)
        ),
        "the ring's latencies are weighed against the tree's volume alone": (
            size(p - 1, L)
        ),
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Count places from the root: place = (rank − root) mod p. The root has"
            " place 0, and rank numbers come back by adding root."
        ),
        (
            "In round k places below 2^k have the tensor, and place v sends to v + 2^k."
            " Who receives in that round, and from whom?"
        ),
        (
            "hop = 1, 2, 4, … while hop < p: if place < hop and place + hop < p, send"
            " to place + hop; if hop ≤ place < 2·hop, receive from place − hop."
        ),
    ),
)
def tree_broadcast(answer):
    """A broadcast by a binomial tree of sends and receives."""
    for p, root in ((8, 0), (8, 3), (6, 5), (5, 1), (2, 1), (1, 0)):
        x = torch.randn(3, 2)
        what = f"tree_broadcast(comm, x, root={root}) with {p} ranks"
        used: set[str] = set()
        results, ledger = _broadcast(answer, p, root, x, used, what)
        sent_to = {event.peer for event in ledger.events("send")}
        for r, got in enumerate(results):
            if got is None and r != root and r not in sent_to:
                raise Mistake(
                    f"{what}: nobody sends to rank {r}: there are ⌈log₂ p⌉ rounds,"
                    " rounded up, and in the last one some have nobody to send to"
                )
            if got is None:
                raise Mistake(
                    f"{what}: on rank {r} it returned None; every rank returns the"
                    " tensor, the root too"
                )
            diagnose(got, right=x, mistakes={}, what=f"{what}, on rank {r}")
        if ledger.count("send") > p - 1:
            raise Mistake(
                f"{what}: {ledger.count('send')} messages are sent, and {p - 1} are"
                " enough"
            )
        rounds = round(ledger.time)
        allowed = math.ceil(math.log2(p))
        # the clock takes messages that are under way at once in any order
        if "isend" in used:
            rounds = min(rounds, tree_rounds(ledger, root))
        if rounds > allowed:
            raise Mistake(
                f"{what}: it takes {rounds} rounds, where {allowed} are enough: every"
                " rank that has the tensor passes it on, not only one"
            )
        at_most(
            ledger, max(1, allowed) * x.numel(), "no rank sends more than once a round"
        )


COLLECTIVES = {"broadcast", "all_gather", "all_reduce", "scatter", "reduce_scatter"}


def _broadcast(answer, p: int, root: int, x, used: set[str], what: str) -> tuple:
    """Results and ledger of one broadcast, or what keeps it from its end.

    The cases before this one went well: what is new in it is what goes wrong.
    """
    if (p, root) == (8, 0):
        reason = (
            "each rank must receive before it sends, from the rank that sends to it"
        )
    elif p == 8:
        reason = (
            "with root 0 it works: count places from the root, (rank − root) mod p, and"
            " add root again to come back to a rank"
        )
    elif p > 1:
        reason = (
            "with 8 ranks it works: where p is no power of two, place + hop may be p or"
            " more in the last round, and then there is nobody to send to"
        )
    else:
        reason = "a rank that is alone sends and receives nothing"
    try:
        return on_the_clock(
            p,
            lambda comm: answer(
                _Noting(comm, used), x if comm.rank == root else None, root
            ),
        )
    except (Mistake, ValueError) as error:
        if isinstance(error, ValueError) and "NoneType" in str(error):
            reason += " (a rank sends None: it has not received yet)"
        raise Mistake(f"{what}: {reason}\n{error}") from error
    finally:
        if used & COLLECTIVES:
            raise Mistake(
                "you called one of comm's collectives: build it from comm.send and"
                " comm.recv"
            )


@check.exercise(
    points=4,
    minutes=40,
    difficulty=5,
    importance=3,
    hints=(
        (
            "Write the all-gather first. parts[i] is chunk (r + i) mod p, so parts[0]"
            " is a rank's own. In the step with hop 2^k, n = min(2^k, p − 2^k) chunks"
            " go from parts[:n] to rank r − 2^k, and arrive from r + 2^k as parts[2^k :"
            " 2^k + n]."
        ),
        (
            "Now the reduce-scatter: the same steps in reverse order, and every message"
            " the other way. What arrived as parts[hop : hop + n] is now sent (to r +"
            " hop), and what was sent, parts[:n], is now where the arriving chunks are"
            " added."
        ),
        (
            "for hop in reversed(hops): got = comm.sendrecv(cat(parts[hop : hop + n]),"
            " r + hop, r − hop), added to parts[:n]; then for hop in hops: parts[hop :"
            " hop + n] = comm.sendrecv(cat(parts[:n]), r − hop, r + hop); chunk c is"
            " parts[(c − r) % p]."
        ),
    ),
)
def log_all_reduce(answer):
    """Challenge: an all-reduce in 2⌈log₂ p⌉ messages, 2(p−1)/p·n bytes per rank."""
    for p in (4, 3, 6, 7, 1):
        xs = [torch.randn(2 * p) for _ in range(p)]
        what = f"log_all_reduce(comm, x) with {p} ranks"
        try:
            results, ledger = on_the_clock(
                p, lambda comm, xs=xs: answer(comm, xs[comm.rank])
            )
        except (IndexError, RuntimeError, ValueError, TypeError, Mistake) as error:
            if p == 4:
                raise
            raise Mistake(
                f"with 4 ranks it works, with {p} it does not: halves, and partners by"
                " XOR, need a power of two; hop 1, 2, 4, … ranks modulo p, and in the"
                f" last step only as many chunks as are missing\n{error}"
            ) from error
        total = torch.stack(xs).sum(0)
        for r, got in enumerate(results):
            _sum_or_mistake(
                expect(got, shape=(2 * p,), dtype=torch.float32, what=what),
                total,
                xs,
                r,
                what,
            )
        called = [
            op
            for op in (
                "all_reduce",
                "reduce_scatter",
                "all_gather",
                "broadcast",
                "reduce",
            )
            if ledger.count(op)
        ]
        if called:
            raise Mistake(f"you called comm.{called[0]}: build it from comm.sendrecv")
        allowed = 2 * math.ceil(math.log2(p))
        if round(ledger.time) > allowed:
            raise Mistake(
                f"{what}: the values are right, but it takes {ledger.time:.0f} messages"
                f" one after another, where {allowed} are enough: hop 1, 2, 4, … ranks"
            )
        at_most(
            ledger,
            2 * (p - 1) / p * total.nbytes,
            "send chunks, never the whole tensor",
            unit="bytes",
        )


def _sum_or_mistake(got, total, xs: list, r: int, what: str) -> None:
    p = len(xs)
    chunks = [t.chunk(p) for t in (total, *xs)]
    mistakes = {}
    if p > 1:
        mistakes = {
            (
                "the chunks are right but in the order of this rank's list: chunk c is"
                " parts[(c − r) % p]"
            ): torch.cat([chunks[0][(r + i) % p] for i in range(p)]),
            "nothing was added: this is the rank's own x": xs[r],
            (
                "nothing was added: this is chunk c of rank c, for all c; the"
                " reduce-scatter is missing"
            ): torch.cat([chunks[1 + c][c] for c in range(p)]),
            "this is the mean; the sum is asked": total / p,
            "the rank's own x is in the sum twice": total + xs[r],
        }
        for text, how in SLIPS.items():
            mistakes[text] = bruck(chunks[1:], **how)[r]
        done = [
            c
            for c, (a, b) in enumerate(zip(got.chunk(p), chunks[0], strict=True))
            if close(a, b)
        ]
        if done == [r]:
            mistakes[
                "only this rank's own chunk is complete: the all-gather is missing"
            ] = got
    diagnose(got, right=total, mistakes=mistakes, what=f"{what}, on rank {r}")


SLIPS = {
    "what arrives in the first half replaces the chunks; it is to be added": {
        "adds": False
    },
    (
        "the first half takes the hops in the order 1, 2, 4, …: played backwards it"
        " begins with the largest"
    ): {"largest_first": False},
    (
        "the second half sends 2^k ranks on; chunks go 2^k ranks back, and come from"
        " 2^k ranks further on"
    ): {"back": -1},
    (
        "the list is turned by r the wrong way at the end: chunk c is"
        " parts[(c − r) % p]"
    ): {"turned": -1},
}


def bruck(
    chunks: list,
    adds: bool = True,
    largest_first: bool = True,
    back: int = 1,
    turned: int = 1,
) -> list[torch.Tensor]:
    """The result of each rank, with one slip; `chunks[r]` are those of rank r."""
    p = len(chunks)
    hops = [2**k for k in range((p - 1).bit_length())]
    parts = [[chunks[r][(r + i) % p] for i in range(p)] for r in range(p)]
    for hop in reversed(hops) if largest_first else hops:
        n = min(hop, p - hop)
        sent = [own[hop : hop + n] for own in parts]
        for r, own in enumerate(parts):
            for i, came in enumerate(sent[(r - hop) % p]):
                own[i] = own[i] + came if adds else came
    parts = [own[:1] for own in parts]
    for hop in hops:
        n = min(hop, p - hop)
        sent = [own[:n] for own in parts]
        for r, own in enumerate(parts):
            own += sent[(r + back * hop) % p]
    return [
        torch.cat([own[(c - turned * r) % p] for c in range(p)])
        for r, own in enumerate(parts)
    ]
