"""Static single assignment, on blocks: the mathematics under MLIR and LLVM.

    ^0(%0: i32):                      a block has arguments
      %1 = const 1 : i32              every value is defined once
      %2 = less %0, %1 : i1
      cond_br %2, ^1(%0), ^2()        and ends with a terminator, which hands values on

A value that comes from two sides is an argument of the block where they meet (MLIR); a
phi says the same from inside the block (LLVM).

    dominates   block a, block b: every way from the entry to b leads through a
    idom(b)     of the blocks that dominate b, and are not b, the last one
    frontier    of a: the blocks where what a dominates ends

A program is valid when the definition of every value dominates each of its uses. Then a
value may be replaced by an equal one wherever that one's definition dominates.

Sources: Cooper, Harvey and Kennedy 2001 for dominators and frontiers; Cytron et al.
1991 for the places of block arguments.

Simplified: integers of 32 bits and truth values, one region, no calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(eq=False)
class Value:
    """What an operation or a block defines. `type` is i32, i1 or slot."""

    type: str = "i32"


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        result: the value that it defines, if any.
        number: of a constant.
        targets: of a terminator: each block that may come next, with its arguments.
    """

    name: str
    operands: list[Value] = field(default_factory=list)
    result: Value | None = None
    number: int | None = None
    targets: list[tuple[Block, list[Value]]] = field(default_factory=list)

    @property
    def reads(self) -> list[Value]:
        """Every value that it uses, those that it hands to other blocks included."""
        return [
            *self.operands,
            *(value for _, values in self.targets for value in values),
        ]

    def replace_uses(self, new: Mapping[Value, Value]) -> None:
        """Read another value wherever it reads one that has a new one."""
        self.operands = [new.get(value, value) for value in self.operands]
        self.targets = [
            (block, [new.get(value, value) for value in values])
            for block, values in self.targets
        ]


@dataclass(eq=False)
class Block:
    """Operations that run one after the other; the last is a terminator."""

    arguments: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def successors(self) -> list[Block]:
        return [block for block, _ in self.ops[-1].targets] if self.ops else []

    def add(self, name: str, *operands: Value, number: int | None = None) -> Value:
        """Append an operation; its result has the type that the operation gives."""
        kind = RESULT.get(name)
        result = Value(kind) if kind else None
        self.ops.append(Op(name, list(operands), result, number))
        return result

    def goto(self, block: Block, *values: Value) -> None:
        """End with a jump."""
        self.ops.append(Op("br", targets=[(block, list(values))]))

    def choose(
        self,
        condition: Value,
        then: tuple[Block, list[Value]],
        other: tuple[Block, list[Value]],
    ) -> None:
        """End with a jump to one of two blocks."""
        targets = [(block, list(values)) for block, values in (then, other)]
        self.ops.append(Op("cond_br", [condition], targets=targets))


@dataclass
class Function:
    """Blocks; the first is the entry, and its arguments are the function's."""

    blocks: list[Block]

    def __str__(self) -> str:
        return "\n".join(lines(self))


RESULT = {
    "const": "i32",
    "add": "i32",
    "sub": "i32",
    "mul": "i32",
    "less": "i1",
    "slot": "slot",  # a place in memory
    "load": "i32",
}
OPERANDS = {
    "const": (),
    "add": ("i32", "i32"),
    "sub": ("i32", "i32"),
    "mul": ("i32", "i32"),
    "less": ("i32", "i32"),
    "slot": (),
    "load": ("slot",),
    "store": ("i32", "slot"),
    "print": ("i32",),
    "br": (),
    "cond_br": ("i1",),
    "ret": ("i32",),
}
TARGETS = {"br": 1, "cond_br": 2, "ret": 0}  # the terminators
COMMUTE = ("add", "mul")
PURE = ("const", "add", "sub", "mul", "less")  # depend on their operands only


def numbered(function: Function, sign: str) -> dict[Value, str]:
    """A name for each value, in their order."""
    names: dict[Value, str] = {}
    for block in function.blocks:
        for value in [*block.arguments, *(op.result for op in block.ops)]:
            if value is not None:
                names[value] = f"{sign}{len(names)}"
    return names


