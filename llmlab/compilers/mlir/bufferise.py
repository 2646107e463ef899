"""From values to places: every tensor gets a buffer (`memref`).

A tensor is a value, and nothing can change it. A buffer is memory, and is written. An
operation of linalg names the tensor that its result starts from (`outs`): the
destination. So the rule is short.

    tensor.empty              a new buffer for each operation that starts from it
    operation on outs(%t)     writes into the buffer of %t, unless %t is read later:
                              then into a copy
    reshape                   the same buffer under another type
    a constant                a global
    what is returned          is written into a buffer that the caller gives

Then the buffers get places in one arena, by the front end's plan: two may share bytes
if one is read for the last time before the other is first written.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects import arith, memref
from xdsl.dialects import tensor as tensor_dialect
from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    FunctionType,
    IntegerAttr,
    MemRefType,
    ModuleOp,
    StringAttr,
    TensorType,
    UnitAttr,
    i64,
)
from xdsl.dialects.func import ReturnOp
from xdsl.dialects.linalg.abstract_ops import LinalgStructuredOperation
from xdsl.ir import Block, Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from llmlab.compilers.front_end import ALIGNMENT, Life, Node, Type, arena, plan
from llmlab.compilers.mlir.dialect import body, function

OFFSET = "lab.offset"  # an attribute of an allocation: where it lies in the arena


@dataclass(frozen=True)
class Buffers:
    """What the tensors between operations need, in bytes.

    Attributes:
        count: how many there are.
        alone: if each had its own place.
        arena: with the plan.
    """

    count: int
    alone: int
    arena: int


def place_of(type: TensorType) -> MemRefType:
    """The buffer type of a tensor type."""
    return MemRefType(type.element_type, type.get_shape())


def bufferise(module: ModuleOp) -> Buffers:
    """Rewrite tensors to buffers, and plan them.

    Raises:
        ValueError: an operation that has no destination.
    """
    Bufferise(module).run()
    module.verify()
    return planned(module)


class Bufferise:
    """One walk over a function of one block.

    Attributes:
        buffers: where each tensor lies; nowhere for those of no particular numbers.
    """

    def __init__(self, module: ModuleOp) -> None:
        self.module = module
        self.block: Block = body(module)
        self.buffers: dict[SSAValue, SSAValue | None] = {}

    def run(self) -> None:
        """Every operation in its order."""
        changed = function(self.module)
        inputs = [place_of(value.type) for value in self.block.args]
        results = [place_of(type) for type in changed.function_type.outputs]
        for value, kind in zip(list(self.block.args), inputs, strict=True):
            Rewriter.replace_value_with_new_type(value, kind)
        self.buffers = {value: value for value in self.block.args}
        ops = list(self.block.ops)
        later = last_readers(ops)
        for place, op in enumerate(ops):
            self.rewrite(op, place, later)
        outs = [self.block.insert_arg(kind, len(self.block.args)) for kind in results]
        self.hand_over(ops[-1], outs)
        changed.function_type = FunctionType.from_lists([*inputs, *results], [])
        for op in reversed(ops):
            if any(isinstance(value.type, TensorType) for value in op.results):
                op.detach()
                op.erase(safe_erase=False)

    def insert(self, op: Operation, before: Operation) -> SSAValue | None:
        Rewriter.insert_op(op, InsertPoint.before(before))
        return op.results[0] if op.results else None

    def rewrite(self, op: Operation, place: int, later: dict[SSAValue, int]) -> None:
        """One operation on tensors as one on buffers, in front of it."""
        if isinstance(op, tensor_dialect.EmptyOp):
            self.buffers[op.tensor] = None
        elif isinstance(op, LinalgStructuredOperation):
            self.structured(op, place, later)
        elif isinstance(op, tensor_dialect.CollapseShapeOp):
            self.reshaped(op, memref.CollapseShapeOp)
        elif isinstance(op, tensor_dialect.ExpandShapeOp):
            self.reshaped(op, memref.ExpandShapeOp)
        elif isinstance(op, arith.ConstantOp) and isinstance(
            op.value, DenseIntOrFPElementsAttr
        ):
            self.constant(op)
        elif any(isinstance(value.type, TensorType) for value in op.results):
            raise ValueError(f"{op.name} has no destination: lower it to linalg first")

    def structured(self, op: Operation, place: int, later: dict[SSAValue, int]) -> None:
        """It writes into the buffer of its destination, or into a new one."""
        (out,) = op.outputs
        target = self.buffers[out]
        kind = place_of(out.type)
        if target is None or later[out] > place or out in self.block.args:
            new = self.insert(memref.AllocOp([], [], kind), op)
            if target is not None:
                self.insert(memref.CopyOp(target, new), op)
            target = new
        operands = [self.buffers.get(value, value) for value in op.inputs]
        self.insert(
            type(op).create(
                operands=[*operands, target],
                properties=dict(op.properties),
                regions=[region.clone() for region in op.regions],
            ),
            op,
        )
        self.buffers[op.results[0]] = target

    def reshaped(self, op: Operation, kind: type[Operation]) -> None:
        """The same buffer under another type. (A view: nobody writes to it, for a
        reshaped tensor is never a destination here.)
        """
        view = kind.create(
            operands=[self.buffers[op.operands[0]]],
            properties=dict(op.properties),
            result_types=[place_of(op.results[0].type)],
        )
        self.buffers[op.results[0]] = self.insert(view, op)

    def constant(self, op: arith.ConstantOp) -> None:
        """Numbers that lie in the program."""
        count = sum(isinstance(each, memref.GlobalOp) for each in self.module.ops)
        name, kind = f"constant_{count}", place_of(op.result.type)
        known = memref.GlobalOp.get(
            StringAttr(name), kind, op.value, constant=UnitAttr()
        )
        Rewriter.insert_op(known, InsertPoint.before(function(self.module)))
        self.buffers[op.result] = self.insert(memref.GetGlobalOp(name, kind), op)

    def hand_over(self, end: Operation, outs: list[SSAValue]) -> None:
        """Results are written where the caller wants them.

        A buffer that was allocated here becomes the caller's; others are copied.
        """
        given: set[SSAValue] = set()
        for value, out in zip(list(end.operands), outs, strict=True):
            buffer = self.buffers[value]
            if isinstance(buffer.owner, memref.AllocOp) and buffer not in given:
                allocation = buffer.owner
                buffer.replace_all_uses_with(out)
                self.buffers = {
                    each: out if where is buffer else where
                    for each, where in self.buffers.items()
                }
                allocation.detach()
                allocation.erase()
                given.add(out)
            else:
                self.insert(memref.CopyOp(buffer, out), end)
        Rewriter.replace_op(end, ReturnOp())


def last_readers(ops: list[Operation]) -> dict[SSAValue, int]:
    """The place of the last operation that reads each tensor, under any shape."""
    last: dict[SSAValue, int] = {}
    for place in reversed(range(len(ops))):
        op = ops[place]
        views = (tensor_dialect.CollapseShapeOp, tensor_dialect.ExpandShapeOp)
        until = last.get(op.results[0], place) if isinstance(op, views) else place
        for value in op.operands:
            last[value] = max(last.get(value, 0), until)
    return last


def planned(module: ModuleOp) -> Buffers:
    """Give each allocation its offset in one arena."""
    ops = list(body(module).ops)
    lives: dict[Node, Life] = {}
    allocations: dict[Node, memref.AllocOp] = {}
    for op in ops:
        if not isinstance(op, memref.AllocOp):
            continue
        used = [i for i, each in enumerate(ops) if reads(each, op.memref)]
        shape = op.memref.type.get_shape()
        node = Node("buffer", (), Type(tuple(shape)))
        size = -(-node.type.bytes // ALIGNMENT) * ALIGNMENT
        allocations[node] = op
        lives[node] = Life(size, min(used), max(used))
    offsets = plan(lives)
    for node, op in allocations.items():
        op.attributes[OFFSET] = IntegerAttr(offsets[node], i64)
    alone = sum(life.size for life in lives.values())
    return Buffers(len(lives), alone, arena(lives, offsets))


def reads(op: Operation, buffer: SSAValue) -> bool:
    """Whether an operation touches a buffer, under any type."""
    views = (memref.CollapseShapeOp, memref.ExpandShapeOp)
    for value in op.operands:
        while isinstance(value.owner, views):
            value = value.owner.src
        if value is buffer:
            return True
    return False
