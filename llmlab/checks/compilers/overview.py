"""Checks of 08-compilers/01-overview.

A list of operations may be in any order that works, and lines of LLVM IR may have any
names: what is judged is whether the list is complete and what the lines compute, once
LLVM has made machine code of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers import overview as ov
from llmlab.compilers.overview import (
    FUNCTIONS_OF_LLVM,
    INSTRUCTIONS,
    Expression,
    assembly,
    compile_expression,
    compile_ir,
    exp,
    hot_loop,
    literal,
    loop,
    maximum,
    minimum,
    sqrt,
    tanh,
    trace,
)
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect

check = Checks("08-compilers/01-overview")


# 1 ------------------------------------------------------------------------------------


def deep_and_shallow(x: Expression, y: Expression) -> Expression:
    """x is read near the result and far below it."""
    inner = exp(y) * y
    return (inner + tanh(inner * x)) - (inner / x)


def same_numbers(x: Expression) -> Expression:
    """Two constants that are equal and not the same object, and one read twice."""
    half = Expression("constant", value=0.5)
    return (x * half + half) * (x + 0.5)


def same_arguments() -> Expression:
    """Two objects that stand for the same argument."""
    x, again = (Expression("argument", value=0) for _ in range(2))
    return x * again + x


def list_cases() -> list[Expression]:
    """Results; each is an expression with values that are read once or more."""
    return [
        trace(lambda x, y: x * y + 1, 2),
        trace(lambda x: x * x, 1),
        trace(deep_and_shallow, 2),
        trace(same_numbers, 1),
        trace(lambda x, y: y, 2),
        trace(lambda x: tanh(tanh(tanh(-x))) + x, 1),
        trace(lambda x, y, z: sqrt((x - y) * (x - y) + z) / ((y - x) + 2), 3),
        Expression("constant", value=2.0),
        same_arguments(),
    ]


def run_list(answer: Callable, n: int) -> Outcome:
    """Case n: what is missing, twice, too early, or should not be there."""
    result = list_cases()[n]
    wanted = ov.linearise(result)
    number = {node: i for i, node in enumerate(wanted)}
    found = expect(answer(result), kind=list, what="linearise(result)")
    if not all(isinstance(node, Expression) for node in found):
        raise Mistake("the list must hold the expressions themselves")
    again = answer(result)
    first: dict[Expression, int] = {}
    for place, node in enumerate(found):
        first.setdefault(node, place)
    early = [
        number[node]
        for node, place in first.items()
        if node in number
        and any(first.get(each, len(found)) > place for each in node.inputs)
    ]
    return {
        "what is missing": [i for node, i in number.items() if node not in first],
        "what stands there more than once": sorted(
            number.get(node, -1)
            for place, node in enumerate(found)
            if first[node] < place
        ),
        "what comes before something that it reads": sorted(early),
        "what was not in the expression": sum(node not in number for node in found),
        "the last one": number.get(found[-1], -1) if found else None,
        "a second call with the same expression": sorted(
            number.get(node, -1) for node in again
        ),
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "First what an operation reads, then the operation: a function that calls"
        " itself for each of `node.inputs` does that.",
        "A value that is read twice is reached twice. Keep what is in the list already,"
        " and return at once if the node is there.",
        "`order = []`, and in it `def visit(node)`: if node is in order, return; visit"
        " each of node.inputs; append node. Then `visit(result)`.",
    ),
)
def linearise(answer):
    """An expression as a list: each operation once, after those that it reads."""
    cases = len(list_cases())
    judge(answer, run_list, ov.linearise, wrong_lists(), cases, "linearise(result)")


def every_way(result: Expression) -> list[Expression]:
    """Without a look at what is there already."""
    before = [node for each in result.inputs for node in every_way(each)]
    return [*before, result]


def by_levels(result: Expression) -> list[Expression]:
    """Level by level from the result, then turned round."""
    found = [result]
    for node in found:
        for each in node.inputs:
            if each not in found:
                found.append(each)
    return found[::-1]


def result_first(result: Expression) -> list[Expression]:
    """Each before what it reads, depth first."""
    found: list[Expression] = []

    def visit(node: Expression) -> None:
        if node not in found:
            found.append(node)
            for each in node.inputs:
                visit(each)

    visit(result)
    return found


def once_for_all() -> Callable[[Expression], list[Expression]]:
    """What one call has seen, the next one leaves out."""
    seen: set[Expression] = set()

    def way(result: Expression) -> list[Expression]:
        found = [node for node in ov.linearise(result) if node not in seen]
        seen.update(found)
        return found

    return way


def by_looks(*ops: str) -> Callable[[Expression], list[Expression]]:
    """One for all that look the same, among operations of these kinds; all, if none."""

    def way(result: Expression) -> list[Expression]:
        kept: dict[object, Expression] = {}
        for node in ov.linearise(result):
            looks = (node.op, node.value, node.inputs)
            kept.setdefault(looks if not ops or node.op in ops else node, node)
        return list(kept.values())

    return way


def wrong_lists() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a value that is read twice stands in the list twice: it is computed once, so"
        " look whether it is there already": every_way,
        "the list stands on its head: first what an operation reads, then the"
        " operation": lambda result: ov.linearise(result)[::-1],
        "level by level from the result is not enough: a value may be read near the"
        " result and far below it, and must come before both": by_levels,
        "an operation stands before what it reads: put it into the list after the loop"
        " over its inputs": result_first,
        "depth first from the result, then turned round, is not enough: a value that is"
        " read twice must come before both": lambda result: result_first(result)[::-1],
        "a second call gives less: what one call has seen reaches the next, so begin"
        " anew inside the function": once_for_all(),
        "the result is missing: it is the last of the list": lambda result: (
            ov.linearise(result)[:-1]
        ),
        "only what the result reads directly is there: go on from there": lambda r: [
            *dict.fromkeys(r.inputs),
            r,
        ],
        "arguments and constants are missing: they are values like others": lambda r: [
            node for node in ov.linearise(r) if node.inputs
        ],
        "constants are missing: they are values like others": lambda r: [
            node for node in ov.linearise(r) if node.op != "constant"
        ],
        "two expressions that look alike became one: go by the object, `node in order`,"
        " and leave merging to a later pass": by_looks(),
        "two constants that look alike became one: two objects stay two": by_looks(
            "constant"
        ),
        "two objects for one argument became one: two objects stay two": by_looks(
            "argument"
        ),
    }


# 2 ------------------------------------------------------------------------------------

LINE = re.compile(r"%[\w.]+ = (f(add|sub|mul|div)|call) float .*")


def line_cases() -> list[tuple[Callable, int]]:
    """Functions of so many arguments: every operation, and orders that matter."""
    return [
        (lambda x, y: x * y + x, 2),
        (lambda x, y: y - x / 3, 2),
        (lambda x: 0.1 * x - 1 / x, 1),
        (lambda x, y: exp(y) - tanh(x) * sqrt(y * y), 2),
        (lambda x, y: maximum(x, 0.25) - minimum(y, x), 2),
        (lambda x: x * 0.044715, 1),
        (lambda x: x, 1),
        (lambda x: Expression("constant", value=-0.3), 1),
        (lambda x, y, z: (z - y) / (x - z), 3),
        (lambda x: (x + 1) * (x + 1.5) - (x + 1), 1),
    ]


def run_lines(answer: Callable, n: int) -> Outcome:
    """Case n: what machine code of the lines computes."""
    function, arguments = line_cases()[n]
    program = ov.linearise(trace(function, arguments))
    found = expect(answer(program), kind=tuple, what="lower(program)")
    if len(found) != 2 or not isinstance(found[1], str):
        raise Mistake("return the list of lines, and the name of the last value")
    lines, result = expect(found[0], kind=list, what="the list of lines"), found[1]
    for line in lines:
        if not isinstance(line, str) or not LINE.fullmatch(line.strip()):
            raise Mistake(
                f"this is not a line that a loop can hold: {line!r}. One looks like"
                " `%v0 = fadd float %x0, %x1`, or `%v1 = call float"
                " @llvm.exp.f32(float %v0)`"
            )
    ir = loop(lines, result, arguments)
    try:
        code = compile_ir(ir, arguments, level=0)
    except ValueError as problem:
        words = explained(str(problem), ir)
        if not program[-1].inputs and "undefined" in words:
            words += ": the last node may be an argument or a constant"
        raise Mistake(words) from None
    random = torch.Generator().manual_seed(n)
    inputs = [torch.randn(5, generator=random) + 0.1 for _ in range(arguments)]
    return {
        "what the lines compute": [f"{v:.4g}" for v in code(*inputs).tolist()],
        "the number of lines": len(lines),
    }


def explained(problem: str, ir: str) -> str:
    """What LLVM says, of which line, and what it usually comes from."""
    said = problem.removeprefix("LLVM cannot read this: ").strip().splitlines()
    words = [line.strip() for line in said[:2]]
    text = "LLVM cannot read your lines: " + "; ".join(words)
    place = re.search(r"<string>:(\d+):", text)
    if place:
        text += f". It means `{ir.splitlines()[int(place[1]) - 1].strip()}`"
    if "constant" in problem or "integer" in problem:
        text += ". A number must be written by `literal(value)`"
    elif "multiple definition" in problem or "redefinition" in problem:
        text += ". Every line needs a name of its own"
    elif "undefined" in problem:
        text += ". A name is used that no line has given"
    elif "incompatible signature" in problem:
        text += ". A function is given as many operands as its node has inputs"
    elif "expected type" in problem:
        text += ". In a call `float` stands before each operand, not only the first"
    elif "expected value token" in problem:
        text += (
            ". The name of a function begins with `@`, and an instruction says `float`"
            " once"
        )
    return text


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "Go through the program in its order, and keep a dict from each node to the"
        " name of its value. An argument and a constant have a name and no line.",
        "An argument's name is `%x` and its place, `int(node.value)`; a constant's is"
        " `literal(node.value)`; any other's is `%v` and the number of lines so far.",
        "Of an instruction: `f'{name} = {INSTRUCTIONS[node.op]} float {a}, {b}'`. Of a"
        " function, each operand is `float` and its name, in parentheses, after"
        " `call float @` and FUNCTIONS_OF_LLVM[node.op].",
    ),
)
def lower(answer):
    """A line of LLVM IR per operation, and the name of the last value."""
    judge(
        answer,
        run_lines,
        ov.lower,
        wrong_lines(),
        len(line_cases()),
        "lower(program)",
    )


def lowering(
    argument: Callable = lambda node, seen: int(node.value),
    read: Callable = lambda names, node: [names[each] for each in node.inputs],
    number: Callable = lambda value: value,
    op: Callable = lambda op: op,
    result: Callable = lambda program, names, lines: names[program[-1]],
) -> Callable:
    """`lower`, and what comes out with one thing changed."""

    def way(program: Sequence[Expression]) -> tuple[list[str], str]:
        lines: list[str] = []
        names: dict[Expression, str] = {}
        seen = 0
        for node in program:
            if node.op == "argument":
                names[node] = f"%x{argument(node, seen)}"
                seen += 1
                continue
            if node.op == "constant":
                names[node] = literal(number(node.value))
                continue
            operands = read(names, node)
            name, kind = f"%v{len(lines)}", op(node.op)
            names[node] = name
            if kind in INSTRUCTIONS:
                call = f"{INSTRUCTIONS[kind]} float {', '.join(operands)}"
            else:
                given = ", ".join(f"float {each}" for each in operands)
                call = f"call float @{FUNCTIONS_OF_LLVM[kind]}({given})"
            lines.append(f"{name} = {call}")
        return lines, result(program, names, lines)

    return way


def previous_value(names: dict[Expression, str], node: Expression) -> list[str]:
    """The second operand is whatever was computed last."""
    found = [names[each] for each in node.inputs]
    return [*found[:-1], [*names.values()][-1]]


def latest_values(names: dict[Expression, str], node: Expression) -> list[str]:
    """As many values as the operation reads, those that stand just before it."""
    return [*names.values()][-len(node.inputs) :]


def latest_of_kind(names: dict[Expression, str], node: Expression) -> list[str]:
    """The last name that was given to an operation of the same kind and value."""
    kinds = {(each.op, each.value): name for each, name in names.items()}
    return [kinds[each.op, each.value] for each in node.inputs]


def constants_as_lines(program: Sequence[Expression]) -> tuple[list[str], str]:
    """A line for each constant, too."""
    lines, result = ov.lower(program)
    constants = [node for node in program if node.op == "constant"]
    extra = [
        f"%c{i} = fadd float {literal(0.0)}, {literal(node.value)}"
        for i, node in enumerate(constants)
    ]
    return [*extra, *lines], result


def renamed(**other: str) -> Callable:
    """One operation for another."""
    return lambda op: other.get(op, op)


def wrong_lines() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "x − y became y − x, or x / y became y / x: the operands stay in the order of"
        " `node.inputs`": lowering(
            read=lambda names, node: [names[each] for each in reversed(node.inputs)]
        ),
        "the operands were sorted by their names: x − y is not y − x": lowering(
            read=lambda names, node: sorted(names[each] for each in node.inputs)
        ),
        "an argument's number is `node.value`, its place in the call; it is not the"
        " order in which the program meets it": lowering(
            argument=lambda node, seen: seen
        ),
        "the second operand is always the value before: look up the name of each of"
        " `node.inputs`": lowering(read=previous_value),
        "the operands are the values that stand just before: look up the name of each"
        " of `node.inputs`": lowering(read=latest_values),
        "two operations of one kind share a name, and the later one is read for both:"
        " keep the names by the object": lowering(read=latest_of_kind),
        "a constant has a line: it has a name, `literal(value)`, and no"
        " line": constants_as_lines,
        "constants have lost what follows the point: keep the float": lowering(
            number=lambda value: float(int(value))
        ),
        "constants have lost their sign": lowering(number=abs),
        "constants have lost digits: give `literal` the whole number": lowering(
            number=lambda value: round(value, 4)
        ),
        "maximum and minimum are exchanged": lowering(
            op=renamed(maximum="minimum", minimum="maximum")
        ),
        "the result is the value of the first line: it is that of the last node of the"
        " program": lowering(
            result=lambda program, names, lines: "%v0" if lines else names[program[-1]]
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "y = x + b first. Then `maximum` and `minimum` keep y + 3 between 0 and 6; t is"
        " a sixth of that.",
        "A compiler may not turn y / 6 into y · (1/6): the results differ in the last"
        " bit for some y. You may decide that it does not matter.",
        "There is no power: t² is `t * t`. A name that is used twice is computed once.",
    ),
)
def smooth_gate(answer):
    """y t² (3 − 2t) with y = x + b and t = min(max(y + 3, 0), 6) / 6, as machine code
    without a division and without a call.
    """
    try:
        code = compile_expression(answer, 2)
    except ValueError as problem:
        raise Mistake(str(problem)) from None
    for size in (1000, 37, 1):
        x, b = torch.randn(2, size) * 4
        diagnose(
            code(x, b),
            right=(x + b) * smooth(kept_between(x + b)),
            mistakes=wrong_gates(x, b),
            what="smooth_gate(x, b)",
        )
    text = assembly(code.ir)
    if "call" in text:
        raise Mistake(
            "the machine code calls a function, once for each number: the formula needs"
            " nothing but +, −, ×, maximum and minimum"
        )
    if re.search(r"\bv?div", text):
        raise Mistake(
            "the values are right, and the machine code divides, which takes several"
            " times as long as a product: multiply by 1/6"
        )
    if len(hot_loop(text)) > MOST_INSTRUCTIONS:
        raise Mistake(
            f"the values are right, and the loop has {len(hot_loop(text))}"
            f" instructions: {MOST_INSTRUCTIONS} are enough. Compute y and t once, and"
            " clamp with one maximum and one minimum"
        )


MOST_INSTRUCTIONS = 20


def kept_between(y: Tensor, low: float | None = 0, high: float | None = 6) -> Tensor:
    """t: y + 3 between two ends, in sixths."""
    return (y + 3).clamp(low, high) / 6


def smooth(t: Tensor) -> Tensor:
    """From 0 to 1 without a corner."""
    return t * t * (3 - 2 * t)


def wrong_gates(x: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Diagnosis → what a wrong formula gives."""
    y = x + b
    t = kept_between(y)
    return {
        "b is missing: y = x + b": x * smooth(kept_between(x)),
        "the 3 is missing: it is y + 3 that is kept between 0 and 6": (
            y * smooth(kept_between(y - 3))
        ),
        "the upper end is missing: minimum(…, 6)": (
            y * smooth(kept_between(y, high=None))
        ),
        "the lower end is missing: maximum(…, 0)": (
            y * smooth(kept_between(y, low=None))
        ),
        "the sixth is missing": y * smooth(6 * t),
        "the factor y is missing: this is the gate alone": smooth(t),
        "the outer factor is y = x + b, not x": x * smooth(t),
        "t is made of y = x + b, not of x": y * smooth(kept_between(x)),
        "t² (3 − 2t) needs its parentheses: y t² is multiplied by all of 3 − 2t": (
            y * t * t * 3 - 2 * t
        ),
        "this is t³ (3 − 2t): t is squared": y * t * smooth(t),
        "maximum and minimum are exchanged: with maximum(…, 6) t is 1 for every y": y,
        "this is the gate of the lesson: t² (3 − 2t) takes the place of t": y * t,
        "t is not squared: t² (3 − 2t)": y * t * (3 - 2 * t),
        "the 2 is missing: t² (3 − 2t)": y * t * t * (3 - t),
    }


