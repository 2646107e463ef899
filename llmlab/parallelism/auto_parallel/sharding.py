"""Sharding as loops: how to cut an operator over a device mesh, and what that sends.

GSPMD (Xu et al. 2021, https://arxiv.org/abs/2105.04663) and Alpa (Zheng et al. 2022,
https://arxiv.org/abs/2201.12023). An operator is written by its loops, as in einsum: a
matrix product is "mk,kn->mn". A *strategy* gives each axis of the mesh one loop to cut,
or none. Everything else follows:

    a tensor is cut         by the axes whose loop it has. This is its *spec*: the axes
                            that cut each dimension.
    the output              is a partial sum along an axis whose loop it lacks, and is
                            all-reduced there.
    an input's gradient     is a partial sum along an axis whose loop the input lacks,
                            and is all-reduced there.

For "mk,kn->mn" with input mk and weight kn, an axis

    on k    all-reduces the output                  row parallel
    on n    all-reduces the input's gradient        column parallel
    on m    all-reduces the weight's gradient       data parallel

    s       a strategy: ("m", "") cuts m along mesh axis 0, and leaves axis 1 unused
    spec    ("0", "1"): rows are cut along mesh axis 0, columns along axis 1;
            ("01", ""): rows along both axes, axis 0 the major one
    dims    the loops of one tensor, one letter per dimension: "mk"

Simplified: every length that is cut must divide; no halo, no uneven shards, and no
partial sums kept for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from llmlab.parallelism.runtime import Link, cost

Spec = tuple[str, ...]
Strategy = tuple[str, ...]


class Move(NamedTuple):
    """One step from a spec to another, along one axis of the mesh."""

    kind: Literal["gather", "slice", "all_to_all"]
    axis: int
    dim: int  # the dimension that the axis cuts before (slice: after)
    to_dim: int  # all_to_all: the dimension that it cuts after; otherwise `dim`


class Collective(NamedTuple):
    """What one step sends. `bytes` is what `cost.seconds` takes for it."""

    name: str
    axis: int
    bytes: float


@dataclass(frozen=True)
class DeviceMesh:
    """A grid of devices, and how fast they and the links between them are.

    Raises:
        ValueError: there is not one link per axis.
    """

    shape: tuple[int, ...]
    links: tuple[Link, ...]  # of each axis
    flops: float = 1e12  # per second, of one device
    memory: float = float("inf")  # bytes of one device

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.links):
            raise ValueError(
                f"links has {len(self.links)} entries: one for each of the"
                f" {len(self.shape)} axes"
            )


@dataclass(frozen=True)
class Op:
    """One operator, written by its loops.

    A loop with a capital letter is never cut: the sequence, the inside of a head, what
    a norm sums over.
    """

    name: str
    dims: str  # "mk,kn->mn"
    inputs: tuple[str, ...]  # names of operators, or of leaves
    sizes: dict[str, int] = field(hash=False)  # length of each loop
    fn: Callable = field(hash=False, compare=False)  # computes it, whole or on shards
    weights: tuple[int, ...] = ()  # which inputs are trained
    work: float = 2.0  # FLOPs per turn of all loops

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
        """Forward and backward: a product has a gradient for each of its two inputs."""
        return 3 * self.work * prod(self.sizes.values())


def strategies(op: Op, mesh: DeviceMesh) -> list[Strategy]:
    """All ways to give each mesh axis a loop that it can divide.

    "" leaves an axis unused: its devices all compute the same.
    """
    loops = ["", *loops_to_cut(op)]
    found = []
    for s in product(loops, repeat=len(mesh.shape)):
        if _divides(op, s, mesh):
            found.append(s)
    return found


def loops_to_cut(op: Op) -> list[str]:
    """The loops of an operator that may be cut."""
    return [loop for loop in op.sizes if loop.islower()]


def _divides(op: Op, s: Strategy, mesh: DeviceMesh) -> bool:
    pieces: dict[str, int] = {}
    for loop, devices in zip(s, mesh.shape, strict=True):
        if loop:
            pieces[loop] = pieces.get(loop, 1) * devices
    return all(op.sizes[loop] % count == 0 for loop, count in pieces.items())


def spec(dims: str, s: Strategy) -> Spec:
    """How a tensor with these loops is cut: the axes of each dimension."""
    cut = []
    for dim in dims:
        cut.append("".join(str(axis) for axis, loop in enumerate(s) if loop == dim))
    return tuple(cut)


def partial_axes(dims: str, s: Strategy) -> list[int]:
    """The axes along which a tensor is a partial sum: they cut a loop that it lacks."""
    return [axis for axis, loop in enumerate(s) if loop and loop not in dims]


def shard_shape(shape: Sequence[int], cut: Spec, mesh: DeviceMesh) -> tuple[int, ...]:
    """The shape of one device's part of a tensor."""
    lengths = []
    for length, axes in zip(shape, cut, strict=True):
        lengths.append(length // prod(mesh.shape[int(axis)] for axis in axes))
    return tuple(lengths)


def shape_of(dims: str, op: Op) -> tuple[int, ...]:
    """The shape of a whole tensor."""
    return tuple(op.sizes[dim] for dim in dims)


def _shard_numbers(dims: str, op: Op, s: Strategy, mesh: DeviceMesh) -> int:
    """How many numbers one device holds of an input or output."""
    return prod(shard_shape(shape_of(dims, op), spec(dims, s), mesh))


# From one spec to another -------------------------------------------------------------


def moves(src: Spec, dst: Spec) -> list[Move]:
    """The steps from one spec to another.

    An axis that leaves one dimension and comes next in another goes there by
    all-to-all. One that leaves altogether is gathered.
    """
    now = list(src)
    steps = []

    # First, the axes that leave their dimension, innermost first.
    for dim, wanted in enumerate(dst):
        keep = _common_length(now[dim], wanted)
        while len(now[dim]) > keep:
            axis = now[dim][-1]
            now[dim] = now[dim][:-1]
            to_dim = _next_place(axis, dim, now, dst)
            if to_dim is None:
                steps.append(Move("gather", int(axis), dim, dim))
            else:
                steps.append(Move("all_to_all", int(axis), dim, to_dim))
                now[to_dim] += axis

    # Then the new cuts. They send nothing: a device keeps a slice of what it has.
    for dim, wanted in enumerate(dst):
        for axis in wanted[len(now[dim]) :]:
            steps.append(Move("slice", int(axis), dim, dim))
    return steps


def _common_length(a: str, b: str) -> int:
    """The length of the longest common start of two strings."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _next_place(axis: str, leaves: int, now: list[str], dst: Spec) -> int | None:
    """The other dimension where `dst` has this axis right after those it has now."""
    for dim, wanted in enumerate(dst):
        if dim != leaves and wanted.startswith(now[dim] + axis):
            return dim
    return None


def resharding_collectives(
    shape: Sequence[int], src: Spec, dst: Spec, mesh: DeviceMesh, itemsize: int = 2
) -> Iterator[Collective]:
    """What the steps of `moves(src, dst)` send, for a tensor of this whole shape."""
    now = list(src)
    for step in moves(src, dst):
        axis = str(step.axis)
        held = prod(shard_shape(shape, tuple(now), mesh)) * itemsize
        if step.kind == "slice":
            now[step.dim] += axis
        elif step.kind == "gather":
            now[step.dim] = now[step.dim].replace(axis, "")
            yield Collective("all_gather", step.axis, held * mesh.shape[step.axis])
        else:
            now[step.dim] = now[step.dim].replace(axis, "")
            now[step.to_dim] += axis
            yield Collective("all_to_all", step.axis, held)


# What it costs ------------------------------------------------------------------------


def collectives(
    op: Op, s: Strategy, mesh: DeviceMesh, itemsize: int = 2
) -> Iterator[Collective]:
    """The all-reduces of an operator under a strategy, forward and backward."""
    # The output is a partial sum itself; of each input it is the gradient.
    for dims in [op.writes, *op.reads]:
        size = _shard_numbers(dims, op, s, mesh) * itemsize
        for axis in partial_axes(dims, s):
            yield Collective("all_reduce", axis, size)


def op_seconds(op: Op, s: Strategy, mesh: DeviceMesh) -> float:
    """Compute and all-reduces of one operator, forward and backward."""
    shards = prod(n for loop, n in zip(s, mesh.shape, strict=True) if loop)
    compute = op.flops / shards / mesh.flops
    return compute + sum(_seconds(c, mesh) for c in collectives(op, s, mesh))


def edge_seconds(
    shape: Sequence[int], out: Spec, wanted: Spec, mesh: DeviceMesh
) -> float:
    """Seconds from the producer's spec to the consumer's.

    The gradient goes the other way in the backward pass, and is counted too.
    """
    forward = resharding_collectives(shape, out, wanted, mesh)
    backward = resharding_collectives(shape, wanted, out, mesh)
    return sum(_seconds(c, mesh) for c in [*forward, *backward])


def _seconds(collective: Collective, mesh: DeviceMesh) -> float:
    devices = mesh.shape[collective.axis]
    link = mesh.links[collective.axis]
    return cost.seconds(collective.name, devices, collective.bytes, link)


def op_bytes(
    op: Op, s: Strategy, mesh: DeviceMesh, state: int = 16, itemsize: int = 2
) -> float:
    """Bytes that one device holds for an operator.

    Args:
        state: bytes per number of a trained input: the weight, its gradient, and what
            the optimizer keeps.
        itemsize: bytes per number of the output, which is kept for the backward pass.
    """
    trained = sum(_shard_numbers(op.reads[i], op, s, mesh) for i in op.weights)
    output = _shard_numbers(op.writes, op, s, mesh)
    return state * trained + itemsize * output
