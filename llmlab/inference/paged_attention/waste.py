"""Where the memory of a key/value cache goes, by four ways to hand it out.

Kwon et al. 2023, https://arxiv.org/abs/2309.06180, figures 2 and 13. A memory of so
many token slots serves a queue of requests; every running request writes one token in a
step, and leaves after its last one. Averaged over the steps until the queue is empty, a
slot is

    stored      the keys and values of a token
    reserved    empty now; its request will fill it
    internal    set aside for a request that will end before
    external    free, or lost to rounding: the "external fragmentation & others" of the
                paper

    max       2,048 slots for every request, the model's longest text
    pow2      the prompt, and the output's length rounded up to a power of two
    oracle    the prompt, and the output's true length, which nobody knows
    paged     blocks of b slots, when they are needed

The first three want slots that lie in a row, from a buddy allocator: its chunks are
powers of two, each cut from one twice as large.

Simplified: nobody arrives late, all running requests write one token in a step, and a
prompt takes no time. When no block is left, the newest request goes back to the front
of the queue; what it has written is part of its prompt when it comes again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST = 2048
SYSTEMS = ("max", "pow2", "oracle", "paged")
# Table 1 and figure 11 of the paper: slots of OPT-13B on an A100 of 40 GB, and the mean
# lengths of its two sets of requests.
SLOTS = 15_700
MEANS = {"ShareGPT": (161.31, 337.99), "Alpaca": (19.31, 58.45)}

Request = tuple[int, int]  # tokens of the prompt, tokens of the output


def trace(
    name: str = "ShareGPT", count: int = 400, seed: int = 0, spread: float = 1.0
) -> list[Request]:
    """Requests whose lengths are log-normal with the published means.

    The paper gives the means; `spread`, the deviation of the logarithm, is our choice.
    Requests above 2,048 tokens are drawn again, which lowers the means a little.
    """
    draw = random.Random(seed)
    requests = []
    while len(requests) < count:
        lengths = [
            # the mean of exp(N(mu, s²)) is exp(mu + s²/2)
            max(1, round(mean * draw.lognormvariate(-(spread**2) / 2, spread)))
            for mean in MEANS[name]
        ]
        if sum(lengths) <= LONGEST:
            requests.append((lengths[0], lengths[1]))
    return requests


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


class Buddy:
    """Chunks that are powers of two, each cut from one twice as large.

    Slots that make up no power of two become several chunks at the start.
    """

    def __init__(self, slots: int) -> None:
        self.free: dict[int, set[int]] = {}  # size → where its free chunks begin
        self.tops: dict[int, int] = {}  # where a chunk of the start begins → its size
        at = 0
        for bit in reversed(range(slots.bit_length())):
            if slots >> bit & 1:
                self.free.setdefault(1 << bit, set()).add(at)
                self.tops[at] = 1 << bit
                at += 1 << bit

    def take(self, need: int) -> tuple[int, int] | None:
        """(beginning, size) of a chunk for `need` slots, or None."""
        size = power_of_two(need)
        fitting = [s for s, chunks in self.free.items() if s >= size and chunks]
        if not fitting:
            return None
        found = min(fitting)
        at = min(self.free[found])
        self.free[found].remove(at)
        while found > size:  # the upper half is free again
            found //= 2
            self.free.setdefault(found, set()).add(at + found)
        return at, size

    def give(self, at: int, size: int) -> None:
        """A chunk is free; with its free other half it becomes one again."""
        top = max(start for start in self.tops if start <= at)
        while size < self.tops[top]:
            # within its top chunk, the other half differs in one bit
            other = top + ((at - top) ^ size)
            if other not in self.free.get(size, set()):
                break
            self.free[size].remove(other)
            at, size = min(at, other), 2 * size
        self.free.setdefault(size, set()).add(at)


@dataclass
class Usage:
    """Shares of the memory, over the steps; and the requests that ran at a time."""

    stored: float = 0.0
    reserved: float = 0.0
    internal: float = 0.0
    external: float = 0.0
    running: float = 0.0
    restarts: int = 0
    steps: int = 0
    table_entries: float = 0.0  # block numbers in all tables


@dataclass(eq=False)  # two requests of the same lengths are two requests
class Running:
    """A request; with `aside` above 0 it has memory."""

    prompt: int
    output: int
    written: int = 0
    chunk: tuple[int, int] = (0, 0)
    aside: int = 0  # slots set aside for it

    @property
    def length(self) -> int:
        return self.prompt + self.written


def serve(
    requests: Sequence[Request],
    system: str,
    slots: int = SLOTS,
    block_size: int = 16,
) -> Usage:
    """Serve requests, first come first served, and say where the memory went.

    The time until the queue is empty counts: a memory that nobody asks for is not
    wasted.

    Raises:
        ValueError: an unknown system, a request that never fits, or none that waits.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system={system!r} must be one of {', '.join(SYSTEMS)}")
    largest = max(map(sum, requests))
    if largest > slots // block_size * block_size:
        raise ValueError(f"slots={slots} are too few for a request of {largest} tokens")
    waiting = deque(Running(*lengths) for lengths in requests)
    memory = Blocks(slots, block_size) if system == "paged" else Chunks(slots, system)
    running: list[Running] = []
    usage = Usage()
    while True:
        while waiting and memory.admit(waiting[0]):
            running.append(waiting.popleft())
        if not waiting:
            break
        if not running:
            raise ValueError(f"slots={slots} are too few for one request of {system}")
        _account(usage, running, slots, block_size)
        step(running, waiting, memory, usage)
    if usage.steps == 0:
        raise ValueError(f"all {len(requests)} requests fit at once: nobody waits")
    for name in ("stored", "reserved", "internal", "external"):
        setattr(usage, name, getattr(usage, name) / (usage.steps * slots))
    usage.running /= usage.steps
    usage.table_entries /= usage.steps
    return usage


