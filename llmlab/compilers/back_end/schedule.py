"""Schedules: how a program runs, not what it computes.

    [("tile", "j", 32), ("tile", "i", 14), ("reorder", "j_o", "i_o", "k", "i_i", "j_i"),
     ("cache", "C", "i_o"), ("unroll", "i_i"), ("vectorise", "j_i")]

is data: a list of steps, each with the names of loops and buffers. `apply` carries them
out one after the other. Every step asks the dependences first, and one that would
change what is computed, or leave an array, is refused with the reason.

    step                          what becomes of the program
    ----------------------------  ----------------------------------------------------
    tile(loop, size)              loop → loop_o around loop_i, of `size` iterations
    reorder(loop, …)              loops directly inside each other, in this order
    unroll · vectorise · parallel how a loop runs (`ir`)
    merge(first, second)          two loops one after the other become the first
    move(loop, before)            a loop goes up to before another one
    inline(buffer)                computed where it is read, not written
    pack(buffer, loop, order)     what an iteration of `loop` reads, copied side by side
    cache(buffer, loop)           what it writes is kept in registers until its end
    partial_sums(loop, at)        one sum for each iteration of `loop`, added up later
    prefetch(buffer, elements)    lines are asked for before they are read
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from llmlab.compilers.back_end.dependence import (
    Access,
    accesses,
    carried,
    changed_order,
    may_meet,
    overtaken,
    pairs,
)
from llmlab.compilers.back_end.ir import (
    Affine,
    Buffer,
    Limit,
    Load,
    Loop,
    Node,
    Number,
    Program,
    Store,
    dense,
    mapped,
    reindexed,
    rewritten,
    var,
    walk,
)

Step = tuple
MOST_UNROLLED = 64
MOST_LANES = 64


class NotLegal(ValueError):
    """A step that would change the result, or that cannot be done here."""


def apply(program: Program, schedule: Sequence[Step]) -> Program:
    """The program after all steps.

    Raises:
        NotLegal: the first step that is refused, and why.
    """
    for number, step in enumerate(schedule, 1):
        name, *arguments = step
        primitive = PRIMITIVES.get(name)
        if primitive is None:
            raise NotLegal(f"step {number}: {name!r} must be one of {[*PRIMITIVES]}")
        try:
            program = primitive(program, *arguments)
        except (ValueError, TypeError) as problem:
            said = f"step {number}, {name}({', '.join(map(str, arguments))}): {problem}"
            raise NotLegal(said) from None
    return program


def around(program: Program, name: str) -> tuple[Loop, ...]:
    """The loops around a loop."""
    for node, loops in walk(program.body):
        if isinstance(node, Loop) and node.var == name:
            return loops
    raise NotLegal(f"loop={name!r} must be one of {program.loops}")


def put(program: Program, name: str, new: Callable[[Loop], object]) -> Program:
    """With something in the place of a loop."""

    def change(node: Node) -> object:
        return new(node) if isinstance(node, Loop) and node.var == name else node

    return replace(program, body=rewritten(program.body, change))


def refuse_local(program: Program, buffer: str) -> None:
    """A copy that lives in a loop is not copied again, nor done away with."""
    for node, _ in walk(program.body):
        if isinstance(node, Loop) and buffer in node.local:
            raise NotLegal(f"{buffer} lives in {node.var}: it is a copy already")


def told(met: tuple[Access, Access, dict]) -> str:
    """A dependence in words."""
    a, b, found = met
    words = {"=": "the same", "<": "a later", ">": "an earlier"}
    name = f"{a.buffer}[{', '.join(map(str, a.index))}]"
    other = f"{b.buffer}[{', '.join(map(str, b.index))}]"
    verbs = ["read" if not each.op else "written" for each in (a, b)]
    ways = [f"{words[w]} {loop}" for loop, w in found.items() if w != "="]
    where = f" in {' and '.join(ways)}" if ways else ""
    return f"{name} is {verbs[0]}, and {other} is {verbs[1]}{where}"


# Loops --------------------------------------------------------------------------------


def tile(program: Program, loop: str, size: int) -> Program:
    """A loop becomes two: tiles of `size` iterations, and those of a tile."""
    found = program.loop(loop)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise NotLegal(f"size={size!r} must be a whole number from 1")
    if found.kind != "serial":
        raise NotLegal(f"{loop} is {found.kind} already: tile it before")
    outer, inner = f"{loop}_o", f"{loop}_i"
    value = var(outer) * size + var(inner)

    def index(each: Affine) -> Affine:
        return each.put(loop, value)

    limits = tuple(Limit(index(each.index), each.total) for each in found.limits)
    first = tuple(Limit(x.index.put(inner, 0), x.total) for x in limits)
    if found.extent % size:
        limits += (Limit(value, found.extent),)
    body = reindexed(found.body, index)
    low = Loop(inner, size, body, limits=limits, local=found.local)
    tiles = -(-found.extent // size)
    return put(program, loop, lambda _: Loop(outer, tiles, (low,), limits=first))


def chain_of(program: Program, names: Sequence[str]) -> list[Loop]:
    """Loops that stand directly inside each other, from the outermost in.

    Raises:
        NotLegal: they do not, or something stands between them.
    """
    if len(set(names)) < len(names) or len(names) < 2:
        raise NotLegal(f"loops={list(names)} must be two or more, each once")
    depth = {name: len(around(program, name)) for name in names}
    inner = max(names, key=lambda name: depth[name])
    nest = {inner, *(loop.var for loop in around(program, inner))}
    if apart := [name for name in names if name not in nest]:
        raise NotLegal(f"{inner} does not stand inside {apart[0]}")
    chain = [program.loop(min(names, key=lambda name: depth[name]))]
    while len(chain) < len(names):
        last = chain[-1]
        inside = last.body[0]
        if len(last.body) > 1 or not isinstance(inside, Loop):
            raise NotLegal(f"there is more than one loop directly inside {last.var}")
        if inside.var not in names:
            raise NotLegal(f"{inside.var} stands between them: name it, too")
        chain.append(inside)
    return chain


def reorder(program: Program, *loops: str) -> Program:
    """Loops that stand directly inside each other, in a new order."""
    chain = chain_of(program, loops)
    old = [loop.var for loop in chain]
    by_name = {loop.var: loop for loop in chain}
    for place, name in enumerate(loops):
        if by_name[name].kind in ("vector", "parallel"):
            raise NotLegal(f"{name} is {by_name[name].kind} already: reorder before")
        if by_name[name].local and name != old[-1]:
            raise NotLegal(f"{by_name[name].local[0]} lives in {name}: reorder before")
        for limit in by_name[name].limits:
            late = [v for v in limit.index.variables if v in loops[place + 1 :]]
            if late:
                raise NotLegal(
                    f"where {name} ends depends on {late[0]}, which is inside"
                )
    if chain[-1].local and loops[-1] != old[-1]:
        raise NotLegal(f"{chain[-1].local[0]} lives in {old[-1]}: reorder before")
    outside = around(program, old[0])
    met = changed_order(chain[-1].body, (*outside, *chain), old, loops)
    if met:
        raise NotLegal(f"the order would turn round: {told(met)}")
    body = chain[-1].body
    for name in reversed(loops):
        body = (replace(by_name[name], body=body),)
    return put(program, old[0], lambda _: body)


def of_kind(program: Program, loop: str, kind: str) -> Program:
    """A loop that runs in another way."""
    found = program.loop(loop)
    if found.kind != "serial":
        raise NotLegal(f"{loop} is {found.kind} already")
    return put(program, loop, lambda node: replace(node, kind=kind))


def unroll(program: Program, loop: str) -> Program:
    """The iterations of a loop are written out."""
    if program.loop(loop).extent > MOST_UNROLLED:
        raise NotLegal(f"{loop} would be written out more than {MOST_UNROLLED} times")
    return of_kind(program, loop, "unroll")


def vectorise(program: Program, loop: str) -> Program:
    """The iterations of an innermost loop become the lanes of a register."""
    found = program.loop(loop)
    if any(isinstance(node, Loop) for node in found.body):
        raise NotLegal(f"{loop} has loops inside: only an innermost loop")
    if found.local:
        raise NotLegal(f"{found.local[0]} lives in {loop}: each lane would need one")
    if found.extent not in (2, 4, 8, 16, 32, MOST_LANES):
        raise NotLegal(
            f"{loop} has {found.extent} iterations: tile it to a power of two up to"
            f" {MOST_LANES}"
        )
    met = carried(found, around(program, loop))
    if met:
        raise NotLegal(f"lanes would meet: {told(met)} (see partial_sums)")
    return of_kind(program, loop, "vector")


def parallel(program: Program, loop: str) -> Program:
    """The iterations of a loop are done by several threads."""
    found, outside = program.loop(loop), around(program, loop)
    if any(each.kind == "parallel" for each in outside):
        raise NotLegal(f"{loop} is inside a parallel loop")
    met = carried(found, outside)
    if met:
        raise NotLegal(f"threads would meet: {told(met)}")
    return of_kind(program, loop, "parallel")


def merge(program: Program, first: str, second: str) -> Program:
    """Two loops of which one follows the other become one."""
    a, b = program.loop(first), program.loop(second)
    outside = around(program, first)
    siblings = outside[-1].body if outside else program.body
    if a not in siblings or b not in siblings:
        raise NotLegal(f"{first} and {second} do not stand in the same loop")
    place = siblings.index(a)
    if siblings[place + 1 : place + 2] != (b,):
        raise NotLegal(f"{second} does not follow {first} directly")

    def index(each: Affine) -> Affine:
        return each.put(second, var(first))

    renamed = reindexed((replace(b, var=first),), index)[0]
    same = (a.extent, a.kind, a.limits) == (b.extent, b.kind, renamed.limits)
    if not same:
        raise NotLegal(f"{first} and {second} do not run in the same way, or as long")
    met = overtaken(a, renamed, outside)
    if met:
        raise NotLegal(f"{told(met)}: it would come too early")
    both = replace(a, body=a.body + renamed.body, local=a.local + renamed.local)
    met = a.kind in ("vector", "parallel") and carried(both, outside)
    if met:
        raise NotLegal(f"{a.kind} iterations would meet: {told(met)}")
    without = put(program, second, lambda _: [])
    return put(without, first, lambda _: both)


def move(program: Program, loop: str, before: str) -> Program:
    """A loop goes up, to before another one in the same body."""
    moved, target = program.loop(loop), program.loop(before)
    outside = around(program, loop)
    siblings = outside[-1].body if outside else program.body
    if target not in siblings or siblings.index(target) >= siblings.index(moved):
        raise NotLegal(f"{before} does not come before {loop} in the same loop")
    skipped = siblings[siblings.index(target) : siblings.index(moved)]
    known = dict.fromkeys([each.var for each in outside], "=")
    one, two = accesses(skipped, outside), accesses((moved,), outside)
    for a, b in pairs(one, two):
        if may_meet(a, b, known):
            raise NotLegal(f"{told((a, b, {}))}: it would come too early")
    without = put(program, loop, lambda _: [])
    return put(without, before, lambda node: [moved, node])


# Buffers ------------------------------------------------------------------------------


def inline(program: Program, buffer: str) -> Program:
    """What an elementwise loop nest writes is computed where it is read."""
    if program.buffer(buffer).role != "temporary":
        raise NotLegal(f"{buffer} is an {program.buffer(buffer).role}")
    refuse_local(program, buffer)
    writers = [
        (node, loops)
        for node, loops in walk(program.body)
        if isinstance(node, Store) and node.buffer == buffer
    ]
    (node, loops), *more = writers
    names = [each.terms[0][0] if each.terms else None for each in node.index]
    known = {loop.var for loop in loops}
    plain = [var(name) for name in names if name] == [e for e in node.index if e.terms]
    alone = all(len(loop.body) == 1 for loop in loops)
    if more or node.op != "=" or not plain or not alone or known != {*names} - {None}:
        raise NotLegal(f"{buffer} is not written by an elementwise nest of its own")
    top = loops[0].var if loops else None
    place = program.body.index(loops[0] if loops else node)
    after = program.body[place + 1 :]
    read = {e.buffer for e in accesses((node,)) if not e.op}
    written = {e.buffer for e in accesses(after) if e.op}
    if read & written:
        raise NotLegal(f"{(read & written).pop()} is changed before {buffer} is read")

    def instead(load: Load) -> object:
        if load.buffer != buffer:
            return load
        values = dict(zip(names, load.index, strict=True))

        def index(each: Affine) -> Affine:
            found = Affine((), each.constant)
            for name, factor in each.terms:
                found = found + values[name] * factor
            return found

        return mapped(node.value, lambda e: e, index)

    def change(each: Node) -> object:
        if isinstance(each, Loop):
            return [] if each.var == top else each
        if each == node:
            return []
        return replace(each, value=mapped(each.value, instead, lambda e: e))

    buffers = tuple(each for each in program.buffers if each.name != buffer)
    return replace(program, buffers=buffers, body=rewritten(program.body, change))


def pack(
    program: Program, buffer: str, loop: str, order: Sequence[int] = ()
) -> Program:
    """What an iteration of `loop` reads of a buffer, copied without gaps before.

    Args:
        loop: "" for the whole program: it is copied once.
        order: of the dimensions; the last lies side by side.
    """
    return copied(program, buffer, loop, tuple(order), "memory")


def cache(program: Program, buffer: str, loop: str) -> Program:
    """What an iteration of `loop` computes of a buffer is kept in registers."""
    return copied(program, buffer, loop, (), "registers")


def copied(
    program: Program, buffer: str, loop: str, order: tuple, memory: str
) -> Program:
    """An iteration works on a copy of the box that it touches of a buffer."""
    target = program.buffer(buffer)
    refuse_local(program, buffer)
    rank = len(target.shape)
    if order and sorted(order) != list(range(rank)):
        raise NotLegal(f"order={order} must name each of {rank} dimensions")
    outside = (*around(program, loop), program.loop(loop)) if loop else ()
    if outside and outside[-1].kind == "vector":
        raise NotLegal(f"{loop} is vector already: each lane would need a copy")
    body = outside[-1].body if outside else program.body
    touched = [each for each in accesses(body, outside) if each.buffer == buffer]
    if not touched:
        raise NotLegal(f"{buffer} is not touched in {loop or 'the program'}")
    base, box = box_of(touched, {each.var for each in outside}, target)
    name = f"{buffer}_{loop or 'all'}"
    if name in program.names:
        raise NotLegal(f"{buffer} has a copy in {loop} already")
    local = Buffer(name, box, target.dtype, "temporary", dense(box, order), memory)

    def instead(each: Load) -> Load:
        if each.buffer != buffer:
            return each
        index = tuple(i - b for i, b in zip(each.index, base, strict=True))
        return Load(name, index)

    inside = reindexed(body, lambda each: each, instead)
    written = [each for each in touched if each.op]
    everywhere = [e for e in accesses(program.body) if e.buffer == buffer]
    elsewhere = len(everywhere) > len(touched)
    load = not covered(body, outside, buffer, base, box, target)
    store = bool(written) and (target.role == "output" or elsewhere or load)
    whole = [each for each in touched if whole_box(each, outside, base, box, target)]
    written_before = any(e.op for e in everywhere[: everywhere.index(touched[0])])
    if load and target.role != "input" and not written_before:
        raise NotLegal(f"{buffer} holds nothing yet before {loop or 'the program'}")
    if load:
        if not whole:
            raise NotLegal(f"no access goes through all that is touched of {buffer}")
        inside = (copying(whole[0], target, local, base, "in"), *inside)
    if store:
        if written[-1] not in whole:
            raise NotLegal(f"{written[-1].index} does not write a whole box")
        inside = (*inside, copying(written[-1], target, local, base, "out"))
    buffers = (*program.buffers, local)
    if not load and not store and target.role == "temporary" and not elsewhere:
        buffers = tuple(each for each in buffers if each.name != buffer)
    program = replace(program, buffers=buffers)
    if not loop:
        return replace(program, body=inside)
    return put(program, loop, lambda n: replace(n, body=inside, local=(*n.local, name)))


def box_of(
    touched: Sequence[Access], outer: set[str], target: Buffer
) -> tuple[list[Affine], tuple[int, ...]]:
    """Where the part that is touched begins, and how large it is."""
    base, box = [], []
    for dim, size in enumerate(target.shape):
        starts, ends = set(), set()
        for each in touched:
            index = each.index[dim]
            terms = tuple(t for t in index.terms if t[0] in outer)
            extents = {loop.var: loop.extent for loop in each.around}
            rest = index - Affine(terms)
            if rest.constant < 0 or any(f < 0 for _, f in rest.terms):
                raise NotLegal(f"{target.name} is read backwards or before its tile")
            starts.add(Affine(terms))
            end = rest.constant + sum(f * (extents[v] - 1) for v, f in rest.terms)
            for loop in each.around:
                for limit in loop.limits:
                    if limit.index == rest:  # a tile of a tile
                        end = min(end, limit.total - 1)
            ends.add(end)
        if len(starts) > 1:
            places = " and ".join(sorted(map(str, starts)))
            raise NotLegal(f"{target.name} is touched at two places, {places}")
        base.append(starts.pop())
        box.append(min(max(ends) + 1, size))
    return base, tuple(box)


def gapless(access: Access, base: Sequence[Affine], box: Sequence[int]) -> bool:
    """Whether an access goes through every element of a box."""
    extents = {loop.var: loop.extent for loop in access.around}
    used: set[str] = set()
    for index, start, size in zip(access.index, base, box, strict=True):
        rest = index - start
        reach = rest.constant
        if reach or used & {*rest.variables}:
            return False
        used |= {*rest.variables}
        for name, factor in sorted(rest.terms, key=lambda term: term[1]):
            if factor > reach + 1:
                return False
            reach += factor * (extents[name] - 1)
        if reach + 1 < size:
            return False
    return True


def covered(
    body: Sequence[Node],
    outside: tuple[Loop, ...],
    buffer: str,
    base: Sequence[Affine],
    box: Sequence[int],
    target: Buffer,
) -> bool:
    """Whether the first thing that happens to the box is that all of it is written."""
    for node in body:
        touched = [e for e in accesses((node,), outside) if e.buffer == buffer]
        if touched:
            # alone in its nest: nothing beside it could read what is not there yet
            alone = len(touched) == 1 and touched[0].op == "="
            return alone and whole_box(touched[0], outside, base, box, target)
    return False


def whole_box(
    access: Access,
    outside: tuple[Loop, ...],
    base: Sequence[Affine],
    box: Sequence[int],
    target: Buffer,
) -> bool:
    """Whether an access goes through all of a box that lies inside the array."""
    outer = {each.var for each in outside}
    used = {name for each in access.index for name in each.variables} - outer
    loops = [loop for loop in access.around if loop.var in used]
    limits = [limit for loop in loops for limit in loop.limits]
    fits = all(harmless(limit, access, base, box, target) for limit in limits)
    return fits and gapless(access, base, box)


def harmless(
    limit: Limit,
    access: Access,
    base: Sequence[Affine],
    box: Sequence[int],
    target: Buffer,
) -> bool:
    """Whether a limit only keeps an index inside its array, or inside the box.

    The limit of an outer tile says nothing more than that of the inner one.
    """
    for dim, index in enumerate(access.index):
        ends = ((index, target.shape[dim]), (index - base[dim], box[dim]))
        for whole, size in ends:
            inner = whole - limit.index
            rising = all(factor > 0 for _, factor in inner.terms)
            if limit.total >= size and not inner.constant and rising:
                return True
    return False


def copying(
    access: Access, target: Buffer, local: Buffer, base: Sequence[Affine], way: str
) -> Node:
    """The nest that fills a copy, or writes it back.

    Its loops are those by which `access` goes through the copy, of the same kinds.
    """
    rest = [index - start for index, start in zip(access.index, base, strict=True)]
    used = {name for each in rest for name in each.variables}
    loops = [loop for loop in access.around if loop.var in used]
    new = {loop.var: var(f"{local.name}_{way}_{loop.var}") for loop in loops}

    def renamed(index: Affine) -> Affine:
        for name, value in new.items():
            index = index.put(name, value)
        return index

    there = Load(target.name, tuple(map(renamed, access.index)))
    here = Load(local.name, tuple(map(renamed, rest)))
    node: Node = Store(here.buffer, here.index, there)
    if way == "out":
        node = Store(there.buffer, there.index, here)
    for loop in reversed(loops):
        limits = tuple(Limit(renamed(each.index), each.total) for each in loop.limits)
        name = new[loop.var].variables[0]
        node = Loop(name, loop.extent, (node,), loop.kind, limits)
    return node


def partial_sums(program: Program, loop: str, at: str) -> Program:
    """One sum for each iteration of `loop`; at the end of `at`'s body they are added.

    The iterations of `loop` no longer meet, and may be lanes.
    """
    outside = around(program, loop)
    names = [each.var for each in outside]
    if at not in names:
        raise NotLegal(f"at={at!r} must be a loop around {loop}: {names}")
    stores = [n for n, _ in walk(program.loop(loop).body) if isinstance(n, Store)]
    store = stores[0]
    if len(stores) > 1 or store.op == "=":
        raise NotLegal(f"{loop} must hold one statement, += or max=")
    inner = [*names[names.index(at) + 1 :], loop]
    inner += [n.var for n, _ in walk(program.loop(loop).body) if isinstance(n, Loop)]
    for each in store.index:
        moved = [name for name in each.variables if name in inner]
        if moved:
            raise NotLegal(f"{store.place} changes with {moved[0]}: put at inside it")
    (nest,) = [
        n for n in program.loop(at).body if any(x == store for x, _ in walk((n,)))
    ]
    inside = [each.buffer for each in accesses((nest,))]
    if inside.count(store.buffer) > 1:
        raise NotLegal(f"{store.buffer} is touched by more than the sum inside {at}")
    extent = program.loop(loop).extent
    name = f"{store.buffer}_{loop}"
    if name in program.names:
        raise NotLegal(f"{loop} has partial sums already")
    start = 0.0 if store.op == "+=" else -math.inf
    first, last = f"{name}_zero", f"{name}_sum"
    zero = Loop(first, extent, (Store(name, (var(first),), Number(start)),))
    value = Load(name, (var(last),))
    total = Loop(last, extent, (Store(store.buffer, store.index, value, store.op),))

    def change(node: Node) -> object:
        return Store(name, (var(loop),), node.value, node.op) if node == store else node

    def around_it(node: Loop) -> Loop:
        inside: list[Node] = []
        for each in node.body:
            here = any(n == store for n, _ in walk((each,)))
            new = rewritten((each,), change)
            inside += [zero, *new, total] if here else [each]
        return replace(node, body=tuple(inside), local=(*node.local, name))

    program = put(program, at, around_it)
    local = Buffer(name, (extent,), "f32", "temporary", memory="registers")
    return replace(program, buffers=(*program.buffers, local))


def prefetch(program: Program, buffer: str, elements: int) -> Program:
    """Where lanes of a buffer are read, those so far ahead are asked for already.

    It touches nothing: what lies beyond the array is never asked for in earnest.
    """
    found = program.buffer(buffer)
    if isinstance(elements, bool) or not isinstance(elements, int) or elements < 1:
        raise NotLegal(f"elements={elements!r} must be a whole number from 1")
    new = replace(found, ahead=elements)
    buffers = tuple(new if each == found else each for each in program.buffers)
    return replace(program, buffers=buffers)


PRIMITIVES: dict[str, Callable[..., Program]] = {
    each.__name__: each
    for each in (
        tile,
        reorder,
        unroll,
        vectorise,
        parallel,
        merge,
        move,
        inline,
        pack,
        cache,
        partial_sums,
        prefetch,
    )
}