# 4 ------------------------------------------------------------------------------------

Calls = list[tuple]


def call_cases() -> list[tuple[int, Calls]]:
    """How many versions there may be, and the arguments of one call after another."""
    a, b = torch.ones(2, 3), torch.zeros(2, 3)
    wide, tall = torch.ones(2, 4), torch.ones(3, 2)
    double = a.double()
    flat = torch.ones(6)
    return [
        (8, [(a,), (a,), (b,), (wide,), (a,)]),
        (8, [(a,), (double,), (a,), (double,)]),
        (8, [(a,), (tall,), (flat,), (tall,)]),
        (8, [(a, 1), (a, 2), (a, 1), (b, 2)]),
        (8, [(a, 1), (a, 1.0), (a, True), (a, 1)]),
        (8, [(a, b), (a, wide), (wide, a), (b, a)]),
        (2, [(a,), (wide,), (tall,), (a,), (flat,), (tall,), (wide,)]),
        (1, [(a,), (b,), (wide,), (a,)]),
        (0, [(a,), (a,)]),
        (8, []),
        (8, [(a,), (a,), (torch.ones(2, 3),)]),
        (8, [(a, b), (a,), (a, b, 1), (a,), (a, b)]),
        (8, [(a, wide), (torch.ones(2), torch.ones(3, 2, 4))]),
        (8, [(a, 1), (1, a)]),
        (8, [(a, "1"), (a, 1), (a, True), (a, "True")]),
        (8, [(a, -1), (a, -2)]),
        (8, [(tall,), (a.mT,)]),
    ]


