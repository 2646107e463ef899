"""What a module of the dialect computes, in torch: what every level must keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue

from llmlab.compilers.front_end import OPS
from llmlab.compilers.mlir import dialect as lab


def evaluate(module: ModuleOp, *arguments: Tensor) -> list[Tensor]:
    """Run a module, operation by operation.

    Raises:
        ValueError: an operation that is not of the dialect.
    """
    block = lab.body(module)
    values: dict[SSAValue, Tensor] = dict(zip(block.args, arguments, strict=True))
    for op in block.ops:
        read = [values[value] for value in op.operands]
        if op.name == "func.return":
            return read
        values[op.results[0]] = computed(op, read)
    raise ValueError("the function has no return")


def computed(op: Operation, read: list[Tensor]) -> Tensor:
    """The result of one operation."""
    name = op.name.removeprefix("lab.")
    if isinstance(op, lab.ConstantOp):
        numbers = torch.tensor(op.value.get_values(), dtype=torch.float32)
        return numbers.reshape(op.result.type.get_shape())
    if isinstance(op, lab.GeluOp):
        return F.gelu(read[0], approximate="tanh")
    if isinstance(op, lab.AddBiasOp):
        return read[0] + read[1]
    if isinstance(op, lab.BiasGeluOp):
        return F.gelu(read[0] + read[1], approximate="tanh")
    if isinstance(op, lab.SoftmaxOp):
        return torch.softmax(read[0], -1)
    if isinstance(op, lab.AttentionOp):
        q, k, v = read
        return torch.softmax(op.scale.value.data * (q @ k.T), -1) @ v
    if not isinstance(op, lab.LabOp) or name not in OPS:
        raise ValueError(f"{op.name} is not an operation of the dialect")
    return OPS[name].run(read, attributes_of(op))


def attributes_of(op: lab.LabOp) -> tuple:
    """As the front end's operations take them."""
    if isinstance(op, lab.MatmulOp):
        return (op.transposed is not None,)
    if isinstance(op, lab.SumOp | lab.MaxOp):
        return (op.dim.value.data,)
    if isinstance(op, lab.TransposeOp):
        return (op.dims,)
    if isinstance(op, lab.ReshapeOp):
        return (tuple(op.to.get_values()),)
    return ()
