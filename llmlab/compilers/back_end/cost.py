"""What a schedule costs, counted: bytes between cache and memory, and cycles.

Times differ from machine to machine and from run to run; these numbers do not. They
come from a simple machine: one cache, whose lines are replaced by the least recently
used, and a core that does one statement after the other.

    traffic   every touched element is looked up in the cache; a line that is not there
              is fetched, and one that was written goes back when it leaves
    cycles    operations (a product and a sum are one), loads and stores, steps of
              loops; lanes are done together; and 8 bytes of traffic take a cycle

Simplified: what is to stay in registers costs nothing where it fits into them, and no
address is ever computed twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from llmlab.compilers.back_end.ir import (
    Affine,
    Binary,
    Codes,
    Dot,
    Expr,
    Loop,
    Node,
    Pair,
    Program,
    Store,
    Unary,
    loads,
)

LINE = 64  # bytes
CYCLES = {"+": 1, "-": 1, "*": 1, "max": 1, "/": 8}
FUNCTIONS = {"neg": 1, "exp": 12, "tanh": 20, "sqrt": 10, "float": 1}
STEP = 2  # cycles of a loop's own for each iteration
WAIT = 4  # until a sum can be added to again
PER_CYCLE = 8  # bytes from memory


@dataclass(frozen=True)
class Model:
    """A simple machine.

    Attributes:
        cache: bytes.
        lanes: floats in a vector register.
        registers: how many of them there are.
    """

    cache: int = 16 * 1024
    lanes: int = 8
    registers: int = 16


@dataclass(frozen=True)
class Cost:
    """What a program costs on a Model."""

    traffic: int
    work: int

    @property
    def cycles(self) -> int:
        return self.work + self.traffic // PER_CYCLE


class Cache:
    """Lines of memory, the least recently used first.

    Attributes:
        traffic: bytes that came and went.
    """

    def __init__(self, size: int) -> None:
        self.lines: OrderedDict[int, bool] = OrderedDict()  # line → was it written?
        self.most = size // LINE
        self.traffic = 0

    def touch(self, line: int, write: bool) -> None:
        """One access; a line that is written as a whole is fetched, too."""
        if line in self.lines:
            self.lines.move_to_end(line)
            if write:
                self.lines[line] = True
            return
        self.traffic += LINE
        self.lines[line] = write
        if len(self.lines) > self.most:
            _, written = self.lines.popitem(last=False)
            self.traffic += LINE * written

    def flush(self) -> None:
        """What was written goes back."""
        self.traffic += LINE * sum(self.lines.values())
        self.lines.clear()


def count(program: Program, model: Model | None = None) -> Cost:
    """Traffic and work of one run, from an empty cache."""
    return Counter(program, model or Model()).run()


@dataclass(frozen=True)
class Plan:
    """Of a statement: its cycles; of each access the place, its lanes, and the way."""

    work: int
    touched: list[tuple[Affine, list[int], bool]]


class Counter:
    """One walk through all iterations of a program."""

    def __init__(self, program: Program, model: Model) -> None:
        self.program, self.model = program, model
        self.cache = Cache(model.cache)
        self.work = 0
        self.at: dict[str, int] = {}
        self.vector: tuple[str, int] | None = None
        self.starts: dict[str, int] = {}
        where = 0
        for buffer in program.buffers:
            self.starts[buffer.name] = where
            where += -(-buffer.bytes // LINE) * LINE  # each begins with a line
        self.free = self.in_registers()
        self.buffers = {b.name: b for b in program.buffers}
        self.plans: dict[tuple, Plan] = {}

    def in_registers(self) -> set[str]:
        """Buffers that cost nothing: as many as fit, the smallest first."""
        room = 4 * self.model.lanes * self.model.registers
        found = set()
        wanted = [b for b in self.program.buffers if b.memory == "registers"]
        for buffer in sorted(wanted, key=lambda b: b.bytes):
            room -= buffer.bytes
            if room >= 0:
                found.add(buffer.name)
        return found

    def run(self) -> Cost:
        self.nodes(self.program.body)
        self.cache.flush()
        return Cost(self.cache.traffic, self.work)

    def nodes(self, body: Sequence[Node], inner: str = "") -> None:
        for node in body:
            if isinstance(node, Store):
                self.store(node, inner)
            else:
                self.loop(node, inner)

    def loop(self, node: Loop, inner: str) -> None:
        """All iterations; `inner` is the loop that steps most often."""
        iterations = node.count(self.at)
        if node.kind == "vector" and iterations == node.extent:
            self.at[node.var] = 0
            self.vector = (node.var, node.extent)
            self.nodes(node.body, inner)
            self.vector = None
            return
        step = 0 if node.kind == "unroll" else STEP
        name = inner if node.kind == "unroll" else node.var
        for iteration in range(iterations):
            self.at[node.var] = iteration
            self.work += step
            self.nodes(node.body, name)

    def store(self, node: Store, inner: str) -> None:
        """Operations, loads and stores of a statement, in all its lanes."""
        key = id(node), self.vector  # the rest of a vector loop goes one by one
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.plan(node, inner)
        self.work += plan.work
        for offset, lines, write in plan.touched:
            first = offset.value(self.at)
            before = None
            for lane in lines:
                line = (first + lane) // LINE
                if line != before:
                    self.cache.touch(line, write)
                before = line

    def plan(self, node: Store, inner: str) -> Plan:
        """What is the same in all iterations."""
        lanes = self.vector[1] if self.vector else 1
        times = -(-lanes // self.model.lanes)
        work = operations(node.value)
        if node.op != "=":
            fused = isinstance(node.value, Binary) and node.value.op == "*"
            work += 0 if node.op == "+=" and fused else 1
            # a sum that the next iteration adds to again
            if not any(each.of(inner) for each in node.index):
                work += WAIT - 1
        work *= times
        accesses = [(load, False) for load in loads(node.value)]
        accesses += [(node.place, False)] if node.op != "=" else []
        touched = []
        for load, write in [*accesses, (node.place, True)]:
            if load.buffer in self.free:
                continue
            offset = self.buffers[load.buffer].offset(load.index) * 4
            name = self.vector[0] if self.vector else ""
            stride = offset.of(name)
            many = lanes if stride else 1
            work += -(-many // self.model.lanes) if stride in (0, 4) else many
            offset = offset.put(name, 0) + self.starts[load.buffer]
            touched.append((offset, [stride * lane for lane in range(many)], write))
        return Plan(work, touched)


def operations(value: Expr) -> int:
    """Cycles of an expression's arithmetic."""
    match value:
        case Binary():
            inner = operations(value.left) + operations(value.right)
            return inner + CYCLES[value.op]
        case Unary():
            return operations(value.inner) + FUNCTIONS[value.op]
        case Pair():  # two sums, shift, and, or
            return operations(value.low) + operations(value.high) + 5
        case Codes():
            return 2
        case Dot():
            return operations(value.left) + operations(value.right) + 1
    return 0


def product_traffic(
    n: int, k: int, m: int, rows: int, columns: int, size: int = 4
) -> int:
    """Bytes that C (n, m) = A (n, k) B (k, m) moves, a block of C at a time.

    A block of `rows` × `columns` stays in registers while k runs: it reads `rows` rows
    of A and `columns` columns of B, and is written once. Blocks at the end are smaller.
    """
    read_a = n * k * -(-m // columns)
    read_b = k * m * -(-n // rows)
    return size * (read_a + read_b + n * m)
