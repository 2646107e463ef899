"""Sharding as loops: every way to cut an operator over a device mesh, what it sends,
and how a tensor changes its cut.

GSPMD (Xu et al. 2021, https://arxiv.org/abs/2105.04663) and Alpa (Zheng et al. 2022,
https://arxiv.org/abs/2201.12023). An operator is written by its loops, as in einsum: a
matrix product is "mk,kn->mn". A *strategy* gives each axis of the mesh one loop to cut,
or none. Everything else follows:

    a tensor is cut by the axes whose loop it has  its *spec*: for each dimension, axes
    the output is a partial sum along axes whose loop it lacks     all-reduce    axis on k: row parallel
    an input's gradient is one along axes whose loop it lacks      all-reduce    axis on n: column parallel (input's gradient)
                                                                                 axis on
                                                                                     m:
                                                                                     data
                                                                                     parallel
                                                                                     (weight's
                                                                                     gradient)

    spec    ("0", "1") rows cut along mesh axis 0, columns along axis 1;  ("01", "")
             rows along both, axis 0 the major one
    move    (kind, axis, from dimension, to dimension); kinds: gather, slice, all_to_all

Simplified: every length that is cut must divide; no halo, no uneven shards, no partial
sums kept for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from llmlab.parallelism.runtime import Link, cost

Spec = tuple[str, ...]
Move = tuple[str, int, int, int]
Strategy = tuple[str, ...]


@dataclass(frozen=True)
class DeviceMesh:
    """A grid of devices with a wire along each axis, and how fast one device
    computes.
    """

    shape: tuple[int, ...]
    links: tuple[Link, ...]
    flops: float = 1e12
    memory: float = float("inf")

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.links):
            raise ValueError(
                f"links has {len(self.links)} entries: one for each of the"
                f" {len(self.shape)} axes"
            )


@dataclass(frozen=True)
class Op:
    """One operator: `dims` are its loops, `inputs` the names of operators or leaves,
    `fn` computes it on (shards of) them.

    A loop in capitals is never cut: the sequence, the inside of a head, what a norm
        sums over.
    """

    name: str
    dims: str  # "mk,kn->mn"
    inputs: tuple[str, ...]
    sizes: dict[str, int] = field(hash=False)
    fn: Callable = field(hash=False, compare=False)
    weights: tuple[int, ...] = ()  # which inputs are trained
    work: float = 2.0  # FLOPs for each turn of all loops

    @property
    def reads(self) -> list[str]:
        """The loops of each input."""
        return self.dims.split("->")[0].split(",")

    @property
    def writes(self) -> str:
        """The loops of the output."""
        return self.dims.split("->")[1]

    @property
    def flops(self) -> float:
        """Forward and backward: three products where a weight or an activation has a
        gradient each.
        """
        return 3 * self.work * prod(self.sizes.values())


def strategies(op: Op, mesh: DeviceMesh) -> list[Strategy]:
    """Every assignment of mesh axes to loops that divides; "" leaves an axis unused
    (its devices compute the same).
    """
    loops = ["", *self_loops(op)]
    return [s for s in product(loops, repeat=len(mesh.shape)) if _divides(op, s, mesh)]


def self_loops(op: Op) -> list[str]:
    """The loops of an operator that may be cut."""
    return [loop for loop in op.sizes if loop.islower()]


def _divides(op: Op, s: Strategy, mesh: DeviceMesh) -> bool:
    return all(
        op.sizes[x] % prod(n for a, n in zip(s, mesh.shape, strict=True) if a == x) == 0
        for x in set(s) - {""}
    )


def spec(dims: str, s: Strategy) -> Spec:
    """How a tensor with these loops is cut: for each dimension the axes that cut it."""
    return tuple("".join(str(a) for a, loop in enumerate(s) if loop == d) for d in dims)


def missing(dims: str, s: Strategy) -> list[int]:
    """Axes that cut a loop which a tensor does not have: along them it is a partial
    sum.
    """
    return [a for a, loop in enumerate(s) if loop and loop not in dims]


def local(shape: Sequence[int], cut: Spec, mesh: DeviceMesh) -> tuple[int, ...]:
    """The shape of a shard."""
    return tuple(
        n // prod(mesh.shape[int(a)] for a in axes)
        for n, axes in zip(shape, cut, strict=True)
    )


def shape_of(dims: str, op: Op) -> tuple[int, ...]:
    """The shape of a whole tensor."""
    return tuple(op.sizes[d] for d in dims)


# Changing a tensor's cut --------------------------------------------------------------


def moves(src: Spec, dst: Spec) -> list[Move]:
    """The steps from one cut to another: first what must go, innermost axis first, then
    what is cut anew.

    An axis that leaves one dimension for the end of another goes by all-to-all; one
    that leaves altogether is gathered.
    """
    now, steps = list(src), []
    for d, want in enumerate(dst):
        keep = _common(now[d], want)
        while len(now[d]) > keep:
            axis = now[d][-1]
            now[d] = now[d][:-1]
            to = next(
                (
                    e
                    for e, w in enumerate(dst)
                    if e != d and w.startswith(now[e] + axis)
                ),
                None,
            )
            steps.append(
                ("gather", int(axis), d, d)
                if to is None
                else ("all_to_all", int(axis), d, to)
            )
            if to is not None:
                now[to] += axis
    steps += [
        ("slice", int(a), d, d)
        for d, want in enumerate(dst)
        for a in want[len(now[d]) :]
    ]
    return steps


def _common(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )


def moved(
    shape: Sequence[int], src: Spec, dst: Spec, mesh: DeviceMesh, itemsize: int = 2
) -> Iterator[tuple]:
    """(collective, axis, bytes) of each step that sends: bytes as `cost.seconds` wants
    them.
    """
    now = list(src)
    for kind, axis, d, to in moves(src, dst):
        held = prod(local(shape, tuple(now), mesh)) * itemsize
        if kind == "slice":
            now[d] += str(axis)
            continue
        now[d] = now[d].replace(str(axis), "")
        if kind == "all_to_all":
            now[to] += str(axis)
            yield "all_to_all", axis, held
        else:
            yield "all_gather", axis, held * mesh.shape[axis]


# What it costs ------------------------------------------------------------------------


def collectives(
    op: Op, s: Strategy, mesh: DeviceMesh, itemsize: int = 2
) -> Iterator[tuple[str, int, float]]:
    """The all-reduces of an operator under a strategy, forward and backward:
    (collective, axis, bytes).
    """
    tensors = [
        (op.writes, missing(op.writes, s)),
        *((dims, missing(dims, s)) for dims in op.reads),
    ]
    for dims, axes in tensors:
        size = prod(local(shape_of(dims, op), spec(dims, s), mesh)) * itemsize
        for axis in axes:
            yield "all_reduce", axis, size


def op_seconds(op: Op, s: Strategy, mesh: DeviceMesh) -> float:
    """Compute and all-reduces of one operator, forward and backward."""
    shards = prod(n for loop, n in zip(s, mesh.shape, strict=True) if loop)
    return op.flops / shards / mesh.flops + sum(
        _seconds(c, mesh) for c in collectives(op, s, mesh)
    )


def edge_seconds(
    shape: Sequence[int], out: Spec, wanted: Spec, mesh: DeviceMesh
) -> float:
    """From the producer's cut to the consumer's, and the gradient's way back."""
    steps = [*moved(shape, out, wanted, mesh), *moved(shape, wanted, out, mesh)]
    return sum(_seconds(c, mesh) for c in steps)


def _seconds(collective: tuple[str, int, float], mesh: DeviceMesh) -> float:
    name, axis, size = collective
    return cost.seconds(name, mesh.shape[axis], size, mesh.links[axis])


def op_bytes(
    op: Op, s: Strategy, mesh: DeviceMesh, state: int = 16, itemsize: int = 2
) -> float:
    """What a device holds: `state` bytes for each number of its trained inputs, and the
    output kept for the backward pass.
    """
    held = [
        prod(local(shape_of(op.reads[i], op), spec(op.reads[i], s), mesh))
        for i in op.weights
    ]
    return state * sum(held) + itemsize * prod(
        local(shape_of(op.writes, op), spec(op.writes, s), mesh)
    )
