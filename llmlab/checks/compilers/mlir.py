"""Checks of 08-compilers/05-mlir.

Answers run on small programs. The last is lowered to machine code, and its numbers are
compared with those that usual mistakes give.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from xdsl.dialects.builtin import Float32Type, FloatAttr, ModuleOp, TensorType, f32
from xdsl.ir import Operation, SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, prop_def, result_def
from xdsl.pattern_rewriter import (
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
)
from xdsl.transforms.dead_code_elimination import region_dce
from xdsl.utils.exceptions import VerifyException

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers import mlir
from llmlab.compilers.front_end import TypeMismatch
from llmlab.compilers.mlir import Block, Function, Op, Value, ssa
from llmlab.compilers.mlir import dialect as lab
from llmlab.course.grading.checking import Checks, Mistake, diagnose

check = Checks("08-compilers/05-mlir")

Graph = dict[str, list[str]]

# 1 ------------------------------------------------------------------------------------

GRAPHS: list[Graph] = [
    {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []},  # a diamond
    {"a": ["b"], "b": ["c", "e"], "c": ["d"], "d": ["b"], "e": []},  # a loop
    {"a": ["b", "c"], "b": ["c", "d"], "c": ["b"], "d": []},  # a loop with two doors
    # a join whose sides have come a long way
    {
        **{"a": ["b"], "b": ["c", "d"], "c": ["e", "f"], "d": ["h"]},
        **{"e": ["g"], "f": ["g"], "g": ["h"], "h": []},
    },
    # from f back to the middle: what a first round believes is wrong
    {
        **{"a": ["b", "f"], "b": ["c"], "c": ["d", "e"], "d": ["g"]},
        **{"e": ["g"], "f": ["e", "h"], "g": ["h", "c"], "h": []},
    },
    # a block that nothing reaches jumps in
    {"a": ["b", "c"], "b": ["d"], "c": ["d"], "x": ["c", "d"], "d": ["e"], "e": []},
    {"a": ["b"], "b": ["c"], "x": ["c"], "c": []},
    # a ladder that is climbed from the far end
    {
        **{"a": ["f", "e"], "f": ["d"], "e": ["b"], "b": ["c"]},
        **{"c": ["b", "d"], "d": ["c"]},
    },
    {"a": ["a1"], "a1": ["a1", "a2"], "a2": ["a1", "a3"], "a3": []},  # loops in one
    {"a": []},
]


def as_function(graph: Graph) -> tuple[Function, dict[Block, str]]:
    """The same graph as blocks."""
    blocks = {name: Block() for name in graph}
    for name, after in graph.items():
        blocks[name].ops = [Op("br", targets=[(blocks[each], []) for each in after])]
    return Function([*blocks.values()]), {block: name for name, block in blocks.items()}


def order_of(graph: Graph) -> list[str]:
    """Its blocks in reverse postorder."""
    function, names = as_function(graph)
    return [names[block] for block in ssa.reverse_postorder(function)]


def run_idoms(answer: Callable, n: int) -> Outcome:
    """Graph n: who dominates whom."""
    graph = {name: list(after) for name, after in GRAPHS[n].items()}
    order = order_of(graph)
    try:
        found = answer(graph, order)
    except KeyError as problem:
        lost = problem.args[0]
        if lost not in graph or lost in order:
            raise
        raise Mistake(
            f"KeyError: {lost!r}. Nothing reaches this block, so it is not in `order`,"
            " and as a predecessor it does not count"
        ) from None
    if not isinstance(found, dict):
        raise Mistake(f"idoms(…) returned a {type(found).__name__}: return a dict")
    return {"the dict": dict(found)}


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Turn the graph round first: for each block, who jumps to it. A block that"
            " is not in `order` is never run, so it does not count."
        ),
        (
            "Begin with `{order[0]: order[0]}`. For each further block, take one"
            " predecessor that has an entry already; each other one with an entry meets"
            " it: of two blocks the one that comes later in the order goes up to its"
            " idom, until both are the same."
        ),
        (
            "A jump back comes from a block that is not in the dict in round one. So go"
            " through the order again, until a whole round changes nothing."
        ),
    ),
)
def idoms(answer):
    """The immediate dominator of every block."""
    judge(answer, run_idoms, right_idoms, wrong_idoms(), len(GRAPHS), "idoms(…)")


def right_idoms(successors: Graph, order: list[str]) -> dict[str, str]:
    """By the definition: b cannot be reached without a; the last such a is idom(b)."""

    def reached(without: str) -> set[str]:
        found: set[str] = set()
        waiting = [order[0]]
        while waiting:
            block = waiting.pop()
            if block != without and block not in found:
                found.add(block)
                waiting += successors[block]
        return found

    result = {order[0]: order[0]}
    left = {block: reached(block) for block in order}
    for block in order[1:]:
        above = [a for a in order if a != block and block not in left[a]]
        result[block] = max(
            above, key=lambda a: sum(a not in left[other] for other in above)
        )
    return result


def climbing(
    rounds: int | None = None,
    everyone: bool = False,
    pick: Callable | None = None,
    tree: str = "idom",
) -> Callable:
    """The algorithm, with one thing changed.

    Args:
        rounds: how many at most.
        everyone: whether unreachable predecessors count, as if the entry came before.
        pick: which predecessor it is, instead of where all meet.
        tree: whether two blocks go up by idoms or by first predecessors.
    """

    def way(successors: Graph, order: list[str]) -> dict[str, str]:
        place = {block: i for i, block in enumerate(order)}
        before = {block: [] for block in order}
        for block in successors if everyone else order:
            for after in successors[block]:
                if after in before:
                    before[after].append(block)
        idom = {order[0]: order[0]}
        up = {b: (before[b] or [b])[0] for b in order} if tree == "first" else idom

        def meet(a: str, b: str) -> str:
            for _ in range(100):
                if a == b:
                    return a
                if place[a] > place[b]:
                    a = up[a]
                else:
                    b = up[b]
            return order[0]

        for _ in range(rounds or 20):
            for block in order[1:]:
                sides = [
                    order[0] if each not in place else each
                    for each in before[block]
                    if each in idom or each not in place
                ]
                new = pick(sides) if pick else sides[0]
                if not pick:
                    for each in sides[1:]:
                        new = meet(new, each)
                idom[block] = new
        return idom

    return way


def joins_at_the_entry(successors: Graph, order: list[str]) -> dict[str, str]:
    """Where ways meet, only the entry is sure."""
    result = {order[0]: order[0]}
    for block in order[1:]:
        before = [each for each in order if block in successors[each]]
        result[block] = before[0] if len(before) == 1 else order[0]
    return result


def all_dominators(successors: Graph, order: list[str]) -> dict[str, set[str]]:
    """Each block and what stands above it."""
    above = right_idoms(successors, order)
    result = {order[0]: {order[0]}}
    for block in order[1:]:
        result[block] = {block, *result[above[block]]}
    return result


def wrong_idoms() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    right = right_idoms
    return {
        "one round is not enough: a jump back comes from a block that was not in the"
        " dict, so go on until nothing changes": climbing(rounds=1),
        "two rounds are not enough: what a jump back corrects may have to be corrected"
        " again, so go on until a whole round changes nothing": climbing(rounds=2),
        "a predecessor that is never run counts, though it is not in `order`": climbing(
            everyone=True
        ),
        "the first predecessor is not the dominator: a block with two has other ways"
        " in": climbing(pick=lambda sides: sides[0]),
        "the last predecessor is not the dominator: a block with two has other ways"
        " in": climbing(pick=lambda sides: sides[-1]),
        "the two go up by their predecessors: they must go up by their dominators, or"
        " they follow one way of many": climbing(tree="first"),
        "every block has the entry: it dominates all, but the immediate one is the last"
        " that does": lambda s, order: dict.fromkeys(order, order[0]),
        "where ways meet, the entry is not always the last that dominates: they may"
        " have parted further down": joins_at_the_entry,
        "each block has the set of all its dominators: one is asked, the last of them"
        " but the block itself": all_dominators,
        "the entry is missing: it has itself": lambda s, order: {
            b: d for b, d in right(s, order).items() if b != order[0]
        },
        "the entry has None: it has itself": lambda s, order: {
            b: None if b == order[0] else d for b, d in right(s, order).items()
        },
        "every block has itself: that is so for the entry only": lambda s, order: {
            b: b for b in order
        },
        "a block that nothing reaches is in it": lambda s, order: {
            **dict.fromkeys(s, order[0]),
            **right(s, order),
        },
        "a block that nothing reaches is in it, with itself: the dict has the blocks of"
        " `order`": lambda s, order: {b: b for b in s} | right(s, order),
        "the dict is the wrong way round: block → its immediate dominator": (
            lambda s, order: {d: b for b, d in right(s, order).items()}
        ),
    }


# 2 ------------------------------------------------------------------------------------


@cache
def problem_cases() -> list[Function]:
    """Right ones and broken ones of each kind."""
    return [
        *dominance_cases(),
        *terminator_cases(),
        *edge_cases(),
        *type_cases(),
        *more_cases(),
    ]


def split(then_defines: bool = True) -> tuple[list[Block], Value]:
    """^0 → ^1, ^2 → ^3, and a value of ^1."""
    a, b, c, d = (Block() for _ in range(4))
    a.arguments = [Value()]
    test = a.add("less", a.arguments[0], a.arguments[0])
    a.choose(test, (b, []), (c, []))
    made = b.add("const", number=1)
    b.goto(d)
    c.goto(d)
    return [a, b, c, d], made


def dominance_cases() -> list[Function]:
    """Uses that are dominated, and uses that are not."""
    fine, _ = split()
    fine[3].add("ret", fine[0].arguments[0])
    one_way, made = split()
    one_way[3].add("ret", made)  # came by ^2
    sibling, made = split()
    sibling[2].ops.insert(0, Op("print", [made]))  # a block that stands later
    sibling[3].add("ret", sibling[0].arguments[0])
    below, made = split()
    inner = Block()
    below[1].ops.pop()
    below[1].goto(inner)
    inner.add("print", made)
    inner.goto(below[3])
    below[3].add("ret", below[0].arguments[0])
    # the block that dominates stands later in the list
    moved = Function([below[0], inner, below[1], below[2], below[3]])
    late = Block([Value()])
    y = Value()
    late.ops = [Op("add", [y, late.arguments[0]], Value()), Op("const", [], y, 1)]
    late.add("ret", y)
    itself = Block([Value()])
    z = Value()
    itself.ops = [Op("add", [z, itself.arguments[0]], z)]
    itself.add("ret", itself.arguments[0])
    handed, made = split()
    handed[3].arguments = [Value()]
    handed[1].ops[-1].targets = [(handed[3], [made])]
    handed[2].ops[-1].targets = [(handed[3], [made])]  # handed on, where it is unknown
    handed[3].add("ret", handed[3].arguments[0])
    phi, made = split()
    phi[3].arguments = [Value()]
    phi[1].ops[-1].targets = [(phi[3], [made])]
    phi[2].ops[-1].targets = [(phi[3], [phi[0].arguments[0]])]
    phi[3].add("ret", phi[3].arguments[0])
    alone = Block([Value()])
    alone.add("ret", alone.add("add", alone.arguments[0], alone.arguments[0]))
    nobody, made = split()
    nobody[3].add("ret", nobody[0].arguments[0])
    lost = Block()
    lost.add("print", made)  # nothing reaches it
    lost.goto(nobody[3])
    # nothing reaches the second block, in which a use stands above its definition
    lone = Block([Value()])
    lone.add("ret", lone.arguments[0])
    upside_down, w = Block(), Value()
    upside_down.ops = [Op("print", [w]), Op("const", [], w, 1)]
    upside_down.add("ret", w)
    return [
        *(Function(fine), Function(one_way), Function(sibling), moved),
        *(Function([late]), Function([itself]), Function(handed), Function(phi)),
        *(Function([*nobody, lost]), Function([alone]), Function([lone, upside_down])),
    ]


def terminator_cases() -> list[Function]:
    """Blocks that do not end, or end too early."""
    open_ended = Block([Value()])
    open_ended.add("print", open_ended.arguments[0])
    empty, _ = split()
    early = Block([Value()])
    early.add("ret", early.arguments[0])
    early.add("print", early.arguments[0])
    early.add("ret", early.arguments[0])
    two_ends = Block([Value()])
    two_ends.add("ret", two_ends.arguments[0])
    two_ends.add("ret", two_ends.arguments[0])
    # and a type that is wrong before it: the terminator comes first
    both = Block([Value()])
    truth = both.add("less", both.arguments[0], both.arguments[0])
    both.add("print", truth)
    return [
        *(Function([open_ended]), Function(empty)),
        *(Function([early]), Function([two_ends]), Function([both])),
    ]


def edge_cases() -> list[Function]:
    """Jumps that hand on too little, too much, or the wrong thing."""
    found = []
    for given, wanted in ((0, 1), (2, 1), (1, 0)):
        a, b = Block([Value()]), Block([Value() for _ in range(wanted)])
        a.goto(b, *a.arguments * given)
        b.add("ret", a.arguments[0])
        found.append(Function([a, b]))
    # the second target of two
    a, b, c = Block([Value()]), Block(), Block([Value()])
    test = a.add("less", a.arguments[0], a.arguments[0])
    a.choose(test, (b, []), (c, []))
    b.add("ret", a.arguments[0])
    c.add("ret", c.arguments[0])
    found.append(Function([a, b, c]))
    # too few, and what is used is not known either: the jump is named first
    a, b = Block([Value()]), Block([Value()])
    a.goto(b)
    b.add("ret", Value())
    return [*found, Function([a, b])]


def type_cases() -> list[Function]:
    """Operands and handed values of another type, or too many of them."""
    a = Block([Value(), Value("i1")])
    a.add("add", a.arguments[0], a.arguments[1])
    a.add("ret", a.arguments[0])
    b = Block([Value()])
    b.add("add", b.arguments[0])
    b.add("ret", b.arguments[0])
    c, d = Block([Value()]), Block([Value("i1")])
    c.goto(d, c.arguments[0])
    d.add("ret", c.arguments[0])
    e, g = Block([Value()]), Block()
    e.choose(e.arguments[0], (g, []), (g, []))
    g.add("ret", e.arguments[0])
    truth = Block([Value("i1")])
    truth.add("ret", truth.arguments[0])
    # the type is wrong, and a value is unknown: the type is named first
    both = Block([Value("i1")])
    both.add("print", Value())
    both.add("ret", both.arguments[0])
    return [
        *(Function([a]), Function([b]), Function([c, d])),
        *(Function([e, g]), Function([truth]), Function([both])),
    ]


def more_cases() -> list[Function]:
    """Unknown values, arguments out of their block, lost blocks, two kinds at once."""
    unknown = Block([Value()])
    unknown.add("print", Value())
    unknown.add("ret", unknown.arguments[0])
    # an argument of ^1 in ^3, which is reached by ^2 as well
    sibling, _ = split()
    sibling[1].arguments = [Value()]
    sibling[0].ops[-1].targets = [
        (sibling[1], [sibling[0].arguments[0]]),
        (sibling[2], []),
    ]
    sibling[3].add("ret", sibling[1].arguments[0])
    # nothing reaches the last block, and it is not right in itself
    lost = []
    for add in ("print", "add", "br"):
        block, other = Block([Value()]), Block([Value()])
        block.add("ret", block.arguments[0])
        if add == "br":
            other.goto(block)
        else:
            other.add(add, other.arguments[0])
        if add == "add":
            other.add("ret", other.arguments[0])
        lost.append(Function([block, other]))
    # a later kind stands above an earlier one
    a, b, c = Block([Value()]), Block([Value()]), Block()
    a.add("add", a.arguments[0])
    a.goto(b)
    b.add("ret", a.arguments[0])
    d = Block([Value()])
    d.add("add", d.arguments[0])
    d.goto(c)
    c.add("print", d.arguments[0])
    return [
        *(Function([unknown]), Function(sibling), *lost),
        *(Function([a, b]), Function([d, c])),
    ]


def run_problem(answer: Callable, n: int) -> Outcome:
    """Case n: the kind of its first problem."""
    function = copy.deepcopy(problem_cases()[n])
    try:
        found = answer(function)
    except KeyError as problem:
        if not isinstance(problem.args[0], Block):
            raise
        raise Mistake(
            "a KeyError for a block: `idom` has only the blocks that can be reached."
            " In the others no use is wrong, and a value from there dominates no use"
            " elsewhere"
        ) from None
    if not isinstance(found, str):
        raise Mistake(f"first_problem(…) returned {found!r}: return a string")
    return {"the kind": found}


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Four loops over all blocks, one for each kind, in the order of the text."
            " The first that finds something returns. At the end: an empty string."
        ),
        (
            "For arguments and types of a jump: `for block, values in op.targets`, and"
            " compare `values` with `block.arguments`. For operands:"
            " `tuple(v.type for v in op.operands) == OPERANDS[op.name]`."
        ),
        (
            "For dominance: who defines what is `home[value]`, for block arguments as"
            " well. In the same block, keep a set of what was defined so far (the"
            " arguments at once, a result after its operation). In another block,"
            " `dominates(idom, home[value], block)`. Uses are `op.reads`."
        ),
    ),
)
def first_problem(answer):
    """The first kind of problem that a program has."""
    cases = len(problem_cases())
    judge(
        answer,
        run_problem,
        verifying(),
        wrong_problems(),
        cases,
        "first_problem(function)",
        shown=lambda found: f"{found!r}",
    )


KINDS = ("terminator", "arguments", "type", "dominance")


def ended(block: Block) -> bool:
    """Whether its last operation is a terminator."""
    return bool(block.ops) and block.ops[-1].name in ssa.TARGETS


def goes_on(block: Block, skipped: int = 1) -> bool:
    """Whether operations follow a terminator; the last ones are skipped."""
    return any(op.name in ssa.TARGETS for op in block.ops[:-skipped])


def verifying(
    ends: Callable = lambda block: ended(block) and not goes_on(block),
    counts: Callable = lambda given, wanted: len(given) == len(wanted),
    targets: Callable = lambda op: op.targets,
    operands: Callable = lambda op: (
        tuple(value.type for value in op.operands) == ssa.OPERANDS[op.name]
    ),
    handed: Callable = lambda given, wanted: (
        [a.type for a in given] == [b.type for b in wanted]
    ),
    reads: Callable = lambda op: op.reads,
    same_block: str = "order",
    other_block: str = "dominates",
    arguments: bool | str = True,
    unreachable: bool | str = False,
    unknown: bool = False,
    lost: bool = True,
    kinds: Sequence[str] = KINDS,
) -> Callable:
    """`first_problem`, with one thing changed.

    Args:
        arguments: whether they are definitions; "anywhere" takes them in every block.
        unreachable: whether dominance is asked in blocks that nothing reaches; "order"
            asks only for the order inside them.
        unknown: whether values that nobody defines are taken.
        lost: whether blocks that nothing jumps to are looked at for the other kinds.
    """

    def way(function: Function) -> str:
        aims = [
            block
            for each in function.blocks
            for op in each.ops
            for block, _ in op.targets
        ]
        blocks = [
            block
            for i, block in enumerate(function.blocks)
            if lost or not i or block in aims
        ]
        edges = [
            (values, block.arguments)
            for each in blocks
            for op in each.ops
            for block, values in targets(op)
        ]
        ops = [op for block in blocks for op in block.ops]
        found = {
            "terminator": not all(map(ends, blocks)),
            "arguments": not all(counts(*edge) for edge in edges),
            "type": not all(
                [*map(operands, ops), *(handed(*e) for e in edges if counts(*e))]
            ),
        }
        for kind in kinds:
            if kind == "dominance" and not found["terminator"]:
                uses = used_well(
                    *(function, reads, same_block, other_block, arguments),
                    *(unreachable, unknown),
                )
                if not all(uses):
                    return kind
            elif found.get(kind):
                return kind
        return ""

    return way


def used_well(
    function: Function,
    reads: Callable,
    same_block: str,
    other_block: str,
    arguments: bool | str,
    unreachable: bool | str,
    unknown: bool,
) -> Iterator[bool]:
    """For each use, whether it is taken."""
    idom = ssa.immediate_dominators(function)
    blocks = function.blocks
    home = {v: b for b in blocks for v in b.arguments} if arguments else {}
    home |= {op.result: b for b in blocks for op in b.ops}
    for place, block in enumerate(blocks):
        if block not in idom:
            if unreachable == "order":
                yield in_order(block, home)
            elif unreachable:
                yield not any(reads(op) for op in block.ops)
            continue
        above = set(block.arguments) if arguments else set()
        if arguments == "anywhere":
            above = {value for each in blocks for value in each.arguments}
        for op in block.ops:
            if same_block == "own":
                above.add(op.result)
            for value in reads(op):
                where = home.get(value)
                if where is block:
                    yield value in above or same_block == "any"
                elif value in above or (where is None and unknown):
                    yield True
                elif where is None or other_block == "none":
                    yield False
                elif other_block == "earlier":
                    yield blocks.index(where) < place
                elif other_block == "dominates":
                    yield where in idom and ssa.dominates(idom, where, block)
                else:
                    yield True
            above.add(op.result)


def in_order(block: Block, home: Mapping[Value, Block]) -> bool:
    """Whether no use of its own values stands above their definitions."""
    above = set(block.arguments)
    for op in block.ops:
        if any(home.get(value) is block and value not in above for value in op.reads):
            return False
        above.add(op.result)
    return True


def down_the_list(function: Function) -> str:
    """Whatever was defined further up in the list is taken, in all blocks."""
    if found := verifying(kinds=KINDS[:-1])(function):
        return found
    above: set[Value] = set()
    for block in function.blocks:
        above.update(block.arguments)
        for op in block.ops:
            if not above.issuperset(op.reads):
                return "dominance"
            above.add(op.result)
    return ""


def operation_by_operation(function: Function) -> str:
    """All kinds at the first operation, then at the next."""
    for block in function.blocks:
        if not ended(block) or goes_on(block):
            return "terminator"
        for op in block.ops:
            handed = [(values, to.arguments) for to, values in op.targets]
            if any(len(given) != len(wanted) for given, wanted in handed):
                return "arguments"
            pairs = [(op.operands, ssa.OPERANDS[op.name])]
            pairs += [(given, [a.type for a in wanted]) for given, wanted in handed]
            if any([v.type for v in given] != list(types) for given, types in pairs):
                return "type"
    return verifying(kinds=KINDS[-1:])(function)


def block_by_block(function: Function) -> str:
    """All kinds in the first block, then in the next."""
    first_kinds = verifying(kinds=KINDS[:-1])
    for block in function.blocks:
        if found := first_kinds(Function([block])):
            return found
    return verifying(kinds=KINDS[-1:])(function)


def wrong_problems() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a value that is defined in another block is always taken: its block must"
        " dominate": verifying(other_block="any"),
        "a value of a block that stands earlier in the list is taken: the order of the"
        " list says nothing, its block must dominate": verifying(other_block="earlier"),
        "every value is taken that is defined further up in the list: the order of the"
        " list says nothing, and in a block that nothing reaches no use is"
        " wrong": down_the_list,
        "a value of another block is never taken: it may be used where its block"
        " dominates": verifying(other_block="none"),
        "in one block a value is used before its operation, and you take it": verifying(
            same_block="any"
        ),
        "what a jump hands on is not looked at: it is a use as well"
        " (`op.reads`)": verifying(reads=lambda op: op.operands),
        "an argument of a block is not taken for a definition": verifying(
            arguments=False
        ),
        "a block that nothing reaches is checked for dominance: there is no way to it,"
        " so nothing can be wrong on the way": verifying(unreachable=True),
        "the order inside a block that nothing reaches is looked at: no use is wrong"
        " there": verifying(unreachable="order"),
        "an argument of a block is taken in every block: its block must dominate, as"
        " that of any other value": verifying(arguments="anywhere"),
        "a value that nobody defines is taken: nothing dominates its use": verifying(
            unknown=True
        ),
        "an operation that reads its own result is taken: the definition must stand"
        " above it": verifying(same_block="own"),
        "a block that nothing reaches is passed over: it is free of dominance only, the"
        " other kinds are looked for anywhere": verifying(lost=False),
        "an empty block is taken: it has no terminator": verifying(
            ends=lambda block: not block.ops or (ended(block) and not goes_on(block))
        ),
        "a block without a terminator is taken": verifying(
            ends=lambda block: not goes_on(block)
        ),
        "operations that follow a terminator are taken": verifying(ends=ended),
        "a terminator right before the last operation is taken: none but the last may"
        " be one": verifying(
            ends=lambda block: (
                ended(block)
                and not any(op.name in ssa.TARGETS for op in block.ops[:-2])
            )
        ),
        "how many values a jump hands on is not looked at": verifying(
            kinds=("terminator", "type", "dominance")
        ),
        "only too few values are found: a jump that hands on too many is wrong as"
        " well": verifying(counts=lambda given, wanted: len(given) >= len(wanted)),
        "a jump that hands on too many values is taken: more is as wrong as"
        " fewer": verifying(
            counts=lambda given, wanted: len(given) >= len(wanted),
            handed=lambda given, wanted: all(
                a.type == b.type for a, b in zip(given, wanted, strict=False)
            ),
        ),
        "no operation has the right types: OPERANDS has tuples, and a list is never"
        " equal to one": verifying(operands=lambda op: False),
        "only the first target of a cond_br is looked at": verifying(
            targets=lambda op: op.targets[:1]
        ),
        "the types of operands are not looked at": verifying(operands=lambda op: True),
        "the types of the values that a jump hands on are not looked at": verifying(
            handed=lambda given, wanted: True
        ),
        "an operation with too few operands is taken: compare the whole tuple with"
        " OPERANDS": verifying(
            operands=lambda op: all(
                value.type == wanted
                for value, wanted in zip(
                    op.operands, ssa.OPERANDS[op.name], strict=False
                )
            )
        ),
        "types are named before arguments: keep to the order of the text": verifying(
            kinds=("terminator", "type", "arguments", "dominance")
        ),
        "dominance is named before arguments and types: keep to the order of the"
        " text": verifying(kinds=("terminator", "dominance", "arguments", "type")),
        "the first block with a problem decides: look for each kind in all blocks"
        " before you look for the next": block_by_block,
        "the first operation with a problem decides: look for each kind in the whole"
        " program before you look for the next": operation_by_operation,
        "types are named before terminators: keep to the order of the text": verifying(
            kinds=("type", *KINDS)
        ),
    }


# 3 ------------------------------------------------------------------------------------

LIMIT = 60  # how often a pattern may be tried on one small program


def transpose_program(
    shape: lab.Shape, *orders: lab.Shape, also: int | None = None
) -> ModuleOp:
    """Transposes one after the other; `also` is read by somebody else as well."""
    module, block = lab.program([shape], [])
    value = block.args[0]
    values = []
    for order in orders:
        op = lab.TransposeOp.make(value, order=lab.dims(*order))
        block.add_op(op)
        value = op.result
        values.append(value)
    results = [value]
    if also is not None:
        again = lab.NegOp.make(values[also])
        block.add_op(again)
        results.insert(0, again.result)
    lab.finish(block, *results)
    main = lab.function(module)
    main.function_type = main.function_type.from_lists(
        main.function_type.inputs, [result.type for result in results]
    )
    return module


@cache
def transpose_cases() -> list[ModuleOp]:
    """Orders that undo each other and others, of two, three and four dimensions."""
    return [
        transpose_program((2, 3), (1, 0), (1, 0)),
        transpose_program((2, 3, 4), (1, 2, 0), (1, 2, 0)),
        transpose_program((2, 3, 4), (1, 2, 0), (0, 2, 1)),
        transpose_program((2, 3, 4), (1, 2, 0), (2, 0, 1)),
        transpose_program((2, 3, 4), (2, 1, 0)),
        transpose_program((2, 3, 4), (0, 1, 2)),
        transpose_program((2, 3, 4, 5), (1, 2, 3, 0), (1, 0, 2, 3), (0, 3, 1, 2)),
        transpose_program((2, 3, 4), (1, 2, 0), (0, 2, 1), also=0),
        transpose_program((3, 3), (1, 0), (1, 0), also=0),
        transpose_program((4, 4, 4), (1, 2, 0), (0, 2, 1), (1, 0, 2), also=1),
    ]


class Tried(RewritePattern):
    """A learner's function as a pattern, tried so often at most."""

    def __init__(self, answer: Callable) -> None:
        self.answer = answer
        self.times = 0

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, lab.TransposeOp):
            return
        self.times += 1
        if self.times > LIMIT:
            raise Mistake(
                f"after {LIMIT} tries there is still something to do in a program of"
                " three transposes: a pattern that puts in what it could match again"
                " never ends. Does the old operation go, and is the new one simpler?"
            )
        said = self.answer(op, rewriter)
        if not isinstance(said, bool):
            raise Mistake(
                f"fold_transposes(…) returned {said!r}: True if it changed the program,"
                " else False"
            )
        if said != rewriter.has_done_action:
            did = "was changed" if rewriter.has_done_action else "was not changed"
            raise Mistake(f"fold_transposes(…) returned {said}, and the program {did}")


