"""Checks of 08-compilers/07-tensorrt.

Each exercise is marked by cases: what an answer says of small histograms, programs,
operations and layers, beside what usual mistakes say of them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers import tensorrt as trt
from llmlab.compilers.front_end import Graph, Node, Type, constant, made
from llmlab.compilers.tensorrt import Layer
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("08-compilers/07-tensorrt")


def value(*shape: int) -> Node:
    """An input."""
    return Node("input", (), Type(shape))


# 1 ------------------------------------------------------------------------------------


def divergence_cases() -> list[tuple[list[int], int, int]]:
    """(counts, kept, levels)."""
    return [
        ([8, 4, 2, 2, 1, 1], 4, 2),  # two bins a level, and two that are clipped
        ([9, 0, 3, 1, 0, 6, 2, 5], 8, 4),  # nothing is clipped; empty bins
        ([5, 1, 2, 7, 3, 2, 4], 5, 2),  # levels of unlike size
        ([4, 6, 1, 0, 3], 4, 2),  # the last bin is empty, and something is clipped
        ([4, 6, 1, 0, 0], 4, 2),  # the last bin is empty, and nothing is clipped
        ([3, 1, 4, 1, 5, 9, 2, 6], 6, 3),
    ]


def run_divergence(answer: Callable, n: int) -> Outcome:
    """Case n: the number."""
    counts, kept, levels = divergence_cases()[n]
    given = torch.tensor(counts)
    found = answer(given, kept, levels)
    if given.tolist() != counts:
        raise Mistake("the counts that you were given have changed: work on a copy")
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if not isinstance(found, numbers.Real):
        raise Mistake(f"return one number, not a {type(found).__name__}")
    what = f"the divergence of {counts} in {levels} levels, {kept} bins kept,"
    return {what: found if math.isinf(found) else round(float(found), 5)}


def diverging(
    clip_p: bool = True,
    clip_q: bool = False,
    filled_only: bool = True,
    mean: bool = True,
    normal: bool = True,
    swapped: bool = False,
    infinite: bool = True,
    whole: bool = False,
    last_level_takes_all: bool = False,
    beyond: int = 0,
    per_bin: bool = False,
    full: str = "source",
    level_of: Callable = lambda j, levels, size: j * levels // size,
    log: Callable = math.log,
    divided: bool = True,
) -> Callable:
    """KL(P ‖ Q), and what comes out with one thing changed.

    Args:
        full: whose bins say which are not empty: "inside", "P" or those that Q is of.
        divided: whether P and Q are divided by their sums.
    """

    def way(counts: Tensor, kept: int, levels: int) -> float:
        c = [float(x) for x in counts]
        P = c[: len(c) if whole else kept]
        inside = list(P)
        if clip_p and not whole:
            P[-1] += sum(c[kept + beyond :])
        source = P if clip_q else inside
        judged = {"inside": inside, "P": P, "source": source}[full]
        size = len(P)
        Q = [0.0] * size
        wide = max(1, size // levels)
        for level in range(levels + 1):
            if last_level_takes_all:
                bins = [j for j in range(size) if min(j // wide, levels - 1) == level]
            else:
                bins = [j for j in range(size) if level_of(j, levels, size) == level]
            filled = [j for j in bins if judged[j] > 0] if filled_only else bins
            for j in filled:
                total = sum(source[k] for k in bins)
                Q[j] = total / len(filled) if mean else total
        if swapped:
            P, Q = Q, P
        p_sum, q_sum = (sum(P), sum(Q)) if normal else (sum(P), sum(P))
        if not divided:
            p_sum = q_sum = 1.0
        found = 0.0
        for p, q in zip(P, Q, strict=True):
            if p > 0 and q > 0:
                found += p / p_sum * log(p / p_sum * q_sum / q)
            elif p > 0 and infinite:
                return math.inf
        return found / size if per_bin else found

    return way


def wrong_divergences() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "what is clipped is missing from P: its last bin gets the counts of all bins"
        " behind it": diverging(clip_p=False),
        "the first bin that is clipped is missing from P: that is bin number `kept`": (
            diverging(beyond=1)
        ),
        "the sum was divided by the number of bins: P weighs them already": diverging(
            per_bin=True
        ),
        "Q knows what is clipped: its levels come from the kept bins as they were,"
        " before anything was added": diverging(clip_q=True),
        "Q knows what is clipped: a level's count is that of the kept bins as they"
        " were, before anything was added": diverging(clip_q=True, full="inside"),
        "a bin that is empty but for what is clipped is taken for filled: Q does not"
        " know what is clipped": diverging(full="P"),
        "P and Q were not divided by their sums": diverging(divided=False),
        "the logarithm has another base: it is the natural one": diverging(
            log=math.log2
        ),
        "a bin's level was rounded up: ⌊j · levels / kept⌋ is rounded down": diverging(
            level_of=lambda j, levels, size: -(-j * levels // size)
        ),
        "a bin's level was rounded to the nearest: ⌊j · levels / kept⌋ is rounded"
        " down": diverging(level_of=lambda j, levels, size: round(j * levels / size)),
        "a level's count is divided among all its bins: only among those that are not"
        " empty": diverging(filled_only=False),
        "each bin of a level gets the whole count of the level: divide it by the number"
        " of its bins that are not empty": diverging(mean=False),
        "Q does not sum to one: divide it by its own sum, which is not that of"
        " P": diverging(normal=False),
        "P and Q are exchanged: it is Σ P log(P / Q)": diverging(swapped=True),
        "a bin where Q is 0 and P is not was left out: there the divergence is"
        " infinite": diverging(infinite=False),
        "all bins are kept: P and Q have `kept` bins": diverging(whole=True),
        "the levels have equally many bins, and the last takes the rest: bin j belongs"
        " to level j · levels // kept": diverging(last_level_takes_all=True),
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        "P: the first `kept` counts, as floats, and the sum of the rest on top of the"
        " last one. Both P and Q are divided by their sums at the end.",
        (
            "Q, level by level: the bins with j · levels // kept == level. Their counts"
            " (those before anything was added) go in equal parts to those of them that"
            " are not empty."
        ),
        (
            "Sum P log(P / Q) where P > 0. If Q is 0 there, return math.inf. Where P is"
            " 0, the term is 0."
        ),
    ),
)
def divergence_of(answer):
    """KL(P ‖ Q) of one threshold."""
    cases = len(divergence_cases())
    what = "divergence_of(counts, kept, levels)"
    judge(answer, run_divergence, diverging(), wrong_divergences(), cases, what)


# 2 ------------------------------------------------------------------------------------


def placing_cases() -> list[tuple[Graph, list[Node]]]:
    """(program, weights)."""
    x, y, w1, w2, b = value(4, 6), value(4, 6), value(6, 6), value(6, 6), value(6)
    r = made("tanh", [x])
    p1 = made("matmul", [r, w1], (False,))
    with_b = made("add", [p1, b])
    g = made("exp", [with_b])
    p2 = made("matmul", [g, w2], (False,))
    out = made("add", [r, p2])
    layer = Graph([x, w1, b, w2], [x, w1, b, w2, r, p1, with_b, g, p2, out], [out])

    n = made("neg", [x])
    q, k = (made("matmul", [n, w], (True,)) for w in (w1, w2))
    s = made("matmul", [q, k], (True,))
    attention = Graph([x, w1, w2], [x, w1, w2, n, q, k, s], [s])

    z = value(4, 6)
    m = made("matmul", [x, w1], (False,))
    both = made("add", [y, m])
    twice = made("add", [both, x])
    last = made("matmul", [twice, w2], (False,))
    end = made("add", [last, z])
    nodes = [x, y, z, w1, w2, m, both, twice, last, end]
    sums = Graph([x, y, z, w1, w2], nodes, [end])

    one = made("matmul", [x, w1], (False,))
    two = made("matmul", [one, w2], (False,))
    added = made("add", [one, two])
    chain = Graph([x, w1, w2], [x, w1, w2, one, two, added], [added])

    first, second = made("matmul", [x, w1], (False,)), made("matmul", [y, w2], (False,))
    ends = made("add", [first, second])
    pair = Graph([x, y, w1, w2], [x, y, w1, w2, first, second, ends], [ends])

    w3, row = value(4, 4), value(1, 6)
    left = made("matmul", [w3, x], (False,))
    right = made("matmul", [left, w1], (False,))
    shifted = made("add", [right, row])
    sided = Graph([x, w3, w1, row], [x, w3, w1, row, left, right, shifted], [shifted])

    times_w = made("matmul", [x, w1], (False,))
    bias_first = made("add", [b, times_w])
    leading = Graph([x, w1, b], [x, w1, b, times_w, bias_first], [bias_first])

    turned = made("transpose", [x], ((1, 0),))
    inner = made("matmul", [x, turned], (False,))
    plain = made("add", [inner, inner])
    none = Graph([x, w1], [x, w1, turned, inner, plain], [plain])
    return [
        (layer, [w1, b, w2]),
        (attention, [w1, w2]),
        (sums, [w1, w2]),
        (chain, [w1, w2]),
        (pair, [w1, w2]),
        (sided, [w3, w1]),
        (leading, [w1, b]),
        (none, [w1]),
    ]


def run_placing(answer: Callable, n: int) -> Outcome:
    """Case n: the places of the values in the program."""
    graph, weights = placing_cases()[n]
    found = answer(graph, set(weights))
    if not isinstance(found, list):
        raise Mistake(f"return a list of nodes, not a {type(found).__name__}")
    if not all(isinstance(each, Node) and each in graph.nodes for each in found):
        raise Mistake("the list must hold nodes of the program that you were given")
    places = [graph.nodes.index(each) for each in found]
    return {
        "the values, by their places in graph.nodes,": [
            f"{i}: {graph.nodes[i].op}" for i in places
        ]
    }


def placing(
    product: Callable = lambda node, weights: node.inputs[1] in weights,
    read: Callable = lambda node: node.inputs[:1],
    residual: Callable = lambda node, one, other: other.type == node.type,
    sides: int = 2,
    before: bool = True,
    once: bool = True,
    sums_after: bool = False,
    took: Callable = lambda one, other: other,
    most: int = 2,
    forward: bool = True,
    any_sum: bool = False,
) -> Callable:
    """The values that need a scale, and what comes out with one thing changed."""

    def way(graph: Graph, weights: set[Node]) -> list[Node]:
        products = [n for n in graph.nodes if n.op == "matmul" and product(n, weights)]
        found, later = [], []
        for node in graph.nodes:
            if node in products:
                found += read(node)
            elif node.op == "add" and before:
                pairs = (node.inputs, node.inputs[::-1])[:sides]
                new = [
                    took(one, other)
                    for one, other in pairs
                    if (any_sum or one in products) and residual(node, one, other)
                ]
                (later if sums_after else found).extend(
                    new[:: 1 if forward else -1][:most]
                )
        found += later
        return list(dict.fromkeys(found)) if once else found

    return way


def wrong_placings() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the results of the products are in it: Q stands before a product, and what"
        " follows (bias, GELU) is fused behind it": placing(read=lambda node: (node,)),
        "a weight is in it: weights get their scales by themselves": placing(
            read=lambda node: node.inputs
        ),
        "a product of two values is in it: only those with a weight": placing(
            product=lambda node, weights: True
        ),
        "a product whose first input is a weight is in it: the second must be one": (
            placing(product=lambda node, weights: bool(weights & {*node.inputs}))
        ),
        "the weight is in it, in the place of the value that it multiplies": placing(
            read=lambda node: node.inputs[1:]
        ),
        "the product that is added is in it, in the place of the other value": placing(
            took=lambda one, other: one
        ),
        "of two products that are added only one is in it: each is the other value of"
        " the other": placing(most=1),
        "of two products that are added the second comes first": placing(forward=False),
        "a row that is added to all rows is in it: it has as many dimensions as the"
        " sum, and not its shape": placing(
            residual=lambda node, one, other: (
                len(other.type.shape) == len(node.type.shape)
            )
        ),
        "what is added to a product is missing: in codes it costs a quarter of the"
        " bytes": placing(before=False),
        "what an addition reads is in it, though no product is added: only where one of"
        " the two is a product's result": placing(any_sum=True),
        "the bias is in it: only what is added with the shape of the result": placing(
            residual=lambda node, one, other: True
        ),
        "a bias that stands first in the addition is in it: the shape counts on both"
        " sides": placing(
            residual=lambda node, one, other: (
                other.type == node.type or other is node.inputs[0]
            )
        ),
        "a value that stands on the other side of an addition is missing: x + product,"
        " and product + x": placing(sides=1),
        "a value is in it twice: one scale serves all who read it": placing(once=False),
        "the list is in another order: in that in which the program reads the"
        " values": placing(sums_after=True),
        "the value that is added is missing where it is a product's result"
        " itself": placing(
            residual=lambda node, one, other: (
                other.type == node.type and other.op != "matmul"
            )
        ),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        "Go through graph.nodes once, and keep the values in a dict: it remembers the"
        " order, and holds each once.",
        (
            "A product: node.op == 'matmul' and node.inputs[1] in weights. Its value is"
            " node.inputs[0]. Remember the product."
        ),
        (
            "An 'add': look at (one, other) both ways. If `one` is a remembered product"
            " and other.type == node.type, `other` belongs to it."
        ),
    ),
)
def values_to_quantise(answer):
    """Where Q and DQ must stand."""
    cases = len(placing_cases())
    what = "values_to_quantise(graph, weights)"
    judge(answer, run_placing, placing(), wrong_placings(), cases, what)


# 3 ------------------------------------------------------------------------------------


def moving_cases() -> list[Node]:
    """Operations, of x, of x and y, or of x and a constant."""
    x, y = value(4, 6), value(4, 6)
    zero, half, one = constant(0.0), constant(0.5), constant(1.0)
    return [
        made("reshape", [x], ((24,),)),
        made("transpose", [x], ((1, 0),)),
        made("maximum", [x, zero]),
        made("maximum", [zero, x]),
        made("maximum", [x, half]),
        made("maximum", [x, y]),
        made("max", [x], (1,)),
        made("sum", [x], (1,)),
        made("neg", [x]),
        made("add", [x, y]),
        made("sub", [x, y]),
        made("mul", [x, half]),
        made("mul", [x, y]),
        made("tanh", [x]),
        made("exp", [x]),
        made("sqrt", [x]),
        made("div", [one, x]),
        made("matmul", [x, value(6, 4)], (False,)),
    ]


def run_moving(answer: Callable, n: int) -> Outcome:
    """Case n: True or False."""
    node = moving_cases()[n]
    found = answer(node)
    if not isinstance(found, bool):
        raise Mistake(f"return True or False, not {found!r}")
    names = iter("xy")
    inputs = [next(names) if i.data is None else f"{i.number:g}" for i in node.inputs]
    return {f"the answer for {node.op}({', '.join(inputs)})": found}


LAYOUT = ("reshape", "transpose")
NOT_THROUGH = {  # operation → why not
    "add": "a sum of two values does not: they have two scales",
    "tanh": "tanh does not: Q(tanh x) has other codes than tanh(Q x)",
    "exp": "exp does not: Q(exp x) has other codes than exp(Q x)",
    "sqrt": "a root does not: DQ could not go down, for √(s q) is not s √q",
    "div": "1 / x does not: DQ could not go down, for 1 / (s q) is not s / q",
    "mul": "a product does not: 0.5 · 3 is no code, and two values have two scales",
    "matmul": "a product of matrices does not: a sum of rounded parts is another sum",
}


def wrong_movings() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    right = trt.moves_through
    return {
        "a maximum with 0 (ReLU) commutes: rounding keeps the order, and 0 has the code"
        " 0": lambda node: node.op in (*LAYOUT, "neg", "max"),
        "0 may stand on either side of a maximum": lambda node: (
            right(node) and not (node.op == "maximum" and node.inputs[0].number == 0)
        ),
        "a maximum with 0.5 does not commute: DQ could not go down, for 0.5 is no"
        " code": lambda node: (
            right(node)
            or (node.op == "maximum" and any(i.data is not None for i in node.inputs))
        ),
        "a maximum of two values does not: DQ could not go down, for they have two"
        " scales": lambda node: right(node) or node.op == "maximum",
        "a maximum along a row commutes: it picks one of the numbers": lambda node: (
            right(node) and node.op != "max"
        ),
        "a sum does not: rounded parts have another sum": lambda node: (
            right(node) or node.kind == "reduction"
        ),
        "a change of sign commutes: the codes are symmetric": lambda node: (
            right(node) and node.op != "neg"
        ),
        "what grows with its input need not commute: Q(tanh x) has other codes than"
        " tanh(Q x)": lambda node: right(node) or node.op in ("tanh", "exp", "sqrt"),
        "a product with a number does not: 0.5 · 3 is no code": lambda node: (
            right(node)
            or (node.op == "mul" and any(i.data is not None for i in node.inputs))
        ),
        "a sum or difference of two values does not: they have two scales": (
            lambda node: right(node) or node.op in ("add", "sub")
        ),
        "look for more than what moves numbers: what picks one of them, or changes its"
        " sign, commutes as well": lambda node: node.op in LAYOUT,
        "to keep the order is not enough: DQ must go down as well, and f(s q) is s f(q)"
        " for few operations": lambda node: (
            right(node) or node.op in ("maximum", "tanh", "exp", "sqrt")
        ),
        **{
            words: lambda node, op=op: right(node) or node.op == op
            for op, words in NOT_THROUGH.items()
        },
        "elementwise is not enough: GELU of codes is not the code of"
        " GELU": lambda node: right(node) or node.kind == "elementwise",
        "a reshape and a transpose move numbers and change none: they"
        " commute": lambda node: right(node) and node.kind != "layout",
        "a transpose commutes like a reshape: there is one scale for"
        " all": lambda node: right(node) and node.op != "transpose",
        "a reshape commutes like a transpose: there is one scale for"
        " all": lambda node: right(node) and node.op != "reshape",
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=3,
    importance=4,
    hints=(
        "Two things must hold for every x: f(Q(x)) = Q(f(x)), and f(s q) = s f(q). What"
        " does rounding keep?",
        (
            "Rounding keeps the order and the sign. So f may pick numbers (a maximum),"
            " move them (`node.kind == 'layout'`), or change their sign."
        ),
        (
            "`each.number == 0` says whether an input is the constant 0. A 'maximum'"
            " commutes only with it: a second value would have a scale of its own."
        ),
    ),
)
def moves_through(answer):
    """Whether Q and DQ can change places with an operation."""
    cases = len(moving_cases())
    judge(
        answer,
        run_moving,
        trt.moves_through,
        wrong_movings(),
        cases,
        "moves_through(node)",
    )


# 4 ------------------------------------------------------------------------------------

Asked = tuple[Layer, int, int]  # layer, rows, threads


def layer_of(function: Callable, *shapes: tuple[int, ...], form: str = "") -> Layer:
    """The layer of a small network with a product."""
    x, *weights = (torch.ones(shape) for shape in shapes)
    named = {f"w{i}": w for i, w in enumerate(weights)}
    network = trt.define(function, [x], named)
    if form:
        values = trt.quantised_values(network.graph, network.weights)
        network = trt.quantise(network, dict.fromkeys(values, 0.1), form)
    return trt.fuse_layers(trt.split(network).after)[-1]


def constants_and_places() -> list[list[Layer]]:
    """Layers that differ in a constant's number, or in which value is read."""

    def times(number):
        return lambda x, w: (x @ w) * number

    def exp_minus_tanh(x, w):
        y = x @ w
        e = torch.exp(y)
        return e - torch.tanh(y)

    def tanh_minus_exp(x, w):
        y = x @ w
        t = torch.tanh(y)
        return t - torch.exp(y)

    def less_first(x, w, a, b):
        return (x @ w) * a * b - a

    def less_second(x, w, a, b):
        return (x @ w) * a * b - b

    small = ((4, 6), (6, 8))
    constants = [layer_of(times(each), *small) for each in (0.5, 0.25)]
    ends = [layer_of(f, *small, (4, 8), (4, 8)) for f in (less_first, less_second)]
    orders = [layer_of(f, *small) for f in (exp_minus_tanh, tanh_minus_exp)]
    return [constants, orders, ends]


