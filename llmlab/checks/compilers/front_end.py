"""Checks of 08-compilers/02-front-end.

An answer is run on small programs; what it makes of them is compared with what usual
mistakes make of them. A plan of memory may be any that is valid and small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers import front_end as fe
from llmlab.compilers.front_end import (
    Graph,
    Life,
    Node,
    Type,
    along_rows,
    constant,
    made,
    rows,
    small_inputs,
)
from llmlab.course.grading.checking import Checks, Mistake, expect

check = Checks("08-compilers/02-front-end")


def value(*shape: int, dtype: torch.dtype = torch.float32) -> Node:
    """An input."""
    return Node("input", (), Type(shape, dtype))


# 1 ------------------------------------------------------------------------------------


def dead_cases() -> list[Graph]:
    """Chains that nobody reads, effects that nobody reads, inputs that change."""
    x, y = value(3, 4), value(3, 4)
    used = made("add", [x, y])
    first = made("exp", [x])
    second = made("tanh", [first])
    third = made("mul", [second, first])
    said = made("report", [first], ("first",))
    out = made("neg", [used])
    again = made("mul", [used, used])
    chain = Graph([x, y], [x, y, first, second, third, used, out], [out])
    heard = Graph([x, y], [x, y, used, first, second, said, out], [out])
    changed = Graph([x, y], [x, y, used, again, first, second, out], [out], {x: second})
    c = constant(2.0)
    twice = made("mul", [x, c])
    alone = Graph([x, y], [x, y, c, first, twice, used], [twice, twice])
    noise = made("draw", [second])
    drawn = Graph([x], [x, c, twice, first, second, noise], [x])
    known = Graph([], [c, constant(3.0)], [c])
    scaled = made("mul", [y, c])
    mixed = Graph([x, y], [c, x, first, y, scaled, used], [scaled])
    stored = Graph([x, y], [x, y, first, used], [first], {y: used})
    return [chain, heard, changed, alone, drawn, known, mixed, stored]


def run_dead(answer: Callable, n: int) -> Outcome:
    """Case n: which nodes are left, in which order, and the rest of the program."""
    graph = dead_cases()[n]
    before = list(graph.nodes)
    new = answer(graph)
    if not isinstance(new, Graph):
        raise Mistake(
            f"return a Graph, not a {type(new).__name__}: Graph(inputs, nodes, outputs,"
            " updates)"
        )
    if graph.nodes != before:
        raise Mistake("the program that you were given has changed: make a new Graph")
    strange = [node for node in new.nodes if node not in before]
    if strange:
        raise Mistake("there are nodes in it that the program did not have")
    return {
        "the set of nodes": sorted(before.index(node) for node in new.nodes),
        "the order of the nodes": [before.index(node) for node in new.nodes],
        "the inputs": [before.index(node) for node in new.inputs],
        "the outputs": [before.index(node) for node in new.outputs],
        "the updates": {
            before.index(a): before.index(b) for a, b in new.updates.items()
        },
    }


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "Go from the results back: a result is needed, and so is whatever it reads.",
        (
            "Keep a list of nodes still to be looked at. Take one off, and if it is not"
            " in the set `needed`, put it there and put its inputs on the list."
        ),
        (
            "`graph.results` has outputs, new values of inputs, and effects. The new"
            " list is `[node for node in graph.nodes if node in needed]`: the order"
            " stays. The inputs stay, whoever reads them."
        ),
    ),
)
def remove_dead(answer):
    """A program without the operations that nothing depends on."""
    cases = len(dead_cases())
    judge(answer, run_dead, fe.remove_dead, wrong_dead(), cases, "remove_dead(graph)")


def removing(
    roots: Callable = lambda graph: graph.results,
    keep: Callable = lambda graph: graph.inputs,
    order: Callable = lambda graph, needed: [n for n in graph.nodes if n in needed],
    follow: Callable = lambda node: node.inputs,
    given: Callable = lambda graph, needed: graph.inputs,
    rest: Callable = lambda graph: (graph.outputs, graph.updates),
) -> Callable:
    """`remove_dead`, and what comes out with one thing changed."""

    def way(graph: Graph) -> Graph:
        needed = dict.fromkeys(keep(graph))
        waiting = list(roots(graph))
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed[node] = None
                waiting += follow(node)
        return Graph(given(graph, needed), order(graph, needed), *rest(graph))

    return way


def one_step(graph: Graph) -> Graph:
    """The results and what they read themselves."""
    stay = {*graph.inputs, *graph.results}
    stay |= {each for node in graph.results for each in node.inputs}
    nodes = [node for node in graph.nodes if node in stay]
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def unread(graph: Graph) -> Graph:
    """Without the nodes that nobody reads, looked at once."""
    users = graph.users()
    stay = {*graph.results, *graph.inputs}
    nodes = [node for node in graph.nodes if users[node] or node in stay]
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def inputs_first(graph: Graph) -> Graph:
    """The inputs, then all else that is needed."""
    new = fe.remove_dead(graph)
    others = [node for node in new.nodes if node not in graph.inputs]
    return Graph(graph.inputs, [*graph.inputs, *others], graph.outputs, graph.updates)


def once_per_reader(graph: Graph) -> Graph:
    """From the results down, without a look at what is there already."""
    nodes: list[Node] = []

    def visit(node: Node) -> None:
        for each in node.inputs:
            visit(each)
        nodes.append(node)

    for node in graph.results:
        visit(node)
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def effects_alone(graph: Graph) -> Graph:
    """Effects stay, and what they read does not."""
    roots = [*graph.outputs, *graph.updates.values()]
    new = removing(lambda graph: roots)(graph)
    stay = {*new.nodes, *(node for node in graph.nodes if node.kind == "effect")}
    nodes = [node for node in graph.nodes if node in stay]
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def updates_that_are_read(graph: Graph) -> Graph:
    """New values only of inputs that an output reads."""
    new = fe.remove_dead(graph)
    read = removing(lambda graph: graph.outputs, keep=lambda graph: [])(graph).nodes
    updates = {node: into for node, into in graph.updates.items() if node in read}
    return Graph(new.inputs, new.nodes, new.outputs, updates)


def wrong_dead() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the inputs were moved to the front: all nodes stay in their order": (
            inputs_first
        ),
        "a node that is read twice stands in the list twice: keep a set of what is"
        " needed": once_per_reader,
        "an effect stayed, and what it reads did not: go on from it to its inputs, as"
        " from every result": effects_alone,
        "the new value of an input was dropped where no output reads that input: the"
        " caller sees it": updates_that_are_read,
        "inputs are missing from `nodes`: they stand there, too": removing(
            order=lambda graph, needed: [
                n for n in graph.nodes if n in needed and n not in graph.inputs
            ]
        ),
        "a result that is returned twice is returned once: leave the outputs as they"
        " are": removing(
            rest=lambda graph: ([*dict.fromkeys(graph.outputs)], graph.updates)
        ),
        "an effect was removed: what somebody outside sees stays, whether or not its"
        " value is read (`graph.results` has it)": removing(
            lambda graph: [*graph.outputs, *graph.updates.values()]
        ),
        "the new value of an input was removed: it is stored when the program ends, so"
        " it is a result (`graph.results` has it)": removing(
            lambda graph: [
                *graph.outputs,
                *(node for node in graph.nodes if node.kind == "effect"),
            ]
        ),
        "only what the outputs need is left: effects and new values of inputs are"
        " results, too (`graph.results`)": removing(lambda graph: graph.outputs),
        "an input that nobody reads was removed: the caller gives it, so it"
        " stays": removing(keep=lambda graph: []),
        "the list of nodes is in another order: leave it in the old one, or a value may"
        " be read before it is made": removing(order=lambda graph, needed: [*needed]),
        "the list of nodes stands on its head: leave it in the old order": removing(
            order=lambda graph, needed: [n for n in graph.nodes[::-1] if n in needed]
        ),
        "only one step was made: a node that is read by a dead one alone is dead,"
        " too": unread,
        "what a result reads was removed: go on from each needed node to its"
        " inputs": removing(follow=lambda node: ()),
        "only what a result reads itself is left: go on to what that reads": one_step,
        "only the first input of each node was followed: all are needed": removing(
            follow=lambda node: node.inputs[:1]
        ),
        "constants were removed: a node reads them, too": removing(
            order=lambda graph, needed: [
                n for n in graph.nodes if n in needed and n.kind != "constant"
            ]
        ),
        "inputs that nobody reads are in the new program neither as inputs nor as"
        " nodes: the caller gives them": removing(
            keep=lambda graph: [],
            given=lambda graph, needed: [n for n in graph.inputs if n in needed],
        ),
        "effects and new values of inputs became outputs: leave the outputs as they"
        " are": removing(rest=lambda graph: (graph.results, graph.updates)),
        "nothing was removed": removing(lambda graph: graph.nodes),
        "the new program has lost its updates: hand them on": removing(
            rest=lambda graph: (graph.outputs, {})
        ),
        "the new program has lost its outputs: hand them on": removing(
            rest=lambda graph: ([], graph.updates)
        ),
    }


# 2 ------------------------------------------------------------------------------------


def key_cases() -> list[list[Node]]:
    """Nodes of which some are equal."""
    # in the order of their ids, so that a wrong key is wrong in the same way each time
    x, y, z = sorted((value(4, 4), value(4, 4), value(4, 4)), key=id)
    sums = [made("sum", [x], (0,)), made("sum", [x], (1,)), made("max", [x], (1,))]
    sums += [made("sum", [x], (1,)), made("sum", [y], (1,))]
    pairs = [made(op, two) for op in ("add", "sub") for two in ([x, y], [y, x], [x, z])]
    pairs += [made("add", [x, x]), made("maximum", [y, x]), made("maximum", [x, y])]
    pairs += [made("div", [y, x]), made("div", [x, y]), made("div", [x, y])]
    products = [
        made("matmul", [a, b], (t,)) for a, b in ((x, y), (y, x)) for t in (False, True)
    ]
    products += [made("matmul", [x, y], (True,))]
    numbers = [constant(v) for v in (1.0, 2.0, 1.0, 0.0, -0.0, float("nan"))]
    numbers += [constant(float("nan")), constant(1.0, torch.float64)]
    numbers += [constant(torch.ones(1)), constant(torch.ones(1, 1))]
    numbers += [constant(torch.ones(1))]
    weight, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    numbers += [constant(weight), constant(weight), constant(other)]
    numbers += [constant(weight.clone()), constant(1 + 2**-23)]
    numbers += [constant(1 + 2**-22)]
    a, b = made("exp", [x]), made("exp", [y])
    deep = [made("neg", [a]), made("neg", [b]), made("neg", [a]), made("exp", [a])]
    deep += [made("neg", [made("tanh", [x])]), made("neg", [x])]
    wide = [made("reshape", [x], (shape,)) for shape in ((16,), (2, 8), (16,), (8, 2))]
    return [sums, pairs, products, numbers, deep, wide]


def run_key(answer: Callable, n: int) -> Outcome:
    """Case n: which two nodes have the same key."""
    nodes = key_cases()[n]
    keys = []
    for node in nodes:
        key = answer(node)
        try:
            keys.append((key, hash(key)))
        except TypeError:
            raise Mistake(
                f"the key of {node.op} is a {type(key).__name__} that cannot stand in a"
                " dict: make it a tuple of things that can"
            ) from None
        except RuntimeError as problem:
            raise Mistake(f"the key of {node.op} cannot be hashed: {problem}") from None
    found: dict[object, int] = {}
    return {"the keys": [found.setdefault(key, i) for i, (key, _) in enumerate(keys)]}


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "What decides the value of a node? Its operation, its inputs, and what else?",
        (
            "Inputs are nodes, and equal ones have been merged already: `id(each)` says"
            " which. Sort the two where `OPS[node.op].commutes`."
        ),
        (
            "A constant has no inputs: its key is in its data. One number: type and"
            " bytes, `node.data.numpy().tobytes()`, for 0.0 == −0.0 but 1/0.0 is not"
            " 1/−0.0. Several numbers: `id(node.data)`."
        ),
    ),
)
def key_of(answer):
    """The same key for nodes with the same value, and for no others."""
    judge(answer, run_key, fe.key_of, wrong_keys(), len(key_cases()), "key_of(node)")


def keying(
    op: Callable = lambda node: node.op,
    attributes: Callable = lambda node: node.attributes,
    inputs: Callable = lambda node: [id(each) for each in node.inputs],
    commutes: Callable = lambda node: fe.OPS[node.op].commutes,
    number: Callable = lambda node: (node.type, node.data.numpy().tobytes()),
    many: Callable = lambda node: id(node.data),
) -> Callable:
    """`key_of`, and what comes out with one thing changed."""

    def way(node: Node) -> tuple:
        if node.data is not None:
            return ("c", number(node) if node.data.numel() == 1 else many(node))
        read = inputs(node)
        read = sorted(read) if commutes(node) else read
        return (op(node), attributes(node), *read)

    return way


def wrong_keys() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""

    def of_rank_nought(node: Node) -> object:
        alone = node.data is None or node.type.shape == ()
        return fe.key_of(node) if alone else id(node.data)

    return {
        "operation, attributes and inputs are not enough: x + y and y + x have two"
        " keys, and all constants have one": keying(
            commutes=lambda node: False, number=lambda node: 0, many=lambda node: 0
        ),
        "a shape does not tell constants apart, and x + y and y + x have two keys": (
            keying(
                commutes=lambda node: False,
                number=lambda node: node.type,
                many=lambda node: node.type,
            )
        ),
        "not every elementwise operation of two inputs commutes: ask"
        " `OPS[node.op].commutes`": keying(
            commutes=lambda node: node.kind == "elementwise" and len(node.inputs) == 2
        ),
        "only the first input is in the key": keying(
            inputs=lambda node: [id(each) for each in node.inputs[:1]]
        ),
        "a tensor of shape (1,) holds one number, too: count with"
        " `node.data.numel()`": of_rank_nought,
        "numbers that are printed alike have one key: compare bytes": keying(
            number=lambda node: (node.type, repr(node.data))
        ),
        "x + y and y + x have two keys: sort the inputs where the operation"
        " commutes": keying(commutes=lambda node: False),
        "x − y and y − x have one key: sort the inputs only where the operation"
        " commutes": keying(commutes=lambda node: len(node.inputs) == 2),
        "a product and one that reads its second input transposed have one key, or sums"
        " along two dimensions: the attributes belong to it": keying(
            attributes=lambda node: ()
        ),
        "a sum and a maximum of the same value have one key: the operation belongs to"
        " it": keying(op=lambda node: "op"),
        "two inputs count as the same when they come from the same kind of operation:"
        " it must be the very same node, `id(each)`": keying(
            inputs=lambda node: [each.op for each in node.inputs]
        ),
        "the inputs are not in the key": keying(inputs=lambda node: []),
        "all constants of one number have one key: what they hold belongs to"
        " it": keying(number=lambda node: node.type),
        "0.0 and −0.0 have one key, and 1/x tells them apart: compare bytes": keying(
            number=lambda node: (node.type, repr(float(node.data) + 0.0))
        ),
        "two NaNs have two keys, or 0.0 and −0.0 have one: a float that is compared by"
        " == is not compared bit by bit": keying(
            number=lambda node: (node.type, float(node.data))
        ),
        "a number of 32 bits and one of 64, or of another shape, have one key: the type"
        " belongs to it": keying(number=lambda node: repr(float(node.data))),
        "numbers of another shape have one key: the whole type belongs to it": keying(
            number=lambda node: node.data.numpy().tobytes()
        ),
        "numbers that are nearly the same have one key: compare bytes": keying(
            number=lambda node: (node.type, f"{float(node.data):.6g}")
        ),
        "several numbers are compared by what they hold, which reads all weights: go by"
        " `id(node.data)`": keying(
            many=lambda node: (node.type, node.data.numpy().tobytes())
        ),
        "all constants have one key: it is in their data": keying(
            number=lambda node: 0, many=lambda node: 0
        ),
        "every constant has a key of its own: two may hold the same": keying(
            number=id, many=id
        ),
        "every node has a key of its own: two may compute the same": id,
        "the same constant has a new key each time: go by what it holds": keying(
            number=lambda node: id(node.data)
        ),
        "all constants of one shape have one key: of several numbers, go by"
        " `id(node.data)`": keying(many=lambda node: node.type),
    }


# 3 ------------------------------------------------------------------------------------

Case = tuple[Node, list[Node], set[Node], set[Node]]


def join_cases() -> list[Case]:
    """(node, its readers, roots of their kernels, roots of kernels with a product)."""
    x, w, row, b = value(6, 8), value(8, 8), value(6, 1), value(8)
    cases: list[Case] = []

    def case(
        node: Node, *users: Node, kernels=None, product: bool = False, others=()
    ) -> None:
        roots = set(users) if kernels is None else set(kernels)
        held = roots if product else set()
        cases.append((node, list(users), roots, {*held, *others}))

    e = made("exp", [x])
    case(e, made("neg", [e]))  # elementwise, one reader
    case(e, made("matmul", [e, w], (False,)), product=True)  # read by a product
    case(e, made("sum", [e], (1,)))  # a sum along rows
    case(e, made("sum", [e], (0,)))  # a sum over rows
    case(e, made("transpose", [e], ((1, 0),)))
    m = made("max", [x], (1,))
    case(m, made("sub", [x, m]))  # along rows, read by its rows
    tall = made("max", [x], (0,))
    case(tall, made("sub", [x, tall]))  # one row for all
    bias = made("mul", [b, b])
    case(bias, made("add", [x, bias]))  # other rows than its reader
    p = made("matmul", [x, w], (False,))
    case(p, made("add", [p, b]))
    case(p, made("add", [p, b]), product=True)  # there is a product already
    case(p, made("add", [p, b]), others=[made("exp", [x])])  # in another kernel
    case(bias, made("add", [x, bias]), made("neg", [bias]))  # rows of one of the two
    two = [made("neg", [p]), made("exp", [p])]
    case(p, *two)  # a product for two kernels
    case(p, *two, kernels=[made("add", two)])  # both in one
    case(e, made("neg", [e]), made("tanh", [e]))  # repeated in both
    both = made("sub", [x, row])
    case(both, made("neg", [both]), made("tanh", [both]))  # more to read than to write
    full = made("add", [x, value(6, 8)])
    case(full, made("neg", [full]), made("tanh", [full]))
    case(full, made("neg", [full]))
    half = made("mul", [x, constant(0.5)])
    case(half, made("neg", [half]), made("tanh", [half]))  # a number costs nothing
    square = made("mul", [x, x])
    case(square, made("neg", [square]), made("tanh", [square]))  # one input, read twice
    case(m, made("sub", [x, m]), made("mul", [m, m]))  # a maximum for two kernels
    thin = made("sum", [row], (1,))
    case(thin, made("neg", [thin]), made("tanh", [thin]))  # a small sum for two
    t = made("transpose", [w], ((1, 0),))
    case(t, made("neg", [t]))
    r = made("reshape", [w], ((8, 8),))
    case(r, made("neg", [r]))
    draw = made("draw", [x])
    case(draw, made("neg", [draw]))
    over = made("sum", [value(2, 6, 8)], (1,))
    case(over, made("neg", [over]))
    mixed = [made("neg", [e]), made("matmul", [e, w], (False,))]
    case(e, *mixed)  # one of two readers is a product
    case(e, mixed[0], made("sum", [e], (0,)), kernels=[mixed[0]])
    return [*cases, *row_cases(x), *beside_a_product(p, e)]


def row_cases(x: Node) -> list[Case]:
    """Rows that are as many as the reader's, or begin alike, and are not the same."""
    pairs = [
        (value(1, 8), x),
        (value(2, 1, 8), value(2, 6, 8)),
        (x, value(1, 6, 8)),
    ]
    cases = []
    for thin, wide in pairs:
        node = made("exp", [thin])
        reader = made("add", [wide, node])
        cases.append((node, [reader], {reader}, set()))
    return cases


