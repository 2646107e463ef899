"""Random programs, and a few known ones, for the tests of the front end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from llmlab.compilers.front_end import Graph, Node, Type, constant, made
from llmlab.compilers.front_end.capture import report

SHAPES = ((4, 6), (4, 1), (6,), (1, 6), (4, 4), (2, 4, 6), ())


def norm(x, gain):
    return x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + 1e-5) * gain


def twice(x):
    """A value with two readers, one of them a product."""
    e = torch.exp(x)
    return e @ e.mT, e.sum(-1)


def turned(x, w):
    """Transposes that meet below elementwise operations."""
    y = torch.tanh(x.mT) + (x * 2.0).mT
    return (y.mT @ w) / 4.0


def swiglu(x, w):
    gate, up = x @ w, x @ (w * 1.0)
    return F.silu(gate) * up


def noisy(x):
    first, second = torch.rand_like(x), torch.rand_like(x)
    torch.rand_like(x)  # nobody reads it, and the next draw is another one for it
    return x * 1.0 + (first - second)


def spoken(x):
    y = report(x + 1.0, "y")
    report(x + 1.0, "again")
    return y * 2.0


def changed(x, y):
    """Changes its first input, and reads it before and after."""
    before = x * 2.0
    x += y
    return before + x


KNOWN = {
    "norm": (norm, ((4, 6), (6,))),
    "twice": (twice, ((4, 6),)),
    "turned": (turned, ((4, 6), (6, 3))),
    "swiglu": (swiglu, ((4, 6), (6, 5))),
    "noisy": (noisy, ((4, 6),)),
    "spoken": (spoken, ((4, 6),)),
    "changed": (changed, ((4, 6), (4, 6))),
}


def inputs_of(shapes, seed: int = 0, dtype=torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]


@st.composite
def graphs(draw, largest: int = 14) -> Graph:
    """A program of operations on whatever fits, with several readers and results."""
    inputs = [
        Node("input", (), Type(draw(st.sampled_from(SHAPES)), torch.float64))
        for _ in range(draw(st.integers(1, 3)))
    ]
    nodes = [*inputs]
    for number in draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 0.25, 3.0]))):
        nodes.append(constant(number, torch.float64))
    for _ in range(draw(st.integers(1, largest))):
        nodes.append(draw(operations(nodes)))
    work = [node for node in nodes if node.kind not in ("input", "constant")]
    outputs = draw(st.lists(st.sampled_from(work), min_size=1, max_size=3))
    updates = {}
    fitting = [n for n in work if n.type == inputs[0].type]
    if fitting and draw(st.booleans()):
        updates[inputs[0]] = draw(st.sampled_from(fitting))
    return Graph(inputs, nodes, outputs, updates)


@st.composite
def operations(draw, nodes: list[Node]) -> Node:
    """One more operation on the values of a program."""
    x = draw(st.sampled_from(nodes))
    rank = len(x.type.shape)
    kinds = ["unary", "binary", "binary", "binary", "draw"]
    kinds += ["reduction", "transpose", "reshape"] if rank else []
    kinds += ["matmul"] if rank >= 2 else []
    match draw(st.sampled_from(kinds)):
        case "unary":
            return made(draw(st.sampled_from(["neg", "exp", "tanh"])), [tame(x)])
        case "draw":
            return made("draw", [x])
        case "reduction":
            op = draw(st.sampled_from(["sum", "max"]))
            return made(op, [x], (draw(st.integers(0, rank - 1)),))
        case "transpose":
            return made("transpose", [x], (tuple(draw(st.permutations(range(rank)))),))
        case "reshape":
            return made("reshape", [x], (draw(shapes_like(x.type.shape)),))
        case "matmul":
            fitting = [
                (y, t)
                for y in nodes
                for t in (False, True)
                if len(y.type.shape) == 2
                and y.type.shape[1 if t else 0] == x.type.shape[-1]
            ]
            if fitting:
                y, transposed = draw(st.sampled_from(fitting))
                return made("matmul", [x, y], (transposed,))
    fitting = [y for y in nodes if fits(x, y)]
    y = draw(st.sampled_from(fitting))
    op = draw(st.sampled_from(["add", "sub", "mul", "maximum", "div"]))
    return made(op, [x, y] if draw(st.booleans()) else [y, x])


def tame(x: Node) -> Node:
    return x


def shapes_like(shape: tuple[int, ...]) -> st.SearchStrategy:
    size = 1
    for each in shape:
        size *= each
    options = [shape, (size,), (1, size), (size, 1)]
    options += [(size // 2, 2)] if size % 2 == 0 else []
    return st.sampled_from(options)


def fits(x: Node, y: Node) -> bool:
    pairs = zip(reversed(x.type.shape), reversed(y.type.shape), strict=False)
    return all(a == b or 1 in (a, b) for a, b in pairs)