def kinds(arguments: tuple) -> list:
    """Arguments as plain data."""
    return [
        [*each.shape, str(each.dtype), float(each.sum())]
        if isinstance(each, Tensor)
        else repr(each)
        for each in arguments
    ]


def look_for_a_star(arguments: tuple) -> None:
    """Refuses a call with all arguments as one."""
    if len(arguments) == 1 and isinstance(arguments[0], tuple):
        raise Mistake(
            "`arguments` was handed on as one argument: `*arguments` hands on each"
        )


def run_calls(answer: Callable, n: int) -> Outcome:
    """Case n: what was compiled, and which version answered each call."""
    limit, calls = call_cases()[n]
    compiled: list = []

    def function(*arguments):
        look_for_a_star(arguments)
        return ["as it stands", kinds(arguments)]

    def compiler(*arguments):
        look_for_a_star(arguments)
        if any(callable(each) for each in arguments):
            raise Mistake("compile takes the arguments of the call, not the function")
        compiled.append(kinds(arguments))
        version = len(compiled)
        return lambda *given: [f"version {version}", kinds(given)]

    versions: dict = {}
    try:
        answers = [
            answer(function, compiler, limit, versions, arguments)
            for arguments in calls
        ]
    except (StopIteration, LookupError, ValueError):
        if limit or compiled:
            raise
        raise Mistake(
            "with `limit` 0 there is no version to throw away, and none to call: when"
            " there is no room, `function` is called as it stands"
        ) from None
    if callable(answers[0] if answers else None):
        raise Mistake("return what the version returns, not the version: call it")
    return {"what was compiled": compiled, "who answered": answers}


