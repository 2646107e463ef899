"""Wrong answers to 08-compilers/02-front-end, each with its diagnosis."""

from __future__ import annotations

import numpy as np

from llmlab.checks.compilers import front_end as checks
from llmlab.checks.compilers.front_end import check
from llmlab.compilers import front_end as fe
from llmlab.compilers.front_end import Graph, along_rows, rows, small_inputs
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "08-compilers/02-front-end"

# Right, written otherwise ------------------------------------------------------------


def dead_by_marks(graph):
    marks = {id(node): node in graph.results for node in graph.nodes}
    for node in reversed(graph.nodes):
        if marks[id(node)]:
            marks.update(dict.fromkeys(map(id, node.inputs), True))
    kept = [n for n in graph.nodes if marks[id(n)] or n in graph.inputs]
    return Graph([*graph.inputs], kept, [*graph.outputs], {**graph.updates})


def dead_by_recursion(graph):
    seen = []

    def visit(node):
        if node not in seen:
            seen.append(node)
            for each in node.inputs:
                visit(each)

    for node in [*graph.inputs, *graph.results]:
        visit(node)
    nodes = sorted(seen, key=graph.nodes.index)
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def key_as_text(node):
    if node.data is None:
        inputs = [str(id(each)) for each in node.inputs]
        if fe.OPS[node.op].commutes:
            inputs = sorted(inputs)
        return f"{node.op} {node.attributes} {' '.join(inputs)}"
    if node.data.numel() == 1:
        return f"{node.type} {node.data.numpy().tobytes().hex()}"
    return id(node.data)


def key_with_sets(node):
    if node.data is not None and node.data.numel() > 1:
        return node.data.data_ptr()
    inputs = node.inputs
    if fe.OPS[node.op].commutes:
        inputs = frozenset(inputs)
    raw = None if node.data is None else bytes(node.data.numpy().tobytes())
    return (node.op, node.type, node.attributes, inputs, raw)


def joins_in_one(node, users, kernels, with_product):
    fits = {rows(node)} == {rows(root) for root in kernels}
    fits = fits and not [user for user in users if not along_rows(user)]
    if node.kind == "matmul":
        rest = len(kernels) < 2 and kernels.isdisjoint(with_product)
    elif len(kernels) > 1:
        rest = node.kind == "elementwise" and small_inputs(node)
    else:
        rest = along_rows(node)
    return fits and rest


def joins_by_shapes(node, users, kernels, with_product):
    for user in users:
        last = len(user.type.shape) - 1
        if user.kind not in ("elementwise", "reduction"):
            return False
        if user.kind == "reduction" and user.attributes != (last,):
            return False
    for root in kernels:
        if root.type.shape[:-1] != node.type.shape[:-1]:
            return False
    several = len(kernels) > 1
    match node.kind:
        case "matmul":
            return not several and not any(root in with_product for root in kernels)
        case "elementwise":
            return not several or small_inputs(node)
        case "reduction":
            return not several and along_rows(node)
    return False


def joins_with_numpy(node, users, kernels, with_product):
    return np.all([joins_in_one(node, users, kernels, with_product)])


def plan_with_numpy(lives):
    return {node: np.int64(offset) for node, offset in fe.plan(lives).items()}


def plan_by_birth(lives):
    offsets = {}
    for node, life in sorted(lives.items(), key=lambda pair: pair[1].born):
        spans = sorted(
            (offsets[o], offsets[o] + lives[o].size)
            for o in offsets
            if life.meets(lives[o])
        )
        offset = 0
        for start, end in spans:
            if start - offset >= life.size:
                break
            offset = max(offset, end)
        offsets[node] = offset
    return offsets


RIGHT = {
    "remove_dead": (dead_by_marks, dead_by_recursion),
    "key_of": (key_as_text, key_with_sets),
    "joins": (joins_in_one, joins_by_shapes, joins_with_numpy),
    "plan": (plan_by_birth, fe.plan, plan_with_numpy),
}


test_right_answers_written_otherwise = accepts(check, RIGHT, seeds=range(3))


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "remove_dead": ByCases(
        checks.run_dead,
        fe.remove_dead,
        checks.wrong_dead,
        checks.dead_cases,
    ),
    "key_of": ByCases(checks.run_key, fe.key_of, checks.wrong_keys, checks.key_cases),
    "joins": ByCases(checks.run_join, fe.joins, checks.wrong_joins, checks.join_cases),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def dead_in_place(graph):
    graph.nodes[:] = fe.remove_dead(graph).nodes
    return graph


