"""Kernels, run: each goes through its rows in pieces that stay in the cache.

The operations inside are torch's, so this is no code generator (that is the back end's
work); but what lies between them is a few hundred kilobytes that are used again at once,
and the arena is the only memory that is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.compilers.front_end import memory
from llmlab.compilers.front_end.fusion import Kernel, fuse, traffic
from llmlab.compilers.front_end.ir import OPS, Graph, Node, bind, finish
from llmlab.compilers.front_end.passes import optimise

PIECE = 1 << 18  # bytes of a value that are computed at one time


@dataclass
class Program:
    """Kernels in their order, and where their results lie.

    Attributes:
        graph: what they compute.
        offsets: of each value that a kernel writes, in bytes.
    """

    graph: Graph
    kernels: list[Kernel]
    offsets: dict[Node, int]
    arena: int

    @property
    def traffic(self) -> int:
        """Bytes read and written by all kernels."""
        return traffic(self.kernels)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Run it.

        Raises:
            ValueError: arguments of other types than it was compiled for.
        """
        values = bind(self.graph, arguments)
        room = torch.empty(self.arena, dtype=torch.uint8)
        for kernel in self.kernels:
            root = kernel.root
            if root.op == "reshape":
                values[root] = values[root.inputs[0]].reshape(root.type.shape)
                continue
            start = self.offsets[root]
            out = room[start : start + root.type.bytes].view(root.type.dtype)
            values[root] = out.view(root.type.shape)
            run_kernel(kernel, values, values[root])
        return finish(self.graph, values)


def compile_graph(graph: Graph) -> Program:
    """Optimise, fuse, plan."""
    graph = optimise(graph)
    return program_of(graph, fuse(graph))


def program_of(graph: Graph, kernels: Sequence[Kernel]) -> Program:
    """Plan the memory of these kernels."""
    lives = memory.lifetimes(graph, kernels)
    offsets = memory.plan(lives)
    return Program(graph, list(kernels), offsets, memory.arena(lives, offsets))


def run_kernel(kernel: Kernel, values: dict[Node, Tensor], out: Tensor) -> None:
    """Compute the kernel's result into `out`, some rows at a time."""
    step = rows_at_a_time(kernel)
    if step is None:
        out.copy_(piece(kernel, values, None))
        return
    for start in range(0, len(out), step):
        rows = slice(start, min(start + step, len(out)))
        out[rows] = piece(kernel, values, rows)


def rows_at_a_time(kernel: Kernel) -> int | None:
    """How many rows of the first dimension fit; None if it must be run as a whole."""
    root = kernel.root
    if len(root.type.shape) < 2 or len(kernel.nodes) == 1:
        return None
    widest = max(node.type.bytes for node in kernel.nodes)
    row = max(1, widest // max(1, root.type.shape[0]))
    return max(1, PIECE // row)


def piece(kernel: Kernel, values: dict[Node, Tensor], rows: slice | None) -> Tensor:
    """The kernel's result in these rows."""
    inside: dict[Node, Tensor] = {}
    for node in kernel.nodes:
        tensors = []
        for place, each in enumerate(node.inputs):
            if each in inside:
                tensors.append(inside[each])
            else:
                x = values[each]
                cut = rows is not None and has_rows(node, place, x)
                tensors.append(x[rows] if cut else x)
        inside[node] = OPS[node.op].run(tensors, node.attributes)
    return inside[kernel.root]


def has_rows(node: Node, place: int, x: Tensor) -> bool:
    """Whether an input has a row for each row of the result, or serves all rows."""
    if node.op == "matmul" and place == 1 and x.dim() == 2:
        return False
    full = x.dim() == len(node.type.shape) and x.dim() > 0
    return full and x.shape[0] == node.type.shape[0] and math.prod(x.shape) > 0
