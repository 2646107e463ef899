"""A collective as data: which rank sends which chunks to which rank, step by step.

An algorithm (see `ring`, `tree`, `halving`, `bruck`) is a list of moves. In one step a
rank sends at most one message and receives at most one, so that a step takes
α + (bytes of its largest message) / β. The functions here run, time and draw such a
list.

Simplified: a rank waits for its message before it sends the next; NCCL and gloo cut
chunks once more and overlap the two.

    p        ranks
    n        bytes of the whole tensor; numbers in it (in a shape)
    chunk    one of the pieces that the tensor is cut into
    lengths  numbers in each chunk, known to all ranks (MPI's "counts")
    α        seconds per message
    β        bytes per second
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from llmlab.parallelism.runtime import REDUCTIONS, Communicator, Link, chunks


class Move(NamedTuple):
    """In one step, rank `src` sends chunks to rank `dst` in one message.

    `add`: whether `dst` adds them to its own chunks or keeps them instead.
    """

    step: int
    src: int
    dst: int
    chunks: tuple[int, ...]
    add: bool = False


Schedule = list[Move]


def steps(schedule: Schedule) -> int:
    """How many steps a schedule takes."""
    return max((move.step for move in schedule), default=-1) + 1


def pieces(schedule: Schedule) -> int:
    """How many chunks a schedule cuts the tensor into."""
    highest = max((max(move.chunks) for move in schedule if move.chunks), default=0)
    return highest + 1


def then(*schedules: Schedule) -> Schedule:
    """One schedule after another."""
    moves = []
    start = 0
    for schedule in schedules:
        for move in schedule:
            moves.append(move._replace(step=start + move.step))
        start += steps(schedule)
    return moves


def backwards(schedule: Schedule, add: bool) -> Schedule:
    """Every message in the other direction, last step first.

    So a broadcast becomes a reduce, and an all-gather a reduce-scatter.

    Args:
        add: whether the chunks are added where they arrive.
    """
    last_step = steps(schedule) - 1
    return [
        Move(last_step - move.step, move.dst, move.src, move.chunks, add)
        for move in reversed(schedule)
    ]


def perform(
    comm: Communicator,
    schedule: Schedule,
    held: dict[int, Tensor],
    lengths: Sequence[int],
    op: str = "sum",
) -> dict[int, Tensor]:
    """Run this rank's part of a schedule with `comm.send` and `comm.recv`.

    Args:
        held: chunk number → 1-D tensor, what this rank brings.
        lengths: numbers in each chunk.
        op: how arriving chunks are added: "sum", "max" or "min".
    Returns:
        The chunks that this rank holds at the end.
    Raises:
        ValueError: an unknown op.
        KeyError: the schedule sends a chunk that this rank does not hold.
    """
    if op not in ("sum", "max", "min"):
        raise ValueError(f"op={op!r} must be one of sum, max, min")
    # copies, so that no result is the caller's tensor
    held = {chunk: tensor.clone() for chunk, tensor in held.items()}
    # step → this rank's message in it
    sends: dict[int, Move] = {}
    receives: dict[int, Move] = {}
    for move in schedule:
        if move.src == comm.rank:
            sends[move.step] = move
        elif move.dst == comm.rank:
            receives[move.step] = move
    for step in sorted(sends.keys() | receives.keys()):
        send = sends.get(step)
        receive = receives.get(step)
        message = None
        if send is not None:
            message = torch.cat([held[chunk] for chunk in send.chunks])
        received = _exchange(comm, message, send, receive)
        if receive is None:
            continue
        parts = received.split([lengths[chunk] for chunk in receive.chunks])
        for chunk, part in zip(receive.chunks, parts, strict=True):
            if receive.add:
                held[chunk] = REDUCTIONS[op](held[chunk], part)
            else:
                held[chunk] = part
    return held


def _exchange(
    comm: Communicator,
    message: Tensor | None,
    send: Move | None,
    receive: Move | None,
) -> Tensor | None:
    """One step of one rank: send, receive, or both at once. Returns what arrives."""
    if send is not None and receive is not None:
        return comm.sendrecv(message, send.dst, receive.src)
    if receive is not None:
        return comm.recv(receive.src)
    comm.send(message, send.dst)
    return None


def _cut(x: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
    """All chunks of a tensor of any shape: chunk number → 1-D tensor."""
    return dict(enumerate(x.detach().flatten().split(lengths)))


def _join(held: dict[int, Tensor], shape: torch.Size) -> Tensor:
    """`_cut` undone."""
    return torch.cat([held[chunk] for chunk in range(len(held))]).view(shape)


def all_reduce(
    comm: Communicator, x: Shaped[Tensor, "*shape"], schedule: Schedule, op: str = "sum"
) -> Shaped[Tensor, "*shape"]:
    """The reduction over all ranks, on every rank."""
    lengths = chunks(x.numel(), pieces(schedule))
    held = perform(comm, schedule, _cut(x, lengths), lengths, op)
    return _join(held, x.shape)


def reduce(
    comm: Communicator, x: Tensor, schedule: Schedule, root: int = 0, op: str = "sum"
) -> Tensor | None:
    """The reduction on rank `root`; None elsewhere."""
    lengths = chunks(x.numel(), pieces(schedule))
    held = perform(comm, schedule, _cut(x, lengths), lengths, op)
    if comm.rank != root:
        return None
    return _join(held, x.shape)


def broadcast(
    comm: Communicator, x: Tensor, schedule: Schedule, root: int = 0
) -> Tensor:
    """The root's x on every rank.

    The others bring a tensor of that shape, whose numbers are not used.
    """
    lengths = chunks(x.numel(), pieces(schedule))
    held = _cut(x, lengths) if comm.rank == root else {}
    held = perform(comm, schedule, held, lengths)
    return _join(held, x.shape)


def reduce_scatter(
    comm: Communicator, x: Shaped[Tensor, "n"], schedule: Schedule, op: str = "sum"
) -> Tensor:
    """Chunk number `rank` of the reduction, n cut as evenly as possible (`chunks`)."""
    lengths = chunks(len(x), comm.size)
    held = perform(comm, schedule, _cut(x, lengths), lengths, op)
    return held[comm.rank]


def all_gather(
    comm: Communicator,
    x: Shaped[Tensor, "n"],
    schedule: Schedule,
    lengths: Sequence[int],
) -> Tensor:
    """All ranks' x, joined in rank order, on every rank."""
    held = perform(comm, schedule, {comm.rank: x.detach()}, lengths)
    return torch.cat([held[rank] for rank in range(comm.size)])