def run_transposes(answer: Callable, n: int) -> Outcome:
    """Program n after the pattern: its text, if it is a program."""
    module = transpose_cases()[n].clone()
    PatternRewriteWalker(Tried(answer)).rewrite_module(module)
    known = set(lab.body(module).args)
    for op in lab.body(module).ops:
        if not known.issuperset(op.operands):
            raise Mistake(
                f"{op.name} reads a value that stands below it, or that is gone: put"
                " the new operation in the old one's place, by"
                " rewriter.replace(op, new)"
            )
        known.update(op.results)
    region_dce(module.body)
    return {"the program": str(module)}


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "`op.x.owner` is the operation that made the operand, or a block. Which two"
            " things can be simplified: a transpose that does nothing, and a transpose"
            " of a transpose."
        ),
        (
            "Dimension i of the result is dimension op.dims[i] of the value between,"
            " which is dimension inner.dims[op.dims[i]] of x."
        ),
        (
            "`rewriter.replace(op, lab.TransposeOp.make(x, order=lab.dims(…)))` puts a"
            " new operation there, `rewriter.replace(op, [], [value])` only a value."
            " The inner one goes by itself when nobody reads it any more."
        ),
    ),
)
def fold_transposes(answer):
    """Two transposes as one, and none where nothing moves."""
    judge(
        answer,
        run_transposes,
        folding(),
        wrong_transposes(),
        len(transpose_cases()),
        "fold_transposes(op, rewriter)",
        shown=lambda text: "\n" + str(text),
    )