def step(
    running: list[Running],
    waiting: deque[Running],
    memory: Chunks | Blocks,
    usage: Usage,
) -> None:
    """Every running request writes a token, the oldest first."""
    at = 0
    while at < len(running):
        request = running[at]
        while not memory.grow(request):
            newest = running.pop()
            memory.leave(newest)
            waiting.appendleft(newest)
            usage.restarts += 1
            if newest is request:
                return
        request.written += 1
        if request.written == request.output:
            memory.leave(request)
            running.pop(at)
        else:
            at += 1


class Chunks:
    """One chunk per request, for as long as it runs."""

    def __init__(self, slots: int, system: str) -> None:
        self.buddy = Buddy(slots)
        self.system = system

    def admit(self, request: Running) -> bool:
        """Set its slots aside, if there is a chunk."""
        if self.system == "max":
            aside = LONGEST
        elif self.system == "pow2":
            aside = min(LONGEST, request.prompt + power_of_two(request.output))
        else:
            aside = request.prompt + request.output
        chunk = self.buddy.take(aside)
        if chunk is None:
            return False
        request.chunk = chunk
        request.aside = aside
        return True

    def grow(self, request: Running) -> bool:
        """Its slots are there."""
        return True

    def leave(self, request: Running) -> None:
        self.buddy.give(*request.chunk)


class Blocks:
    """Blocks when they are needed; here only their number counts."""

    def __init__(self, slots: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = slots // block_size

    def admit(self, request: Running) -> bool:
        """Blocks for what it has and its next token."""
        blocks = -(-(request.length + 1) // self.block_size)
        if blocks > self.free:
            return False
        self.free -= blocks
        request.aside = blocks * self.block_size
        return True

    def grow(self, request: Running) -> bool:
        """A block more where the next token needs one."""
        if request.length < request.aside:
            return True
        if self.free == 0:
            return False
        self.free -= 1
        request.aside += self.block_size
        return True

    def leave(self, request: Running) -> None:
        self.free += request.aside // self.block_size
        request.aside = 0


def _account(
    usage: Usage, running: Sequence[Running], slots: int, block_size: int
) -> None:
    """What every slot is at this step."""
    stored = sum(request.length for request in running)
    will = sum(
        min(request.aside, request.prompt + request.output) - request.length
        for request in running
    )
    aside = sum(request.aside for request in running)
    usage.stored += stored
    usage.reserved += will
    usage.internal += aside - stored - will
    usage.external += slots - aside
    usage.running += len(running)
    usage.table_entries += sum(-(-r.aside // block_size) for r in running)
    usage.steps += 1
