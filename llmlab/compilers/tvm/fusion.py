"""Which operations become one function: TVM's kinds, and its rule.

    kind           how its result depends on what it reads             example
    -------------  -------------------------------------------------  ----------------
    ELEMENTWISE    each number from the number at the same place       exp(x), x + bias
    BROADCAST      the same axes in the same order, some of them       b[j] for all i
    INJECTIVE      any place, but no number is summed over             transpose
    REDUCTION      summed along whole axes                             Σ_j x[i, j]
    ANCHOR         worth a kernel; elementwise operations may follow   matmul, softmax
    OPAQUE         anything else                                       a library's call

A kind is *found*, by looking at indices; nobody writes it down. The rule goes through
the operations in order. Each asks whether it may join its **post-dominator**, the first
operation that all ways from it to the results go through:

    ANCHOR                   joins if everything on the way is elementwise
    ELEMENTWISE, BROADCAST   join if nothing on the way is summed; the last may be a
                             reduction, or be in an anchor's function already
    INJECTIVE                in a second round, if everything on the way is injective
    REDUCTION, OPAQUE        do not join

and if it does, all that lies between joins as well. TVM calls ANCHOR
"out-elementwise-fusable" (Chen et al. 2018, §3; here as in TVM 0.27, without tuples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from llmlab.compilers.tvm.expressions import (
    Affine,
    Operation,
    Read,
    Reduction,
    Tensor,
    affine,
    stages,
)


class Kind(IntEnum):
    """In TVM's order: what comes later is harder to fuse."""

    ELEMENTWISE = 0
    BROADCAST = 1
    INJECTIVE = 2
    REDUCTION = 3
    ANCHOR = 4
    OPAQUE = 8


# Kinds --------------------------------------------------------------------------------


def read_kind(axes: Sequence[str], read: Read) -> Kind:
    """The kind of one read, in the result at (axes).

    OPAQUE: it needs an axis that the result does not have.
    """
    at = [Affine.of({name: 1}) for name in axes]
    if [*read.indices] == at:
        return Kind.ELEMENTWISE
    # a dimension of size 1, read at 0, does not count
    wanted = [
        index
        for index, size in zip(read.indices, read.tensor.shape, strict=True)
        if size != 1 or index != Affine()
    ]
    if all(index in at for index in wanted):
        places = [at.index(index) for index in wanted]
        if places == sorted(places):  # a diagonal x[i, i] counts, as in TVM
            return Kind.BROADCAST
    if all(index.names <= set(axes) for index in read.indices):
        return Kind.INJECTIVE
    return Kind.OPAQUE


def kind_of(result: Tensor) -> Kind:
    """The kind of an operation, which may have several steps, as a softmax has."""
    kind = Kind.ELEMENTWISE
    for tensor in stages(result):
        one = step_kind(tensor)
        if one <= Kind.INJECTIVE and tensor is result and kind is Kind.REDUCTION:
            return Kind.ANCHOR  # something was summed, and used again: a softmax
        kind = max(kind, one)
    return kind


def step_kind(tensor: Tensor) -> Kind:
    """The kind of one expression."""
    axes = [axis.name for axis in tensor.axes]
    kinds = [read_kind(axes, read) for read in tensor.reads]
    if tensor.reduced:
        kinds.append(Kind.ELEMENTWISE)  # a sum reads what it has so far
    kind = max(kinds, default=Kind.ELEMENTWISE)
    if kind is Kind.BROADCAST and Kind.ELEMENTWISE in kinds:
        return Kind.ELEMENTWISE  # x + bias
    if kind is not Kind.OPAQUE:
        return kind
    if not tensor.reduced:
        return Kind.OPAQUE
    if multiplies(tensor) or not all(map(whole_axes(tensor), tensor.reads)):
        return Kind.ANCHOR
    return Kind.REDUCTION


def multiplies(tensor: Tensor) -> bool:
    """Σ a·b, where each of the two is used for several results: a matmul."""
    match tensor.value:
        case Reduction(name="+", body=Operation(name="*", inputs=(Read(), Read()))):
            axes = {axis.name for axis in tensor.axes}
            for read in tensor.reads:
                used = set().union(*(index.names for index in read.indices))
                if axes <= used:
                    return False
            return True
    return False


def whole_axes(tensor: Tensor) -> Callable[[Read], bool]:
    """Whether a read has the summed axes alone in an index, not as in x[i + k]."""
    summed = {axis.name: affine(axis) for axis in tensor.reduced}

    def test(read: Read) -> bool:
        for index in read.indices:
            found = index.names & summed.keys()
            if found and index not in [summed[name] for name in found]:
                return False
        return True

    return test