@cache
def key_cases() -> list[list[Asked]]:
    """Layers of which some take the same time."""

    def plain(x, w):
        return x @ w

    def with_exp(x, w):
        return torch.exp(x @ w)

    def minus_exp(x, w):
        y = x @ w
        return y - torch.exp(y)

    def exp_minus(x, w):
        y = x @ w
        return torch.exp(y) - y

    def linear(x, w):
        return F.linear(x, w)

    def row_sum(x, w):
        return (x @ w).sum(-1, keepdim=True)

    def row_max(x, w):
        return (x @ w).amax(-1, keepdim=True)

    def twice(x, w, v):
        return (x @ w) * (x @ v)

    def exp_minus_twice(x, w):
        y = torch.exp(x @ w)
        return y - torch.exp(y)

    def twice_minus_exp(x, w):
        y = torch.exp(x @ w)
        return torch.exp(y) - y

    small, wide, square = ((4, 6), (6, 8)), ((4, 6), (6, 10)), ((4, 6), (6, 6))
    sizes = (small, wide, small, ((5, 6), (6, 8)), ((4, 7), (7, 8)))
    shapes = [layer_of(plain, *each) for each in sizes]
    kinds = [layer_of(f, *small) for f in (plain, with_exp, minus_exp, exp_minus)]
    turned = [layer_of(f, *small) for f in (exp_minus_twice, twice_minus_exp)]
    sides = [layer_of(f, *square) for f in (plain, linear, plain, row_sum, row_max)]
    forms = [
        layer_of(plain, *small, form=each) for each in ("", "int8", "e4m3", "int8")
    ]
    many = [layer_of(twice, *small, (6, 8)), layer_of(plain, *small)]
    many += [layer_of(twice, *small, (6, 8))]
    first = shapes[0]
    settings = [
        (first, rows, n) for rows, n in ((4, 1), (8, 1), (4, 2), (4, 1), (1, 4))
    ]
    others = constants_and_places()
    compared = (shapes, kinds, sides, forms, many, turned, *others)
    return [*([(layer, 4, 1) for layer in some] for some in compared), settings]