@check.exercise(
    points=4,
    minutes=20,
    in_place=True,
    difficulty=4,
    importance=5,
    hints=(
        "`versions` goes from what was assumed to the version that was compiled for it."
        " Of a tensor, what is assumed is its shape and its dtype.",
        "Of any other argument, its type and its value: 1, 1.0 and True are equal for"
        " a dict, and code that was made for one need not be right for another.",
        "Make the key. If it is not in the dict and there is room for one more,"
        " compile. If it is in the dict now, call that version; else call `function`.",
    ),
)
def guarded_call(answer):
    """The answer of a function that is compiled anew where what was assumed no longer
    holds.
    """
    judge(
        answer,
        run_calls,
        right_guarded,
        wrong_guards(),
        len(call_cases()),
        "guarded_call(…)",
    )


def assumed(arguments: tuple) -> tuple:
    """What a compiled version takes for granted."""
    return tuple(
        (each.shape, each.dtype) if isinstance(each, Tensor) else (type(each), each)
        for each in arguments
    )


def guarding(
    key: Callable = assumed,
    room: Callable = lambda versions, limit: len(versions) < limit,
    full: Callable = lambda function, versions: function,
    forget: bool = False,
) -> Callable:
    """`guarded_call`, and what comes out with one thing changed."""

    def way(
        function: Callable,
        compiler: Callable,
        limit: int,
        versions: dict,
        arguments: tuple,
    ):
        about = key(arguments)
        if about not in versions:
            if forget and len(versions) >= limit and versions:
                versions.pop(next(iter(versions)))
            if not room(versions, limit):
                return full(function, versions)(*arguments)
            versions[about] = compiler(*arguments)
        return versions[about](*arguments)

    return way


