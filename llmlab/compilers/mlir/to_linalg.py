"""Down one level: from `lab` to `linalg`, whose one operation says everything by maps.

    %r = linalg.generic {
           indexing_maps = [(i, j) -> (i, j),  (i, j) -> (j),  (i, j) -> (i, j)],
           iterator_types = ["parallel", "parallel"]
         } ins(%x, %b) outs(%e) { ^0(%x0: f32, %b0: f32, %e0: f32): … }

There is a loop for each iterator. A map says which number of an operand belongs to a
turn of the loops: a bias is read at (j), a size of 1 is read at 0. A reduction leaves
an iterator out of the result's map. So broadcasting, transposing and summing are maps,
and only the arithmetic is operations.

The level below need not know `lab`: when no pattern applies any more, nothing of it may
be left (`legal`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdsl.dialects import arith
from xdsl.dialects import math as math_dialect
from xdsl.dialects import tensor as tensor_dialect
from xdsl.dialects.builtin import (
    AffineMapAttr,
    ArrayAttr,
    FloatAttr,
    IntegerAttr,
    ModuleOp,
    f32,
    i64,
)
from xdsl.dialects.linalg.attrs import IteratorTypeAttr
from xdsl.dialects.linalg.ops import FillOp, GenericOp, MatmulOp, YieldOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.ir.affine import AffineConstantExpr, AffineDimExpr, AffineMap
from xdsl.pattern_rewriter import (
    GreedyRewritePatternApplier,
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import region_dce

from llmlab.compilers.mlir import dialect as lab
from llmlab.compilers.mlir.dialect import Elementwise, Shape, tensor

PARALLEL, REDUCTION = IteratorTypeAttr.parallel(), IteratorTypeAttr.reduction()


class NotLegal(ValueError):
    """Operations that the next level does not know."""


# Arithmetic on one number -------------------------------------------------------------


class Scalars:
    """Writes the body of a loop: `write.add(a, b)` appends an operation."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def append(self, op: Operation) -> SSAValue:
        self.block.add_op(op)
        return op.results[0]

    def apply(self, kind: Callable[..., Operation], *values: SSAValue) -> SSAValue:
        """An operation on values.

        Raises:
            ValueError: one of them is a number of Python.
        """
        for value in values:
            if not isinstance(value, SSAValue):
                raise ValueError(
                    f"{value!r} is no value of the program: write number({value!r})"
                )
        return self.append(kind(*values))

    def number(self, value: float) -> SSAValue:
        return self.append(arith.ConstantOp(FloatAttr(value, f32)))

    def add(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self.apply(arith.AddfOp, a, b)

    def sub(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self.apply(arith.SubfOp, a, b)

    def mul(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self.apply(arith.MulfOp, a, b)

    def div(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self.apply(arith.DivfOp, a, b)

    def maximum(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self.apply(arith.MaximumfOp, a, b)

    def neg(self, a: SSAValue) -> SSAValue:
        return self.apply(arith.NegfOp, a)

    def exp(self, a: SSAValue) -> SSAValue:
        return self.apply(math_dialect.ExpOp, a)

    def tanh(self, a: SSAValue) -> SSAValue:
        return self.apply(math_dialect.TanhOp, a)

    def sqrt(self, a: SSAValue) -> SSAValue:
        return self.apply(math_dialect.SqrtOp, a)

    def gelu(self, x: SSAValue) -> SSAValue:
        cube = self.mul(self.mul(x, x), x)
        inner = self.add(x, self.mul(self.number(0.044715), cube))
        inner = self.mul(self.number(math.sqrt(2 / math.pi)), inner)
        half = self.mul(self.number(0.5), x)
        return self.mul(half, self.add(self.number(1.0), self.tanh(inner)))

    def add_bias(self, x: SSAValue, b: SSAValue) -> SSAValue:
        return self.add(x, b)

    def bias_gelu(self, x: SSAValue, b: SSAValue) -> SSAValue:
        return self.gelu(self.add(x, b))


# Operations of linalg -----------------------------------------------------------------


def map_of(loops: int, *places: int | None) -> AffineMap:
    """(d0, d1, …) → these of them; None is the constant 0."""
    results = [
        AffineConstantExpr(0) if place is None else AffineDimExpr(place)
        for place in places
    ]
    return AffineMap(loops, 0, tuple(results))


def broadcast_map(shape: Shape, result: Shape) -> AffineMap:
    """How an operand is read for each number of the result: sizes of 1 at 0."""
    missing = len(result) - len(shape)
    places = [
        None if size == 1 and result[missing + i] != 1 else missing + i
        for i, size in enumerate(shape)
    ]
    return map_of(len(result), *places)


class Linalg:
    """Writes operations on tensors in front of the operation that is rewritten."""

    def __init__(self, rewriter: PatternRewriter) -> None:
        self.rewriter = rewriter

    def insert(self, op: Operation) -> SSAValue:
        self.rewriter.insert(op)
        return op.results[0]

    def empty(self, *shape: int) -> SSAValue:
        """A tensor of no particular numbers."""
        return self.insert(tensor_dialect.EmptyOp([], tensor(*shape)))

    def filled(self, number: float, *shape: int) -> SSAValue:
        """A tensor of one number."""
        known = self.insert(arith.ConstantOp(FloatAttr(number, f32)))
        empty = self.empty(*shape)
        return self.insert(FillOp([known], [empty], [empty.type]))

    def generic(
        self,
        inputs: Sequence[SSAValue],
        maps: Sequence[AffineMap],
        out: SSAValue,
        write: Callable[..., SSAValue],
        reduced: Sequence[int] = (),
    ) -> SSAValue:
        """The loops of `maps` over these inputs, the last map for the result.

        Args:
            out: what the result is before the first turn.
            write: (Scalars, a number of each input, the result's so far) → the new one.
            reduced: the loops that the result is not indexed by.
        """
        block = Block(arg_types=[f32] * (len(inputs) + 1))
        scalars = Scalars(block)
        block.add_op(YieldOp(write(scalars, *block.args)))
        kinds = [
            REDUCTION if loop in reduced else PARALLEL
            for loop in range(maps[-1].num_dims)
        ]
        return self.insert(
            GenericOp(
                inputs,
                [out],
                Region(block),
                ArrayAttr([AffineMapAttr(each) for each in maps]),
                ArrayAttr(kinds),
                [out.type],
            )
        )

    def along(
        self, x: SSAValue, dim: int, start: float, write: Callable[..., SSAValue]
    ) -> SSAValue:
        """One number for each row along a dimension, which stays with the size 1.

        Args:
            dim: below zero counts from the end.
        """
        shape = x.type.get_shape()
        dim = range(len(shape))[dim]
        result = [1 if i == dim else size for i, size in enumerate(shape)]
        places = [None if i == dim else i for i in range(len(shape))]
        maps = [map_of(len(shape), *range(len(shape))), map_of(len(shape), *places)]
        out = self.filled(start, *result)
        return self.generic([x], maps, out, write, reduced=[dim])

    def matmul(self, a: SSAValue, b: SSAValue, transposed: bool = False) -> SSAValue:
        """A product: linalg's own, or loops with the second operand's map turned."""
        m, n = a.type.get_shape()[0], b.type.get_shape()[0 if transposed else 1]
        out = self.filled(0.0, m, n)
        if not transposed:
            return self.insert(MatmulOp([a, b], [out], [out.type]))
        maps = [map_of(3, 0, 2), map_of(3, 1, 2), map_of(3, 0, 1)]
        return self.generic([a, b], maps, out, multiply_add, reduced=[2])

    def softmax(self, x: SSAValue, scale: float = 1.0, apart: bool = False) -> SSAValue:
        """exp(scale (x − max)) / Σ, along the last dimension. scale is not negative.

        Args:
            apart: a loop for each operation: more passes, in a form that others know.
        """
        shape = x.type.get_shape()
        last = len(shape) - 1
        whole = map_of(len(shape), *range(len(shape)))

        def below(write: Scalars, x: SSAValue, top: SSAValue, _: SSAValue) -> SSAValue:
            return write.sub(x, top)

        def raised(write: Scalars, x: SSAValue, _: SSAValue) -> SSAValue:
            return write.exp(x)

        def both(write: Scalars, x: SSAValue, top: SSAValue, _: SSAValue) -> SSAValue:
            less = write.sub(x, top)
            if scale != 1.0:
                less = write.mul(less, write.number(scale))
            return write.exp(less)

        def divided(write: Scalars, e: SSAValue, z: SSAValue, _: SSAValue) -> SSAValue:
            return write.div(e, z)

        def scaled(write: Scalars, x: SSAValue, _: SSAValue) -> SSAValue:
            return write.mul(x, write.number(scale))

        empty = self.empty(*shape)
        if apart and scale != 1.0:
            x = self.generic([x], [whole, whole], empty, scaled)
        top = self.along(x, last, -math.inf, Scalars.maximum)
        row = broadcast_map(top.type.get_shape(), shape)
        if apart:
            e = self.generic([x, top], [whole, row, whole], empty, below)
            e = self.generic([e], [whole, whole], empty, raised)
        else:
            e = self.generic([x, top], [whole, row, whole], empty, both)
        z = self.along(e, last, 0.0, Scalars.add)
        return self.generic([e, z], [whole, row, whole], empty, divided)


def multiply_add(write: Scalars, a: SSAValue, b: SSAValue, c: SSAValue) -> SSAValue:
    """c + a b"""
    return write.add(c, write.mul(a, b))


# Patterns -----------------------------------------------------------------------------


class LowerElementwise(RewritePattern):
    """All operations with the trait: one loop per dimension of the result."""

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not op.has_trait(Elementwise):
            return
        shape = op.results[0].type.get_shape()
        name = op.name.removeprefix("lab.")
        known: dict[int, float] = {}  # operands that are one number stand in the body
        inputs = []
        for place, value in enumerate(op.operands):
            number = number_of(value)
            if number is None:
                inputs.append(value)
            else:
                known[place] = number

        def write(scalars: Scalars, *values: SSAValue) -> SSAValue:
            left = iter(values)
            numbers = [
                scalars.number(known[i]) if i in known else next(left)
                for i in range(len(op.operands))
            ]
            return getattr(scalars, name)(*numbers)

        maps = [broadcast_map(x.type.get_shape(), shape) for x in inputs]
        maps.append(map_of(len(shape), *range(len(shape))))
        build = Linalg(rewriter)
        result = build.generic(inputs, maps, build.empty(*shape), write)
        rewriter.replace(op, [], [result])


def number_of(value: SSAValue) -> float | None:
    """Of a constant that is one number."""
    op = value.owner
    return op.number if isinstance(op, lab.ConstantOp) else None


class LowerReduction(RewritePattern):
    """A sum or a maximum along one dimension."""

    @op_type_rewrite_pattern
    def match_and_rewrite(
        self, op: lab.SumOp | lab.MaxOp, rewriter: PatternRewriter
    ) -> None:
        dim, build = op.dim.value.data, Linalg(rewriter)
        if isinstance(op, lab.SumOp):
            result = build.along(op.x, dim, 0.0, Scalars.add)
        else:
            result = build.along(op.x, dim, -math.inf, Scalars.maximum)
        rewriter.replace(op, [], [result])


class LowerMatmul(RewritePattern):
    """A product."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.MatmulOp, rewriter: PatternRewriter) -> None:
        result = Linalg(rewriter).matmul(op.a, op.b, op.transposed is not None)
        rewriter.replace(op, [], [result])


@dataclass
class LowerSoftmax(RewritePattern):
    """Four loops: the largest, the exponentials, their sum, the quotients."""

    apart: bool = False

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.SoftmaxOp, rewriter: PatternRewriter) -> None:
        rewriter.replace(op, [], [Linalg(rewriter).softmax(op.x, apart=self.apart)])


@dataclass
class LowerAttention(RewritePattern):
    """Two products and a softmax that scales on its way."""

    apart: bool = False

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.AttentionOp, rewriter: PatternRewriter) -> None:
        build = Linalg(rewriter)
        scale = op.scale.value.data
        if scale < 0:  # then the smallest score is the largest
            raise NotLegal(f"scale={scale} of an attention must not be negative")
        scores = build.matmul(op.q, op.k, transposed=True)
        result = build.matmul(build.softmax(scores, scale, self.apart), op.v)
        rewriter.replace(op, [], [result])


class LowerTranspose(RewritePattern):
    """A copy, read by another map."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.TransposeOp, rewriter: PatternRewriter) -> None:
        shape = op.result.type.get_shape()
        loops = len(shape)
        # dimension order[i] of x is read at loop i
        places = [op.dims.index(dim) for dim in range(loops)]
        build = Linalg(rewriter)
        maps = [map_of(loops, *places), map_of(loops, *range(loops))]
        result = build.generic(
            [op.x], maps, build.empty(*shape), lambda write, x, out: x
        )
        rewriter.replace(op, [], [result])


class LowerReshape(RewritePattern):
    """The same numbers in one row, and that row in the new shape."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.ReshapeOp, rewriter: PatternRewriter) -> None:
        build = Linalg(rewriter)
        before, after = op.x.type.get_shape(), op.result.type.get_shape()
        flat = op.x
        if not before:  # one number without a dimension: a copy
            flat = build.generic(
                [op.x], [map_of(1), map_of(1, 0)], build.empty(1), lambda w, x, out: x
            )
        elif len(before) != 1:
            flat = build.insert(collapse(flat, before))
        rewriter.replace(
            op, [], [flat if len(after) == 1 else build.insert(expand(flat, after))]
        )


def groups(shape: Shape) -> ArrayAttr:
    """All dimensions in one group."""
    return ArrayAttr([ArrayAttr([IntegerAttr(i, i64) for i in range(len(shape))])])


def collapse(x: SSAValue, shape: Shape) -> Operation:
    """All dimensions as one."""
    return tensor_dialect.CollapseShapeOp.create(
        operands=[x],
        properties={"reassociation": groups(shape)},
        result_types=[tensor(math.prod(shape))],
    )


def expand(x: SSAValue, shape: Shape) -> Operation:
    """One dimension as many."""
    if not shape:
        return tensor_dialect.CollapseShapeOp.create(
            operands=[x],
            properties={"reassociation": ArrayAttr([])},
            result_types=[tensor()],
        )
    return tensor_dialect.ExpandShapeOp.create(
        operands=[x],
        properties={
            "reassociation": groups(shape),
            "static_output_shape": lab.dims(*shape),
        },
        result_types=[tensor(*shape)],
    )


class LowerConstant(RewritePattern):
    """arith has constants of any type."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.ConstantOp, rewriter: PatternRewriter) -> None:
        if all(use.operation.dialect_name() != "lab" for use in op.result.uses):
            rewriter.replace(op, arith.ConstantOp(op.value))


LOWERING = (
    *(LowerElementwise, LowerReduction, LowerMatmul, LowerTranspose, LowerReshape),
)


def to_linalg(module: ModuleOp, *more: RewritePattern, apart: bool = False) -> ModuleOp:
    """Rewrite a module until nothing of `lab` is left in it.

    Args:
        apart: whether a softmax is written as one loop per operation.
        more: patterns for operations that were added to the dialect; tried first.
    Raises:
        NotLegal: an operation for which there is no pattern.
    """
    patterns = [*more, *(kind() for kind in LOWERING)]
    patterns += [LowerSoftmax(apart), LowerAttention(apart)]
    PatternRewriteWalker(GreedyRewritePatternApplier(patterns)).rewrite_module(module)
    region_dce(module.body)
    PatternRewriteWalker(LowerConstant()).rewrite_module(module)
    cse(module)
    legal(module, "lab")
    module.verify()
    return module


def legal(module: ModuleOp, *dialects: str) -> None:
    """Raises NotLegal if an operation of these dialects is left."""
    for op in module.walk():
        if op.dialect_name() in dialects:
            raise NotLegal(
                f"failed to legalise {op.name}: no pattern takes it to the next level"
            )
