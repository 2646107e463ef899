"""`World(n)`: n ranks as threads of one process, to see and to count.

    >>> import torch
    >>> from llmlab.parallelism import World
    >>> def total(comm):
    ...     return comm.all_reduce(torch.tensor(float(comm.rank))).item()
    >>> World(3).run(total)
    [3.0, 3.0, 3.0]

Ranks take turns (see `scheduler`), so a run is deterministic to the bit. `world.ledger`
holds every byte of the last run, as the chosen algorithm (`ring`, `tree`, `halving` or
`naive`) would send it. A deadlock is reported at once, with who waits for whom, where.
For tensors on the CPU: on a GPU, autograd runs every rank's backward pass in one
thread, and a collective in it would wait for itself.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable

from llmlab.parallelism.runtime import cost
from llmlab.parallelism.runtime.calls import MEANING, Call, disagreement, wire_sizes
from llmlab.parallelism.runtime.communicator import Communicator, call_site
from llmlab.parallelism.runtime.cost import Link
from llmlab.parallelism.runtime.ledger import Event, Ledger
from llmlab.parallelism.runtime.rendezvous import Group, Meeting, Post
from llmlab.parallelism.runtime.turns import Turns


class DeadlockError(RuntimeError):
    """Every rank that is left waits for another."""


class CollectiveMismatch(RuntimeError):
    """Two ranks of a group called different collectives, or the same one with shapes,
    dtypes or options that disagree.
    """


class World:
    """n ranks as threads. `run(fn, *args)` calls `fn(comm, *args)` once a rank and
    returns the results in rank order.

    Args:
        n: number of ranks.
        algorithm: how collectives are counted: "ring", "tree", "halving" or "naive".
        link: the wire whose α and β move the ledger's virtual clock, or a function from
            the ranks of a group to their wire (`placement.node_links`); None: messages
            take no time.
    """

    def __init__(
        self,
        n: int,
        *,
        algorithm: str = "ring",
        link: Link | Callable[[tuple[int, ...]], Link] | None = None,
    ) -> None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r} must be a positive number of ranks")
        if algorithm not in cost.ALGORITHMS:
            raise ValueError(
                f"algorithm={algorithm!r} must be one of {', '.join(cost.ALGORITHMS)}"
            )
        self.size, self.algorithm, self.link = n, algorithm, link
        self.ledger = Ledger(n)

    def __repr__(self) -> str:
        return f"World({self.size}, algorithm={self.algorithm!r})"

    def run(self, fn: Callable, *args, **kwargs) -> list:
        """Run `fn(comm, *args, **kwargs)` on every rank. Each rank gets its own deep
        copy of the arguments, as a process would.

        Raises:
            DeadlockError: nobody can go on. CollectiveMismatch: calls that do not fit
                together.
            Whatever a rank raises first, with that rank's traceback and a note that
            names the rank.
        """
        self.ledger = Ledger(self.size)
        self.clock, self.wire_free = [0.0] * self.size, [0.0] * self.size
        self.turns = Turns(self._deadlock)
        self.posts: dict[tuple, deque[Post]] = defaultdict(deque)
        self.open: list[Meeting] = []
        everyone = Group(tuple(range(self.size)))
        ranks = [RankComm(self, everyone, r) for r in range(self.size)]
        private = [_private((args, kwargs), self.size) for _ in ranks]
        tasks = [
            lambda c=c, a=a, k=k: fn(c, *a, **k)
            for c, (a, k) in zip(ranks, private, strict=True)
        ]
        try:
            results = self.turns.run(tasks)
        except BaseException as error:
            if self.turns.failed and self.turns.failed[0] >= 0:
                error.add_note(
                    f"(raised by rank {self.turns.failed[0]} of {self.size})"
                )
            raise
        self._check_nothing_left()
        return results

    def wire(self, ranks: tuple[int, ...]) -> Link | None:
        """What connects these ranks."""
        return self.link(ranks) if callable(self.link) else self.link

    def _deadlock(self, waits: list) -> DeadlockError:
        lines = ["deadlock: no rank can go on"]
        for rank, wait in enumerate(waits):
            lines.append(
                f"  rank {rank}"
                f" {'has returned' if wait is None else f'waits in {wait.describe()}'}"
            )
        return DeadlockError("\n".join(lines))

    def _check_nothing_left(self) -> None:
        left = [m.describe() for m in self.open] + [
            p.describe() for q in self.posts.values() for p in q
        ]
        if left:
            raise CollectiveMismatch(
                "the ranks have returned, but these never found their partners:\n  "
                + "\n  ".join(left)
            )


class _Handle:
    """Waits for a meeting or a post, and moves this rank's clock to its end."""

    def __init__(self, comm: RankComm, what, result: Callable) -> None:
        self.comm, self.what, self.result = comm, what, result

    def wait(self):
        world, me = self.comm.world, self.comm.ranks[self.comm.rank]
        world.turns.wait(me, self.what)
        world.clock[me] = max(world.clock[me], self.what.end)
        return self.result()


