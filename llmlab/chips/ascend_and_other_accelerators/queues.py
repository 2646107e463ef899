"""Queues and flags: the units of an Ascend core work side by side, and wait by request.

Every unit has a queue of its own: MTE2, MTE1, M (the cube), V (the vector unit), MTE3.
A queue works through its instructions in order, and the queues know nothing of each
other. The program makes them wait, with pairs of instructions:

    set_flag(src, dst, id)    in queue src: when all before it is done, the flag is 1
    wait_flag(src, dst, id)   in queue dst: stop until the flag is 1, and make it 0

The documentation of CANN ("SetFlag/WaitFlag") asks for pairs, and knows the ids 0 to 3
on an Ascend 910. Data needs two of them: one that says *it is there*, and, where a
buffer is used again, one back that says *it is free*.

`simulate` says when everything happens; `races` finds what no flag orders. A race may
well give the right result in one run: it is found in the order that the flags force,
not in the times.

Simplified: flags take no time, and in `simulate` a flag that is 1 is set again only
when it is 0 again. (A core would lose one of them; `races` does not count on it.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

QUEUES = ("MTE2", "MTE1", "M", "V", "MTE3")
IDS = range(4)


@dataclass(frozen=True)
class Do:
    """Work of one queue."""

    queue: str
    cycles: float
    name: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _known(queue=self.queue)
        if not self.cycles > 0:
            raise ValueError(f"cycles={self.cycles} must be above 0")


@dataclass(frozen=True)
class Flag:
    """A flag from one queue to another."""

    src: str
    dst: str
    id: int = 0

    def __post_init__(self) -> None:
        _known(src=self.src, dst=self.dst)
        if self.src == self.dst:
            raise ValueError(f"src=dst={self.src!r}: a queue works in order anyway")
        if self.id not in IDS:
            raise ValueError(f"id={self.id} must be 0 to {max(IDS)}")

    def __str__(self) -> str:
        return f"{self.src}_{self.dst} {self.id}"


@dataclass(frozen=True)
class Set(Flag):
    """set_flag."""

    @property
    def queue(self) -> str:
        """Where it stands."""
        return self.src


@dataclass(frozen=True)
class Wait(Flag):
    """wait_flag."""

    @property
    def queue(self) -> str:
        """Where it stands."""
        return self.dst


Instruction = Do | Set | Wait


def _known(**queues: str) -> None:
    for name, queue in queues.items():
        if queue not in QUEUES:
            raise ValueError(f"{name}={queue!r} must be one of {', '.join(QUEUES)}")


@dataclass(frozen=True)
class Run:
    """When each instruction of a program begins and ends, in cycles."""

    program: tuple[Instruction, ...]
    begins: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def cycles(self) -> float:
        """Of the whole program."""
        return max(self.ends, default=0.0)

    def busy(self, queue: str) -> float:
        """Which part of the time a queue works."""
        work = [each for each in self.program if isinstance(each, Do)]
        return sum(w.cycles for w in work if w.queue == queue) / self.cycles


def pairs(program: Sequence[Instruction]) -> dict[int, int]:
    """Place of each wait_flag → place of the set_flag that it waits for.

    The first wait of a flag belongs to its first set, and so on.

    Raises:
        ValueError: a flag is not set as often as it is waited for.
    """
    sets: dict[str, list[int]] = defaultdict(list)
    waits: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(program):
        if isinstance(each, Set):
            sets[str(each)].append(place)
        elif isinstance(each, Wait):
            waits[str(each)].append(place)
    for flag in sets | waits:
        if len(sets[flag]) != len(waits[flag]):
            raise ValueError(
                f"flag {flag} is set {len(sets[flag])} times and waited for"
                f" {len(waits[flag])} times: they come in pairs"
            )
    return {
        wait: set_
        for flag in sets
        for set_, wait in zip(sets[flag], waits[flag], strict=True)
    }


def _before(program: Sequence[Instruction], set_again: bool = True) -> list[list[int]]:
    """Which instructions each waits for: the one before it in its queue, and its set.

    Args:
        set_again: whether a set also waits until the same flag is 0 again.
    """
    set_of = pairs(program)
    wait_of = {set_: wait for wait, set_ in set_of.items()}
    last_in_queue: dict[str, int] = {}
    last_set: dict[str, int] = {}
    before: list[list[int]] = []
    for place, each in enumerate(program):
        needs = []
        if each.queue in last_in_queue:
            needs.append(last_in_queue[each.queue])
        if isinstance(each, Wait):
            needs.append(set_of[place])
        if isinstance(each, Set) and set_again:
            if str(each) in last_set:
                needs.append(wait_of[last_set[str(each)]])
            last_set[str(each)] = place
        last_in_queue[each.queue] = place
        before.append(needs)
    return before


def _order(program: Sequence[Instruction], before: list[list[int]]) -> list[int]:
    """The places in an order in which they can be done.

    Raises:
        ValueError: there is none: queues wait for each other.
    """
    waiting = [len(needs) for needs in before]
    then: list[list[int]] = [[] for _ in program]
    for place, needs in enumerate(before):
        for need in needs:
            then[need].append(place)
    ready = [place for place, count in enumerate(waiting) if count == 0]
    done: list[int] = []
    while ready:
        place = ready.pop()
        done.append(place)
        for follower in then[place]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)
    if len(done) < len(program):
        stuck = min(set(range(len(program))) - set(done))
        raise ValueError(
            f"queues wait for each other for ever: the first that does not begin is"
            f" instruction {stuck}, {program[stuck]}"
        )
    return done


def simulate(program: Sequence[Instruction]) -> Run:
    """When everything happens.

    Raises:
        ValueError: flags are not in pairs, or queues wait for each other for ever.
    """
    before = _before(program)
    begins = [0.0] * len(program)
    ends = [0.0] * len(program)
    for place in _order(program, before):
        each = program[place]
        begins[place] = max((ends[need] for need in before[place]), default=0.0)
        took = each.cycles if isinstance(each, Do) else 0.0
        ends[place] = begins[place] + took
    return Run(tuple(program), tuple(begins), tuple(ends))


@dataclass(frozen=True)
class Race:
    """Two instructions on one buffer that no flag orders."""

    first: Do
    second: Do
    buffer: str
    kind: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.buffer}: {self.second.name} ({self.second.queue}) does"
            f" not wait for {self.first.name} ({self.first.queue}); a flag"
            f" {self.first.queue}_{self.second.queue} is missing"
        )


KINDS = {
    (False, True): "read before it is written,",  # the later one reads
    (True, False): "written over before it is read,",
    (True, True): "written twice in any order,",
}


def _touches(first: Do, second: Do) -> list[tuple[str, str]]:
    """(buffer, kind) where their order matters."""
    found = [(b, KINDS[False, True]) for b in second.reads if b in first.writes]
    found += [(b, KINDS[True, False]) for b in second.writes if b in first.reads]
    found += [(b, KINDS[True, True]) for b in second.writes if b in first.writes]
    return found


def races(program: Sequence[Instruction]) -> list[Race]:
    """All pairs on one buffer, in the order of the program, that no flag orders.

    Raises:
        ValueError: flags are not in pairs, or queues wait for each other for ever.
    """
    before = _before(program, set_again=False)
    behind = [0] * len(program)  # the places that are surely done, as bits
    for place in _order(program, before):
        for need in before[place]:
            behind[place] |= behind[need] | 1 << need
    found = []
    work = [(place, each) for place, each in enumerate(program) if isinstance(each, Do)]
    for later, second in work:
        for earlier, first in work:
            if earlier >= later or first.queue == second.queue:
                continue
            if not behind[later] >> earlier & 1:
                touched = _touches(first, second)
                found += [Race(first, second, b, kind) for b, kind in touched]
    return found


# A product as a program ---------------------------------------------------------------


def product_program(
    count: int,
    load: float,
    split: float,
    multiply: float,
    store: float = 1.0,
    buffers: int = 2,
    without: str = "",
) -> list[Instruction]:
    """A product of `count` tiles along k, which are added up in L0C, and its result.

    Args:
        load, split, multiply, store: cycles of MTE2, of MTE1 and of the cube for one
            tile, and of the vector unit and of MTE3 for the result.
        buffers: of each kind; 2: one is filled while the other is used.
        without: a flag that is left out, as "MTE1_M".

    Raises:
        ValueError: there are no tiles, or not 1 to 4 buffers.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if buffers not in range(1, len(IDS) + 1):
        raise ValueError(f"buffers={buffers} must be 1 to {len(IDS)}")
    program: list[Instruction] = []

    def wait(src: str, dst: str, tile: int) -> None:
        program.append(Wait(src, dst, tile % buffers))

    def set_(src: str, dst: str, tile: int) -> None:
        program.append(Set(src, dst, tile % buffers))

    for tile in range(count):
        l1, l0 = f"L1[{tile % buffers}]", f"L0[{tile % buffers}]"
        again = tile >= buffers  # the buffer was used before
        last = tile >= count - buffers  # and will not be used after
        if again:
            wait("MTE1", "MTE2", tile)  # L1 is free
        program.append(Do("MTE2", load, f"load {tile}", writes=(l1,)))
        set_("MTE2", "MTE1", tile)
        wait("MTE2", "MTE1", tile)  # L1 is there
        if again:
            wait("M", "MTE1", tile)  # L0 is free
        program.append(Do("MTE1", split, f"split {tile}", (l1,), (l0,)))
        if not last:
            set_("MTE1", "MTE2", tile)
        set_("MTE1", "M", tile)
        wait("MTE1", "M", tile)  # L0 is there
        program.append(Do("M", multiply, f"multiply {tile}", (l0,), ("L0C",)))
        if not last:
            set_("M", "MTE1", tile)
    program += [
        Set("M", "V"),
        Wait("M", "V"),
        Do("V", store, "convert", ("L0C",), ("UB",)),
        Set("V", "MTE3"),
        Wait("V", "MTE3"),
        Do("MTE3", store, "store", ("UB",)),
    ]
    if without:
        program = [
            each
            for each in program
            if isinstance(each, Do) or f"{each.src}_{each.dst}" != without
        ]
    return program