def folding(
    order: Callable = lambda outer, inner: tuple(inner[dim] for dim in outer),
    identity: Callable = lambda dims: dims == tuple(range(len(dims))),
    fits: Callable = lambda op, inner: True,
) -> Callable:
    """`fold_transposes`, with one thing changed."""

    def way(op: lab.TransposeOp, rewriter: PatternRewriter) -> bool:
        if identity(op.dims):
            rewriter.replace(op, [], [op.x])
            return True
        inner = op.x.owner
        if not isinstance(inner, lab.TransposeOp) or not fits(op, inner):
            return False
        new = lab.dims(*order(op.dims, inner.dims))
        rewriter.replace(op, lab.TransposeOp.make(inner.x, order=new))
        return True

    return way


def inverse(outer: lab.Shape, inner: lab.Shape) -> bool:
    """Whether the two undo each other."""
    return tuple(inner[dim] for dim in outer) == tuple(range(len(outer)))


def nothing(op: lab.TransposeOp, rewriter: PatternRewriter) -> bool:
    """Matches never."""
    return False


def always_gone(op: lab.TransposeOp, rewriter: PatternRewriter) -> bool:
    """Two transposes are nothing."""
    inner = op.x.owner
    if not isinstance(inner, lab.TransposeOp) or inner.x.type != op.result.type:
        return False
    rewriter.replace(op, [], [inner.x])
    return True