# Groups -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """An operation of a graph.

    Attributes:
        reads: names of the steps that it reads; inputs of the graph are not among them.
    """

    name: str
    kind: Kind
    reads: tuple[str, ...] = ()


def readers(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Step → who reads it."""
    found: dict[str, list[Step]] = {step.name: [] for step in steps}
    for step in steps:
        for name in step.reads:
            found[name].append(step)
    return found


def dominators(
    steps: Sequence[Step], outputs: Iterable[str]
) -> dict[str, tuple[str, Kind] | None]:
    """Step → its post-dominator, and the largest kind of what reads on the way there.

    None: a result of the graph, or a step from which ways go to several.
    """
    results = set(outputs)
    used = readers(steps)
    found: dict[str, tuple[str, Kind] | None] = {}
    depth: dict[str, int] = {}
    for step in reversed(steps):
        name = step.name
        found[name], depth[name] = None, 1
        if name in results or not used[name]:
            continue
        meeting: str | None = used[name][0].name
        kind = max(each.kind for each in used[name])
        for other in used[name][1:]:
            there: str | None = other.name
            while meeting != there and meeting is not None and there is not None:
                # the deeper of the two goes up; both, where they are equally deep
                down = depth[meeting] - depth[there]
                if down >= 0:
                    meeting, kind = up(found[meeting], kind)
                if down <= 0:
                    there, kind = up(found[there], kind)
            meeting = meeting if meeting == there else None
        if meeting is not None:
            found[name], depth[name] = (meeting, kind), depth[meeting] + 1
    return found


def up(link: tuple[str, Kind] | None, kind: Kind) -> tuple[str | None, Kind]:
    """One step towards the results."""
    return (None, kind) if link is None else (link[0], max(kind, link[1]))


def between(used: Mapping[str, Sequence[Step]], start: str, end: str) -> list[str]:
    """The steps on all ways from one to another, without the two."""
    found: dict[str, None] = {}
    waiting = [start]
    while waiting:
        for reader in used[waiting.pop()]:
            if reader.name != end and reader.name not in found:
                found[reader.name] = None
                waiting.append(reader.name)
    return [*found]


def may_fuse(
    kind: Kind, way: Kind, between: Sequence[Kind], end: Kind, second: bool
) -> bool:
    """Whether a step joins its post-dominator, with all that lies between.

    Args:
        way: the largest kind of an operation that reads on the way, the last included.
        between: for each step in between, the kind of the function that it is in.
        end: the kind of the function that the post-dominator is in.
        second: whether this is the second round.
    """
    if kind is Kind.ANCHOR:
        fits = all(each <= Kind.BROADCAST for each in (*between, end))
        return not second and way is Kind.ELEMENTWISE and fits
    if kind <= Kind.BROADCAST:
        fits = all(each <= Kind.INJECTIVE for each in between)
        return way <= Kind.REDUCTION and fits and end <= Kind.ANCHOR
    if kind is Kind.INJECTIVE:
        return second and all(each <= Kind.INJECTIVE for each in (*between, end))
    return False


def fuse_groups(steps: Sequence[Step], outputs: Iterable[str]) -> list[list[str]]:
    """The functions, each a list of steps, by their first ones.

    Args:
        steps: each after those that it reads.
        outputs: what the graph returns.
    """
    used = readers(steps)
    dominator = dominators(steps, outputs)
    home = {step.name: step.name for step in steps}  # step → the last of its function
    kind = {step.name: step.kind for step in steps}  # … → the kind of the function
    for second in (False, True):
        for step in steps:
            link = dominator[step.name]
            if link is None or home[step.name] == home[link[0]]:
                continue
            end, way = link
            inside = between(used, step.name, end)
            kinds = [kind[home[name]] for name in inside]
            group = home[end]
            if not may_fuse(kind[home[step.name]], way, kinds, kind[group], second):
                continue
            moved = {home[name] for name in (step.name, *inside)} - {group}
            if any(kind[root] is Kind.ANCHOR for root in moved):
                kind[group] = Kind.ANCHOR
            for name, root in home.items():
                if root in moved:
                    home[name] = group
    groups: dict[str, list[str]] = {}
    for step in steps:
        groups.setdefault(home[step.name], []).append(step.name)
    return [*groups.values()]
