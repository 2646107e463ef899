"""`World(n)`: n ranks as threads of one process, to see and to count.

    >>> import torch
    >>> from llmlab.parallelism import World
    >>> def total(comm):
    ...     return comm.all_reduce(torch.tensor(float(comm.rank))).item()
    >>> World(3).run(total)
    [3.0, 3.0, 3.0]

    rank, size      a rank's number in its group, and the number of ranks in the group
    global rank     a rank's number in the whole world
    meeting         a collective under way (see `rendezvous`)
    post            a message, sent or asked for, that looks for its partner

Ranks take turns (see `turns`), so a run is deterministic to the bit. `world.ledger`
holds every byte of the last run, as the chosen algorithm (`ring`, `tree`, `halving` or
`naive`) would send it. A deadlock is reported at once: who waits for whom, and where.

For tensors on the CPU. On a GPU, autograd runs every rank's backward pass in one
thread, and a collective in it would wait for itself.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial

from torch import Tensor

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
    """Calls of a group's ranks that do not fit together.

    Either they are different collectives, or their shapes, dtypes or options disagree.
    """


class World:
    """n ranks as threads.

    `run(fn, *args)` calls `fn(comm, *args)` once per rank and returns the results in
    rank order.

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
        self.size = n
        self.algorithm = algorithm
        self.link = link
        self.ledger = Ledger(n)

    def __repr__(self) -> str:
        return f"World({self.size}, algorithm={self.algorithm!r})"

    def run(self, fn: Callable, *args, **kwargs) -> list:
        """Run `fn(comm, *args, **kwargs)` on every rank.

        Each rank gets its own deep copy of the arguments, as a process would.

        Raises:
            DeadlockError: nobody can go on.
            CollectiveMismatch: calls that do not fit together.
            Exception: whatever a rank raises first, with that rank's traceback and a
                note that names the rank.
        """
        self._reset()
        everyone = Group(tuple(range(self.size)))
        tasks = []
        for rank in range(self.size):
            comm = RankComm(self, everyone, rank)
            own_args, own_kwargs = _own_copy((args, kwargs), self.size)
            tasks.append(partial(fn, comm, *own_args, **own_kwargs))
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
        """What connects these global ranks."""
        if callable(self.link):
            return self.link(ranks)
        return self.link

    def _reset(self) -> None:
        """Nothing is sent, nobody waits, and all clocks are at 0."""
        self.ledger = Ledger(self.size)
        self.clock = [0.0] * self.size  # for each rank: its virtual time
        self.wire_free = [0.0] * self.size  # for each rank: when its wire is free
        self.turns = Turns(self._deadlock)
        # (group, from, to, tag) and "send" or "recv" → posts, the oldest first
        self.posts: dict[tuple, deque[Post]] = defaultdict(deque)
        self.open_meetings: list[Meeting] = []

    def _deadlock(self, waits: list) -> DeadlockError:
        """The error. `waits` is what each rank waits for, None for one that is done."""
        lines = ["deadlock: no rank can go on"]
        for rank, wait in enumerate(waits):
            if wait is None:
                lines.append(f"  rank {rank} has returned")
            else:
                lines.append(f"  rank {rank} waits in {wait.describe()}")
        return DeadlockError("\n".join(lines))

    def _check_nothing_left(self) -> None:
        """Raise if a collective or a message has not found its partners."""
        left = [meeting.describe() for meeting in self.open_meetings]
        for queue in self.posts.values():
            for post in queue:
                left.append(post.describe())
        if left:
            raise CollectiveMismatch(
                "the ranks have returned, but these never found their partners:\n  "
                + "\n  ".join(left)
            )


class _MeetingHandle:
    """Waits for a collective; its result is this rank's output."""

    def __init__(self, comm: RankComm, meeting: Meeting) -> None:
        self.comm = comm
        self.meeting = meeting

    def wait(self):
        self.comm.wait_for(self.meeting)
        return self.meeting.outputs[self.comm.rank]


class _PostHandle:
    """Waits for a message; the result of a receive is its tensor, of a send None."""

    def __init__(self, comm: RankComm, post: Post) -> None:
        self.comm = comm
        self.post = post

    def wait(self) -> Tensor | None:
        self.comm.wait_for(self.post)
        if self.post.call.op == "send":
            return None
        return self.post.value