def run_keys(answer: Callable, n: int) -> Outcome:
    """Case n: which of its layers have the same key."""
    found: dict[object, int] = {}
    same = []
    for i, (layer, rows, threads) in enumerate(key_cases()[n]):
        key = answer(layer, rows, threads)
        try:
            same.append(found.setdefault(key, i))
        except TypeError:
            raise Mistake(
                f"the key is a {type(key).__name__} that cannot stand in a dict: make"
                " it a tuple of things that can, or text"
            ) from None
    return {f"which of {KEY_WORDS[n]} have one key": same}


KEY_WORDS = (
    "x @ w, one with a wider w, the first again, one with more rows, one with longer"
    " rows of x",
    "y = x @ w, exp(y), y − exp(y), exp(y) − y",
    "x @ w, x @ wᵀ, the first again, its sum, its maximum",
    "x @ w in floats, in int8, in FP8, in int8 again",
    "(x @ w) · (x @ v), x @ w, the first again",
    "y − exp(y) and exp(y) − y with y = exp(x @ w)",
    "(x @ w) · 0.5 and (x @ w) · 0.25",
    "exp(y) − tanh(y) and tanh(y) − exp(y), each computed from left to right",
    "(x @ w) · a · b − a and (x @ w) · a · b − b",
    "4 rows on 1 thread, 8 on 1, 4 on 2, 4 on 1, 1 on 4",
)