right_guarded = guarding()


def assuming(of_tensor: Callable, of_other: Callable = lambda v: (type(v), v)):
    """A key by other properties."""
    return lambda arguments: tuple(
        of_tensor(each) if isinstance(each, Tensor) else of_other(each)
        for each in arguments
    )


def every_time(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """A new version for each call."""
    return compiler(*arguments)(*arguments)


def first_arguments(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """A version for the first of these arguments, or for these and more, will do."""
    about = assumed(arguments)
    for known, version in versions.items():
        if all(a == b for a, b in zip(known, about, strict=False)):
            return version(*arguments)
    return right_guarded(function, compiler, limit, versions, arguments)


def none_kept(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """`versions` stays as it was."""
    return right_guarded(function, compiler, limit, dict(versions), arguments)


def emptied(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """Where there is no room, room is made."""
    if assumed(arguments) not in versions and len(versions) >= limit:
        versions.clear()
        versions[assumed(arguments)] = compiler(*arguments)
    return right_guarded(function, compiler, limit, versions, arguments)


def looked_up_late(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """The number of versions first."""
    if len(versions) >= limit:
        return function(*arguments)
    return right_guarded(function, compiler, limit, versions, arguments)


def compiled_for_nothing(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """Where there is no room, a version for one call."""
    about = assumed(arguments)
    version = versions.get(about) or compiler(*arguments)
    if len(versions) < limit:
        versions[about] = version
    return version(*arguments)


def used_from_the_second_call(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """A version does not answer the call that it is compiled for."""
    about = assumed(arguments)
    if about in versions:
        return versions[about](*arguments)
    if len(versions) < limit:
        versions[about] = compiler(*arguments)
    return function(*arguments)


def answers_kept(
    function: Callable, compiler: Callable, limit: int, versions: dict, arguments: tuple
):
    """What the version gave, once and for all."""
    about = assumed(arguments)
    if about not in versions:
        if len(versions) >= limit:
            return function(*arguments)
        versions[about] = compiler(*arguments)(*arguments)
    return versions[about]


def wrong_guards() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""

    def both(t: Tensor) -> tuple:
        return (t.shape, t.dtype)

    def sorted_out(arguments: tuple) -> tuple:
        tensors = tuple(both(each) for each in arguments if isinstance(each, Tensor))
        others = (each for each in arguments if not isinstance(each, Tensor))
        return tensors, tuple((type(each), each) for each in others)

    def end_to_end(arguments: tuple) -> tuple:
        sizes = (each.shape for each in arguments if isinstance(each, Tensor))
        others = assuming(lambda t: t.dtype)
        return tuple(size for shape in sizes for size in shape), others(arguments)

    return {
        "it is compiled anew for each call: keep the versions": every_time,
        "no version is kept: put it into `versions`": none_kept,
        "all versions were thrown away where there was no room: none is, and"
        " `function` is called as it stands": emptied,
        "it is compiled anew for a tensor of the same shape and dtype: the object or"
        " its numbers are not what was assumed": guarding(assuming(id)),
        "it is compiled anew where only the numbers in a tensor differ: shape and"
        " dtype are what was assumed": guarding(
            assuming(lambda t: (t.shape, t.dtype, float(t.sum())))
        ),
        "a version for float32 was called with float64: the dtype belongs to"
        " it": guarding(assuming(lambda t: t.shape)),
        "a version for one shape was called with another: the shape belongs to"
        " it": guarding(assuming(lambda t: t.dtype)),
        "a version for 2 × 3 was called with another shape of as many dimensions or"
        " numbers: the whole shape belongs to it": guarding(
            assuming(lambda t: (t.dim(), t.dtype))
        ),
        "a 2 × 3 tensor and a flat one of 6 numbers share a version: the whole shape"
        " belongs to it": guarding(assuming(lambda t: (t.numel(), t.dtype))),
        "an argument that is no tensor is not guarded: its value may be built into the"
        " code": guarding(assuming(both, lambda v: None)),
        "an argument that is no tensor is left out of the key: its value may be built"
        " into the code": guarding(lambda arguments: sorted_out(arguments)[0]),
        "tensors stand in one part of the key and all else in another: f(a, 1) and"
        " f(1, a) share a version": guarding(sorted_out),
        "the sizes of all tensors stand in a row, and nobody can see where one shape"
        " ends: a 2 × 3 and a 2 × 4 tensor, or 2 and 3 × 2 × 4": guarding(end_to_end),
        "the arguments themselves are the key: two tensors of one shape and dtype are"
        " two keys, and 1, 1.0 and True are one": guarding(lambda arguments: arguments),
        'values are compared as text: 1 and "1" share a version, so put the type beside'
        " the value": guarding(assuming(both, str)),
        "the hash is the key: two values may have one hash, as -1 and -2 have, so keep"
        " the values": guarding(lambda arguments: hash(assumed(arguments))),
        "it is compiled anew for a transposed tensor of the same shape and dtype: here"
        " only these two were assumed": guarding(
            assuming(lambda t: (t.shape, t.dtype, t.stride()))
        ),
        "1, 1.0 and True share a version: they are equal for a dict, so put the type"
        " beside the value": guarding(assuming(both, lambda v: v)),
        "of an argument that is no tensor only the type is guarded: its value may be"
        " built into the code": guarding(assuming(both, type)),
        "only the first argument is guarded: all of them are": guarding(
            lambda arguments: assumed(arguments[:1])
        ),
        "arguments are compared as far as both calls have some: another number of them"
        " is another call": first_arguments,
        "the order of the arguments is lost: f(a, b) and f(b, a) have two keys": (
            guarding(lambda arguments: frozenset(assumed(arguments)))
        ),
        "there is one version more than `limit`": guarding(
            room=lambda versions, limit: len(versions) <= limit
        ),
        "there is one version less than `limit`": guarding(
            room=lambda versions, limit: len(versions) < limit - 1
        ),
        "there are more versions than `limit`: when there is no room, `function` is"
        " called as it stands": guarding(room=lambda versions, limit: True),
        "an old version was thrown away for a new one: when there is no room,"
        " `function` is called as it stands": guarding(
            room=lambda versions, limit: limit > 0, forget=True
        ),
        "when there was no room, a version was called that assumes something else: call"
        " `function` as it stands": guarding(
            full=lambda function, versions: [*versions.values(), function][0]
        ),
        "when all versions are there, none is used: look for one that fits before you"
        " look for room": looked_up_late,
        "when there was no room, it was compiled all the same: call `function` as it"
        " stands": compiled_for_nothing,
        "a version does not answer the call that it was compiled for: call it at once,"
        " too": used_from_the_second_call,
        "the answer was kept and given again: keep the version, and call it with each"
        " call's arguments": answers_kept,
        "when there was no room, nothing was returned: return the answer of"
        " `function`": guarding(
            full=lambda function, versions: lambda *arguments: None
        ),
    }
