"""Wrong answers to 08-compilers/01-overview, each with its diagnosis."""

from __future__ import annotations

import re

import torch

from llmlab.checks.compilers import overview as checks
from llmlab.checks.compilers.overview import check
from llmlab.compilers import overview as ov
from llmlab.compilers.overview import maximum, minimum
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "08-compilers/01-overview"

# Right, written otherwise ------------------------------------------------------------


def list_by_rounds(result):
    """Whatever has all its inputs, round after round."""
    needed, waiting = [], [result]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.append(node)
            waiting += node.inputs
    order = []
    while len(order) < len(needed):
        ready = [n for n in needed if n not in order and set(n.inputs) <= set(order)]
        order += ready
    return order


def list_from_the_right(result):
    seen = {}

    def visit(node):
        for each in node.inputs[::-1]:
            if id(each) not in seen:
                visit(each)
        seen[id(node)] = node

    visit(result)
    return list(seen.values())


def lines_with_other_names(program):
    lines, names = [], []
    for i, node in enumerate(program):
        read = [names[program.index(each)] for each in node.inputs]
        match node.op:
            case "argument":
                names.append("%x" + str(int(node.value)))
                continue
            case "constant":
                names.append(literal_by_hand(node.value))
                continue
        names.append(f"%step.{i}")
        if node.op in ("add", "sub", "mul", "div"):
            lines.append(f"  {names[-1]} = f{node.op} float {read[0]},{read[1]}")
        else:
            given = ", ".join("float " + each for each in read)
            lines.append(f"{names[-1]} = call float @llvm.{node.op}.f32({given})")
    return lines, names[-1]


def literal_by_hand(value):
    bits = torch.tensor(value).double().view(torch.int64).item() & (2**64 - 1)
    return f"0x{bits:016X}"


def gate_the_other_way(x, b):
    y = b + x
    t = maximum(0.0, minimum(6.0, 3.0 + y)) * (1 / 6)
    return (3 * t * t - 2 * t * t * t) * y


def gate_by_fractions(x, b):
    y = x + b
    t = maximum(minimum(y * (1 / 6) + 0.5, 1), 0)
    return y * t * t * (3 - t - t)


def guarded_by_a_list(function, compile, limit, versions, arguments):
    def fits(old, new):
        if len(old) != len(new):
            return False
        for one, other in zip(old, new, strict=True):
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                if one.shape != other.shape or one.dtype != other.dtype:
                    return False
            elif type(one) is not type(other) or one != other:
                return False
        return True

    for example, version in versions.values():
        if fits(example, arguments):
            return version(*arguments)
    if len(versions) >= limit:
        return function(*arguments)
    version = compile(*arguments)
    versions[len(versions)] = (arguments, version)
    return version(*arguments)


def guarded_by_text(function, compile, limit, versions, arguments):
    words = []
    for each in arguments:
        if isinstance(each, torch.Tensor):
            words.append(f"{tuple(each.shape)} {each.dtype}")
        else:
            words.append(repr(each))
    key = "; ".join(words)
    if key not in versions and len(versions) == limit:
        return function(*arguments)
    if key not in versions:
        versions[key] = compile(*arguments)
    return versions[key](*arguments)


RIGHT = {
    "linearise": (list_by_rounds, list_from_the_right, ov.linearise),
    "lower": (lines_with_other_names, ov.lower),
    "smooth_gate": (gate_the_other_way, gate_by_fractions),
    "guarded_call": (guarded_by_a_list, guarded_by_text),
}