def alike(same: object) -> str:
    """Which are alike, in words: [0, 1, 0] is "1 = 3, 2"."""
    groups: dict[int, list[str]] = {}
    for i, first in enumerate(list(same)):
        groups.setdefault(first, []).append(str(i + 1))
    return ", ".join(" = ".join(group) for group in groups.values())


def keying(
    op: bool = True,
    wired: bool = True,
    typed: bool = True,
    form: bool = True,
    attributes: bool = True,
    rows: bool = True,
    threads: bool = True,
    identity: bool = False,
    only_nodes: bool = False,
    joined: bool = False,
    by_op: bool = False,
    reads_typed: bool = True,
    of_constant: Callable = lambda node: node.type,
    ordered: bool = True,
    reads_placed: bool = True,
) -> Callable:
    """A key, and what comes out with one thing changed."""

    def way(layer: Layer, count: int, cores: int) -> tuple:
        places: dict[Node, object] = {}
        parts: list[object] = [count if rows else 0, cores if threads else 0]
        if joined:
            parts = [count * cores]
        for node in [*([] if only_nodes else layer.reads), *layer.nodes]:
            inside = node not in layer.reads
            read = [
                str(places[i] if i in places else of_constant(i))
                for i in node.inputs
                if inside and wired
            ]
            if inside or reads_placed:
                places[node] = node.op if by_op else f"%{len(places)}"
            parts.append(
                (
                    (node.op if inside else "read") if op else "",
                    tuple(read),
                    node.type if typed and (inside or reads_typed) else "",
                    trt.stored_format(node) if form else "",
                    node.attributes if attributes and inside else (),
                    id(node) if identity else 0,
                )
            )
        if ordered:
            return tuple(parts)
        outside = len(parts) - len(layer.nodes)
        return tuple(parts[:outside]), frozenset(parts[outside:])

    return way


