"""The dialect `lab`: the operations of this part's functions, on tensors of fp32.

    %3 = lab.matmul %0, %1 : (tensor<8x16xf32>, tensor<16x4xf32>) -> tensor<8x4xf32>
    %4 = lab.add_bias %3, %2 : (tensor<8x4xf32>, tensor<4xf32>) -> tensor<8x4xf32>

    operation   what it computes
    ----------  ------------------------------------------------------------------------
    matmul      a b, or a bᵀ with `transposed`
    add_bias    x + b for each row of x
    gelu        0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))
    bias_gelu   gelu(x + b): what fusion makes of the two
    softmax     along the last dimension
    attention   softmax(scale · q kᵀ) v
    add, …      elementwise, with broadcasting; sums and maxima; transpose; reshape

An operation knows its operands, its attributes and how its result's shape follows from
them. So there is one verifier for all: the type that was written must be the one that
follows. `make` writes it; a file may hold any.

Traits say what a pass may do without knowing the operation: `Pure` ones may be merged
and removed, `Elementwise` ones are lowered by one pattern.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import ClassVar

from xdsl.dialects.builtin import (
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    Float32Type,
    FloatAttr,
    FunctionType,
    IntegerAttr,
    ModuleOp,
    TensorType,
    UnitAttr,
    f32,
    i64,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Dialect, Operation, Region, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import OpTrait, Pure
from xdsl.utils.exceptions import VerifyException

from llmlab.compilers.front_end import OPS, TypeMismatch

Shape = tuple[int, ...]
TENSOR = TensorType[Float32Type]
TYPES = "attr-dict `:` functional-type(operands, results)"


def tensor(*shape: int) -> TensorType:
    """The type of a dense tensor of fp32."""
    return TensorType(f32, shape)


class Elementwise(OpTrait):
    """Each number of the result from one number of each operand, broadcast."""


class LabOp(IRDLOperation):
    """What all operations of the dialect have: one result, whose shape follows."""

    traits = traits_def(Pure())
    irdl_options = (ParsePropInAttrDict(),)

    def shape(self, shapes: list[Shape]) -> Shape:
        """The result's shape from those of the operands.

        Raises:
            TypeMismatch: they do not fit.
        """
        raise NotImplementedError(self.name)

    @classmethod
    def make(cls, *operands: SSAValue, **properties: Attribute) -> LabOp:
        """An operation whose result has the type that follows.

        Raises:
            TypeMismatch: operands that do not fit.
        """
        draft = cls.create(
            operands=operands, properties=properties, result_types=[tensor()]
        )
        try:
            shape = draft.shape([value.type.get_shape() for value in operands])
        finally:
            draft.erase()  # or it would count as a reader of the operands
        return cls.create(
            operands=operands, properties=properties, result_types=[tensor(*shape)]
        )

    def verify_(self) -> None:
        """The type that was written is the one that follows.

        Raises:
            VerifyException: it is another, or the operands do not fit.
        """
        try:
            wanted = self.shape([value.type.get_shape() for value in self.operands])
        except TypeMismatch as problem:
            raise VerifyException(f"{self.name}: {problem}") from problem
        found = self.results[0].type
        if found != tensor(*wanted):
            raise VerifyException(
                f"{self.name}: the result has the type {found}, and {tensor(*wanted)}"
                " follows from its operands"
            )


def as_the_front_end(op: LabOp, shapes: list[Shape], *attributes: object) -> Shape:
    """The rule of the front end's operation of that name."""
    return OPS[op.name.removeprefix("lab.")].shape(shapes, attributes)


# One or two operands, elementwise -----------------------------------------------------


class Unary(LabOp):
    """One operand, the same shape."""

    traits = traits_def(Pure(), Elementwise())
    x = operand_def(TENSOR)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        return shapes[0]