def gather(
    comm: Communicator,
    x: Shaped[Tensor, "n"],
    schedule: Schedule,
    lengths: Sequence[int],
    root: int = 0,
) -> list[Tensor] | None:
    """The list of all ranks' x on rank `root`; None elsewhere."""
    held = perform(comm, schedule, {comm.rank: x.detach()}, lengths)
    if comm.rank != root:
        return None
    return [held[rank] for rank in range(comm.size)]


def scatter(
    comm: Communicator,
    xs: Sequence[Tensor] | None,
    schedule: Schedule,
    lengths: Sequence[int],
) -> Tensor:
    """Tensor number `rank` of the list that the root brings; the others bring None."""
    held = {}
    if xs is not None:
        held = {rank: x.detach() for rank, x in enumerate(xs)}
    held = perform(comm, schedule, held, lengths)
    return held[comm.rank]


def all_to_all(
    comm: Communicator,
    xs: Sequence[Tensor],
    schedule: Schedule,
    lengths: Sequence[Sequence[int]],
) -> list[Tensor]:
    """A tensor to each rank, and a tensor from each.

    Args:
        xs: tensor j goes to rank j.
        lengths: lengths[i][j] is how many numbers rank i sends to rank j. That tensor
            is chunk i·p + j of the schedule.
    """
    p = comm.size
    held = {comm.rank * p + j: x.detach() for j, x in enumerate(xs)}
    flat_lengths = [length for row in lengths for length in row]
    held = perform(comm, schedule, held, flat_lengths)
    return [held[i * p + comm.rank] for i in range(p)]


# which wires a message from one rank to another takes
Route = Callable[[int, int], Iterable[Hashable]]


def crossbar(src: int, dst: int) -> Iterable[Hashable]:
    """A switch with a wire of its own between any two ranks: messages never meet."""
    return [(src, dst)]


def cable_ring(p: int) -> Route:
    """p ranks on a ring of two-way cables.

    A message to a rank further away passes through those between, on the shorter side.
    """

    def route(src: int, dst: int) -> list[Hashable]:
        hops_right = (dst - src) % p
        hops_left = p - hops_right
        if hops_right <= hops_left:
            direction = 1
            hops = hops_right
        else:
            direction = -1
            hops = hops_left
        # a wire: the rank at which it begins, and its direction
        return [((src + direction * i) % p, direction) for i in range(hops)]

    return route


def shared_card(ranks: int) -> Route:
    """Machines with one network card each; inside a machine messages never meet.

    Args:
        ranks: per machine.
    """

    def route(src: int, dst: int) -> list[Hashable]:
        from_machine = src // ranks
        to_machine = dst // ranks
        if from_machine == to_machine:
            return [(src, dst)]
        return [("out", from_machine), ("in", to_machine)]

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
    # step → wire → bytes
    load = [defaultdict(float) for _ in range(steps(schedule))]
    for move in schedule:
        message_bytes = sum(sizes[chunk] for chunk in move.chunks)
        for wire in route(move.src, move.dst):
            load[move.step][wire] += message_bytes
    return sum(link.latency + max(wires.values()) / link.bandwidth for wires in load)


def bytes_sent(schedule: Schedule, sizes: Sequence[int], p: int) -> list[int]:
    """Bytes that each of p ranks sends, when chunk c has sizes[c] bytes."""
    sent = [0] * p
    for move in schedule:
        sent[move.src] += sum(sizes[chunk] for chunk in move.chunks)
    return sent


def draw(schedule: Schedule, p: int, ax=None):
    """Draw a schedule: steps to the right, ranks downward, one arrow per message.

    An arrow is as thick as its share of the tensor; sums have another colour.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
    n = pieces(schedule)
    for move in schedule:
        style = {
            "arrowstyle": "-|>",
            "color": "C0" if move.add else "C1",
            "lw": 0.8 + 3.2 * len(move.chunks) / n,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 8,
        }
        tail = (move.step + 0.1, move.src)
        head = (move.step + 0.9, move.dst)
        ax.annotate("", xy=head, xytext=tail, arrowprops=style)
    ax.set(
        xlim=(-0.1, steps(schedule) + 0.1),
        ylim=(p - 0.6, -0.4),
        yticks=range(p),
        xlabel="step",
        ylabel="rank",
    )
    return ax
