"""Passes over blocks: each leaves a valid program that computes the same.

    promote         a place in memory becomes values, and arguments where they meet
    drop_arguments  an argument that is always the same value is that value
    merge_equal     what is computed twice is computed once, where the first dominates
    remove_dead     what no effect needs goes, and blocks that nothing reaches
    rewrite         rules, again and again, until none applies

`rewrite` is MLIR's greedy driver: a list of operations still to be looked at. A rule
that applies puts on the list what it made, who reads it, and what it no longer reads.
The list runs empty if every rule makes some measure smaller. No driver can know that,
so this one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmlab.compilers.mlir.ssa import (
    COMMUTE,
    COMPUTE,
    PURE,
    TARGETS,
    Block,
    Function,
    Op,
    Value,
    frontiers,
    immediate_dominators,
    predecessors,
    reverse_postorder,
    sides,
)

# From memory to values ----------------------------------------------------------------


def promote(function: Function) -> int:
    """mem2reg: every slot that is only loaded from and stored to becomes values.

    Returns:
        How many block arguments that took: one per slot in each block of the iterated
        frontier of its stores in which the slot is still read.
    Raises:
        ValueError: a slot may be read before it was written.
    """
    remove_unreachable(function)
    idom = immediate_dominators(function)
    slots = [op.result for block in idom for op in block.ops if op.name == "slot"]
    new: dict[Block, dict[Value, Value]] = {block: {} for block in idom}
    edges = frontiers(function)
    for slot in slots:
        for block in joins(slot, edges, live_at_start(slot, list(idom))):
            new[block][slot] = Value("i32")
    at_end: dict[Block, dict[Value, Value]] = {}
    loaded: dict[Value, Value] = {}  # result of a load → the value that it stands for
    for block in idom:  # a block comes after its immediate dominator
        current = {**at_end.get(idom[block], {}), **new[block]}
        at_end[block] = renamed(block, current, loaded)
    for block in idom:
        for target, values in block.ops[-1].targets:
            values += [at_end[block][slot] for slot in new[target]]
    for block in idom:
        block.arguments += new[block].values()
    return sum(map(len, new.values()))


def live_at_start(slot: Value, blocks: list[Block]) -> set[Block]:
    """Blocks in which, or after which, the slot is read before it is written."""
    live: set[Block] = set()
    waiting: list[Block] = []
    writes = set()
    for block in blocks:
        first = next((op.name for op in block.ops if slot in op.operands), None)
        if first == "load":
            waiting.append(block)
        elif first == "store":
            writes.add(block)
    before = predecessors(blocks)
    while waiting:
        block = waiting.pop()
        if block not in live:
            live.add(block)
            waiting += [each for each in before[block] if each not in writes]
            # a block that reads first and writes later is on the list already
    return live


def joins(
    slot: Value, edges: dict[Block, set[Block]], live: set[Block]
) -> dict[Block, None]:
    """The iterated frontier of the blocks that store to a slot, where it is live."""
    stores = [
        block
        for block in edges
        if any(op.name == "store" and op.operands[1] is slot for op in block.ops)
    ]
    found: dict[Block, None] = {}
    waiting = stores
    while waiting:
        reached = edges[waiting.pop()]
        for block in edges:  # in their order, for a set has none
            if block in reached and block in live and block not in found:
                found[block] = None  # an argument is a new value, as a store is
                waiting.append(block)
    return found


def renamed(
    block: Block, current: dict[Value, Value], loaded: dict[Value, Value]
) -> dict[Value, Value]:
    """Loads stand for the last store's value. Returns each slot's value at the end."""
    kept = []
    for op in block.ops:
        op.replace_uses(loaded)
        if op.name == "store":
            current[op.operands[1]] = op.operands[0]
        elif op.name == "load":
            if op.operands[0] not in current:
                raise ValueError("a slot may be read before it was written")
            loaded[op.result] = current[op.operands[0]]
        elif op.name != "slot":
            kept.append(op)
    block.ops = kept
    return current


def drop_arguments(function: Function) -> int:
    """An argument to which every side hands the same value, or itself, is that value.

    Returns:
        How many went.
    """
    gone = 0
    again = True
    while again:
        again = False
        for block in function.blocks[1:]:
            for place in reversed(range(len(block.arguments))):
                if drop_argument(function, block, place):
                    gone += 1
                    again = True
    return gone


def drop_argument(function: Function, block: Block, place: int) -> bool:
    """Whether the argument at this place was dropped."""
    argument = block.arguments[place]
    handed_over = [values for _, values in sides(function, block)]
    handed = {values[place] for values in handed_over} - {argument}
    if len(handed) != 1:
        return False
    for values in handed_over:
        del values[place]
    del block.arguments[place]
    (value,) = handed
    for each in function.blocks:
        for op in each.ops:
            op.replace_uses({argument: value})
    return True


# Equal and dead -----------------------------------------------------------------------


def merge_equal(function: Function, commute: bool = True) -> int:
    """CSE: an operation is replaced by an equal one whose definition dominates it.

    Args:
        commute: whether a + b and b + a are equal.
    Returns:
        How many went.
    """
    idom = immediate_dominators(function)
    known: dict[Block, dict[tuple, Value]] = {}
    stands_for: dict[Value, Value] = {}
    for block in idom:
        table = dict(known.get(idom[block], {}))
        known[block] = table
        kept = []
        for op in block.ops:
            op.replace_uses(stands_for)
            key = key_of(op, commute)
            if key in table:
                stands_for[op.result] = table[key]
                continue
            if key is not None:
                table[key] = op.result
            kept.append(op)
        block.ops = kept
    # a loop hands a value back to a block that was looked at before
    for block in idom:
        for op in block.ops:
            op.replace_uses(stands_for)
    return len(stands_for)


def key_of(op: Op, commute: bool) -> tuple | None:
    """The same for operations that compute the same. None if there is no telling."""
    if op.name not in PURE:
        return None
    read = [id(value) for value in op.operands]
    if commute and op.name in COMMUTE:
        read.sort()
    return (op.name, op.number, *read)


def remove_unreachable(function: Function) -> None:
    """Drop the blocks that no way leads to."""
    reached = set(reverse_postorder(function))
    function.blocks = [block for block in function.blocks if block in reached]


def remove_dead(function: Function) -> int:
    """DCE: terminators and effects are needed, and what a needed operation reads.

    An argument of a block stays, and so does what is handed to it.

    Returns:
        How many operations went.
    """
    remove_unreachable(function)
    made = {op.result: op for block in function.blocks for op in block.ops}
    made.pop(None, None)
    waiting = [
        op
        for block in function.blocks
        for op in block.ops
        if op.name in TARGETS or op.name in ("store", "print")
    ]
    needed: set[Op] = set()
    while waiting:
        op = waiting.pop()
        if op not in needed:
            needed.add(op)
            waiting += [made[value] for value in op.reads if value in made]
    gone = 0
    for block in function.blocks:
        kept = [op for op in block.ops if op in needed]
        gone += len(block.ops) - len(kept)
        block.ops = kept
    return gone


# Rewriting ----------------------------------------------------------------------------


class DoesNotEnd(RuntimeError):
    """Rules were applied more often than was allowed."""


class Rewriter:
    """What a rule may do to a program. It keeps account of who reads what.

    Attributes:
        made: the operation that defines each value.
        users: the operations that read each value.
        waiting: operations still to be looked at.
    """

    def __init__(self, function: Function) -> None:
        self.home: dict[Op, Block] = {}
        self.made: dict[Value, Op] = {}
        self.users: dict[Value, dict[Op, None]] = {}
        self.waiting: list[Op] = []
        for block in function.blocks:
            for op in block.ops:
                self.enter(op, block)
        self.waiting.reverse()

    def enter(self, op: Op, block: Block) -> None:
        """Keep account of an operation."""
        self.home[op] = block
        if op.result is not None:
            self.made[op.result] = op
        for value in op.reads:
            self.users.setdefault(value, {})[op] = None
        self.waiting.append(op)

    def constant(self, value: Value) -> int | None:
        """The number of a value that is a constant."""
        op = self.made.get(value)
        return op.number if op is not None and op.name == "const" else None

    def before(self, op: Op, new: Op) -> Value:
        """Put a new operation in front of one; the value that it makes."""
        ops = self.home[op].ops
        ops.insert(ops.index(op), new)
        self.enter(new, self.home[op])
        return new.result

    def replace(self, op: Op, value: Value) -> None:
        """Whoever reads the operation's result reads the value; the operation goes."""
        for user in self.users.pop(op.result, {}):
            user.replace_uses({op.result: value})
            self.users.setdefault(value, {})[user] = None
            self.waiting.append(user)
        self.erase(op)

    def erase(self, op: Op) -> None:
        """Take out an operation that nobody reads."""
        if self.users.get(op.result):
            raise ValueError(f"{op.name} is still read, and cannot be erased")
        block = self.home.pop(op)
        block.ops.remove(op)
        self.made.pop(op.result, None)
        for value in op.reads:
            self.users[value].pop(op, None)
            if value in self.made:
                self.waiting.append(self.made[value])


