"""The last levels: loops, jumps, and the dialect that LLVM's text is written from.

    linalg on buffers   → scf, memref      loops       (xDSL's pass)
    scf                 → cf               jumps       (xDSL's pass)
    memref, arith, math, cf, func → llvm   instructions (here: xDSL has no pass)

The last step changes types, too: an index is an i64, and a buffer is a pointer. So each
operation is translated with its operands' new values (`Translate`), and an operation
that has no translation is named. x[i, j] of a buffer with rows of n numbers is the
number i n + j behind its pointer.

The function gets one pointer for each argument, one for each result, and the arena.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from xdsl.dialects import affine, arith, cf, llvm, memref, scf
from xdsl.dialects import math as math_dialect
from xdsl.dialects.builtin import (
    AffineMapAttr,
    ArrayAttr,
    DictionaryAttr,
    FloatAttr,
    IndexType,
    IntegerAttr,
    MemRefType,
    ModuleOp,
    UnitAttr,
    f32,
    i8,
    i64,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.dialects.linalg.ops import CopyOp, GenericOp, MatmulOp
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue
from xdsl.pattern_rewriter import (
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)
from xdsl.transforms.convert_linalg_to_loops import ConvertLinalgToLoopsPass
from xdsl.transforms.convert_scf_to_cf import ConvertScfToCf

from llmlab.compilers.mlir.bufferise import OFFSET
from llmlab.compilers.mlir.dialect import body, context, function
from llmlab.compilers.mlir.to_linalg import (
    PARALLEL,
    REDUCTION,
    NotLegal,
    legal,
    map_of,
)

POINTER = llvm.LLVMPointerType()

# Loops --------------------------------------------------------------------------------


class ReorderMatmul(RewritePattern):
    """The loops of a product as i, k, j: the innermost goes along rows of b and c."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: MatmulOp, rewriter: PatternRewriter) -> None:
        maps = [map_of(3, 0, 1), map_of(3, 1, 2), map_of(3, 0, 2)]
        new = GenericOp(
            op.inputs,
            op.outputs,
            op.regions[0].clone(),
            ArrayAttr([AffineMapAttr(each) for each in maps]),
            ArrayAttr([PARALLEL, REDUCTION, PARALLEL]),
        )
        rewriter.replace(op, new, [])