def any_two_are_nothing(op: lab.TransposeOp, rewriter: PatternRewriter) -> bool:
    """Whatever their orders."""
    inner = op.x.owner
    if not isinstance(inner, lab.TransposeOp):
        return folding()(op, rewriter)
    rewriter.replace(op, [], [inner.x])
    return True


def same_shape_is_nothing(op: lab.TransposeOp, rewriter: PatternRewriter) -> bool:
    """One whose result has the operand's shape."""
    if op.x.type != op.result.type:
        return folding()(op, rewriter)
    rewriter.replace(op, [], [op.x])
    return True


def equal_orders_are_nothing(
    op: lab.TransposeOp, rewriter: PatternRewriter, otherwise: Callable = nothing
) -> bool:
    """Two with the same order."""
    inner = op.x.owner
    if isinstance(inner, lab.TransposeOp) and inner.dims == op.dims:
        rewriter.replace(op, [], [inner.x])
        return True
    return otherwise(op, rewriter)


def inner_replaced_too(op: lab.TransposeOp, rewriter: PatternRewriter) -> bool:
    """Readers of the inner one get its operand."""
    inner = op.x.owner
    if op.dims == tuple(range(len(op.dims))) or not isinstance(inner, lab.TransposeOp):
        return folding()(op, rewriter)
    folding()(op, rewriter)
    rewriter.replace(inner, [], [inner.x])
    return True


