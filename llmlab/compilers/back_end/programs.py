"""Programs to schedule: written by hand, or made from the front end's graph.

They are naive on purpose: one loop nest for each operation, each writes all of its
result before the next begins.

    matmul(n, k, m)         C = A B
    matvec_4bit(rows, columns, group)
                            y = W x with codes of 4 bits and a scale for each group
    from_graph(graph)       what the front end captured
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmlab.compilers.back_end.ir import (
    Affine,
    Binary,
    Buffer,
    Codes,
    Dot,
    Expr,
    Load,
    Loop,
    Node,
    Number,
    Pair,
    Program,
    Store,
    Unary,
    var,
)
from llmlab.compilers.front_end import Graph
from llmlab.compilers.front_end import Node as Value

BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "maximum": "max"}
LETTERS = "ijlmnopqrsuvw"  # of loops, for each dimension; k runs along a sum
LARGEST = 32767.0  # whole number of 16 bits
SMALLEST = 1e-30  # taken for max |x| of a group of zeros, which needs a step, too


class NotLowered(ValueError):
    """An operation of the graph that has no loops here."""


def nest(names: Sequence[str], extents: Sequence[int], node: Node) -> Node:
    """A statement in loops, the first the outermost."""
    for name, extent in reversed([*zip(names, extents, strict=True)]):
        node = Loop(name, extent, (node,))
    return node


def at(*names: str) -> tuple[Affine, ...]:
    """An index."""
    return tuple(var(name) for name in names)


def times(*factors: Expr) -> Expr:
    """A product."""
    found = factors[0]
    for each in factors[1:]:
        found = Binary("*", found, each)
    return found


def matmul(n: int, k: int, m: int) -> Program:
    """C (n, m) = A (n, k) B (k, m)."""
    buffers = (Buffer("A", (n, k)), Buffer("B", (k, m)))
    buffers += (Buffer("C", (n, m), role="output"),)
    zero = Store("C", at("zi", "zj"), Number(0.0))
    product = times(Load("A", at("i", "k")), Load("B", at("k", "j")))
    add = Store("C", at("i", "j"), product, "+=")
    body = (nest(("zi", "zj"), (n, m), zero), nest("ijk", (n, m, k), add))
    return Program("matmul", buffers, body)


def matvec_4bit(rows: int, columns: int, group: int = 128, streams: int = 2) -> Program:
    """y (rows) = W x, each weight a code of 4 bits: s (code − 8).

    A word of 32 bits holds eight codes: byte b has two, halves h = 0 and 1 of the group
    (the format of part 06). x is rounded to 16 bits, with a step for each group, so
    that two codes and two numbers of x are multiplied and added up by one `Dot`:

        E[g]       = max |x| of the group; the step is E / 32,767
        t[i, g, m] = Σ_bh (code_b − 8) x_b + (code_b+2 − 8) x_b+2   of whole numbers
        z[i, m]    = Σ_g s[i, g] E[g] t[i, g, m]
        y[i]       = Σ_m z[i, m] / 32,767

    What the −8 give is the same for all rows: X[g, m], with which t begins.
    """
    if group % 8 or columns % group:
        raise ValueError(
            f"group={group} must be a multiple of 8 that divides columns={columns}"
        )
    if rows % streams:
        raise ValueError(f"streams={streams} must divide rows={rows}")
    G, M, half = columns // group, group // 8, group // 2
    many = (streams, rows // streams)
    buffers = (
        Buffer("w", (*many, G, M), "u32"),
        Buffer("s", (*many, G)),
        Buffer("x", (columns,)),
        Buffer("y", many, role="output"),
        Buffer("E", (G,), role="temporary"),
        Buffer("xs", (G, 2, 2, M), "u32", role="temporary"),
        Buffer("X", (G, M), "i32", role="temporary"),
        Buffer("t", (*many, G, M), "i32", role="temporary"),
        Buffer("z", (*many, M), role="temporary"),
    )
    x = Load("x", (var("Eg") * group + var("Ek"),))
    size = Binary("max", x, Unary("neg", x))
    g, b, h, m = (var(f"x{name}") for name in "gbhm")
    place = g * group + h * half + m * 4 + b
    steps = Binary("/", Number(LARGEST), Load("E", (g,)))
    rounded = Pair(*(times(Load("x", (place + more,)), steps) for more in (0, 2)))
    eights = Pair(Number(-8.0), Number(-8.0))
    less = Dot(eights, Load("xs", at("Xg", "Xb", "Xh", "Xm")))
    start = Store("t", at("tq", "ti", "tg", "tm"), Load("X", at("tg", "tm")))
    codes = Codes(Load("w", at("q", "i", "g", "m")), var("b") * 8 + var("h") * 4)
    total = Dot(codes, Load("xs", at("g", "b", "h", "m")))
    scale = times(Load("s", at("aq", "ai", "ag")), Load("E", at("ag")))
    weighed = times(scale, Unary("float", Load("t", at("aq", "ai", "ag", "am"))))
    lane = times(Load("z", at("sq", "si", "sm")), Number(1 / LARGEST))
    sizes = (G, 2, 2, M)
    nests = (
        ("eg", (G,), Store("E", at("eg"), Number(SMALLEST))),
        ("Eg Ek", (G, group), Store("E", at("Eg"), size, "max=")),
        ("xg xb xh xm", sizes, Store("xs", at("xg", "xb", "xh", "xm"), rounded)),
        ("Zg Zm", (G, M), Store("X", at("Zg", "Zm"), Number(0.0))),
        ("Xg Xb Xh Xm", sizes, Store("X", at("Xg", "Xm"), less, "+=")),
        ("zq zi zm", (*many, M), Store("z", at("zq", "zi", "zm"), Number(0.0))),
        ("tq ti tg tm", (*many, G, M), start),
        (
            "q i g b h m",
            (*many, *sizes),
            Store("t", at("q", "i", "g", "m"), total, "+="),
        ),
        ("aq ai ag am", (*many, G, M), Store("z", at("aq", "ai", "am"), weighed, "+=")),
        ("yq yi", many, Store("y", at("yq", "yi"), Number(0.0))),
        ("sq si sm", (*many, M), Store("y", at("sq", "si"), lane, "+=")),
    )
    body = tuple(nest(names.split(), size, store) for names, size, store in nests)
    return Program("matvec_4bit", buffers, body)


def words(codes: Tensor) -> Tensor:
    """Packed codes of part 06, (rows, columns / 2) bytes, as the input `w`."""
    return codes.contiguous().view(torch.int32)


# From the front end -------------------------------------------------------------------


def from_graph(graph: Graph, name: str = "program") -> Program:
    """A loop nest for each operation of a graph; sums and products begin with zeros.

    Raises:
        NotLowered: an operation that has no loops here.
    """
    if graph.updates:
        raise NotLowered("a graph that changes its inputs")
    strange = [node.op for node in graph.outputs if node not in graph.work]
    if strange:
        raise NotLowered(f"an output that is an {strange[0]}: nothing computes it")
    if len(set(graph.outputs)) < len(graph.outputs):
        raise NotLowered("one tensor is returned twice: return it once")
    buffers: dict[Value, Buffer] = {}
    body: list[Node] = []
    for number, node in enumerate(graph.inputs):
        buffers[node] = buffer_of(node, f"in{number}", "input")
    for number, node in enumerate(graph.work):
        role = "output" if node in graph.outputs else "temporary"
        buffers[node] = buffer_of(node, f"t{number}", role)
        body += nests(node, buffers, str(number))
    # outputs stand in the order in which the function returns them
    returned = iter(graph.outputs)
    listed = [next(returned) if node in graph.outputs else node for node in buffers]
    return Program(name, tuple(buffers[node] for node in listed), tuple(body))


def buffer_of(node: Value, name: str, role: str) -> Buffer:
    """The array of a value."""
    if node.type.dtype != torch.float32:
        raise NotLowered(f"{node.op} of {node.type}: only float32")
    if len(node.type.shape) > len(LETTERS):
        raise NotLowered(f"{node.op} of {node.type}: {len(LETTERS)} dimensions at most")
    return Buffer(name, node.type.shape or (1,), role=role)


def nests(node: Value, buffers: dict[Value, Buffer], number: str) -> list[Node]:
    """The loops of one operation."""
    target = buffers[node]
    names = [f"{LETTERS[dim]}{number}" for dim in range(len(target.shape))]
    # a dimension of one element has no loop, unless there would be none at all
    kept = [dim for dim, size in enumerate(target.shape) if size > 1]
    kept = kept or [len(names) - 1]

    def placed(prefix: str = "") -> tuple[Affine, ...]:
        dims = range(len(names))
        return tuple(
            var(prefix + names[dim]) if dim in kept else Affine() for dim in dims
        )

    def loops(node: Node, prefix: str = "") -> Node:
        sizes = [target.shape[dim] for dim in kept]
        return nest([prefix + names[dim] for dim in kept], sizes, node)

    index = placed()

    def read(value: Value, index: tuple[Affine, ...] = index) -> Expr:
        """A value, broadcast: where its size is 1, its index is 0."""
        if value.number is not None:
            return Number(value.number)
        if value not in buffers:
            raise NotLowered("a tensor that is no argument: hand it over as one")
        shape = buffers[value].shape
        last = index[len(index) - len(shape) :]
        return Load(
            buffers[value].name,
            tuple(Affine() if n == 1 else i for i, n in zip(last, shape, strict=True)),
        )

    if node.kind == "elementwise":
        values = [read(each) for each in node.inputs]
        value = Unary(node.op, *values) if len(values) == 1 else None
        value = value or Binary(BINARY[node.op], *values)
        return [loops(Store(target.name, index, value))]
    if node.op == "transpose":
        (order,) = node.attributes
        back = tuple(index[order.index(dim)] for dim in range(len(order)))
        value = read(node.inputs[0], back)
        return [loops(Store(target.name, index, value))]
    if node.kind not in ("reduction", "matmul"):
        raise NotLowered(f"{node.op} has no loops here")
    start = Number(float("-inf") if node.op == "max" else 0.0)
    zero = loops(Store(target.name, placed("z"), start), "z")
    along = f"k{number}"
    if node.kind == "reduction":
        (dim,) = node.attributes
        extent = node.inputs[0].type.shape[dim]
        value = read(node.inputs[0], (*index[:dim], var(along), *index[dim + 1 :]))
        place = (*index[:dim], Affine(), *index[dim + 1 :])
        outer = [d for d in kept if d != dim]
    else:
        a, b = node.inputs
        rows, column = index[:-1], index[-1]
        extent = a.type.shape[-1]
        last = (column, var(along)) if node.attributes[0] else (var(along), column)
        value = times(read(a, (*rows, var(along))), read(b, (*rows[:-1], *last)))
        place, outer = index, kept
    op = "max=" if node.op == "max" else "+="
    every = [*(names[d] for d in outer), along]
    sizes = [*(target.shape[d] for d in outer), extent]
    return [zero, nest(every, sizes, Store(target.name, place, value, op))]
