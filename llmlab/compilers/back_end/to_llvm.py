"""Code generation to LLVM: no C compiler is needed, and other machines can be meant.

llvmlite brings LLVM itself. The same walk through the loops writes its intermediate
language; its passes and its code generator do the rest, for the processor that this
runs on (`run.compiled`), or, as text, for a GPU that is not here (`assembly`). There an
outer parallel loop becomes threads, 64 in a block, one for each iteration.

Simplified: on a CPU, parallel loops run one iteration after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llmlab.compilers.back_end.ir import Affine, Buffer, Limit, Loop, Program
from llmlab.compilers.back_end.lower import Lowering, Value, parameters
from llmlab.compilers.llvm import binding, optimised

BLOCK = 64  # threads in a block of a GPU
TRIPLES = {"nvptx": "nvptx64-nvidia-cuda", "amdgcn": "amdgcn-amd-amdhsa"}
LOCAL = r'%"([^"]*)" = alloca (.*)'
CONTRACT = ("contract",)  # a product and a sum may become one instruction
SERIES = (62 / 2835, -17 / 315, 2 / 15, -1 / 3)  # (tanh x / x − 1) / x² near 0
POLYNOMIAL = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


class LLVM:
    """A target that writes one function with llvmlite's builder."""

    def __init__(
        self, name: str, arguments: Sequence[Buffer], gpu: str | None = None
    ) -> None:
        from llvmlite import ir

        self.ir = ir
        self.gpu = gpu
        self.module = ir.Module(name=name)
        self.module.triple = TRIPLES[gpu] if gpu else ""
        self.f32, self.i32, self.i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        pointers = [ir.PointerType(addrspace=1 if gpu else 0) for _ in arguments]
        kind = ir.FunctionType(ir.VoidType(), pointers)
        self.function = ir.Function(self.module, kind, name=name)
        if gpu:
            kernels = {"nvptx": "ptx_kernel", "amdgcn": "amdgpu_kernel"}
            self.function.calling_convention = kernels[gpu]
        self.pointers: dict[str, Any] = {}
        for argument, buffer in zip(self.function.args, arguments, strict=True):
            argument.name = buffer.name
            argument.add_attribute("noalias")
            self.pointers[buffer.name] = argument
        self.entry = self.function.append_basic_block("entry")
        first = self.function.append_basic_block("begin")
        self.builder = ir.IRBuilder(first)
        self.first = first
        self.variables: dict[str, Any] = {}

    def finish(self) -> str:
        """The module's text."""
        self.builder.ret_void()
        self.ir.IRBuilder(self.entry).branch(self.first)
        return str(self.module)

    # Loops ----------------------------------------------------------------------------

    def loop(self, node: Loop, start: int, stop: Any, body: Callable[[], None]) -> None:
        """A loop that may have no iterations; on a GPU, threads."""
        if self.gpu and node.kind == "parallel":
            self.threads(node, start, stop, body)
            return
        function = self.function
        before = self.builder.block
        head = function.append_basic_block(f"{node.var}.head")
        inside = function.append_basic_block(f"{node.var}.body")
        after = function.append_basic_block(f"{node.var}.after")
        end = self.i64(stop) if isinstance(stop, int) else stop
        self.builder.branch(head)
        self.builder.position_at_end(head)
        variable = self.builder.phi(self.i64, name=node.var)
        variable.add_incoming(self.i64(start), before)
        goes_on = self.builder.icmp_signed("<", variable, end)
        self.builder.cbranch(goes_on, inside, after)
        self.builder.position_at_end(inside)
        self.variables[node.var] = variable
        body()
        following = self.builder.add(variable, self.i64(1), flags=("nsw",))
        variable.add_incoming(following, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    def threads(
        self, node: Loop, start: int, stop: Any, body: Callable[[], None]
    ) -> None:
        """The iteration with the number of this thread, if there is one."""
        builder, i32 = self.builder, self.i32
        names = {
            "nvptx": (
                "llvm.nvvm.read.ptx.sreg.ctaid.x",
                "llvm.nvvm.read.ptx.sreg.tid.x",
            ),
            "amdgcn": ("llvm.amdgcn.workgroup.id.x", "llvm.amdgcn.workitem.id.x"),
        }[self.gpu]
        block, thread = (
            builder.call(self.declared(name, i32, []), []) for name in names
        )
        number = builder.add(builder.mul(block, i32(BLOCK)), thread)
        number = builder.zext(number, self.i64)
        self.variables[node.var] = builder.add(number, self.i64(start))
        end = self.i64(stop) if isinstance(stop, int) else stop
        there = builder.icmp_signed("<", self.variables[node.var], end)
        with builder.if_then(there):
            body()

    def scope(
        self, local: Sequence[Buffer], body: Callable[[], None], alone: bool
    ) -> None:
        """Local arrays, reserved once, at the beginning of the function."""
        at_entry = self.ir.IRBuilder(self.entry)
        for each in local:
            if each.name in self.pointers:
                continue
            space = at_entry.alloca(self.element(each), size=each.size, name=each.name)
            space.align = 64
            space.type = self.ir.PointerType()  # floats or vectors of them
            self.pointers[each.name] = space
        body()

    def count(self, index: Affine, limit: Limit, step: int, extent: Any) -> Any:
        """The least of what is there already and what a limit leaves."""
        builder = self.builder
        room = builder.sub(self.i64(limit.total + step - 1), self.index(index))
        if step > 1:
            room = builder.sdiv(room, self.i64(step))
        end = self.i64(extent) if isinstance(extent, int) else extent
        return builder.select(builder.icmp_signed("<", room, end), room, end)

    # Memory ---------------------------------------------------------------------------

    def element(self, buffer: Buffer) -> Any:
        return self.f32 if buffer.dtype == "f32" else self.i32

    def index(self, index: Affine) -> Any:
        """An index as a number of 64 bits."""
        found = self.i64(index.constant)
        for name, factor in index.terms:
            part = self.builder.mul(self.variables[name], self.i64(factor))
            found = self.builder.add(found, part, flags=("nsw",))
        return found

    def address(self, buffer: Buffer, offset: Affine, exists: bool = True) -> Any:
        """Where an element lies, or would lie."""
        kind = self.element(buffer)
        start = self.pointers[buffer.name]
        place = self.index(offset)
        return self.builder.gep(start, [place], inbounds=exists, source_etype=kind)

    def load(self, buffer: Buffer, offset: Affine, lanes: int, stride: int) -> Value:
        """One number, or lanes that lie side by side, or lanes picked one by one."""
        kind = self.element(buffer)
        if lanes == 1 or stride == 1:
            if lanes > 1 and buffer.ahead and not self.gpu:
                self.prefetch(self.address(buffer, offset + buffer.ahead, False))
            kind = kind if lanes == 1 else self.ir.VectorType(kind, lanes)
            found = self.builder.load(self.address(buffer, offset), align=4, typ=kind)
            return Value(found, lanes)
        found = self.ir.VectorType(kind, lanes)(self.ir.Undefined)
        for lane in range(lanes):
            place = self.address(buffer, offset + stride * lane)
            one = self.builder.load(place, align=4, typ=kind)
            found = self.builder.insert_element(found, one, self.i32(lane))
        return Value(found, lanes)

    def prefetch(self, place: Any) -> None:
        """Ask for a line; LLVM leaves one of several that are the same."""
        i32 = self.i32
        name, kinds = "llvm.prefetch.p0", [self.ir.PointerType(), i32, i32, i32]
        call = self.declared(name, self.ir.VoidType(), kinds)
        self.builder.call(call, [place, i32(0), i32(3), i32(1)])  # to read, to keep

    def store(
        self, buffer: Buffer, offset: Affine, value: Value, lanes: int, stride: int
    ) -> None:
        """The same, the other way."""
        code = self.spread(value, lanes).code
        if lanes == 1 or stride == 1:
            self.builder.store(code, self.address(buffer, offset), align=4)
            return
        for lane in range(lanes):
            one = self.builder.extract_element(code, self.i32(lane))
            place = self.address(buffer, offset + stride * lane)
            self.builder.store(one, place, align=4)

    # Arithmetic -----------------------------------------------------------------------

    def floats(self, lanes: int) -> Any:
        return self.f32 if lanes == 1 else self.ir.VectorType(self.f32, lanes)

    def whole(self, lanes: int) -> Any:
        return self.i32 if lanes == 1 else self.ir.VectorType(self.i32, lanes)

    def constant(self, kind: Any, value: float, lanes: int) -> Any:
        """A number in all lanes."""
        if lanes == 1:
            return self.ir.Constant(kind, value)
        return self.ir.Constant(kind, [self.ir.Constant(kind.element, value)] * lanes)

    def number(self, value: float, dtype: str = "f32") -> Value:
        if dtype != "f32":
            return Value(self.i32(int(value)))
        return Value(self.ir.Constant(self.f32, value))

    def spread(self, value: Value, lanes: int) -> Value:
        """One number in all lanes."""
        if value.lanes == lanes:
            return value
        start = self.ir.VectorType(value.code.type, lanes)(self.ir.Undefined)
        first = self.builder.insert_element(start, value.code, self.i32(0))
        mask = self.ir.Constant(self.whole(lanes), [self.i32(0)] * lanes)
        return Value(self.builder.shuffle_vector(first, first, mask), lanes)

    def binary(self, op: str, a: Value, b: Value) -> Value:
        lanes = max(a.lanes, b.lanes)
        left, right = self.spread(a, lanes).code, self.spread(b, lanes).code
        builder = self.builder
        if op == "+" and a.code.type in (self.i32, self.whole(a.lanes)):
            return Value(builder.add(left, right), lanes)
        if op == "max":
            larger = builder.fcmp_ordered(">", left, right)
            first = builder.or_(larger, builder.fcmp_unordered("uno", left, left))
            return Value(builder.select(first, left, right), lanes)
        write = {
            "+": builder.fadd,
            "-": builder.fsub,
            "*": builder.fmul,
            "/": builder.fdiv,
        }[op]
        return Value(write(left, right, flags=CONTRACT), lanes)

    def unary(self, op: str, a: Value) -> Value:
        if op == "neg":
            return Value(self.builder.fneg(a.code), a.lanes)
        if op == "float":
            return Value(self.builder.sitofp(a.code, self.floats(a.lanes)), a.lanes)
        if op == "sqrt":
            kind = self.floats(a.lanes)
            suffix = "f32" if a.lanes == 1 else f"v{a.lanes}f32"
            root = self.declared(f"llvm.sqrt.{suffix}", kind, [kind])
            return Value(self.builder.call(root, [a.code]), a.lanes)
        if op == "tanh":
            twice = self.exp(self.binary("*", self.number(2.0), a))
            down = self.binary("+", twice, self.number(1.0))
            part = self.binary("/", self.number(2.0), down)
            far = self.binary("-", self.number(1.0), part)
            return self.where_small(a, self.tanh_near_0(a), far)
        return self.exp(a)

    def tanh_near_0(self, x: Value) -> Value:
        """Its series: 1 − 2 / (e^2x + 1) loses the digits of a small x."""
        y = self.binary("*", x, x)
        p = self.number(SERIES[0])
        for each in SERIES[1:]:
            p = self.binary("+", self.binary("*", p, y), self.number(each))
        return self.binary("+", x, self.binary("*", self.binary("*", x, y), p))

    def where_small(self, x: Value, near: Value, far: Value) -> Value:
        """One number where |x| < 1/4, the other elsewhere."""
        square = self.binary("*", x, x).code
        edge = self.constant(self.floats(x.lanes), 0.0625, x.lanes)
        small = self.builder.fcmp_ordered("<", square, edge)
        return Value(self.builder.select(small, near.code, far.code), x.lanes)

    def exp(self, x: Value) -> Value:
        """2^n times a polynomial of the rest, as in `to_c`."""
        builder, lanes = self.builder, x.lanes
        x = self.binary("max", x, self.number(-87.0))
        x = self.unary(
            "neg", self.binary("max", self.unary("neg", x), self.number(-88.0))
        )
        shifted = self.binary("*", x, self.number(1.44269504))
        shifted = self.binary("+", shifted, self.number(127.5))
        # what a NaN becomes as a whole number is not defined
        zero = self.constant(self.floats(lanes), 0.0, lanes)
        is_nan = builder.fcmp_unordered("uno", shifted.code, shifted.code)
        known = builder.select(is_nan, zero, shifted.code)
        n = builder.fptosi(known, self.whole(lanes))
        bias = self.constant(self.whole(lanes), 127, lanes)
        power = builder.sitofp(builder.sub(n, bias), self.floats(lanes))
        less = self.binary("*", Value(power, lanes), self.number(0.69314718))
        r = self.binary("-", x, less)
        p = self.number(POLYNOMIAL[0])
        for each in POLYNOMIAL[1:]:
            p = self.binary("+", self.binary("*", p, r), self.number(each))
        bits = builder.shl(n, self.constant(self.whole(lanes), 23, lanes))
        scale = builder.bitcast(bits, self.floats(lanes))
        return self.binary("*", p, Value(scale, lanes))

    def pair(self, low: Value, high: Value) -> Value:
        """Adding 1.5 · 2^23 rounds a float; its low bits are the whole number."""
        builder, lanes = self.builder, max(low.lanes, high.lanes)
        kind = self.whole(lanes)
        shifted = [self.binary("+", x, self.number(12582912.0)) for x in (low, high)]
        shifted = [self.spread(each, lanes).code for each in shifted]
        first, second = (builder.bitcast(each, kind) for each in shifted)
        first = builder.and_(first, self.constant(kind, 0xFFFF, lanes))
        second = builder.shl(second, self.constant(kind, 16, lanes))
        return Value(builder.or_(first, second), lanes)

    def codes(self, word: Value, right: Affine) -> Value:
        builder, lanes = self.builder, word.lanes
        far = self.spread(Value(builder.trunc(self.index(right), self.i32)), lanes)
        mask = self.constant(self.whole(lanes), 0x000F000F, lanes)
        return Value(builder.and_(builder.lshr(word.code, far.code), mask), lanes)

    def dot(self, left: Value, right: Value) -> Value:
        """Written so that LLVM finds its instruction: products, then even plus odd."""
        ir, builder, lanes = self.ir, self.builder, max(left.lanes, right.lanes)
        words = [self.spread(each, lanes).code for each in (left, right)]
        halves = ir.VectorType(ir.IntType(16), 2 * lanes)
        wide = ir.VectorType(self.i32, 2 * lanes)
        products = builder.mul(
            *(builder.sext(builder.bitcast(word, halves), wide) for word in words)
        )
        if lanes == 1:
            even, odd = (builder.extract_element(products, self.i32(k)) for k in (0, 1))
            return Value(builder.add(even, odd))
        even, odd = (
            builder.shuffle_vector(
                products,
                products,
                ir.Constant(
                    self.whole(lanes), [self.i32(2 * k + odd) for k in range(lanes)]
                ),
            )
            for odd in (0, 1)
        )
        return Value(builder.add(even, odd), lanes)

    def declared(self, name: str, result: Any, arguments: list) -> Any:
        """A function of LLVM's own."""
        if name in self.module.globals:
            return self.module.globals[name]
        kind = self.ir.FunctionType(result, arguments)
        return self.ir.Function(self.module, kind, name=name)


def to_llvm(program: Program, gpu: str | None = None) -> str:
    """LLVM's language; the function's arguments are those of `to_c`.

    Args:
        gpu: "nvptx" or "amdgcn"; a CPU, if not said.
    """
    if gpu is not None and gpu not in TRIPLES:
        raise ValueError(f"gpu={gpu!r} must be one of {[*TRIPLES]}, or None")
    target = LLVM(program.name, parameters(program), gpu)
    Lowering(program, target).nodes(program.body)
    return target.finish()


def assembly(program: Program, gpu: str, cpu: str) -> str:
    """Assembly text for a GPU that need not be here.

    Args:
        gpu: "nvptx" or "amdgcn".
        cpu: which one: "sm_80", "gfx942".
    """
    text = to_llvm(program, gpu)
    if gpu == "amdgcn":  # local arrays lie in an address space of their own
        cast = r'%"\1" = addrspacecast ptr addrspace(5) %"\1.5" to ptr'
        text = re.sub(LOCAL, rf'%"\1.5" = alloca \2, addrspace(5)\n  {cast}', text)
    target = binding().Target.from_triple(TRIPLES[gpu])
    machine = target.create_target_machine(cpu=cpu, opt=3)
    return machine.emit_assembly(optimised(text, machine))
