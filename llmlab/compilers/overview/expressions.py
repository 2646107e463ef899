"""A compiler that reads in ten minutes: from an expression to LLVM's language.

    trace       run a Python function on values that only write down what is done
    linearise   the expression as a list: each operation once, after those it reads
    lower       a line of LLVM IR for each
    loop        the same for every number of its arrays: the whole function

LLVM does the rest (`machine`). Simplified: float32 only, arrays of equal length, and
no operation looks at two places at once (no sum, no product of matrices).

    n   numbers in each array       x0, x1 …   the arrays
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# operation → LLVM's instruction, or the function that LLVM knows by that name
INSTRUCTIONS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
FUNCTIONS_OF_LLVM = {
    "maximum": "llvm.maximum.f32",
    "minimum": "llvm.minimum.f32",
    "sqrt": "llvm.sqrt.f32",
    "exp": "llvm.exp.f32",
    "tanh": "llvm.tanh.f32",
}


@dataclass(frozen=True, eq=False)
class Expression:
    """One operation and what it reads. The same object may be read several times.

    Attributes:
        op: "argument", "constant", or a key of INSTRUCTIONS or FUNCTIONS_OF_LLVM.
        value: of a constant its number, of an argument its place.
    """

    op: str
    inputs: tuple[Expression, ...] = ()
    value: float = 0.0

    def __add__(self, other):
        return made("add", self, other)

    def __radd__(self, other):
        return made("add", other, self)

    def __sub__(self, other):
        return made("sub", self, other)

    def __rsub__(self, other):
        return made("sub", other, self)

    def __mul__(self, other):
        return made("mul", self, other)

    def __rmul__(self, other):
        return made("mul", other, self)

    def __truediv__(self, other):
        return made("div", self, other)

    def __rtruediv__(self, other):
        return made("div", other, self)

    def __neg__(self):
        return made("mul", self, -1.0)

    def __bool__(self) -> bool:
        raise TypeError("a value that is not known yet cannot decide an `if`")


def made(op: str, *inputs: Expression | float) -> Expression:
    """An operation; plain numbers become constants."""
    given = [
        each
        if isinstance(each, Expression)
        else Expression("constant", value=float(each))
        for each in inputs
    ]
    return Expression(op, tuple(given))


def maximum(a: Expression | float, b: Expression | float) -> Expression:
    """The larger one; NaN if one of them is."""
    return made("maximum", a, b)


def minimum(a: Expression | float, b: Expression | float) -> Expression:
    """The smaller one; NaN if one of them is."""
    return made("minimum", a, b)


def sqrt(x: Expression | float) -> Expression:
    """√x."""
    return made("sqrt", x)


def exp(x: Expression | float) -> Expression:
    """eˣ."""
    return made("exp", x)


def tanh(x: Expression | float) -> Expression:
    """The hyperbolic tangent."""
    return made("tanh", x)


def trace(function: Callable, arguments: int) -> Expression:
    """What a function does with so many arguments.

    Raises:
        ValueError: it returns something that is no expression.
    """
    inputs = [Expression("argument", value=i) for i in range(arguments)]
    result = function(*inputs)
    if not isinstance(result, Expression):
        raise ValueError(
            f"function returned {result!r}: it must return what it computed from its"
            " arguments"
        )
    return result


def linearise(result: Expression) -> list[Expression]:
    """Each expression that the result needs, once, after those that it reads."""
    order: dict[Expression, None] = {}
    waiting = [(result, False)]
    while waiting:
        node, inputs_done = waiting.pop()
        if node in order:
            continue
        if inputs_done:
            order[node] = None
            continue
        waiting.append((node, True))
        waiting += [(each, False) for each in reversed(node.inputs)]
    return list(order)


def literal(value: float) -> str:
    """A float32 as LLVM writes it: the bits of the double of the same value.

    0.1 in decimal is refused there, since no float32 equals it.
    """
    as_float32 = struct.unpack("<f", struct.pack("<f", value))[0]
    return "0x" + struct.pack(">d", as_float32).hex().upper()


def lower(program: Sequence[Expression]) -> tuple[list[str], str]:
    """A line per operation, and the name of the last value.

    Argument i is in %x0, %x1 …; results are %v0, %v1 … in the order of the lines.
    """
    lines: list[str] = []
    names: dict[Expression, str] = {}
    for node in program:
        read = [names[each] for each in node.inputs]
        if node.op == "argument":
            names[node] = f"%x{int(node.value)}"
            continue
        if node.op == "constant":
            names[node] = literal(node.value)
            continue
        names[node] = f"%v{len(lines)}"
        if node.op in INSTRUCTIONS:
            right = f"{INSTRUCTIONS[node.op]} float {', '.join(read)}"
        else:
            floats = ", ".join(f"float {name}" for name in read)
            right = f"call float @{FUNCTIONS_OF_LLVM[node.op]}({floats})"
        lines.append(f"{names[node]} = {right}")
    return lines, names[program[-1]]


def loop(body: Sequence[str], result: str, arguments: int) -> str:
    """LLVM IR of `f`: the body for each of n numbers, `result` written to `out`."""
    arrays = range(arguments)
    given = "".join(f"ptr noalias %a{i}, " for i in arrays)
    loads = []
    for i in arrays:
        loads.append(f"%p{i} = getelementptr float, ptr %a{i}, i64 %i")
        loads.append(f"%x{i} = load float, ptr %p{i}")
    inside = "".join(f"  {line}\n" for line in [*loads, *body])
    known = "".join(
        f"declare float @{name}({', '.join(['float'] * inputs)})\n"
        for op, name in FUNCTIONS_OF_LLVM.items()
        for inputs in [2 if op in ("maximum", "minimum") else 1]
        if f"@{name}(" in inside
    )
    return (
        f"define void @f({given}ptr noalias %out, i64 %n) {{\n"
        "start:\n"
        "  %some = icmp sgt i64 %n, 0\n"
        "  br i1 %some, label %each, label %done\n"
        "each:\n"
        "  %i = phi i64 [ 0, %start ], [ %next, %each ]\n"
        f"{inside}"
        "  %to = getelementptr float, ptr %out, i64 %i\n"
        f"  store float {result}, ptr %to\n"
        "  %next = add i64 %i, 1\n"
        "  %more = icmp slt i64 %next, %n\n"
        "  br i1 %more, label %each, label %done\n"
        "done:\n"
        "  ret void\n"
        "}\n"
        f"{known}"
    )


def to_llvm(function: Callable, arguments: int) -> str:
    """The LLVM IR of a Python function of so many arrays."""
    body, result = lower(linearise(trace(function, arguments)))
    return loop(body, result, arguments)