def wrong_transposes() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the orders were put together the wrong way round: dimension i of the result is"
        " inner.dims[op.dims[i]] of x": folding(
            order=lambda outer, inner: tuple(outer[dim] for dim in inner)
        ),
        "a transpose that moves nothing is left": folding(identity=lambda dims: False),
        "the order that was put together is the inverse of the right one: dimension i"
        " of the result is inner.dims[op.dims[i]] of x": folding(
            order=lambda outer, inner: tuple(
                outer.index(inner.index(dim)) for dim in range(len(outer))
            )
        ),
        "two transposes with the same order are taken for nothing: that is so of two"
        " dimensions; put the orders together": partial(
            equal_orders_are_nothing, otherwise=folding()
        ),
        "only two transposes with the same order are folded, and to nothing: any two"
        " are one": partial(
            equal_orders_are_nothing, otherwise=folding(fits=lambda op, inner: False)
        ),
        "two transposes are only folded where they undo each other: any two are"
        " one": folding(fits=lambda op, inner: inverse(op.dims, inner.dims)),
        "two transposes are not folded where the inner one has another reader: the"
        " outer can read x all the same": folding(
            fits=lambda op, inner: len(list(inner.result.uses)) == 1
        ),
        "two transposes are taken for nothing when the shapes agree: of a square all"
        " shapes agree": always_gone,
        "two transposes are taken for nothing whatever their orders: put the orders"
        " together": any_two_are_nothing,
        "one transpose is taken for nothing when the shape stays: of a square the shape"
        " always stays, look at op.dims": same_shape_is_nothing,
        "a transpose of a transpose is left: look at op.x.owner": folding(
            fits=lambda op, inner: False
        ),
        "the inner one was replaced, too, and others that read it now read its operand:"
        " replace op alone, the inner one goes when nobody reads it": (
            inner_replaced_too
        ),
        "nothing was changed: replace the operation by the rewriter": nothing,
        "the inner order alone is left: put both together": folding(
            order=lambda outer, inner: inner
        ),
        "the outer order alone is left: put both together": folding(
            order=lambda outer, inner: outer
        ),
    }