class RankComm(Communicator):
    """One rank's communicator in a `World`."""

    def __init__(self, world: World, group: Group, rank: int) -> None:
        self.world, self._group, self.rank = world, group, rank
        self.ranks, self.size, self.ledger = group.ranks, len(group.ranks), world.ledger
        self._calls = 0

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size}>"

    def work(self, seconds: float, label: str = "") -> None:
        """Compute for so many virtual seconds."""
        me = self.ranks[self.rank]
        start, self.world.clock[me] = (
            self.world.clock[me],
            self.world.clock[me] + seconds,
        )
        self.ledger.add(
            Event(
                me,
                "work",
                self.ranks,
                0,
                0,
                start=start,
                end=start + seconds,
                label=label,
            )
        )

    def split(self, color: int | None, key: int | None = None) -> RankComm | None:
        """A communicator of the ranks that say the same color; None for a rank that
        says None.
        """
        call = Call(
            "split", (color, self.rank if key is None else key), site=call_site()
        )
        return self._start(call).wait()

    def _start(self, call: Call) -> _Handle:
        return self._post(call) if call.op in ("send", "recv") else self._meet(call)

    def _meet(self, call: Call) -> _Handle:
        """Come to this group's next collective; the last to come makes it happen."""
        number, self._calls = self._calls, self._calls + 1
        meeting = self._group.meetings.get(number)
        if meeting is None:
            meeting = self._group.meetings[number] = Meeting(number, self._group)
            self.world.open.append(meeting)
        for other, theirs in meeting.calls.items():
            if why := disagreement(call, theirs):
                raise CollectiveMismatch(
                    f"{why}: rank {self.ranks[self.rank]} calls {call} at {call.site}, "
                    f"but rank {self.ranks[other]} is in {theirs} at {theirs.site}"
                )
        me = self.ranks[self.rank]
        meeting.calls[self.rank], meeting.came[self.rank] = call, self.world.clock[me]
        if len(meeting.calls) == self.size:
            self._happen(meeting)
        return _Handle(self, meeting, lambda: meeting.outputs[self.rank])

    def _happen(self, meeting: Meeting) -> None:
        del self._group.meetings[meeting.number]
        self.world.open.remove(meeting)
        calls = [meeting.calls[r] for r in range(self.size)]
        if calls[0].op == "split":
            meeting.outputs = _split(self.world, self._group, [c.value for c in calls])
            return
        meeting.end = self._write(calls, max(meeting.came.values()))
        meeting.outputs = MEANING[calls[0].op]([c.value for c in calls], calls[0])

    def _write(self, calls: list[Call], all_came: float) -> float:
        """Every member's line in the ledger; returns when the collective ends on the
        virtual clock.
        """
        world, call, xs = self.world, calls[0], [c.value for c in calls]
        sizes = [wire_sizes(call, xs, r) for r in range(self.size)]
        n = max(map(sum, sizes))
        start = max(all_came, *(world.wire_free[g] for g in self.ranks))
        link = world.wire(self.ranks)
        end = start + (
            cost.seconds(call.op, self.size, n, link, world.algorithm) if link else 0.0
        )
        for r, g in enumerate(self.ranks):
            world.wire_free[g] = end
            sent = cost.sent(call.op, r, sizes[r], call.root or 0, world.algorithm)
            shape = tuple(calls[r].tensors[0].shape) if calls[r].tensors else ()
            self.ledger.add(
                Event(
                    g,
                    call.op,
                    self.ranks,
                    sent,
                    sum(sizes[r]),
                    shape,
                    None,
                    start,
                    end,
                    site=calls[r].site,
                )
            )
        return end

    def _post(self, call: Call) -> _Handle:
        """Offer or ask for a message; whoever comes second hands it over."""
        world, me, peer = self.world, self.ranks[self.rank], self.ranks[call.root]
        post = Post(call, me, peer, world.clock[me], call.value)
        source, target = (me, peer) if call.op == "send" else (peer, me)
        key = (id(self._group), source, target, call.tag)
        queue, partners = (
            world.posts[key, call.op],
            world.posts[key, "recv" if call.op == "send" else "send"],
        )
        if partners:
            partner = partners.popleft()
            self._hand_over(
                *((post, partner) if call.op == "send" else (partner, post))
            )
        else:
            queue.append(post)
        return _Handle(self, post, lambda: post.value if call.op == "recv" else None)

    def _hand_over(self, send: Post, recv: Post) -> None:
        x, link = send.value, self.world.wire((send.rank, recv.rank))
        n = x.numel() * x.element_size()
        start = max(
            send.time, recv.time, self.world.wire_free[send.rank] if link else 0.0
        )
        end = start + (link.latency + n / link.bandwidth if link else 0.0)
        self.world.wire_free[send.rank] = end
        recv.value, shape = x.clone(), tuple(x.shape)
        for post, sent in ((send, n), (recv, 0)):
            post.done, post.end = True, end
            event = Event(
                post.rank,
                post.call.op,
                self.ranks,
                sent,
                n,
                shape,
                post.peer,
                start,
                end,
                site=post.call.site,
            )
            self.ledger.add(event)


def _split(world: World, parent: Group, wishes: list[tuple[int | None, int]]) -> list:
    """The new communicators, one for each member of `parent`."""
    groups = {}
    for color in sorted({c for c, _ in wishes if c is not None}):
        members = sorted((key, r) for r, (c, key) in enumerate(wishes) if c == color)
        groups[color] = [r for _, r in members]
    made = {
        color: Group(tuple(parent.ranks[r] for r in members))
        for color, members in groups.items()
    }
    return [
        None if c is None else RankComm(world, made[c], groups[c].index(r))
        for r, (c, _) in enumerate(wishes)
    ]


def _private(arguments: tuple, n: int) -> tuple:
    """A rank's own copy of the arguments."""
    try:
        return copy.deepcopy(arguments)
    except RuntimeError as error:
        raise ValueError(
            f"an argument cannot be copied for each of the {n} ranks ({error});"
            " detach() it, or close over it"
        ) from error
