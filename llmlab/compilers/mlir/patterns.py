"""Patterns on the dialect: what is matched, and what takes its place.

    transpose of transpose      one, or none
    transpose, then matmul      the product reads its second operand transposed
    reshape of a constant       a constant
    reshape of reshape          one, or none
    add_bias, then gelu         bias_gelu: one pass over the tensor instead of two
    attention's four            attention
    (a b) c or a (b c)          the cheaper one; rounds otherwise, so only if asked for

A pattern changes the program by its rewriter only: new operations stand in front of the
old one, all uses are handed over, the old one goes. Then every use still has its
definition before it. Patterns are tried again until none applies, so each must make
something smaller; the last column of this table says what.

    TransposeOfTranspose, ReshapeOfReshape, ReshapeOfConstant, FuseBiasGelu,
    FuseAttention                                        operations on the way
    TransposeIntoMatmul                                  products of a transpose
    CheapestOrder                                        multiplications
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    FloatAttr,
    ModuleOp,
    UnitAttr,
    f32,
)
from xdsl.ir import Operation, SSAValue
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


def read_once(value: SSAValue) -> bool:
    """Whether one operation reads it, one time."""
    return len(list(value.uses)) == 1


class TransposeOfTranspose(RewritePattern):
    """Two transposes are one, whose order is the inner's read by the outer's."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.TransposeOp, rewriter: PatternRewriter) -> None:
        if op.dims == tuple(range(len(op.dims))):
            rewriter.replace(op, [], [op.x])
            return
        inner = op.x.owner
        if not isinstance(inner, lab.TransposeOp):
            return
        order = lab.dims(*(inner.dims[dim] for dim in op.dims))
        rewriter.replace(op, lab.TransposeOp.make(inner.x, order=order))


class TransposeIntoMatmul(RewritePattern):
    """A product reads its second operand either way."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.MatmulOp, rewriter: PatternRewriter) -> None:
        turned = op.b.owner
        if not isinstance(turned, lab.TransposeOp) or turned.dims != (1, 0):
            return
        properties = {} if op.transposed else {"transposed": UnitAttr()}
        rewriter.replace(op, lab.MatmulOp.make(op.a, turned.x, **properties))


class ReshapeOfConstant(RewritePattern):
    """The same numbers under another type."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.ReshapeOp, rewriter: PatternRewriter) -> None:
        known = op.x.owner
        if isinstance(known, lab.ConstantOp):
            numbers = DenseIntOrFPElementsAttr(op.result.type, known.value.data)
            rewriter.replace(op, lab.ConstantOp.make(value=numbers))


class ReshapeOfReshape(RewritePattern):
    """The last shape is what counts."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.ReshapeOp, rewriter: PatternRewriter) -> None:
        if op.x.type == op.result.type:
            rewriter.replace(op, [], [op.x])
        elif isinstance(op.x.owner, lab.ReshapeOp):
            rewriter.replace(op, lab.ReshapeOp.make(op.x.owner.x, to=op.to))


class FuseBiasGelu(RewritePattern):
    """Not where somebody else reads the sum: it would be computed twice."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.GeluOp, rewriter: PatternRewriter) -> None:
        added = op.x.owner
        if isinstance(added, lab.AddBiasOp) and read_once(op.x):
            rewriter.replace(op, lab.BiasGeluOp.make(added.x, added.b))