class CopyAsLoops(RewritePattern):
    """A copy of a buffer is an operation of linalg, too."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: memref.CopyOp, rewriter: PatternRewriter) -> None:
        rewriter.replace(op, CopyOp([op.source], [op.destination], []), [])


def to_loops(module: ModuleOp, reorder: bool = True) -> ModuleOp:
    """Loops for every operation of linalg.

    Args:
        reorder: whether products run in the order i, k, j, not i, j, k.
    """
    if reorder:
        PatternRewriteWalker(ReorderMatmul()).rewrite_module(module)
    PatternRewriteWalker(CopyAsLoops()).rewrite_module(module)
    ConvertLinalgToLoopsPass().apply(context(), module)
    legal(module, "lab", "linalg")
    module.verify()
    return module


def nests(module: ModuleOp) -> int:
    """How many loops are outermost: passes over tensors."""
    return sum(isinstance(op, scf.ForOp) for op in body(module).ops)


def to_jumps(module: ModuleOp) -> ModuleOp:
    """Loops as blocks with arguments and jumps."""
    ConvertScfToCf().apply(context(), module)
    legal(module, "scf")
    module.verify()
    return module


# Instructions -------------------------------------------------------------------------

SAME: dict[type[Operation], type[Operation]] = {
    arith.AddfOp: llvm.FAddOp,
    arith.SubfOp: llvm.FSubOp,
    arith.MulfOp: llvm.FMulOp,
    arith.DivfOp: llvm.FDivOp,
    arith.NegfOp: llvm.FNegOp,
    arith.AddiOp: llvm.AddOp,
    arith.SubiOp: llvm.SubOp,
    arith.MuliOp: llvm.MulOp,
    math_dialect.ExpOp: llvm.FExpOp,
    math_dialect.SqrtOp: llvm.FSqrtOp,
    memref.CollapseShapeOp: None,
    memref.ExpandShapeOp: None,
}
INTRINSIC: dict[type[Operation], str] = {
    math_dialect.TanhOp: "llvm.tanh.f32",
    arith.MaximumfOp: "llvm.maximum.f32",
}


def type_of(kind: Attribute) -> Attribute:
    """An index is an i64, a buffer a pointer."""
    if isinstance(kind, MemRefType):
        return POINTER
    return i64 if isinstance(kind, IndexType) else kind


def to_llvm(module: ModuleOp) -> ModuleOp:
    """A new module in the dialect llvm.

    Raises:
        NotLegal: an operation that has no translation.
    """
    known = [constant_of(op) for op in module.ops if isinstance(op, memref.GlobalOp)]
    translated = Translate(function(module)).run()
    result = ModuleOp([*known, translated])
    result.verify()
    return result


def constant_of(op: memref.GlobalOp) -> llvm.GlobalOp:
    """Numbers that lie in the program, as an array."""
    count = math.prod(op.type.get_shape())
    return llvm.GlobalOp(
        llvm.LLVMArrayType(count, f32),
        op.sym_name,
        "internal",
        constant=True,
        value=op.initial_value,
    )


class Translate:
    """One function, block by block.

    Attributes:
        values: old value → new one.
        here: the block that is written now.
    """

    def __init__(self, old: FuncOp) -> None:
        self.old = old
        self.values: dict[SSAValue, SSAValue] = {}
        self.blocks: dict[Block, Block] = {}
        self.here: Block | None = None

    def run(self) -> llvm.FuncOp:
        """The new function, with the arena as its last argument."""
        region = Region()
        for number, block in enumerate(self.old.body.blocks):
            kinds = [type_of(value.type) for value in block.args]
            new = Block(arg_types=[*kinds, POINTER] if number == 0 else kinds)
            region.add_block(new)
            self.blocks[block] = new
            self.values.update(zip(block.args, new.args, strict=False))
        self.arena = region.blocks[0].args[-1]
        for block, new in self.blocks.items():
            self.here = new
            for op in block.ops:
                self.translate(op)
        kinds = [value.type for value in region.blocks[0].args]
        # no two of the buffers overlap: then loops may be vectorised
        alone = DictionaryAttr({"llvm.noalias": UnitAttr()})
        return llvm.FuncOp(
            self.old.sym_name,
            llvm.LLVMFunctionType(kinds),
            linkage=llvm.LinkageAttr("external"),
            body=region,
            other_props={"arg_attrs": ArrayAttr([alone] * len(kinds))},
        )

    def append(self, op: Operation) -> SSAValue | None:
        self.here.add_op(op)
        return op.results[0] if op.results else None

    def number(self, value: int) -> SSAValue:
        return self.append(llvm.ConstantOp(IntegerAttr(value, i64), i64))

    def translate(self, op: Operation) -> None:
        """Append what an operation becomes."""
        read = [self.values[value] for value in op.operands]
        special: Callable | None = SPECIAL.get(type(op))
        if special is not None:
            new = special(self, op, read)
        elif type(op) in INTRINSIC:
            name = INTRINSIC[type(op)]
            new = self.append(llvm.CallIntrinsicOp(name, read, [f32]))
        elif type(op) in SAME:
            kind = SAME[type(op)]
            new = self.append(kind(*read)) if kind else read[0]
        else:
            raise NotLegal(f"failed to legalise {op.name}: it has no word in llvm")
        if op.results:
            self.values[op.results[0]] = new

    def constant(self, op: arith.ConstantOp, read: list[SSAValue]) -> SSAValue:
        kind = type_of(op.result.type)
        if isinstance(op.value, FloatAttr):
            return self.append(llvm.ConstantOp(op.value, kind))
        return self.append(
            llvm.ConstantOp(IntegerAttr(op.value.value.data, kind), kind)
        )

    def applied(self, op: affine.ApplyOp, read: list[SSAValue]) -> SSAValue:
        """A place that is always 0: of a size of 1 that is broadcast."""
        return self.number(op.map.data.eval([0] * op.map.data.num_dims, [])[0])

    def allocated(self, op: memref.AllocOp, read: list[SSAValue]) -> SSAValue:
        """A place in the arena."""
        offset = op.attributes[OFFSET].value.data
        return self.append(llvm.GEPOp(self.arena, [offset], i8))

    def known(self, op: memref.GetGlobalOp, read: list[SSAValue]) -> SSAValue:
        return self.append(llvm.AddressOfOp(op.name_, POINTER))

    def place(self, buffer: SSAValue, read: list[SSAValue]) -> SSAValue:
        """The pointer to one number: i n + j for a buffer with rows of n."""
        index = None
        for size, step in zip(buffer.type.get_shape(), read[1:], strict=True):
            if index is None:
                index = step
            else:
                scaled = self.append(llvm.MulOp(index, self.number(size)))
                index = self.append(llvm.AddOp(scaled, step))
        if index is None:
            return read[0]
        many = [llvm.GEP_USE_SSA_VAL]
        return self.append(
            llvm.GEPOp(read[0], many, f32, ssa_indices=[index], inbounds=True)
        )

    def load(self, op: memref.LoadOp, read: list[SSAValue]) -> SSAValue:
        return self.append(llvm.LoadOp(self.place(op.memref, read), f32))

    def store(self, op: memref.StoreOp, read: list[SSAValue]) -> None:
        value, *place = read
        self.append(llvm.StoreOp(value, self.place(op.memref, place)))

    def compared(self, op: arith.CmpiOp, read: list[SSAValue]) -> SSAValue:
        # arith numbers the predicates as llvm does
        return self.append(
            llvm.ICmpOp(*read, IntegerAttr(op.predicate.value.data, i64))
        )

    def jump(self, op: cf.BranchOp, read: list[SSAValue]) -> None:
        self.append(llvm.BrOp(self.blocks[op.successor], *read))

    def choose(self, op: cf.ConditionalBranchOp, read: list[SSAValue]) -> None:
        then = [self.values[value] for value in op.then_arguments]
        other = [self.values[value] for value in op.else_arguments]
        self.append(
            llvm.CondBrOp(
                read[0],
                self.blocks[op.then_block],
                then,
                self.blocks[op.else_block],
                other,
            )
        )

    def end(self, op: ReturnOp, read: list[SSAValue]) -> None:
        self.append(llvm.ReturnOp())


SPECIAL = {
    arith.ConstantOp: Translate.constant,
    arith.CmpiOp: Translate.compared,
    affine.ApplyOp: Translate.applied,
    memref.AllocOp: Translate.allocated,
    memref.GetGlobalOp: Translate.known,
    memref.LoadOp: Translate.load,
    memref.StoreOp: Translate.store,
    cf.BranchOp: Translate.jump,
    cf.ConditionalBranchOp: Translate.choose,
    ReturnOp: Translate.end,
}


def llvm_text(module: ModuleOp) -> str:
    """LLVM's own text of a module in the dialect llvm: xDSL writes it by llvmlite."""
    from xdsl.backend.llvm.convert import convert_module

    return str(convert_module(module, fallback_target_triple=""))
