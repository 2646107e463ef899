"""A collective as data: who sends which chunks to whom in which step; and what runs,
times and draws such a list.

An algorithm (see `collectives_ring`, `_tree`, `_halving`, `_bruck`) is a list of moves.
In one step a rank sends at most one message and receives at most one, so that a step
takes α + (bytes of its largest message) / β.

    p  ranks       n  bytes of the whole tensor      a chunk  one of the pieces that the
                                                     tensor is cut into
    α  seconds a message      β  bytes a second       lengths  numbers in each chunk,
                                                      known to all ranks (MPI's
                                                      "counts")

Simplified: a rank waits for its message before it sends the next; NCCL and gloo cut
chunks once more and overlap the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from llmlab.parallelism.runtime import REDUCTIONS, Communicator, Link, chunks


class Move(NamedTuple):
    """In step `step`, rank `src` sends `chunks`, in one message, to rank `dst`, who
    adds them to its own (or keeps them).
    """

    step: int
    src: int
    dst: int
    chunks: tuple[int, ...]
    add: bool = False


Schedule = list[Move]


def steps(schedule: Schedule) -> int:
    """How many steps it takes."""
    return max((m.step for m in schedule), default=-1) + 1


def pieces(schedule: Schedule) -> int:
    """How many chunks it cuts the tensor into."""
    return max((c for m in schedule for c in m.chunks), default=0) + 1


def then(*schedules: Schedule) -> Schedule:
    """One after another."""
    starts = [0, *accumulate(map(steps, schedules))]
    return [
        m._replace(step=m.step + at)
        for at, one in zip(starts, schedules, strict=False)
        for m in one
    ]


def backwards(schedule: Schedule, add: bool) -> Schedule:
    """Every message the other way, last step first: a broadcast becomes a reduce, an
    all-gather a reduce-scatter.
    """
    last = steps(schedule) - 1
    return [
        Move(last - m.step, m.dst, m.src, m.chunks, add) for m in reversed(schedule)
    ]


def perform(
    comm: Communicator,
    schedule: Schedule,
    held: dict[int, Tensor],
    lengths: Sequence[int],
    op: str = "sum",
) -> dict[int, Tensor]:
    """Run this rank's part with `comm.send` and `comm.recv`; returns the chunks that it
    holds at the end.

    Args:
        held: chunk number → 1-D tensor, what this rank brings.
        lengths: numbers in each chunk.
        op: how arriving chunks are added: "sum", "max" or "min".
    Raises:
        ValueError: an unknown op. KeyError: the schedule sends a chunk that this rank
            does not hold.
    """
    if op not in ("sum", "max", "min"):
        raise ValueError(f"op={op!r} must be one of sum, max, min")
    # what comes out is never the caller's tensor
    held = {c: t.clone() for c, t in held.items()}
    by_step = defaultdict(dict)
    for m in schedule:
        if comm.rank in (m.src, m.dst):
            by_step[m.step]["out" if comm.rank == m.src else "in"] = m
    for step in sorted(by_step):
        out, into = by_step[step].get("out"), by_step[step].get("in")
        message = torch.cat([held[c] for c in out.chunks]) if out else None
        got = _exchange(comm, message, out, into)
        for c, part in (
            zip(into.chunks, got.split([lengths[c] for c in into.chunks]), strict=True)
            if into
            else ()
        ):
            held[c] = REDUCTIONS[op](held[c], part) if into.add else part
    return held


def _exchange(
    comm: Communicator, message: Tensor | None, out: Move | None, into: Move | None
) -> Tensor | None:
    """One step of one rank: send, receive, or both at once."""
    if out and into:
        return comm.sendrecv(message, out.dst, into.src)
    return comm.recv(into.src) if into else comm.send(message, out.dst)


def all_reduce(
    comm: Communicator, x: Shaped[Tensor, "*shape"], schedule: Schedule, op: str = "sum"
) -> Tensor:
    """The reduction over all ranks, on every rank, of the shape of x."""
    lengths = chunks(x.numel(), pieces(schedule))
    held = dict(enumerate(x.detach().flatten().split(lengths)))
    held = perform(comm, schedule, held, lengths, op)
    return torch.cat([held[c] for c in range(len(lengths))]).view(x.shape)


def reduce(
    comm: Communicator, x: Tensor, schedule: Schedule, root: int = 0, op: str = "sum"
) -> Tensor | None:
    """The reduction on rank `root`; None elsewhere."""
    lengths = chunks(x.numel(), pieces(schedule))
    held = perform(
        comm,
        schedule,
        dict(enumerate(x.detach().flatten().split(lengths))),
        lengths,
        op,
    )
    return (
        torch.cat([held[c] for c in range(len(lengths))]).view(x.shape)
        if comm.rank == root
        else None
    )


def broadcast(
    comm: Communicator, x: Tensor, schedule: Schedule, root: int = 0
) -> Tensor:
    """The root's x on every rank; the others bring a tensor of that shape, which is not
    looked at.
    """
    lengths = chunks(x.numel(), pieces(schedule))
    held = (
        dict(enumerate(x.detach().flatten().split(lengths)))
        if comm.rank == root
        else {}
    )
    held = perform(comm, schedule, held, lengths)
    return torch.cat([held[c] for c in range(len(lengths))]).view(x.shape)


def reduce_scatter(
    comm: Communicator, x: Shaped[Tensor, "n"], schedule: Schedule, op: str = "sum"
) -> Tensor:
    """Chunk number `rank` of the reduction, n cut as even as can be (`cost.chunks`)."""
    lengths = chunks(len(x), comm.size)
    return perform(
        comm, schedule, dict(enumerate(x.detach().split(lengths))), lengths, op
    )[comm.rank]


def all_gather(
    comm: Communicator,
    x: Shaped[Tensor, "n"],
    schedule: Schedule,
    lengths: Sequence[int],
) -> Tensor:
    """All ranks' x, joined in rank order, on every rank."""
    held = perform(comm, schedule, {comm.rank: x.detach()}, lengths)
    return torch.cat([held[r] for r in range(comm.size)])