class RankComm(Communicator):
    """One rank's communicator in a `World`."""

    def __init__(self, world: World, group: Group, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.ranks = group.ranks
        self.size = len(group.ranks)
        self.ledger = world.ledger
        self._group = group
        self._calls = 0  # how many collectives this rank has called in this group

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size}>"

    @property
    def global_rank(self) -> int:
        """This rank's number in the whole world."""
        return self.ranks[self.rank]

    def work(self, seconds: float, label: str = "") -> None:
        """Compute for so many virtual seconds."""
        start = self.world.clock[self.global_rank]
        end = start + seconds
        self.world.clock[self.global_rank] = end
        event = Event(
            self.global_rank,
            "work",
            self.ranks,
            bytes=0,
            payload=0,
            start=start,
            end=end,
            label=label,
        )
        self.ledger.add(event)

    def split(self, color: int | None, key: int | None = None) -> RankComm | None:
        """A communicator of the ranks that say the same color.

        A rank that says None gets None.
        """
        if key is None:
            key = self.rank
        call = Call("split", (color, key), site=call_site())
        return self._start(call).wait()

    def wait_for(self, awaited: Meeting | Post) -> None:
        """Let other ranks go on until it is ready, then move this clock to its end."""
        clock = self.world.clock
        self.world.turns.wait(self.global_rank, awaited)
        clock[self.global_rank] = max(clock[self.global_rank], awaited.end)

    def _start(self, call: Call) -> _MeetingHandle | _PostHandle:
        if call.op in ("send", "recv"):
            return self._post(call)
        return self._meet(call)

    def _meet(self, call: Call) -> _MeetingHandle:
        """Come to this group's next collective. The last to come makes it happen."""
        number = self._calls
        self._calls += 1
        meeting = self._group.meetings.get(number)
        if meeting is None:
            meeting = Meeting(number, self._group)
            self._group.meetings[number] = meeting
            self.world.open_meetings.append(meeting)
        self._check_agreement(call, meeting)
        meeting.calls[self.rank] = call
        meeting.came[self.rank] = self.world.clock[self.global_rank]
        if len(meeting.calls) == self.size:
            self._complete(meeting)
        return _MeetingHandle(self, meeting)

    def _check_agreement(self, call: Call, meeting: Meeting) -> None:
        """Raise if the call does not fit those of the ranks that came before."""
        for other, other_call in meeting.calls.items():
            why = disagreement(call, other_call)
            if why:
                raise CollectiveMismatch(
                    f"{why}: rank {self.global_rank} calls {call} at {call.site}, but"
                    f" rank {self.ranks[other]} is in {other_call} at {other_call.site}"
                )

    def _complete(self, meeting: Meeting) -> None:
        """All have come: compute the outputs, and when the collective ends."""
        del self._group.meetings[meeting.number]
        self.world.open_meetings.remove(meeting)
        calls = [meeting.calls[r] for r in range(self.size)]
        values = [call.value for call in calls]
        op = calls[0].op
        if op == "split":
            meeting.outputs = _split_group(self.world, self._group, values)
            return
        meeting.end = self._record(calls, max(meeting.came.values()))
        meeting.outputs = MEANING[op](values, calls[0])

    def _record(self, calls: list[Call], all_came: float) -> float:
        """Write every member's line of a collective into the ledger.

        Returns:
            When the collective ends on the virtual clock.
        """
        world = self.world
        call = calls[0]
        values = [c.value for c in calls]
        sizes = [wire_sizes(call, values, r) for r in range(self.size)]
        # it begins when all have come and the wires of all are free
        start = max(all_came, *(world.wire_free[g] for g in self.ranks))
        end = start
        link = world.wire(self.ranks)
        if link:
            n = max(sum(pieces) for pieces in sizes)
            end += cost.seconds(call.op, self.size, n, link, world.algorithm)
        for r, global_rank in enumerate(self.ranks):
            world.wire_free[global_rank] = end
            tensors = calls[r].tensors
            event = Event(
                global_rank,
                call.op,
                self.ranks,
                bytes=cost.sent(call.op, r, sizes[r], call.root or 0, world.algorithm),
                payload=sum(sizes[r]),
                shape=tuple(tensors[0].shape) if tensors else (),
                start=start,
                end=end,
                site=calls[r].site,
            )
            self.ledger.add(event)
        return end

    def _post(self, call: Call) -> _PostHandle:
        """Offer a message or ask for one. Whoever comes second hands it over."""
        me = self.global_rank
        peer = self.ranks[call.root]
        post = Post(call, me, peer, self.world.clock[me], call.value)
        is_send = call.op == "send"
        sender, receiver = (me, peer) if is_send else (peer, me)
        key = (id(self._group), sender, receiver, call.tag)
        partners = self.world.posts[key, "recv" if is_send else "send"]
        if not partners:
            self.world.posts[key, call.op].append(post)
        elif is_send:
            self._hand_over(send=post, recv=partners.popleft())
        else:
            self._hand_over(send=partners.popleft(), recv=post)
        return _PostHandle(self, post)

    def _hand_over(self, send: Post, recv: Post) -> None:
        """Give the sender's tensor to the receiver, and write both lines."""
        x = send.value
        n = x.numel() * x.element_size()
        link = self.world.wire((send.rank, recv.rank))
        start = max(send.time, recv.time)
        end = start
        if link:
            # messages of one sender go over its wire one after another
            start = max(start, self.world.wire_free[send.rank])
            end = start + (link.latency + n / link.bandwidth)
        self.world.wire_free[send.rank] = end
        recv.value = x.clone()
        for post, sent in ((send, n), (recv, 0)):
            post.done = True
            post.end = end
            event = Event(
                post.rank,
                post.call.op,
                self.ranks,
                bytes=sent,
                payload=n,
                shape=tuple(x.shape),
                peer=post.peer,
                start=start,
                end=end,
                site=post.call.site,
            )
            self.ledger.add(event)


def _split_group(
    world: World, parent: Group, wishes: list[tuple[int | None, int]]
) -> list[RankComm | None]:
    """The new communicators, one for each member of `parent`.

    Args:
        wishes: (color, key) of each member. Those of one color become a group, in the
            order of their keys; a member with color None gets no communicator.
    """
    members_of: dict[int, list[tuple[int, int]]] = {}  # color → (key, rank in parent)
    for rank, (color, key) in enumerate(wishes):
        if color is not None:
            members_of.setdefault(color, []).append((key, rank))

    comms: list[RankComm | None] = [None] * len(wishes)
    for members in members_of.values():
        members.sort()
        group = Group(tuple(parent.ranks[rank] for _, rank in members))
        for new_rank, (_, rank) in enumerate(members):
            comms[rank] = RankComm(world, group, new_rank)
    return comms


def _own_copy(arguments: tuple, n: int) -> tuple:
    """A rank's own copy of the arguments."""
    try:
        return copy.deepcopy(arguments)
    except RuntimeError as error:
        raise ValueError(
            f"an argument cannot be copied for each of the {n} ranks ({error});"
            " detach() it, or close over it"
        ) from error