class FuseAttention(RewritePattern):
    """softmax(q kᵀ · c) v, or / c, for one number c that is not negative."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.MatmulOp, rewriter: PatternRewriter) -> None:
        weights = op.a.owner
        if op.transposed or not isinstance(weights, lab.SoftmaxOp):
            return
        scale, product = scaled(weights.x)
        if not isinstance(product, lab.MatmulOp) or not product.transposed:
            return
        if scale.value.data < 0:  # the lowering scales after the maximum
            return
        if not all(map(read_once, (op.a, weights.x, product.result))):
            return
        new = lab.AttentionOp.make(product.a, product.b, op.b, scale=scale)
        rewriter.replace(op, new)


def scaled(value: SSAValue) -> tuple[FloatAttr, Operation]:
    """A factor, and the operation that makes what it is applied to."""
    op = value.owner
    if isinstance(op, lab.MulOp | lab.DivOp) and isinstance(op.y.owner, lab.ConstantOp):
        number = op.y.owner.number
        if number is not None and isinstance(op, lab.DivOp) and number:
            return FloatAttr(1 / number, f32), op.x.owner
        if number is not None and isinstance(op, lab.MulOp):
            return FloatAttr(number, f32), op.x.owner
    return FloatAttr(1.0, f32), op


# The order of a chain of products -----------------------------------------------------


def cheapest(sizes: Sequence[int]) -> tuple[int, object]:
    """Multiplications of the best order of a chain, and that order.

    Matrix i has sizes[i] rows and sizes[i + 1] columns. The cheapest way for the chain
    from i to j splits it somewhere, and takes the cheapest way on each side.

    Returns:
        The count, and nested pairs of the matrices' numbers.
    """
    n = len(sizes) - 1
    best: dict[tuple[int, int], tuple[int, object]] = {(i, i): (0, i) for i in range(n)}
    for length in range(1, n):
        for i in range(n - length):
            j = i + length
            ways = []
            for split in range(i, j):
                left, right = best[i, split], best[split + 1, j]
                last = sizes[i] * sizes[split + 1] * sizes[j + 1]
                ways.append((left[0] + right[0] + last, (left[1], right[1])))
            best[i, j] = min(ways, key=lambda way: way[0])
    return best[0, n - 1]


class CheapestOrder(RewritePattern):
    """A chain of products in the order with the fewest multiplications."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: lab.MatmulOp, rewriter: PatternRewriter) -> None:
        if any(goes_on(use.operation) for use in op.result.uses) and inner(op.result):
            return  # a chain is looked at from its end
        factors = chain(op.result)
        if op.transposed or len(factors) < 3:
            return
        sizes = [factor.type.get_shape()[0] for factor in factors]
        sizes.append(factors[-1].type.get_shape()[1])
        count, order = cheapest(sizes)
        if count >= multiplications(op.result):
            return
        new: list[Operation] = []

        def product(part: object) -> SSAValue:
            if isinstance(part, int):
                return factors[part]
            new.append(lab.MatmulOp.make(product(part[0]), product(part[1])))
            return new[-1].results[0]

        product(order)
        rewriter.replace(op, new)


def goes_on(op: Operation) -> bool:
    """Whether a chain may go through this operation."""
    return isinstance(op, lab.MatmulOp) and not op.transposed


def inner(value: SSAValue) -> bool:
    """Whether it is a product inside a chain: nobody else reads it."""
    return goes_on(value.owner) and read_once(value)


def chain(value: SSAValue) -> list[SSAValue]:
    """The matrices whose product it is, from left to right."""
    op = value.owner
    found = []
    for side in (op.a, op.b):
        found += chain(side) if inner(side) else [side]
    return found


def multiplications(value: SSAValue) -> int:
    """What the chain costs as it stands."""
    op = value.owner
    m, k = op.a.type.get_shape()
    n = value.type.get_shape()[1]
    below = sum(multiplications(side) for side in (op.a, op.b) if inner(side))
    return below + m * k * n


# Running patterns ---------------------------------------------------------------------

CLEAN = (TransposeOfTranspose, TransposeIntoMatmul, ReshapeOfConstant, ReshapeOfReshape)
FUSE = (FuseBiasGelu, FuseAttention)


def apply(module: ModuleOp, *patterns: RewritePattern) -> ModuleOp:
    """Patterns until none applies, then dead and equal operations; checked after."""
    applier = GreedyRewritePatternApplier(list(patterns))
    PatternRewriteWalker(applier).rewrite_module(module)
    region_dce(module.body)
    cse(module)
    module.verify()
    return module


def optimise(module: ModuleOp, fuse: bool = True) -> ModuleOp:
    """The patterns that change no number by more than a rounding of a scale."""
    kinds = (*CLEAN, *FUSE) if fuse else CLEAN
    return apply(module, *(kind() for kind in kinds))