def wrong_keyings() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "layers of other shapes have one key: the types of all values belong to"
        " it": keying(typed=False),
        "products with results of one shape have one key, and their sums are of other"
        " lengths: the types of what is read belong to it": keying(reads_typed=False),
        "a constant's number is in the key: · 0.5 takes as long as · 0.25, so only its"
        " type counts": keying(of_constant=lambda node: (node.type, node.number)),
        "the operations stand in a set: their order is lost, and with it which value is"
        " which": keying(ordered=False),
        "layers of other operations have one key: node.op belongs to it": keying(
            op=False
        ),
        "a − b and b − a have one key: say which value each operation reads": keying(
            wired=False
        ),
        "a value that is read is told by its operation alone, so exp(y) − y has the key"
        " of y − exp(y) where y is an exp, too: say which value it is": keying(
            by_op=True
        ),
        "a value from outside is told by its type alone, so a and b of one type are the"
        " same: say which value it is": keying(reads_placed=False),
        "floats, int8 and FP8 have one key: stored_format(node) belongs to it": keying(
            form=False
        ),
        "a weight that is read transposed has the key of one that is not: the"
        " attributes belong to it": keying(attributes=False),
        "other numbers of rows have one key": keying(rows=False),
        "one thread and two have one key: what is fastest changes with them": keying(
            threads=False
        ),
        "the same layer has another key each time, so nothing is ever found: go by what"
        " a node is like, not by which it is": keying(identity=True),
        "4 rows on 1 thread and 1 row on 4 have one key: keep the two apart": keying(
            joined=True
        ),
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "What does the time depend on? What do two layers of a model that look alike"
        " have in common, and what not?",
        (
            "Give each value a place: first layer.reads, then layer.nodes, counted from"
            " 0. Then an operation can say which places it reads."
        ),
        (
            "For each node: op, places of its inputs (for a constant, which has no"
            " place, its type), node.type, stored_format(node), node.attributes. Then"
            " rows and threads. Values in layer.reads have no inputs that matter."
        ),
    ),
)
def timing_key(answer):
    """All that a layer's time depends on."""
    cases = len(key_cases())
    what = "timing_key(layer, rows, threads)"
    judge(answer, run_keys, trt.timing_key, wrong_keyings(), cases, what, alike)