Rule = Callable[[Op, Rewriter], bool]


def rewrite(function: Function, rules: Sequence[Rule], limit: int = 100_000) -> int:
    """Apply rules wherever they fit, until none does.

    Args:
        rules: each gets an operation and says whether it changed something.
    Returns:
        How often a rule was applied.
    Raises:
        DoesNotEnd: more often than `limit`.
    """
    rewriter = Rewriter(function)
    applied = 0
    while rewriter.waiting:
        op = rewriter.waiting.pop()
        if op not in rewriter.home:
            continue  # it went while it was on the list
        for rule in rules:
            if rule(op, rewriter):
                applied += 1
                break
        if applied > limit:
            raise DoesNotEnd(
                f"limit={limit} rewrites were done and there is more to do: does every"
                " rule make something smaller?"
            )
    return applied


def fold(op: Op, rewriter: Rewriter) -> bool:
    """An operation on two constants is a constant. Measure: operations that compute."""
    if op.name not in COMPUTE or op.name == "less":
        return False
    numbers = [rewriter.constant(value) for value in op.operands]
    if None in numbers:
        return False
    result = Op("const", [], Value("i32"), COMPUTE[op.name](*numbers))
    rewriter.replace(op, rewriter.before(op, result))
    return True


def constant_last(op: Op, rewriter: Rewriter) -> bool:
    """2 + x as x + 2. Measure: constants that stand first."""
    if op.name not in COMMUTE:
        return False
    a, b = op.operands
    if rewriter.constant(a) is None or rewriter.constant(b) is not None:
        return False
    swapped = Op(op.name, [b, a], Value("i32"))
    rewriter.replace(op, rewriter.before(op, swapped))
    return True


def neutral(op: Op, rewriter: Rewriter) -> bool:
    """x + 0, x − 0 and x · 1 are x; x · 0 is 0. Measure: operations."""
    if op.name not in ("add", "sub", "mul"):
        return False
    number = rewriter.constant(op.operands[1])
    if number == (1 if op.name == "mul" else 0):
        rewriter.replace(op, op.operands[0])
        return True
    if op.name == "mul" and number == 0:
        rewriter.replace(op, op.operands[1])
        return True
    return False


def dead(op: Op, rewriter: Rewriter) -> bool:
    """What nobody reads goes. Measure: operations."""
    if op.name not in (*PURE, "load") or rewriter.users.get(op.result):
        return False
    rewriter.erase(op)
    return True


RULES: tuple[Rule, ...] = (dead, fold, constant_last, neutral)


def canonicalise(function: Function) -> int:
    """All rules above."""
    return rewrite(function, RULES)