def lines(function: Function) -> Iterator[str]:
    """The program as text, values numbered in their order."""
    names = numbered(function, "%")
    blocks = {block: f"^{i}" for i, block in enumerate(function.blocks)}

    def listed(values: list[Value]) -> str:
        return ", ".join(names.get(value, "%?") for value in values)

    for block in function.blocks:
        args = ", ".join(f"{names[value]}: {value.type}" for value in block.arguments)
        yield f"{blocks[block]}({args}):"
        for op in block.ops:
            words = [listed(op.operands)] if op.operands else []
            words += [str(op.number)] if op.number is not None else []
            words += [f"{blocks.get(b, '^?')}({listed(v)})" for b, v in op.targets]
            made = f"{names[op.result]} = " if op.result else ""
            kind = f" : {op.result.type}" if op.result else ""
            yield f"  {made}{' '.join([op.name, ', '.join(words)]).rstrip()}{kind}"


# The graph of blocks ------------------------------------------------------------------


def reverse_postorder(function: Function) -> list[Block]:
    """The blocks that can be reached, each before its successors but for loops."""
    entry = function.blocks[0]
    order: list[Block] = []
    seen = {entry}
    stack = [(entry, iter(entry.successors))]
    while stack:
        block, successors = stack[-1]
        for after in successors:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(after.successors)))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def predecessors(blocks: list[Block]) -> dict[Block, list[Block]]:
    """Who may come before each block, of these."""
    found: dict[Block, list[Block]] = {block: [] for block in blocks}
    for block in blocks:
        for after in block.successors:
            if block not in found[after]:
                found[after].append(block)
    return found


def sides(function: Function, block: Block) -> list[tuple[Block, list[Value]]]:
    """Each jump to a block: where it stands, and what it hands on."""
    return [
        (each, values)
        for each in function.blocks
        for target, values in each.ops[-1].targets
        if target is block
    ]


def immediate_dominators(function: Function) -> dict[Block, Block]:
    """idom of every block that can be reached; the entry's is the entry itself.

    Cooper, Harvey and Kennedy: the tree of dominators is guessed from the first
    predecessor and corrected until nothing changes. Two blocks meet in the tree where
    their ways up do; the block that comes later in the order goes up.
    """
    order = reverse_postorder(function)
    place = {block: i for i, block in enumerate(order)}
    before = predecessors(order)
    idom = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [each for each in before[block] if each in idom]
            new = known[0]
            for each in known[1:]:
                new = meeting(new, each, idom, place)
            if idom.get(block) is not new:
                idom[block] = new
                changed = True
    return idom


def meeting(
    a: Block, b: Block, idom: Mapping[Block, Block], place: Mapping[Block, int]
) -> Block:
    """The last block that dominates both."""
    while a is not b:
        while place[a] > place[b]:
            a = idom[a]
        while place[b] > place[a]:
            b = idom[b]
    return a


def dominates(idom: Mapping[Block, Block], a: Block, b: Block) -> bool:
    """Whether every way to b leads through a. b itself counts."""
    while b is not a and idom[b] is not b:
        b = idom[b]
    return b is a


def frontiers(function: Function) -> dict[Block, set[Block]]:
    """Of each block: where a value of its own may meet another.

    A join is in the frontier of every block on the way up from one of its predecessors
    to its immediate dominator, which is not in it.
    """
    idom = immediate_dominators(function)
    found: dict[Block, set[Block]] = {block: set() for block in idom}
    for block, before in predecessors(list(idom)).items():
        if len(before) < 2:
            continue
        for each in before:
            while each is not idom[block]:
                found[each].add(block)
                each = idom[each]
    return found


# Verification -------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is wrong: terminator, entry, arguments, type or dominance."""

    kind: str
    text: str


class Invalid(ValueError):
    """A program that breaks a rule."""


def check(function: Function) -> None:
    """Raises Invalid with the first problem."""
    for problem in verify(function):
        raise Invalid(f"{problem.kind}: {problem.text}")


def verify(function: Function) -> Iterator[Problem]:
    """What is wrong, in the order of the program; whether each use has its definition
    last, for that needs the graph of blocks.
    """
    sound = True
    for number, block in enumerate(function.blocks):
        for problem in broken_block(function, block):
            yield Problem(problem.kind, f"in ^{number}, {problem.text}")
            sound = sound and problem.kind not in ("terminator", "entry")
    if sound:
        yield from undominated(function)


