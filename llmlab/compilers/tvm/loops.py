"""A schedule as data, and the loops that it makes.

    schedule = [
        ("split", "C", "i", (None, 4)),        i = i_0 · 4 + i_1
        ("split", "C", "j", (None, 16)),
        ("reorder", "C", ("i_0", "j_0", "k", "i_1", "j_1")),
        ("vectorize", "C", "j_1"),
    ]
    print(lower(C, schedule))

The primitives change loops, never the expression: the same numbers come out. Names of
loops are TVM's, so `real.scheduled` gives the very same list to TVM.

    split       the parts must make up the extent. If they make more, the iterations too
                many are cut off by a guard
    reorder     the named loops, in this order, at the places that they have together
    vectorize, parallel    only where iterations do not meet: no loop that is summed
                over, and for vectorize none that computes another tensor inside
    unroll      any loop
    compute_at  a tensor is computed where it is read, piece by piece: `region` says
                which piece

Simplified: no fuse; a sum is set to its first value where its first iteration is; a
tensor is computed at a loop of one reader, which has all its loops by then, and nobody
else reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmlab.compilers.tvm.expressions import (
    Affine,
    Axis,
    Expression,
    Number,
    Operation,
    Read,
    Reduction,
    Tensor,
    affine,
    interval,
    placeholders,
    stages,
)

Primitive = tuple
Guard = tuple[Affine, int]  # index < limit


class Refused(ValueError):
    """A primitive that would change the result, or that names what is not there."""


@dataclass(frozen=True)
class Loop:
    """for name in range(extent), and how."""

    name: str
    extent: int
    kind: str = "serial"


@dataclass
class Stage:
    """A tensor and the loops that compute it, outermost first.

    Attributes:
        index: axis → its value, in terms of loops.
        guards: what must hold for an iteration to be one.
        at: (the reader, one of its loops), if it is computed there.
    """

    tensor: Tensor
    loops: list[Loop]
    index: dict[str, Affine]
    guards: list[Guard] = field(default_factory=list)
    at: tuple[str, str] | None = None

    def loop(self, name: str) -> Loop:
        for loop in self.loops:
            if loop.name == name:
                return loop
        names = ", ".join(loop.name for loop in self.loops)
        raise Refused(f"{self.tensor.name} has no loop {name!r}; it has {names}")

    def put(self, name: str, *loops: Loop) -> None:
        """Other loops in the place of one."""
        place = self.loops.index(self.loop(name))
        self.loops[place : place + 1] = loops


@dataclass
class Program:
    """Stages, each after those that it reads."""

    results: tuple[Tensor, ...]
    stages: dict[str, Stage]

    def __str__(self) -> str:
        return "\n".join(lines(self))


def split(extent: int, factors: Sequence[int | None]) -> tuple[tuple[int, ...], bool]:
    """Extents of the parts, and whether a guard is needed.

    None stands for as many as are needed; at most one of the parts may say so.

    Raises:
        Refused: two of them, parts below 1, or parts that make up less than the extent.
    """
    if list(factors).count(None) > 1:
        raise Refused(f"factors={factors} may hold None once")
    given = [factor for factor in factors if factor is not None]
    if not factors or any(factor < 1 for factor in given):
        raise Refused(f"factors={factors} must be whole numbers from 1")
    rest = -(-extent // math.prod(given))
    parts = tuple(rest if factor is None else factor for factor in factors)
    if math.prod(parts) < extent:
        raise Refused(f"factors={factors} make up {math.prod(parts)} of {extent}")
    return parts, math.prod(parts) > extent


def region(indices: Sequence[Affine], moving: Mapping[str, int]) -> tuple[Affine, int]:
    """Which part of one dimension is read: where it begins, and how long it is.

    Args:
        indices: of all reads of the tensor, along this dimension.
        moving: loops that run inside the piece → their extents. All others stand still.

    Raises:
        Refused: two reads whose standing parts differ: the distance is not known.
    """
    standing = [index.part(index.names - moving.keys()) for index in indices]
    if any(part != standing[0] for part in standing):
        raise Refused(f"reads at {standing[0]} and elsewhere: not one piece")
    spans = []
    for index, part in zip(indices, standing, strict=True):
        spans.append(interval(index - part, moving))
    first = min(first for first, _ in spans)
    last = max(last for _, last in spans)
    return standing[0] + first, last - first + 1


# Primitives ---------------------------------------------------------------------------


def stage_of(program: Program, name: str) -> Stage:
    """Raises: Refused: there is none of this name."""
    if name not in program.stages:
        raise Refused(f"there is no tensor {name!r}: {', '.join(program.stages)}")
    return program.stages[name]


def free(program: Program, tensor: str) -> Stage:
    """Raises: Refused: something is computed at one of its loops already."""
    for other in program.stages.values():
        if other.at is not None and other.at[0] == tensor:
            raise Refused(
                f"{other.tensor.name} is computed at a loop of {tensor}: change the"
                " loops first"
            )
    return stage_of(program, tensor)


def do_split(program: Program, tensor: str, loop: str, factors: Sequence) -> None:
    """loop = (loop_0 · f₁ + loop_1) · f₂ + …"""
    stage = free(program, tensor)
    old = stage.loop(loop)
    parts, guarded = split(old.extent, factors)
    new = [Loop(f"{loop}_{i}", extent) for i, extent in enumerate(parts)]
    value = affine(0)
    for part in new:
        value = value * part.extent + affine(Axis(part.name, part.extent))
    stage.put(loop, *new)
    stage.index = {a: x.substitute({loop: value}) for a, x in stage.index.items()}
    stage.guards = [(x.substitute({loop: value}), n) for x, n in stage.guards]
    if guarded:
        stage.guards.append((value, old.extent))


def do_reorder(program: Program, tensor: str, names: Sequence[str]) -> None:
    """The named loops in this order, at the places that they have together."""
    stage = free(program, tensor)
    if len(set(names)) < len(names):
        raise Refused(f"reorder {names}: a loop is named twice")
    wanted = [stage.loop(name) for name in names]
    places = sorted(stage.loops.index(loop) for loop in wanted)
    for place, loop in zip(places, wanted, strict=True):
        stage.loops[place] = loop


SHARED = "is computed inside it, and has room for one iteration"


def marked(kind: str, apart: bool):
    """A primitive that says how a loop runs.

    Args:
        apart: whether its iterations must not meet.
    """

    def mark(program: Program, tensor: str, loop: str) -> None:
        stage = stage_of(program, tensor)
        old = stage.loop(loop)
        summed = {axis.name for axis in stage.tensor.reduced}
        meets = any(loop in stage.index[axis].names for axis in summed)
        if apart and meets:
            raise Refused(
                f"{kind} {loop}: {tensor} is summed over it, so its iterations write to"
                " the same number"
            )
        if apart and any(each.kind == kind for each in stage.loops):
            raise Refused(f"{kind} {loop}: {tensor} has a {kind} loop already")
        names = [each.name for each in stage.loops]
        for other in program.stages.values():
            if kind != "vectorized" or other.at is None or other.at[0] != tensor:
                continue
            if names.index(other.at[1]) >= names.index(loop):
                raise Refused(f"vectorize {loop}: {other.tensor.name} {SHARED}")
        stage.put(loop, replace(old, kind=kind))

    return mark


def do_compute_at(program: Program, tensor: str, reader: str, loop: str) -> None:
    """The loops of a tensor become those of the piece that one iteration reads."""
    stage, at = stage_of(program, tensor), stage_of(program, reader)
    at.loop(loop)
    if at.at is not None or stage.at is not None:
        raise Refused(f"compute_at {tensor}: one of the two has its place already")
    readers = [s.tensor.name for s in program.stages.values() if reads(s, tensor)]
    if readers != [reader] or stage.tensor in program.results:
        raise Refused(f"compute_at {tensor}: read by {readers}, not by {reader} alone")
    for each in at.loops[: 1 + [each.name for each in at.loops].index(loop)]:
        if each.kind == "vectorized":
            raise Refused(f"compute_at in vectorized {each.name}: {tensor} {SHARED}")
    outer = at.loops[: 1 + [each.name for each in at.loops].index(loop)]
    outer = [each for each in outer if each.extent > 1]
    inner = {each.name: each.extent for each in at.loops if each not in outer}
    extents = {each.name: each.extent for each in at.loops}
    free(program, tensor)
    stage.loops, stage.guards, stage.at = [], [], (reader, loop)
    for d, axis in enumerate(stage.tensor.axes):
        indices = [
            read.indices[d].substitute(at.index)
            for read in at.tensor.reads
            if read.tensor is stage.tensor
        ]
        begin, extent = region(indices, inner)
        if not begin.terms:
            # the same piece each time: what guards cut off may lie outside the tensor
            first = max(begin.constant, 0)
            extent = min(begin.constant + extent, axis.extent) - first
            begin = affine(first)
        if extent > 1:
            name = f"ax{len(stage.loops)}"
            stage.loops.append(Loop(name, extent))
            extents[name] = extent
            begin = begin + affine(Axis(name, extent))
        stage.index[axis.name] = begin
        lowest, highest = interval(begin, extents)
        if lowest < 0:
            stage.guards.append((begin * -1, 1))
        if highest >= axis.extent:
            stage.guards.append((begin, axis.extent))
    for axis in stage.tensor.reduced:
        stage.loops.append(Loop(axis.name, axis.extent))
        stage.index[axis.name] = affine(axis)


def reads(stage: Stage, tensor: str) -> bool:
    """Whether it reads a tensor of this name."""
    return any(each.name == tensor for each in stage.tensor.inputs)


PRIMITIVES = {
    "split": do_split,
    "reorder": do_reorder,
    "vectorize": marked("vectorized", apart=True),
    "parallel": marked("parallel", apart=True),
    "unroll": marked("unroll", apart=False),
    "compute_at": do_compute_at,
}


def lower(*results: Tensor, schedule: Sequence[Primitive] = ()) -> Program:
    """The loops of one or more results under a schedule.

    Raises:
        Refused: a primitive that there is not, or that would change the result.
    """
    program = Program(results, {})
    for tensor in stages(*results):
        axes = (*tensor.axes, *tensor.reduced)
        loops = [Loop(axis.name, axis.extent) for axis in axes]
        index = {axis.name: affine(axis) for axis in axes}
        program.stages[tensor.name] = Stage(tensor, loops, index)
    for name, *arguments in schedule:
        if name not in PRIMITIVES:
            raise Refused(f"there is no primitive {name!r}: {', '.join(PRIMITIVES)}")
        PRIMITIVES[name](program, *arguments)
    return program


# Text, and a run ----------------------------------------------------------------------

FIRST = {"+": "0.0", "max": "-inf"}


def lines(program: Program) -> list[str]:
    """The program as Python."""
    found: list[str] = []
    for stage in program.stages.values():
        if stage.at is None:
            write(program, stage, found, "")
    return found


def write(program: Program, stage: Stage, found: list[str], indent: str) -> None:
    """The loops of a stage, with those that are computed at one of them inside."""
    for loop in stage.loops:
        kind = "range" if loop.kind == "serial" else loop.kind
        found.append(f"{indent}for {loop.name} in {kind}({loop.extent}):")
        indent += "    "
        for other in program.stages.values():
            if other.at == (stage.tensor.name, loop.name):
                write(program, other, found, indent)
    if stage.guards:
        words = " and ".join(f"{index} < {limit}" for index, limit in stage.guards)
        found.append(f"{indent}if {words}:")
        indent += "    "
    tensor = stage.tensor
    place = ", ".join(str(stage.index[axis.name]) for axis in tensor.axes)
    target = f"{tensor.name}[{place}]"
    value = tensor.value
    if not isinstance(value, Reduction):
        found.append(f"{indent}{target} = {text(value, stage.index)}")
        return
    summed = [stage.index[axis.name] for axis in value.axes]
    words = " and ".join(f"{index} == 0" for index in summed)
    found.append(f"{indent}if {words}:")
    found.append(f"{indent}    {target} = {FIRST[value.name]}")
    body = text(value.body, stage.index)
    new = f"{target} + {body}" if value.name == "+" else f"max({target}, {body})"
    found.append(f"{indent}{target} = {new}")


def text(value: Expression, index: Mapping[str, Affine]) -> str:
    """An expression in Python, its axes replaced."""
    match value:
        case Number(value=number):
            return repr(number)
        case Read(tensor=tensor, indices=indices):
            words = ", ".join(str(each.substitute(index)) for each in indices)
            return f"{tensor.name}[{words}]"
        case Operation(name=name, inputs=inputs):
            words = [text(each, index) for each in inputs]
            if name in "+-*/":
                return f"({words[0]} {name} {words[1]})"
            return f"{name}({', '.join(words)})"
    raise ValueError(f"{value!r} has no text")


def run(program: Program, inputs: Mapping[str, object]) -> dict[str, object]:
    """Every tensor of a program, computed by its loops one number at a time.

    Tensors are full of NaN before, so that what nobody wrote shows.

    Args:
        inputs: name → float32 array, for each placeholder.
    """
    import numpy as np

    names: dict[str, object] = {"inf": math.inf, "max": max}
    names |= {"exp": np.exp, "tanh": np.tanh}
    names |= dict.fromkeys(("vectorized", "parallel", "unroll"), range)
    for tensor in placeholders(*program.results):
        found = inputs[tensor.name]
        if found.shape != tensor.shape:
            raise ValueError(f"{tensor.name} is {found.shape}, not {tensor.shape}")
        names[tensor.name] = found
    for stage in program.stages.values():
        shape = stage.tensor.shape
        names[stage.tensor.name] = np.full(shape, np.nan, np.float32)
    exec(compile(str(program), "<loops>", "exec"), names)
    return {name: names[name] for name in program.stages}