def beside_a_product(p: Node, e: Node) -> list[Case]:
    """Two kernels, one of which has a product."""
    summed = made("add", [p, e])
    other = made("neg", [e])
    return [(e, [summed, other], {summed, other}, {summed})]


def run_join(answer: Callable, n: int) -> Outcome:
    """Case n: yes or no."""
    node, users, kernels, product = join_cases()[n]
    found = answer(node, users, set(kernels), set(product))
    if not isinstance(found, bool | np.bool_):
        raise Mistake(f"joins(…) returned {found!r}: return True or False")
    return {f"the result for {described(node, users, kernels, product)}": bool(found)}


def described(node: Node, users: list, kernels: set, product: set) -> str:
    """A case of `joins` in words."""
    readers = ", ".join(user.op for user in users)
    count = "one kernel" if len(kernels) == 1 else f"{len(kernels)} kernels"
    holds = " that holds a product" if kernels & product else ""
    shape = "×".join(map(str, node.type.shape))
    return f"{node.op} ({shape}), read by {readers} in {count}{holds},"


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Five sentences of the text are five conditions. What makes the answer no,"
            " whatever else holds? Begin with these."
        ),
        (
            "`all(along_rows(user) for user in users)`, then `rows(root) == rows(node)`"
            " for every root. What is left depends on what the node is."
        ),
        (
            "A product: one kernel, without a product. Otherwise, with one kernel:"
            " `along_rows(node)`; with several: elementwise, and `small_inputs(node)`."
        ),
    ),
)
def joins(answer):
    """Whether an operation is computed in the kernels of its readers."""
    judge(answer, run_join, fe.joins, wrong_joins(), len(join_cases()), "joins(…)")


