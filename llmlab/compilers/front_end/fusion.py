"""Fusion: which operations run in one kernel, so that what lies between them is never
written to memory.

A kernel works row by row: it reads a row of its inputs, computes all it has to with the
row in registers or cache, and writes a row of its one result. So it may hold

    elementwise operations on the same rows
    sums and maxima along a row
    one product, at its beginning: it makes the rows

    rows      the shape without its last dimension: (8, 16) has 8 rows
    reads     values from outside: read once each
    root      the last operation; its value is what the kernel writes

An operation joins the kernel of its readers if all of them are in one. If they are in
several, its value is written to memory, unless that costs more than to compute it in
each of them: an operation whose inputs are no larger than its result is repeated, in
64 kernels at most.

From the last operation to the first that is one look at each. No two kernels can wait
for each other: whoever reads a joined value is in the same kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmlab.compilers.front_end.ir import Graph, Node

MOST_COPIES = 64  # kernels in which one operation is repeated; so fusing stays linear


@dataclass(eq=False)
class Kernel:
    """Operations that run together, each after those that it reads."""

    nodes: list[Node]
    reads: list[Node]

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def traffic(self) -> int:
        """Bytes read and written. None for a reshape: the bytes stay where they are."""
        if self.root.op == "reshape":
            return 0
        return self.root.type.bytes + sum(node.type.bytes for node in self.reads)

    def __str__(self) -> str:
        return " ".join(node.op for node in self.nodes)


def rows(node: Node) -> tuple[int, ...]:
    """The shape of what a kernel counts its rows by."""
    return node.type.shape[:-1]


def along_rows(node: Node) -> bool:
    """Whether it needs no other row to compute one: elementwise, or along the last."""
    if node.kind == "reduction":
        return node.attributes[0] == len(node.type.shape) - 1
    return node.kind == "elementwise"


def small_inputs(node: Node) -> bool:
    """Whether its readers may as well read its inputs."""
    read = {each for each in node.inputs if each.number is None}
    return sum(each.type.bytes for each in read) <= node.type.bytes


def one_by_one(graph: Graph) -> list[Kernel]:
    """A kernel for each operation: what eager execution does."""
    return kernels_of(graph, {node: {node} for node in graph.work})


def fuse(graph: Graph, repeat: bool = True) -> list[Kernel]:
    """As few kernels as the rule gives.

    Args:
        repeat: whether a cheap operation may be computed in several kernels.
    """
    users = graph.users()
    results = set(graph.results)
    homes: dict[Node, set[Node]] = {}  # operation → roots of the kernels that hold it
    with_product: set[Node] = set()  # roots of kernels that have their product
    for node in reversed(graph.work):
        kernels = set().union(*(homes[user] for user in users[node]))
        inside = (
            len(kernels) > 0
            and node not in results
            and len(kernels) <= (MOST_COPIES if repeat else 1)
            and joins(node, users[node], kernels, with_product)
        )
        homes[node] = kernels if inside else {node}
        if node.kind == "matmul":
            with_product |= homes[node]
    return kernels_of(graph, homes)


def joins(
    node: Node, users: Sequence[Node], kernels: set[Node], with_product: set[Node]
) -> bool:
    """Whether the kernels of all its readers compute this operation as well.

    Args:
        users: who reads it.
        kernels: the roots of the kernels that hold them, one at least.
        with_product: roots of kernels that hold a product.
    """
    if not all(along_rows(user) for user in users):
        return False  # a product or a transpose reads other rows
    if not all(rows(root) == rows(node) for root in kernels):
        return False
    if node.kind == "matmul":
        return len(kernels) == 1 and not kernels & with_product
    if len(kernels) == 1:
        return along_rows(node)
    return node.kind == "elementwise" and small_inputs(node)


def kernels_of(graph: Graph, homes: Mapping[Node, set[Node]]) -> list[Kernel]:
    """The kernels, in the order of their roots: what a kernel reads is made before."""
    members: dict[Node, list[Node]] = {node: [] for node in graph.work}
    for node in graph.work:
        for root in homes[node]:
            members[root].append(node)
    kernels = []
    for root in graph.work:
        if root not in homes[root]:
            continue
        inside = set(members[root])
        reads = dict.fromkeys(
            each
            for node in members[root]
            for each in node.inputs
            if each not in inside and each.number is None
        )
        kernels.append(Kernel(members[root], list(reads)))
    return kernels


def traffic(kernels: Sequence[Kernel]) -> int:
    """Bytes that all kernels read and write."""
    return sum(kernel.traffic for kernel in kernels)