# 4 ------------------------------------------------------------------------------------


@irdl_op_definition
class RMSNormOp(lab.LabOp):
    """gain · x / √(mean(x²) + eps), along the last dimension."""

    name = "lab.rms_norm"
    x = operand_def(TensorType[Float32Type])
    gain = operand_def(TensorType[Float32Type])
    eps = prop_def(FloatAttr)
    result = result_def(TensorType[Float32Type])

    def shape(self, shapes: list[lab.Shape]) -> lab.Shape:
        x, gain = shapes
        if gain != x[-1:]:
            raise TypeMismatch(f"rms_norm of {x} with a gain of {gain}")
        return x


class Lowered(RewritePattern):
    """A learner's function as the way down for RMSNormOp."""

    def __init__(self, answer: Callable) -> None:
        self.answer = answer

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, RMSNormOp):
            return
        eps = op.eps.value.data
        result = self.answer(mlir.Linalg(rewriter), op.x, op.gain, eps)
        if not isinstance(result, SSAValue):
            raise Mistake(
                f"rms_norm(…) returned {type(result).__name__}: return the value that"
                " the last operation made"
            )
        if result.type != op.result.type:
            raise Mistake(
                f"rms_norm(…) returned a value of the type {result.type}, and"
                f" {op.result.type} is needed"
            )
        rewriter.replace(op, [], [result])


