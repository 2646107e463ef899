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
/* (tanh(x) / x - 1) / y, y = x squared, near 0 */
#define SERIES \\
    (((62.0f / 2835.0f * y - 17.0f / 315.0f) * y + 2.0f / 15.0f) * y - 1.0f / 3.0f)
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
static inline fW tanh_W(fW x) {
    fW far = 1.0f - 2.0f / (exp_W(2.0f * x) + 1.0f), y = x * x;
    fW near = x + x * y * SERIES; /* where far loses its digits */
    iW small = (iW)(y < 0.0625f);
    return (fW)((small & (iW)near) | (~small & (iW)far));
}
static inline fW float_W(iW x) { return __builtin_convertvector(x, fW); }
static inline uW pair_W(fW low, fW high) { /* + 1.5 · 2^23 rounds; see the low bits */
    return ((uW)(low + 12582912.0f) & 0xffffu) | (uW)(high + 12582912.0f) << 16;
}
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
static inline float tanh_1(float x) {
    float y = x * x;
    if (y < 0.0625f) return x + x * y * SERIES;
    return 1.0f - 2.0f / (exp_1(2.0f * x) + 1.0f);
}
static inline float float_1(int32_t x) { return (float)x; }
static inline uint32_t pair_1(float low, float high) {
    float shifted[2] = {low + 12582912.0f, high + 12582912.0f};
    uint32_t bits[2];
    memcpy(bits, shifted, sizeof bits);
    return (bits[0] & 0xffffu) | bits[1] << 16;
}
static inline int32_t dot_1(uint32_t a, uint32_t b) {
    return (int16_t)a * (int16_t)b + (int16_t)(a >> 16) * (int16_t)(b >> 16);
}
"""

# A `Dot` in lanes: one instruction of x86, for as many lanes as its registers have.
DOT = """\
#if defined(__SSE2__)
#include <immintrin.h>
#define AT(kind, p, k) ((kind *)((char *)(p) + 4 * (k)))
#define DOT_4(y, a, b, k) _mm_storeu_si128(AT(__m128i, y, k), _mm_madd_epi16( \\
    _mm_loadu_si128(AT(__m128i, a, k)), _mm_loadu_si128(AT(__m128i, b, k))))
#endif
#if defined(__AVX2__)
#define DOT_8(y, a, b, k) _mm256_storeu_si256(AT(__m256i, y, k), _mm256_madd_epi16( \\
    _mm256_loadu_si256(AT(__m256i, a, k)), _mm256_loadu_si256(AT(__m256i, b, k))))
#endif
#if defined(__AVX512BW__)
#define DOT_16(y, a, b, k) _mm512_storeu_si512(AT(char, y, k), _mm512_madd_epi16( \\
    _mm512_loadu_si512(AT(char, a, k)), _mm512_loadu_si512(AT(char, b, k))))
#endif
"""
DOTS = """\
static inline iW dot_W(uW a, uW b) {
    iW found;
#if W >= 16 && defined(DOT_16)
    for (int k = 0; k < W; k += 16) DOT_16(&found, &a, &b, k);
#elif W >= 8 && defined(DOT_8)
    for (int k = 0; k < W; k += 8) DOT_8(&found, &a, &b, k);
#elif W >= 4 && defined(DOT_4)
    for (int k = 0; k < W; k += 4) DOT_4(&found, &a, &b, k);
#else
    iW low = ((iW)(a << 16) >> 16) * ((iW)(b << 16) >> 16);
    found = low + ((iW)a >> 16) * ((iW)b >> 16);
#endif
    return found;
}
"""
TYPES = {"f32": "float", "u32": "uint32_t", "i32": "int32_t"}


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
        self.dots: set[int] = set()  # the lanes of dot products
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
        return [
            f"{kind(buffer.dtype, lanes)} {', '.join(names)};"
            for lanes, names in texts.items()
        ]

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

    def number(self, value: float, dtype: str = "f32") -> Value:
        if dtype != "f32":
            return Value(str(int(value)))
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
        many = kind(buffer.dtype, lanes)
        if stride == 1:
            return Value(f"*(const {many} *)({buffer.name} + {offset})", lanes)
        each = [f"{buffer.name}[{offset + stride * k}]" for k in range(lanes)]
        return Value(f"({many}){{{', '.join(each)}}}", lanes)

    def store(
        self, buffer: Buffer, offset: Affine, value: Value, lanes: int, stride: int
    ) -> None:
        """The same, the other way."""
        self.lanes.add(lanes)
        if lanes > 1 and stride != 1 and buffer.name in self.variables:
            raise NotInRegisters(buffer.name)
        value = self.spread(value, lanes, buffer.dtype)
        many = kind(buffer.dtype, lanes)
        name = self.variable(buffer, offset, lanes)
        if name:
            self.line(f"{name} = {value.code};")
        elif lanes == 1:
            self.line(f"{buffer.name}[{offset}] = {value.code};")
        elif stride == 1:
            place = f"*({many} *)({buffer.name} + {offset})"
            self.line(f"{place} = {value.code};")
        else:
            parts = [
                f"{buffer.name}[{offset + stride * k}] = lanes[{k}];"
                for k in range(lanes)
            ]
            self.line(f"{{ {many} lanes = {value.code}; {' '.join(parts)} }}")

    def spread(self, value: Value, lanes: int, dtype: str = "f32") -> Value:
        """One number in all lanes."""
        if value.lanes == lanes:
            return value
        return Value(f"({value.code} - ({kind(dtype, lanes)}){{0}})", lanes)

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

    def pair(self, low: Value, high: Value) -> Value:
        lanes = max(low.lanes, high.lanes)
        low, high = self.spread(low, lanes), self.spread(high, lanes)
        return Value(f"pair_{lanes}({low.code}, {high.code})", lanes)

    def codes(self, word: Value, right: Affine) -> Value:
        by = f"(int)({right})" if right.terms else right
        return Value(f"(({word.code} >> {by}) & 0xf000fu)", word.lanes)

    def dot(self, left: Value, right: Value) -> Value:
        lanes = max(left.lanes, right.lanes)
        self.dots.add(lanes)
        left, right = (self.spread(each, lanes, "u32") for each in (left, right))
        return Value(f"dot_{lanes}({left.code}, {right.code})", lanes)


def kind(dtype: str, lanes: int) -> str:
    """The type of so many numbers."""
    return TYPES[dtype] if lanes == 1 else f"{dtype[0]}{lanes}"


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
    parts += [DOT] if target.dots else []
    for lanes in sorted(target.dots - {1}):
        parts.append(DOTS.replace("W", str(lanes)))
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