def broken_block(function: Function, block: Block) -> Iterator[Problem]:
    """What can be seen in one block."""
    if not block.ops or block.ops[-1].name not in TARGETS:
        yield Problem("terminator", "the last operation is not br, cond_br or ret")
    for op in block.ops[:-1]:
        if op.name in TARGETS:
            yield Problem("terminator", f"operations follow {op.name}")
    for op in block.ops:
        found = tuple(value.type for value in op.operands)
        if found != OPERANDS[op.name]:
            wanted = ", ".join(OPERANDS[op.name]) or "nothing"
            yield Problem("type", f"{op.name} takes {wanted}, not {', '.join(found)}")
        if len(op.targets) != TARGETS.get(op.name, 0):
            yield Problem("arguments", f"{op.name} has {len(op.targets)} blocks")
        for after, values in op.targets:
            if after not in function.blocks or after is function.blocks[0]:
                yield Problem("entry", f"{op.name} leads to the entry or out of here")
            given = [value.type for value in values]
            wanted = [value.type for value in after.arguments]
            if len(given) != len(wanted):
                text = f"{op.name} hands on {len(given)} values to a block that takes"
                yield Problem("arguments", f"{text} {len(wanted)}")
            elif given != wanted:
                yield Problem("type", f"{op.name} hands on {given}, not {wanted}")


def undominated(function: Function) -> Iterator[Problem]:
    """Uses that the definition does not dominate.

    In the same block the definition must stand before; in another, the defining block
    must dominate. An operation that nothing reaches may read what it likes.
    """
    idom = immediate_dominators(function)
    home = {value: block for block in function.blocks for value in block.arguments}
    home |= {op.result: block for block in function.blocks for op in block.ops}
    for number, block in enumerate(function.blocks):
        if block not in idom:
            continue
        above = set(block.arguments)  # defined in this block so far
        for op in block.ops:
            for value in op.reads:
                here = home.get(value)
                fine = value in above or (
                    here is not None
                    and here is not block
                    and here in idom
                    and dominates(idom, here, block)
                )
                if not fine:
                    text = (
                        f"in ^{number}, {op.name} uses a value that is not defined on"
                    )
                    yield Problem("dominance", f"{text} every way there")
            above.add(op.result)


# Running ------------------------------------------------------------------------------


def wrapped(number: int) -> int:
    """To 32 bits with sign."""
    return (number + 2**31) % 2**32 - 2**31


COMPUTE: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: wrapped(a + b),
    "sub": lambda a, b: wrapped(a - b),
    "mul": lambda a, b: wrapped(a * b),
    "less": lambda a, b: int(a < b),
}


def run(
    function: Function, *arguments: int, steps: int = 100_000
) -> tuple[int, list[int]]:
    """What it returns, and what it prints.

    Raises:
        ValueError: it goes on for too long.
    """
    block = function.blocks[0]
    values: dict[Value, int] = dict(zip(block.arguments, arguments, strict=True))
    memory: dict[Value, int] = {}
    printed: list[int] = []
    for _ in range(steps):
        for op in block.ops[:-1]:
            step(op, values, memory, printed)
        end = block.ops[-1]
        if end.name == "ret":
            return values[end.operands[0]], printed
        way = 0 if end.name == "br" or values[end.operands[0]] else 1
        block, handed = end.targets[way]
        new = [values[value] for value in handed]  # all are read before one is set
        values.update(zip(block.arguments, new, strict=True))
    raise ValueError(f"steps={steps} blocks were run, and no ret was met")


def step(
    op: Op, values: dict[Value, int], memory: dict[Value, int], printed: list[int]
) -> None:
    """One operation that is no terminator."""
    read = [values.get(value) for value in op.operands]
    if op.name in COMPUTE:
        values[op.result] = COMPUTE[op.name](*read)
    elif op.name == "const":
        values[op.result] = wrapped(op.number)
    elif op.name == "load":
        values[op.result] = memory[op.operands[0]]
    elif op.name == "store":
        memory[op.operands[1]] = read[0]
    elif op.name == "print":
        printed.append(read[0])