class Binary(LabOp):
    """Two operands that are broadcast."""

    traits = traits_def(Pure(), Elementwise())
    x = operand_def(TENSOR)
    y = operand_def(TENSOR)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x `,` $y {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        return as_the_front_end(self, shapes)


@irdl_op_definition
class AddOp(Binary):
    """x + y"""

    name = "lab.add"


@irdl_op_definition
class SubOp(Binary):
    """x − y"""

    name = "lab.sub"


@irdl_op_definition
class MulOp(Binary):
    """x · y"""

    name = "lab.mul"


@irdl_op_definition
class DivOp(Binary):
    """x / y"""

    name = "lab.div"


@irdl_op_definition
class MaximumOp(Binary):
    """The larger of both; NaN if one of them is."""

    name = "lab.maximum"


@irdl_op_definition
class NegOp(Unary):
    """−x"""

    name = "lab.neg"


@irdl_op_definition
class ExpOp(Unary):
    """eˣ"""

    name = "lab.exp"


@irdl_op_definition
class TanhOp(Unary):
    """tanh x"""

    name = "lab.tanh"


@irdl_op_definition
class SqrtOp(Unary):
    """√x"""

    name = "lab.sqrt"


@irdl_op_definition
class GeluOp(Unary):
    """The tanh form."""

    name = "lab.gelu"


class WithBias(LabOp):
    """x (…, f) and b (f): one number for each column."""

    traits = traits_def(Pure(), Elementwise())
    x = operand_def(TENSOR)
    b = operand_def(TENSOR)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x `,` $b {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        x, b = shapes
        if len(x) < 2 or b != x[-1:]:
            raise TypeMismatch(f"a bias of {b} for rows of {x}: it must be {x[-1:]}")
        return x


@irdl_op_definition
class AddBiasOp(WithBias):
    """x + b"""

    name = "lab.add_bias"


@irdl_op_definition
class BiasGeluOp(WithBias):
    """gelu(x + b)"""

    name = "lab.bias_gelu"


# Whole rows, products, other shapes ---------------------------------------------------


@irdl_op_definition
class ConstantOp(LabOp):
    """Numbers that stand in the program."""

    name = "lab.constant"
    value = prop_def(DenseIntOrFPElementsAttr)
    result = result_def(TENSOR)

    def shape(self, shapes: list[Shape]) -> Shape:
        return self.value.type.get_shape()

    @classmethod
    def parse(cls, parser: Parser) -> ConstantOp:
        """The numbers carry the type; it need not be written twice."""
        return cls.make(value=parser.parse_attribute())

    def print(self, printer: Printer) -> None:
        """`lab.constant dense<5.0e-01> : tensor<f32>`"""
        printer.print_string(" ")
        printer.print_attribute(self.value)

    @property
    def number(self) -> float | None:
        """Its value, if it is one number."""
        return self.value.get_values()[0] if self.shape([]) == () else None


class Reduction(LabOp):
    """Along one dimension, which stays with the size 1."""

    x = operand_def(TENSOR)
    dim = prop_def(IntegerAttr)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        return as_the_front_end(self, shapes, self.dim.value.data)


@irdl_op_definition
class SumOp(Reduction):
    """The sum."""

    name = "lab.sum"


@irdl_op_definition
class MaxOp(Reduction):
    """The largest."""

    name = "lab.max"


@irdl_op_definition
class SoftmaxOp(LabOp):
    """exp(x − max) / Σ exp(x − max), along the last dimension."""

    name = "lab.softmax"
    x = operand_def(TENSOR)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        if not shapes[0] or not shapes[0][-1]:
            raise TypeMismatch(f"softmax of {shapes[0]}: there is no row")
        return shapes[0]


@irdl_op_definition
class MatmulOp(LabOp):
    """a b, or a bᵀ."""

    name = "lab.matmul"
    a = operand_def(TENSOR)
    b = operand_def(TENSOR)
    transposed = opt_prop_def(UnitAttr)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$a `,` $b (`transposed` $transposed^)? {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        if {len(shape) for shape in shapes} != {2}:
            raise TypeMismatch(f"matmul of {shapes}: both need two dimensions")
        return as_the_front_end(self, shapes, self.transposed is not None)


@irdl_op_definition
class AttentionOp(LabOp):
    """softmax(scale · q kᵀ) v"""

    name = "lab.attention"
    q = operand_def(TENSOR)
    k = operand_def(TENSOR)
    v = operand_def(TENSOR)
    scale = prop_def(FloatAttr)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$q `,` $k `,` $v {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        q, k, v = shapes
        if {len(q), len(k), len(v)} != {2} or q[1] != k[1] or k[0] != v[0]:
            raise TypeMismatch(
                f"attention of q {q}, k {k} and v {v}: q and k need rows of one width,"
                " k and v as many rows"
            )
        return (q[0], v[1])


@irdl_op_definition
class TransposeOp(LabOp):
    """Dimension i of the result is dimension order[i] of x."""

    name = "lab.transpose"
    x = operand_def(TENSOR)
    order = prop_def(DenseArrayBase)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x {TYPES}"

    @property
    def dims(self) -> Shape:
        return tuple(self.order.get_values())

    def shape(self, shapes: list[Shape]) -> Shape:
        return as_the_front_end(self, shapes, self.dims)


@irdl_op_definition
class ReshapeOp(LabOp):
    """As many numbers in another shape."""

    name = "lab.reshape"
    x = operand_def(TENSOR)
    to = prop_def(DenseArrayBase)
    result = result_def(TENSOR)
    assembly_format: ClassVar[str] = f"$x {TYPES}"

    def shape(self, shapes: list[Shape]) -> Shape:
        return as_the_front_end(self, shapes, tuple(self.to.get_values()))


OPERATIONS: tuple[type[LabOp], ...] = (
    *(AddOp, SubOp, MulOp, DivOp, MaximumOp, NegOp, ExpOp, TanhOp, SqrtOp, GeluOp),
    *(AddBiasOp, BiasGeluOp, ConstantOp, SumOp, MaxOp, SoftmaxOp, MatmulOp),
    *(AttentionOp, TransposeOp, ReshapeOp),
)
Lab = Dialect("lab", list(OPERATIONS))
BY_NAME = {op.name.removeprefix("lab."): op for op in OPERATIONS}


# Attributes and programs --------------------------------------------------------------


def dims(*numbers: int) -> DenseArrayBase:
    """A list of dimensions, as an attribute."""
    return DenseArrayBase.from_list(i64, numbers)


def constant(numbers: Sequence[float], *shape: int) -> ConstantOp:
    """A tensor that is known."""
    if len(numbers) != math.prod(shape):
        raise ValueError(f"numbers has {len(numbers)}, and shape={shape} needs others")
    value = DenseIntOrFPElementsAttr.from_list(tensor(*shape), list(numbers))
    return ConstantOp.make(value=value)


def program(
    inputs: Sequence[Shape], outputs: Sequence[Shape]
) -> tuple[ModuleOp, Block]:
    """A module with one empty function, and its block."""
    types = [tensor(*shape) for shape in inputs]
    results = [tensor(*shape) for shape in outputs]
    block = Block(arg_types=types)
    kind = FunctionType.from_lists(types, results)
    return ModuleOp([FuncOp("main", kind, Region(block))]), block


def finish(block: Block, *results: SSAValue) -> None:
    """End a function with what it returns."""
    block.add_op(ReturnOp(*results))


def body(module: ModuleOp) -> Block:
    """The first block of a module's function."""
    return function(module).body.blocks[0]


def function(module: ModuleOp) -> FuncOp:
    """A module's function."""
    return next(op for op in module.ops if isinstance(op, FuncOp))


def operations(module: ModuleOp) -> list[Operation]:
    """What a function does, without its return and constants."""
    skipped = ("func.return", "lab.constant", "arith.constant")
    return [op for op in body(module).ops if op.name not in skipped]


def parse(text: str) -> ModuleOp:
    """A module from its text, verified.

    Raises:
        ParseError: it cannot be read.
        VerifyException: it breaks a rule.
    """
    module = Parser(context(), HEX.sub(as_bytes, text)).parse_module()
    module.verify()
    return module


# What is no finite number is written by its bits: dense<[0xff800000, 1.0]>. xDSL 0.74
# writes that, and reads it as a whole number; bytes in quotes it reads as it should.
HEX = re.compile(r'dense<([^<>"]*0[xX][^<>"]*)>(?=\s*:\s*tensor<[0-9x]*f32>)')


def as_bytes(found: re.Match) -> str:
    """The list that HEX found, as bytes in quotes."""
    numbers = re.findall(r"[^\[\],\s]+", found[1])
    parts = [
        int(number, 16).to_bytes(4, "little")
        if number[:2].lower() == "0x"
        else struct.pack("<f", float(number))
        for number in numbers
    ]
    return f'dense<"0x{b"".join(parts).hex()}">'


def context():
    """The dialects that programs on the way down are made of."""
    from xdsl.context import Context
    from xdsl.dialects import (
        affine,
        arith,
        builtin,
        cf,
        func,
        linalg,
        llvm,
        memref,
        scf,
    )
    from xdsl.dialects import math as math_dialect
    from xdsl.dialects import tensor as tensor_dialect

    found = Context()
    for dialect in (
        *(affine.Affine, arith.Arith, builtin.Builtin, cf.Cf, func.Func),
        *(linalg.Linalg, llvm.LLVM, memref.MemRef, scf.Scf, math_dialect.Math),
        *(tensor_dialect.Tensor, Lab),
    ):
        found.load_dialect(dialect)
    return found
