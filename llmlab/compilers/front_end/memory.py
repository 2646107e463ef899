"""Where values lie: one arena, and an offset for each value that is written to memory.

    born    the kernel that writes it
    dies    the last kernel that reads it; results live to the end

Two values may share bytes if one is dead before the other is born. Not if one dies in
the very kernel that writes the other: the kernel may read a row after it has written
another. A reshape is the same bytes: whoever reads it reads the value before it.

The plan walks through the kernels as an allocator would, but knows who dies when: each
new value goes to the lowest gap that is large enough. Values that the caller gave, and
constants, lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmlab.compilers.front_end.fusion import Kernel
from llmlab.compilers.front_end.ir import Graph, Node

ALIGNMENT = 64  # bytes, a cache line


@dataclass(frozen=True)
class Life:
    """Of one value: its bytes, and the first and last kernel that needs it."""

    size: int
    born: int
    dies: int

    def meets(self, other: Life) -> bool:
        """Whether both are needed at one time."""
        return self.born <= other.dies and other.born <= self.dies


def home(node: Node) -> Node:
    """The value whose bytes these are."""
    while node.op == "reshape":
        node = node.inputs[0]
    return node


def lifetimes(graph: Graph, kernels: Sequence[Kernel]) -> dict[Node, Life]:
    """Of each value that a kernel writes."""
    born: dict[Node, int] = {}
    dies: dict[Node, int] = {}
    for i, kernel in enumerate(kernels):
        if kernel.root.op != "reshape":
            born[kernel.root] = dies[kernel.root] = i
        for node in kernel.reads:
            if home(node) in dies:
                dies[home(node)] = i
    for node in graph.results:
        if home(node) in dies:
            dies[home(node)] = len(kernels)
    return {
        node: Life(-(-node.type.bytes // ALIGNMENT) * ALIGNMENT, born[node], dies[node])
        for node in born
    }


def plan(lives: Mapping[Node, Life]) -> dict[Node, int]:
    """An offset for each value, in bytes."""
    offsets: dict[Node, int] = {}
    gaps: list[tuple[int, int]] = []  # (start, end), by start
    end = 0
    dying: dict[int, list[Node]] = {}
    now = -1
    for node in sorted(lives, key=lambda node: lives[node].born):
        life = lives[node]
        while now < life.born - 1:
            now += 1
            for dead in dying.pop(now, []):
                start = offsets[dead]
                gaps = merged(gaps, (start, start + lives[dead].size))
        for i, (start, stop) in enumerate(gaps):
            if start + life.size <= stop:
                offsets[node] = start
                gaps[i : i + 1] = [(start + life.size, stop)]
                break
        else:
            # the last gap, if it reaches the end, can be made longer
            last = gaps.pop() if gaps and gaps[-1][1] == end else (end, end)
            offsets[node] = last[0]
            end = last[0] + life.size
        gaps = [gap for gap in gaps if gap[0] < gap[1]]
        dying.setdefault(life.dies, []).append(node)
    return offsets


def merged(gaps: list[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    """The gaps with one more; neighbours become one."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted([*gaps, new]):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result


def arena(lives: Mapping[Node, Life], offsets: Mapping[Node, int]) -> int:
    """Bytes of the arena."""
    return max((offsets[node] + lives[node].size for node in lives), default=0)


def most_alive(lives: Mapping[Node, Life]) -> int:
    """Bytes that are needed at one time at the worst moment: no plan does with less."""
    change: dict[int, int] = {}
    for life in lives.values():
        change[life.born] = change.get(life.born, 0) + life.size
        change[life.dies + 1] = change.get(life.dies + 1, 0) - life.size
    now = most = 0
    for time in sorted(change):
        now += change[time]
        most = max(most, now)
    return most