def gather(
    comm: Communicator,
    x: Shaped[Tensor, "n"],
    schedule: Schedule,
    lengths: Sequence[int],
    root: int = 0,
):
    """The list of all ranks' x on rank `root`; None elsewhere."""
    held = perform(comm, schedule, {comm.rank: x.detach()}, lengths)
    return [held[r] for r in range(comm.size)] if comm.rank == root else None


def scatter(
    comm: Communicator,
    xs: Sequence[Tensor] | None,
    schedule: Schedule,
    lengths: Sequence[int],
) -> Tensor:
    """Tensor number `rank` of the list that the root brings; the others bring None."""
    held = {} if xs is None else {r: x.detach() for r, x in enumerate(xs)}
    return perform(comm, schedule, held, lengths)[comm.rank]


def all_to_all(
    comm: Communicator,
    xs: Sequence[Tensor],
    schedule: Schedule,
    lengths: Sequence[Sequence[int]],
) -> list:
    """A tensor to each rank, a tensor from each; lengths[i][j] is how many numbers i
    sends to j. Chunk i·p + j is that tensor.
    """
    p, r = comm.size, comm.rank
    held = {r * p + j: x.detach() for j, x in enumerate(xs)}
    held = perform(comm, schedule, held, [n for row in lengths for n in row])
    return [held[i * p + r] for i in range(p)]


Route = Callable[[int, int], Iterable[Hashable]]


def crossbar(src: int, dst: int) -> Iterable[Hashable]:
    """A switch with a wire of its own between any two ranks: messages never meet."""
    return [(src, dst)]


def cable_ring(p: int) -> Route:
    """p ranks on a ring of cables, two-way; a message to a rank further away passes
    through those between, the short way.
    """

    def route(src: int, dst: int) -> list[Hashable]:
        right = (dst - src) % p
        hop, n = (1, right) if right <= p - right else (-1, p - right)
        return [((src + hop * i) % p, hop) for i in range(n)]

    return route


def shared_card(ranks: int) -> Route:
    """Machines of so many ranks with one network card each; inside a machine messages
    never meet.
    """

    def route(src: int, dst: int) -> list[Hashable]:
        a, b = src // ranks, dst // ranks
        return [(src, dst)] if a == b else [("out", a), ("in", b)]

    return route


def seconds(
    schedule: Schedule, sizes: Sequence[float], link: Link, route: Route = crossbar
) -> float:
    """Σ over steps of α + (bytes on the busiest wire) / β.

    Args:
        sizes: bytes of each chunk.
        route: which wires a message from one rank to another takes. Messages of one
            step that share a wire share its bandwidth.
    """
    load = [defaultdict(float) for _ in range(steps(schedule))]
    for m in schedule:
        for wire in route(m.src, m.dst):
            load[m.step][wire] += sum(sizes[c] for c in m.chunks)
    return sum(link.latency + max(wires.values()) / link.bandwidth for wires in load)


def bytes_sent(schedule: Schedule, sizes: Sequence[int], p: int) -> list[int]:
    """Bytes that each of p ranks sends, when chunk c has sizes[c] bytes."""
    sent = [0] * p
    for m in schedule:
        sent[m.src] += sum(sizes[c] for c in m.chunks)
    return sent


def draw(schedule: Schedule, p: int, ax=None):
    """Steps to the right, ranks downward, an arrow a message, as thick as its share of
    the tensor; sums in another colour.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
    n = pieces(schedule)
    for m in schedule:
        style = {
            "arrowstyle": "-|>",
            "color": "C0" if m.add else "C1",
            "lw": 0.8 + 3.2 * len(m.chunks) / n,
        }
        style |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
        ax.annotate(
            "", xy=(m.step + 0.9, m.dst), xytext=(m.step + 0.1, m.src), arrowprops=style
        )
    ax.set(
        xlim=(-0.1, steps(schedule) + 0.1),
        ylim=(p - 0.6, -0.4),
        yticks=range(p),
        xlabel="step",
        ylabel="rank",
    )
    return ax