test_right_answers_written_otherwise = accepts(check, RIGHT, seeds=range(2))


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "linearise": ByCases(
        checks.run_list,
        ov.linearise,
        checks.wrong_lists,
        checks.list_cases,
    ),
    "lower": ByCases(checks.run_lines, ov.lower, checks.wrong_lines, checks.line_cases),
    "guarded_call": ByCases(
        checks.run_calls,
        checks.right_guarded,
        checks.wrong_guards,
        checks.call_cases,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def list_with_a_stranger(result):
    return [ov.Expression("constant", value=9.0), *ov.linearise(result)]


def list_of_names(result):
    return [node.op for node in ov.linearise(result)]


def list_as_dict(result):
    return dict.fromkeys(ov.linearise(result))


def with_lines(change):
    def answer(program):
        lines, result = ov.lower(program)
        return [change(line) for line in lines], result

    return answer


def decimal_constants(program):
    lines, result = ov.lower(program)
    numbers = {ov.literal(n.value): str(n.value) for n in program if n.op == "constant"}
    for bits, decimal in numbers.items():
        lines = [line.replace(bits, decimal) for line in lines]
    return lines, numbers.get(result, result)


def one_name(program):
    lines, _ = ov.lower(program)
    return ["%v = " + line.split(" = ")[1] for line in lines], "%v"


def named_too_late(program):
    lines, result = ov.lower(program)
    return [line.replace("%v0 =", "%w =") for line in lines], result


def lines_as_text(program):
    lines, result = ov.lower(program)
    return "\n".join(lines), result


def only_lines(program):
    return ov.lower(program)[0]


def one_operand(program):
    lines, result = ov.lower(program)
    return [re.sub(r"\((float [^,]+), .*\)", r"(\1)", line) for line in lines], result


def result_of_last_line(program):
    lines, _ = ov.lower(program)
    return lines, lines[-1].split(" ")[0] if lines else "%v0"


def between(y, low=0, high=6):
    return minimum(maximum(y + 3, low), high) * (1 / 6)


def smooth(t):
    return t * t * (3 - 2 * t)


def gate(change):
    """`smooth_gate` with one thing changed."""
    return lambda x, b: change(x, b, x + b)


GATES = {
    "b is missing": lambda x, b, y: x * smooth(between(x)),
    "the 3 is missing": lambda x, b, y: y * smooth(between(y - 3)),
    "the upper end is missing": lambda x, b, y: y * smooth(maximum(y + 3, 0) * (1 / 6)),
    "the lower end is missing": lambda x, b, y: y * smooth(minimum(y + 3, 6) * (1 / 6)),
    "the sixth is missing": lambda x, b, y: y * smooth(minimum(maximum(y + 3, 0), 6)),
    "this is the gate alone": lambda x, b, y: smooth(between(y)),
    "the outer factor is y": lambda x, b, y: x * smooth(between(y)),
    "maximum and minimum are exchanged": lambda x, b, y: (
        y * smooth(maximum(minimum(y + 3, 0), 6) * (1 / 6))
    ),
    "this is the gate of the lesson": lambda x, b, y: y * between(y),
    "t is not squared": lambda x, b, y: y * between(y) * (3 - 2 * between(y)),
    "the 2 is missing": lambda x, b, y: y * between(y) * between(y) * (3 - between(y)),
    "the machine code divides": lambda x, b, y: (
        y * smooth(minimum(maximum(y + 3, 0), 6) / 6)
    ),
    "the machine code calls a function": lambda x, b, y: (
        y * smooth(between(y)) + 1e-30 * ov.tanh(y)
    ),
    "20 are enough": lambda x, b, y: (
        # nothing is 0 · y for a compiler: y may be infinite
        y * smooth(between(y)) + 0 * y + 0 * (x - b) + 0 * (b - y)
    ),
    "it must return what it computed": lambda x, b, y: 2.0,
}


def never_compiles(function, compile, limit, versions, arguments):
    return function(*arguments)


def not_called(function, compile, limit, versions, arguments):
    return function


def throws_the_oldest_away(function, compile, limit, versions, arguments):
    key = checks.assumed(arguments)
    if key not in versions:
        if len(versions) >= limit:
            del versions[next(iter(versions))]
        versions[key] = compile(*arguments)
    return versions[key](*arguments)


def keeps_none(function, compile, limit, versions, arguments):
    return checks.right_guarded(function, compile, limit, dict(versions), arguments)


def one_tuple(function, compile, limit, versions, arguments):
    if arguments not in versions and limit:
        versions[arguments] = compile(arguments)
    return versions.get(arguments, function)(arguments)


def list_with_memory(result, seen=set()):  # noqa: B006
    """The default is one set for all calls."""
    order = []

    def visit(node):
        if node not in seen:
            seen.add(node)
            for each in node.inputs:
                visit(each)
            order.append(node)

    visit(result)
    return order


def list_of_first_visits_turned(result):
    order = []

    def visit(node):
        if node not in order:
            order.append(node)
            for each in node.inputs:
                visit(each)

    visit(result)
    return order[::-1]


def list_with_one_object_per_argument(result):
    order, arguments = [], set()

    def visit(node):
        if node in order or (node.op == "argument" and node.value in arguments):
            return
        if node.op == "argument":
            arguments.add(node.value)
        for each in node.inputs:
            visit(each)
        order.append(node)

    visit(result)
    return order


def guarded_by(key):
    """`guarded_call` with a key of one's own."""

    def answer(function, compile, limit, versions, arguments):
        about = key(arguments)
        if about not in versions and len(versions) >= limit:
            return function(*arguments)
        if about not in versions:
            versions[about] = compile(*arguments)
        return versions[about](*arguments)

    return answer


def tensors_then_others(arguments):
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    others = [v for v in arguments if not isinstance(v, torch.Tensor)]
    return (
        tuple((t.shape, t.dtype) for t in tensors),
        tuple((type(v), v) for v in others),
    )


def as_words(arguments):
    return tuple(
        (each.shape, each.dtype) if isinstance(each, torch.Tensor) else str(each)
        for each in arguments
    )


def with_strides(arguments):
    return tuple(
        (each.shape, each.dtype, each.stride())
        if isinstance(each, torch.Tensor)
        else (type(each), each)
        for each in arguments
    )


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("linearise", list_with_a_stranger, "was not in the expression"),
        Wrong("linearise", list_of_names, "the expressions themselves"),
        Wrong("linearise", list_as_dict, "list"),
        Wrong("lower", decimal_constants, "must be written by `literal(value)`"),
        Wrong("lower", one_name, "a name of its own"),
        Wrong("lower", named_too_late, "a name is used that no line has given"),
        Wrong("lower", lines_as_text, "list"),
        Wrong(
            "lower",
            with_lines(lambda line: line.replace("@", "")),
            "begins with `@`",
        ),
        Wrong(
            "lower",
            with_lines(lambda line: line.replace(", float ", ", ")),
            "before each operand",
        ),
        Wrong("lower", one_operand, "as its node has inputs"),
        Wrong("lower", result_of_last_line, "may be an argument or a constant"),
        Wrong("lower", only_lines, "tuple"),
        Wrong(
            "lower",
            with_lines(lambda line: line.replace("float ", "", 1)),
            "not a line that a loop can hold",
        ),
        Wrong(
            "lower",
            with_lines(lambda line: line.replace("fadd", "fsub")),
            "what the lines compute",
        ),
        *(Wrong("smooth_gate", gate(how), says) for says, how in GATES.items()),
        Wrong("guarded_call", never_compiles, "what was compiled"),
        Wrong("guarded_call", not_called, "not the version: call it"),
        Wrong("linearise", list_with_memory, "begin anew inside the function"),
        Wrong("linearise", list_of_first_visits_turned, "must come before both"),
        Wrong("linearise", list_with_one_object_per_argument, "two objects stay two"),
        Wrong("guarded_call", keeps_none, "no version is kept"),
        Wrong("guarded_call", one_tuple, "`*arguments` hands on each"),
        Wrong("guarded_call", guarded_by(tensors_then_others), "share a version"),
        Wrong("guarded_call", guarded_by(as_words), "are compared as text"),
        Wrong("guarded_call", guarded_by(with_strides), "for a transposed tensor"),
        Wrong(
            "guarded_call",
            guarded_by(lambda arguments: hash(checks.assumed(arguments))),
            "two values may have one hash",
        ),
        Wrong("guarded_call", guarded_by(lambda a: a), "themselves are the key"),
        Wrong("guarded_call", throws_the_oldest_away, "no version to throw away"),
    ],
)


def test_the_loop_is_shown_or_asked_for():
    def unwritten(x, b):
        raise NotImplementedError

    assert ov.loop_of(unwritten) == "(write the function first)"
    shown = ov.loop_of(gate_the_other_way, "AArch64, NEON")
    assert "fmax\tv" in shown


def test_a_function_runs_by_own_steps_or_is_asked_for():
    def unwritten(program):
        raise NotImplementedError

    steps = (ov.linearise, ov.lower)
    given = (torch.tensor([-4.0, 1.0, 4.0]), torch.zeros(3))
    found = ov.run_with(*steps, gate_the_other_way, *given)
    torch.testing.assert_close(found, torch.tensor([0.0, 20 / 27, 4.0]))
    asked = ov.run_with(ov.linearise, unwritten, gate_the_other_way, *given)
    assert asked == "(write the three functions first)"