def norm_module(*shape: int, eps: float) -> ModuleOp:
    """One norm."""
    module, block = lab.program([shape, shape[-1:]], [shape])
    op = RMSNormOp.make(*block.args, eps=FloatAttr(eps, f32))
    block.add_op(op)
    lab.finish(block, op.result)
    return module


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Two operations of linalg. The first gives one number per row, by"
            " `build.along(x, last, 0.0, write)`, where write is called as"
            " write(scalars, number, sum_so_far)."
        ),
        (
            "The second is `build.generic([x, sums, gain], maps, build.empty(*shape),"
            " write)`: four maps, one for each input and one for the result."
            " `broadcast_map(of the input, of the result)` gives any of them."
        ),
        (
            "In the second body: the mean is the sum times 1/n, add eps, take the root,"
            " divide, multiply by the gain. Numbers that are known are"
            " `write.number(…)`. The last argument of a body is the result's old value,"
            " and not needed there."
        ),
    ),
)
def rms_norm(answer):
    """An operation of your own, from linalg to machine code."""
    for shape, eps in (((3, 6), 0.5), ((2, 4, 5), 1e-5), ((1, 7), 2.0)):
        try:
            compiled = mlir.compile_module(
                norm_module(*shape, eps=eps), [Lowered(answer)]
            )
        except VerifyException as problem:
            raise Mistake(
                f"your operations do not fit together: {str(problem).splitlines()[0]}."
                " Is each map `mlir.broadcast_map(shape_of_the_input,"
                " shape_of_the_result)`, the result's last?"
            ) from None
        x, gain = torch.randn(shape) + 0.5, torch.randn(shape[-1:])
        (found,) = compiled(x, gain)
        diagnose(
            found,
            right=normed(x, gain, eps),
            mistakes=wrong_norms(x, gain, eps),
            what=f"the machine code of rms_norm, on a tensor of {shape},",
        )
        rows = math.prod(shape[:-1])
        room = -(-4 * rows // 64) * 64
        if room < compiled.buffers.alone <= 2 * room:
            raise Mistake(
                "the values are right, and two numbers per row are kept between the"
                " operations: one is enough. The last operation can take the root"
            )
        if compiled.buffers.alone > room:
            raise Mistake(
                f"{compiled.buffers.alone} bytes are written between the operations,"
                f" and one number per row needs {4 * rows}: the squares need not be"
                " kept, nor the quotients"
            )


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm, in torch."""
    return gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def wrong_norms(x: Tensor, gain: Tensor, eps: float) -> Mapping[str, Tensor]:
    """Diagnosis → what that mistake gives."""
    square = x.square()
    mean = square.mean(-1, keepdim=True)
    total = square.sum(-1, keepdim=True)
    n = x.shape[-1]
    root = torch.sqrt(mean + eps)
    apart = x - x.mean(-1, keepdim=True)

    def over(mean: Tensor) -> Tensor:
        """With something else in the place of the mean."""
        return gain * x / torch.sqrt(mean + eps)

    of_three = {}
    if x.dim() > 2:
        of_three = {
            "the mean was taken along dimension 1, which is the last one only of a"
            " matrix": over(square.sum(1, keepdim=True) / x.shape[1]),
            "the sum was taken along dimension 1, which is the last one only of a"
            " matrix": over(square.sum(1, keepdim=True) / n),
        }
    return of_three | {
        "eps was left out, or a number stands in its place": gain
        * x
        / torch.sqrt(mean),
        "eps was added after the root": gain * x / (torch.sqrt(mean) + eps),
        "the sum of squares was taken, not their mean": over(total),
        "the sum was divided by the size of the first dimension, not by the length of"
        " a row": over(total / x.shape[0]),
        "eps was added before the sum was divided by n": gain
        * x
        / torch.sqrt((total + eps) / n),
        "the root was left out": gain * x / (mean + eps),
        "the numbers were not squared": over(x.mean(-1, keepdim=True)),
        "the gain was left out": x / root,
        "the gain was added, not multiplied": x / root + gain,
        "x was multiplied by the root, not divided": gain * x * root,
        "the mean was subtracted first: that is LayerNorm": gain
        * apart
        / torch.sqrt(apart.square().mean(-1, keepdim=True) + eps),
        "the mean of all rows was taken, not each row's": over(square.mean()),
        "the mean was taken along the first dimension": over(
            square.mean(0, keepdim=True)
        ),
        "the sum was taken along the first dimension": over(
            square.sum(0, keepdim=True) / n
        ),
        "the last square alone was taken: add each to the number so far": over(
            square[..., -1:] / n
        ),
        "the sum begins at 1, not at 0": over(mean + 1 / n),
        "1 was added to the gain": (1 + gain) * x / root,
        "x was divided by the gain": x / (gain * root),
        "x was left out: only the gain is divided": (gain / root).expand_as(x),
    }