def joining(
    readers: Callable = lambda users: all(map(along_rows, users)),
    same_rows: Callable = lambda node, kernels: all(
        rows(root) == rows(node) for root in kernels
    ),
    product: Callable = lambda kernels, with_product: (
        len(kernels) == 1 and not kernels & with_product
    ),
    one: Callable = along_rows,
    several: Callable = lambda node: node.kind == "elementwise" and small_inputs(node),
) -> Callable:
    """`joins`, and what comes out with one thing changed."""

    def way(node: Node, users: list, kernels: set, with_product: set) -> bool:
        if not readers(users) or not same_rows(node, kernels):
            return False
        if node.kind == "matmul":
            return product(kernels, with_product)
        return one(node) if len(kernels) == 1 else several(node)

    return way


def alike(how: Callable[[Node], object]) -> Callable:
    """A rule for rows by another property."""
    return lambda node, kernels: all(how(root) == how(node) for root in kernels)


def none_beside_a_product(
    node: Node, users: list, kernels: set, with_product: set
) -> bool:
    """Nothing is repeated where one of the kernels holds a product."""
    if len(kernels) > 1 and kernels & with_product:
        return False
    return fe.joins(node, users, kernels, with_product)


def by_readers(node: Node, users: list, kernels: set, with_product: set) -> bool:
    """Several readers, taken for several kernels."""
    if len(kernels) == 1 and len(users) > 1 and fe.joins(node, users, kernels, set()):
        return node.kind == "elementwise" and small_inputs(node)
    return fe.joins(node, users, kernels, with_product)


