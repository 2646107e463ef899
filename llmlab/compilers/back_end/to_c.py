"""Code generation to C: what gcc and clang read.

Lanes are the compilers' vector extension: `f16` is a type of sixteen floats, and + and
* work on all of them. A compiler splits it where its registers are shorter. What is to
stay in registers becomes variables, `C_i_o_32` for element 32, where each element is
touched at a known place; else it is an array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llmlab.compilers.back_end.ir import Affine, Buffer, Limit, Loop, Program, walk
from llmlab.compilers.back_end.lower import Lowering, Value, parameters

HEAD = """\
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 9
#error "gcc 9 or newer is needed, or clang: __builtin_convertvector"
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>
"""

# One function for each number of lanes, W. Names of one lane end in 1.
VECTORS = """\
typedef float fW __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t uW __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t iW __attribute__((vector_size(4 * W), aligned(4), may_alias));
static inline fW max_W(fW a, fW b) {
    iW first = (iW)(a > b) | (iW)(a != a); /* a NaN stays one */
    return (fW)((first & (iW)a) | (~first & (iW)b));
}
static inline fW sqrt_W(fW x) {
    for (int k = 0; k < W; k++) x[k] = sqrtf(x[k]);
    return x;
}
static inline fW exp_W(fW x) {
    x = max_W(x, (fW){0} - 87.0f);
    x = -max_W(-x, (fW){0} - 88.0f);
    fW t = x * 1.44269504f;
    iW n = __builtin_convertvector(t + 127.5f, iW); /* above 0: cut off is floor */
    fW r = x - __builtin_convertvector(n - 127, fW) * 0.69314718f;
    fW p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (fW)(n << 23);
}
static inline fW tanh_W(fW x) { return 1.0f - 2.0f / (exp_W(2.0f * x) + 1.0f); }
"""
SCALARS = """\
static inline float float_of(uint32_t bits) {
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}
static inline float max_1(float a, float b) { return a > b || a != a ? a : b; }
static inline float sqrt_1(float x) { return sqrtf(x); }
static inline float exp_1(float x) {
    x = max_1(x, -87.0f);
    x = -max_1(-x, -88.0f);
    int32_t n = x != x ? 127 : (int32_t)(x * 1.44269504f + 127.5f);
    float r = x - (float)(n - 127) * 0.69314718f;
    float p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * float_of((uint32_t)n << 23);
}
static inline float tanh_1(float x) { return 1.0f - 2.0f / (exp_1(2.0f * x) + 1.0f); }
"""
ONE = 0x3F800000  # the bits of 1.0
TYPES = {"f32": "float", "u32": "uint32_t"}


class NotInRegisters(Exception):
    """A local array that is not touched at known places, each with its own lanes."""


class C:
    """A target that collects lines of C.

    Attributes:
        given: names of the function's arguments.
    """

    def __init__(self, given: Sequence[str]) -> None:
        self.given = given
        self.lines: list[str] = []
        self.depth = 1
        self.lanes: set[int] = set()
        self.variables: dict[str, dict[int, int]] = {}  # buffer → offset → lanes
        self.fetched: set[str] = set()  # in this loop's body

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def block(self, head: str, body: Callable[[], None]) -> None:
        """A pair of braces."""
        self.line(f"{head} {{".strip())
        self.depth += 1
        body()
        self.depth -= 1
        self.line("}")

    def loop(self, node: Loop, start: int, stop: Any, body: Callable[[], None]) -> None:
        """A for loop."""
        if node.kind == "parallel":
            self.line("#pragma omp parallel for schedule(static)")
        name = node.var
        self.fetched.clear()
        self.block(f"for (long {name} = {start}; {name} < {stop}; {name}++)", body)
        self.fetched.clear()

    def scope(
        self, local: Sequence[Buffer], body: Callable[[], None], alone: bool
    ) -> None:
        """Local arrays, as variables where possible, and what is done with them."""
        if alone and local:  # no loop around it has braces
            self.block("", lambda: self.scope(local, body, False))
            return
        wanted = [each for each in local if each.memory == "registers"]
        arrays = [each for each in local if each not in wanted]
        before, depth = len(self.lines), self.depth
        for each in wanted:
            self.variables[each.name] = {}
        try:
            body()
        except NotInRegisters as found:
            name = found.args[0]
            if name not in {each.name for each in wanted}:
                raise
            del self.lines[before:]
            self.depth = depth
            for each in wanted:
                del self.variables[each.name]
            again = [
                replace(each, memory="memory") if each.name == name else each
                for each in local
            ]
            self.scope(again, body, False)
            return
        declared = [self.declared(each) for each in arrays]
        for each in wanted:
            declared += self.named(each)
        space = "    " * self.depth
        self.lines[before:before] = [space + text for text in declared]

    def declared(self, buffer: Buffer) -> str:
        """A local array. Those that the caller brings are pointers already."""
        if buffer.name in self.given:
            return f"/* {buffer.name} is brought by the caller */"
        return f"{TYPES[buffer.dtype]} {buffer.name}[{buffer.size}];"

    def named(self, buffer: Buffer) -> list[str]:
        """A local array as variables."""
        found = self.variables.pop(buffer.name)
        texts: dict[int, list[str]] = {}
        for offset, lanes in sorted(found.items()):
            texts.setdefault(lanes, []).append(f"{buffer.name}_{offset}")
        return [f"{f_(lanes)} {', '.join(names)};" for lanes, names in texts.items()]

    def variable(self, buffer: Buffer, offset: Affine, lanes: int) -> str | None:
        """The name of an element's variable; None if the buffer is an array.

        Raises:
            NotInRegisters: it must be one.
        """
        found = self.variables.get(buffer.name)
        if found is None:
            return None
        start = offset.constant
        for other, size in found.items():  # one lane of a vector
            if lanes == 1 < size and not offset.terms and 0 <= start - other < size:
                return f"{buffer.name}_{other}[{start - other}]"
        if offset.terms or found.setdefault(start, lanes) != lanes:
            raise NotInRegisters(buffer.name)
        for other, size in found.items():
            if other != start and other < start + lanes and start < other + size:
                raise NotInRegisters(buffer.name)
        return f"{buffer.name}_{start}"

    def count(self, index: Affine, limit: Limit, step: int, extent: Any) -> str:
        """The least of what is there already and what a limit leaves."""
        room = f"({limit.total - index.constant + step - 1} - ({Affine(index.terms)}))"
        room = f"{room} / {step}" if step > 1 else room
        return f"({room} < {extent} ? {room} : {extent})"

    def number(self, value: float) -> Value:
        if value == float("-inf"):
            return Value("-INFINITY")
        text = f"{value:.9g}"
        return Value(f"{text}f" if "." in text or "e" in text else f"{text}.0f")

    def load(self, buffer: Buffer, offset: Affine, lanes: int, stride: int) -> Value:
        """One number, or lanes that lie side by side, or lanes picked one by one."""
        self.lanes.add(lanes)
        if lanes > 1 and stride != 1 and buffer.name in self.variables:
            raise NotInRegisters(buffer.name)
        name = self.variable(buffer, offset, lanes)
        if name:
            return Value(name, lanes)
        if lanes == 1:
            return Value(f"{buffer.name}[{offset}]")
        ahead = f"__builtin_prefetch({buffer.name} + {offset + buffer.ahead});"
        if buffer.ahead and ahead not in self.fetched:
            self.fetched.add(ahead)
            self.line(ahead)
        kind = f_(lanes) if buffer.dtype == "f32" else f"u{lanes}"
        if stride == 1:
            return Value(f"*(const {kind} *)({buffer.name} + {offset})", lanes)
        each = [f"{buffer.name}[{offset + stride * k}]" for k in range(lanes)]
        return Value(f"({kind}){{{', '.join(each)}}}", lanes)

    def store(
        self, buffer: Buffer, offset: Affine, value: Value, lanes: int, stride: int
    ) -> None:
        """The same, the other way."""
        self.lanes.add(lanes)
        if lanes > 1 and stride != 1 and buffer.name in self.variables:
            raise NotInRegisters(buffer.name)
        value = self.spread(value, lanes)
        name = self.variable(buffer, offset, lanes)
        if name:
            self.line(f"{name} = {value.code};")
        elif lanes == 1:
            self.line(f"{buffer.name}[{offset}] = {value.code};")
        elif stride == 1:
            place = f"*({f_(lanes)} *)({buffer.name} + {offset})"
            self.line(f"{place} = {value.code};")
        else:
            parts = [
                f"{buffer.name}[{offset + stride * k}] = lanes[{k}];"
                for k in range(lanes)
            ]
            self.line(f"{{ {f_(lanes)} lanes = {value.code}; {' '.join(parts)} }}")

    def spread(self, value: Value, lanes: int) -> Value:
        """One number in all lanes."""
        if value.lanes == lanes:
            return value
        return Value(f"({value.code} - ({f_(lanes)}){{0}})", lanes)

    def binary(self, op: str, a: Value, b: Value) -> Value:
        lanes = max(a.lanes, b.lanes)
        if op == "max":
            a, b = self.spread(a, lanes), self.spread(b, lanes)
            return Value(f"max_{lanes}({a.code}, {b.code})", lanes)
        return Value(f"({a.code} {op} {b.code})", lanes)

    def unary(self, op: str, a: Value) -> Value:
        if op == "neg":
            return Value(f"(-{a.code})", a.lanes)
        return Value(f"{op}_{a.lanes}({a.code})", a.lanes)

    def bits(self, word: Value, right: int, low: int) -> Value:
        lanes = word.lanes
        moved = f"{word.code} {'>>' if right >= 0 else '<<'} {abs(right)}"
        whole = f"((({moved}) & {15 << low:#x}u) | {ONE:#x}u)"
        if lanes == 1:
            return Value(f"float_of({whole})")
        return Value(f"(f{lanes}){whole}", lanes)


def f_(lanes: int) -> str:
    """The type of so many floats."""
    return "float" if lanes == 1 else f"f{lanes}"


def to_c(program: Program) -> str:
    """A C file with one function; its arguments are inputs, outputs, then workspace.

    Raises:
        CannotGenerate: a program that has no code.
    """
    buffers = parameters(program)
    target = C([each.name for each in buffers])
    Lowering(program, target).nodes(program.body)
    arguments = ", ".join(map(argument, buffers))
    parts = [HEAD, SCALARS]
    for lanes in sorted(target.lanes - {1}):
        parts.append(VECTORS.replace("W", str(lanes)))
    function = f"void {program.name}({arguments}) {{\n" + "\n".join(target.lines)
    return "\n".join([*parts, function + "\n}\n"])


def argument(buffer: Buffer) -> str:
    """A pointer; arrays do not overlap."""
    constant = "const " if buffer.role == "input" else ""
    return f"{constant}{TYPES[buffer.dtype]} *restrict {buffer.name}"


def loops_of(text: str) -> str:
    """The function alone, as a page shows it."""
    return text[text.index("\nvoid ") + 1 :]


def uses_threads(program: Program) -> bool:
    """Whether a loop is parallel."""
    return any(
        isinstance(node, Loop) and node.kind == "parallel"
        for node, _ in walk(program.body)
    )