def dead_by_search(graph):
    """In the order in which a search meets them: valid, but another one."""
    nodes = [*graph.inputs]

    def visit(node):
        if node not in nodes:
            for each in node.inputs:
                visit(each)
            nodes.append(node)

    for node in graph.results:
        visit(node)
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def dead_as_list(graph):
    return fe.remove_dead(graph).nodes


def key_as_list(node):
    return list(fe.key_of(node))


def key_as_tensor(node):
    return node.data if node.data is not None else fe.key_of(node)


def joins_as_number(node, users, kernels, with_product):
    return int(fe.joins(node, users, kernels, with_product))


def joins_never(node, users, kernels, with_product):
    return False


def steps_back(lives):
    """`end` of the last one in the way, not the highest."""
    offsets = {}
    for node, life in lives.items():
        end = 0
        in_the_way = [other for other in offsets if lives[other].meets(life)]
        for other in sorted(in_the_way, key=offsets.get):
            if end + life.size <= offsets[other]:
                break
            end = offsets[other] + lives[other].size
        offsets[node] = end
    return offsets


def side_by_side(lives):
    offsets, end = {}, 0
    for node, life in lives.items():
        offsets[node] = end
        end += life.size
    return offsets


def from_4096(lives):
    return {node: offset + 4096 for node, offset in fe.plan(lives).items()}


def behind_the_last(lives):
    """The end of the last that it meets, by offset, is taken for the highest."""
    offsets = {}
    for node, life in sorted(lives.items(), key=lambda pair: -pair[1].size):
        offset, place = 0, None
        for o in sorted(offsets, key=offsets.get):
            if life.meets(lives[o]):
                if place is None and offsets[o] - offset >= life.size:
                    place = offset
                offset = offsets[o] + lives[o].size
        offsets[node] = offset if place is None else place
    return offsets


def all_at_zero(lives):
    return dict.fromkeys(lives, 0)


def dies_as_it_is_born(lives):
    shorter = {
        node: fe.Life(life.size, life.born, max(life.born, life.dies - 1))
        for node, life in lives.items()
    }
    return plan_by_birth(shorter)


def looks_only_at_the_last(lives):
    offsets, last = {}, None
    for node, life in sorted(lives.items(), key=lambda pair: pair[1].born):
        free = last is None or not life.meets(lives[last])
        offsets[node] = 0 if free else offsets[last] + lives[last].size
        last = node
    return offsets


def never_back(lives):
    """Behind all that it meets, never into a gap."""
    offsets = {}
    for node, life in lives.items():
        ends = [offsets[o] + lives[o].size for o in offsets if life.meets(lives[o])]
        offsets[node] = max(ends, default=0)
    return offsets


def at_zero_or_behind(lives):
    offsets = {}
    for node, life in lives.items():
        met = [o for o in offsets if life.meets(lives[o])]
        free = all(offsets[o] >= life.size for o in met)
        ends = [offsets[o] + lives[o].size for o in met]
        offsets[node] = 0 if free else max(ends)
    return offsets


def too_far_apart(lives):
    return {node: 2 * offset for node, offset in fe.plan(lives).items()}


def forgets_one(lives):
    offsets = fe.plan(lives)
    offsets.popitem()
    return offsets


def fractions(lives):
    return {node: offset / 2 for node, offset in fe.plan(lives).items()}


def as_pairs(lives):
    return list(fe.plan(lives).items())


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("remove_dead", dead_in_place, "make a new Graph"),
        Wrong("remove_dead", dead_as_list, "return a Graph, not a list"),
        Wrong("remove_dead", dead_by_search, "the order of the nodes"),
        Wrong("key_of", key_as_list, "cannot stand in a dict"),
        Wrong("key_of", key_as_tensor, "the same constant has a new key"),
        Wrong("joins", joins_as_number, "return True or False"),
        Wrong(
            "joins",
            joins_never,
            "the result for exp (6×8), read by neg in one kernel, after joins",
        ),
        Wrong("plan", side_by_side, "those of all values together"),
        Wrong("plan", steps_back, "share bytes and are needed at one time"),
        Wrong("plan", all_at_zero, "share bytes"),
        Wrong("plan", from_4096, "the arena begins at 0"),
        Wrong("plan", behind_the_last, "share bytes"),
        Wrong("plan", dies_as_it_is_born, "is still read in the kernel that writes"),
        Wrong("plan", looks_only_at_the_last, "share bytes"),
        Wrong("plan", never_back, "those of all values together"),
        Wrong("plan", at_zero_or_behind, "let values share bytes"),
        Wrong("plan", too_far_apart, "Look for a gap from 0 on"),
        Wrong("plan", forgets_one, "an offset for each value"),
        Wrong("plan", fractions, "whole numbers from 0"),
        Wrong("plan", as_pairs, "dict"),
    ],
)