def wrong_joins() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "an operation whose reader is a product or a transpose joins it: they read"
        " other rows than the one that is computed": joining(
            readers=lambda users: True
        ),
        "one reader that goes along rows is not enough: all of them must": joining(
            readers=lambda users: any(map(along_rows, users))
        ),
        "a value of other rows than its kernel joins it, a bias for example: `rows` of"
        " node and root must be the same": joining(same_rows=lambda n, k: True),
        "one root that has the node's rows is not enough: all of them must": joining(
            same_rows=lambda node, kernels: any(
                rows(root) == rows(node) for root in kernels
            )
        ),
        "the readers were counted, not the kernels: two readers may be in one": (
            by_readers
        ),
        "a product somewhere else keeps this one out: ask for its own kernel": joining(
            product=lambda kernels, with_product: len(kernels) == 1 and not with_product
        ),
        "`small_inputs` is asked the wrong way round": joining(
            several=lambda node: node.kind == "elementwise" and not small_inputs(node)
        ),
        "shapes were compared, not rows: the maximum of a row is one number, and stays"
        " in the kernel of its row": joining(
            same_rows=lambda node, kernels: all(
                root.type.shape == node.type.shape for root in kernels
            )
        ),
        "the number of dimensions was compared, not the rows: (1, 8) has one row and"
        " (6, 8) has six": joining(same_rows=alike(lambda node: len(rows(node)))),
        "only the first dimension was compared: rows are the shape without the last"
        " one": joining(same_rows=alike(lambda node: node.type.shape[:1])),
        "rows were counted: (6,) and (1, 6) are as many, and not the same": joining(
            same_rows=alike(lambda node: math.prod(rows(node)))
        ),
        "a reader must be elementwise here: a sum along a row goes along rows,"
        " too": joining(readers=lambda us: all(u.kind == "elementwise" for u in us)),
        "`small_inputs` was asked of a node with one kernel: nothing is computed twice"
        " there": joining(one=lambda node: along_rows(node) and small_inputs(node)),
        "a product does not go along rows, and joins all the same: ask for it before"
        " you ask for one kernel": joining(
            product=lambda kernels, with_product: (
                len(kernels) > 1 and not kernels & with_product
            )
        ),
        "nothing is repeated where one of several kernels has a product: only a product"
        " asks for that": none_beside_a_product,
        "a second product joined a kernel: it holds one at most": joining(
            product=lambda kernels, _: len(kernels) == 1
        ),
        "a product is computed in two kernels: it is repeated for nobody": joining(
            product=lambda kernels, with_product: not kernels & with_product
        ),
        "a product never joins: it begins the kernel of those who read its"
        " rows": joining(product=lambda kernels, _: False),
        "a sum over rows or a transpose joins the kernel of its reader: only what goes"
        " along a row": joining(one=lambda node: True),
        "a sum or a maximum along a row does not join: it goes along rows, as"
        " elementwise operations do": joining(
            one=lambda node: node.kind == "elementwise"
        ),
        "an operation with large inputs is repeated in several kernels: each would read"
        " more than it saves, so ask `small_inputs`": joining(
            several=lambda node: node.kind == "elementwise"
        ),
        "a sum or a maximum is repeated in several kernels: only elementwise"
        " operations": joining(
            several=lambda node: along_rows(node) and small_inputs(node)
        ),
        "no operation is repeated in several kernels: an elementwise one with small"
        " inputs is": joining(several=lambda node: False),
    }


# 4 ------------------------------------------------------------------------------------

SPARE = 1.4  # the arena may be so many times what must be alive at one time


def life_cases() -> list[list[Life]]:
    """Chains, values that live long, holes of every size."""
    chain = [Life(256, i, i + 1) for i in range(12)]
    growing = [Life(64 * (i + 1), i, i + 1) for i in range(12)]
    shrinking = [Life(64 * (12 - i), i, i + 1) for i in range(12)]
    residual = [
        Life(512, 0, 12),
        *(Life(128 + 64 * (i % 4), i, i + 2) for i in range(12)),
    ]
    together = [Life(192, i // 3, i // 3 + 1) for i in range(12)]
    random = torch.Generator().manual_seed(7)
    mixed = []
    for i in range(60):
        size, length = torch.randint(1, 12, (2,), generator=random).tolist()
        mixed.append(Life(64 * size, i, i + length // 2))
    single = [Life(64, 0, 0)]
    late = [Life(1024, 5, 6), Life(1024, 0, 1), Life(1024, 2, 4), Life(512, 1, 5)]
    covered = [Life(1024, 0, 2), Life(512, 4, 6), Life(256, 1, 5)]
    first = [chain, growing, shrinking, residual, together, mixed, single, late]
    return [*first, covered]


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=4,
    hints=(
        (
            "One value after the other gets its place. Which of those that have one"
            " already are in its way? `life.meets(other)` says so."
        ),
        (
            "Sort those in the way by their offsets, and go up from 0: the first gap"
            " before one of them that is large enough is the place; else behind the"
            " last."
        ),
        (
            "In which order? By birth is simple; the largest first is often smaller."
            " `offset = max(offset, end)` when you step over a value, for values may"
            " overlap each other that live at different times."
        ),
    ),
)
def plan(answer):
    """An offset for each value, so that no two that live at one time share a byte."""
    for lives in life_cases():
        values = {value(i + 1): life for i, life in enumerate(lives)}
        names = {node: i for i, node in enumerate(values)}
        found = expect(answer(dict(values)), kind=dict, what="plan(lives)")
        judge_plan(values, names, found)


def judge_plan(
    lives: dict[Node, Life], names: dict[Node, int], found: dict[Node, int]
) -> None:
    """Whole numbers, nothing shared, and not too large."""
    if set(found) != set(lives):
        raise Mistake("plan(lives) must have an offset for each value, and no others")
    for offset in found.values():
        if isinstance(offset, bool) or not isinstance(offset, Integral) or offset < 0:
            raise Mistake(f"an offset is {offset!r}: whole numbers from 0")
    if least := min(found.values()):
        raise Mistake(f"the lowest offset is {least}: the arena begins at 0")
    overlaps = [
        pair
        for pair in itertools.combinations(lives, 2)
        if overlap(lives, found, *pair)
    ]
    if overlaps:
        # a border is the mistake only where nothing else is
        a, b = min(overlaps, key=lambda pair: at_border(*map(lives.get, pair)))
        x, y = lives[a], lives[b]
        said = (
            f"value {names[a]} ({x.size} bytes at {found[a]}, kernels {x.born} to"
            f" {x.dies}) and value {names[b]} ({y.size} bytes at {found[b]}, kernels"
            f" {y.born} to {y.dies}) share bytes"
        )
        if at_border(x, y):
            raise Mistake(
                f"{said}: the one is still read in the kernel that writes the other"
            )
        raise Mistake(f"{said} and are needed at one time")
    need, size = fe.most_alive(lives), fe.arena(lives, found)
    if size <= SPARE * need:
        return
    if size >= sum(life.size for life in lives.values()):
        raise Mistake(
            f"the arena has {size} bytes, those of all values together, and {need} are"
            " needed at one time: let values share bytes that do not meet"
        )
    raise Mistake(
        f"the arena has {size} bytes, and {need} are needed at one time: at most"
        f" {SPARE} times as many. Look for a gap from 0 on, for each value"
    )


def overlap(lives: dict[Node, Life], found: dict[Node, int], a: Node, b: Node) -> bool:
    """Whether two values that meet share a byte."""
    x, y = lives[a], lives[b]
    apart = found[a] + x.size <= found[b] or found[b] + y.size <= found[a]
    return x.meets(y) and not apart


def at_border(x: Life, y: Life) -> bool:
    """Whether one is read for the last time where the other is written."""
    return x.dies == y.born or y.dies == x.born
