"""Wrong answers to 08-compilers/07-tensorrt, each with its diagnosis."""

from __future__ import annotations

import math

import numpy as np
import torch

from llmlab.checks.compilers import tensorrt as checks
from llmlab.checks.compilers.tensorrt import check
from llmlab.compilers import tensorrt as trt
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "08-compilers/07-tensorrt"

# Right, written otherwise ------------------------------------------------------------


def divergence_in_tensors(counts, kept, levels):
    inside = counts[:kept].double()
    P = inside.clone()
    P[-1] += counts[kept:].sum()
    level = torch.arange(kept) * levels // kept
    sums = torch.zeros(levels, dtype=torch.double).index_add(0, level, inside)
    filled = torch.zeros(levels, dtype=torch.double)
    filled.index_add_(0, level, (inside > 0).double())
    Q = (sums / filled.clamp(min=1))[level] * (inside > 0)
    P, Q = P / P.sum(), Q / Q.sum()
    terms = torch.where(P > 0, P * (P / Q).log(), 0.0)
    return terms.sum()


def divergence_without_division(counts, kept, levels):
    inside = counts[:kept].tolist()
    P = [*inside[:-1], inside[-1] + int(counts[kept:].sum())]
    cells = [[] for _ in range(levels)]
    for j in range(kept):
        cells[j * levels // kept].append(j)
    result = 0.0
    for cell in cells:
        filled = sum(inside[j] > 0 for j in cell)
        for j in cell:
            if P[j] and not inside[j]:
                return math.inf
            if P[j]:
                q = sum(inside[k] for k in cell) / filled
                result += P[j] * (math.log(P[j]) - math.log(q))
    return result / sum(P) - math.log(sum(P)) + math.log(sum(inside))


def divergence_in_numpy(counts, kept, levels):
    c = counts.numpy().astype(np.float32)
    P = c[:kept].copy()
    P[-1] += c[kept:].sum()
    level = np.arange(kept) * levels // kept
    Q = np.zeros_like(P)
    for each in range(levels):
        filled = (level == each) & (c[:kept] > 0)
        if filled.any():
            Q[filled] = c[:kept][filled].mean()
    there = P > 0
    P, Q = P[there] / P.sum(), Q[there] / Q.sum()
    if (Q == 0).any():
        return np.float32(np.inf)
    return (P * np.log(P / Q)).sum()


def values_by_the_package(graph, weights):
    return trt.quantised_values(graph, weights, residuals=True)


def values_in_a_list(graph, weights):
    found = []
    heavy = [n for n in graph.nodes if n.op == "matmul" and n.inputs[1] in weights]
    for node in graph.nodes:
        asked = []
        if node in heavy:
            asked = [node.inputs[0]]
        if node.op == "add":
            a, b = node.inputs
            asked = ([b] if a in heavy else []) + ([a] if b in heavy else [])
            asked = [each for each in asked if each.type == node.type]
        for each in asked:
            if each not in found:
                found.append(each)
    return found


def moves_by_name(node):
    match node.op:
        case "reshape" | "transpose" | "neg" | "max":
            return True
        case "maximum":
            return 0.0 in [each.number for each in node.inputs]
    return False


def moves_by_exclusion(node):
    no = ("sum", "add", "sub", "mul", "div", "exp", "tanh", "sqrt", "matmul")
    if node.op in no:
        return False
    return node.op != "maximum" or 0 in {each.number for each in node.inputs}


def key_as_text(layer, rows, threads):
    return trt.timing_key(layer, rows, threads)


def key_as_nested(layer, rows, threads):
    order = [*layer.reads, *layer.nodes]
    lines = []
    for node in order:
        read = []
        if node in layer.nodes:
            read = [order.index(i) if i in order else str(i.type) for i in node.inputs]
        own = node.op if node in layer.nodes else "outside"
        more = node.attributes if node in layer.nodes else ()
        lines.append((own, more, tuple(read), node.type, trt.stored_format(node)))
    return (rows, threads), tuple(lines)


RIGHT = {
    "divergence_of": (
        divergence_in_tensors,
        divergence_without_division,
        divergence_in_numpy,
    ),
    "values_to_quantise": (values_by_the_package, values_in_a_list),
    "moves_through": (moves_by_name, moves_by_exclusion),
    "timing_key": (key_as_text, key_as_nested),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "divergence_of": ByCases(
        checks.run_divergence,
        checks.diverging(),
        checks.wrong_divergences,
        checks.divergence_cases,
    ),
    "values_to_quantise": ByCases(
        checks.run_placing,
        checks.placing(),
        checks.wrong_placings,
        checks.placing_cases,
    ),
    "moves_through": ByCases(
        checks.run_moving,
        trt.moves_through,
        checks.wrong_movings,
        checks.moving_cases,
    ),
    "timing_key": ByCases(
        checks.run_keys,
        trt.timing_key,
        checks.wrong_keyings,
        checks.key_cases,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def changes_the_counts(counts, kept, levels):
    counts[kept - 1] += counts[kept:].sum()
    return 0.0


def all_divergences(counts, kept, levels):
    return [0.0] * kept


def never_infinite(counts, kept, levels):
    return min(1.0, divergence_in_tensors(counts, kept, levels).item())


def values_as_set(graph, weights):
    return set(trt.quantised_values(graph, weights, residuals=True))


def values_by_place(graph, weights):
    return [0]


def moves_as_number(node):
    return int(trt.moves_through(node))


def moves_always(node):
    return True


def key_as_list(layer, rows, threads):
    return [trt.timing_key(layer, rows, threads)]


def key_of_the_text(layer, rows, threads):
    return f"{layer} {rows} {threads}"


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("divergence_of", changes_the_counts, "work on a copy"),
        Wrong("divergence_of", all_divergences, "return one number, not a list"),
        Wrong("divergence_of", never_infinite, "is not right in case 4"),
        Wrong("values_to_quantise", values_as_set, "return a list of nodes, not a set"),
        Wrong("values_to_quantise", values_by_place, "must hold nodes"),
        Wrong("moves_through", moves_as_number, "return True or False, not 1"),
        Wrong("moves_through", moves_always, "the answer for maximum(x, 0.5)"),
        Wrong("timing_key", key_as_list, "cannot stand in a dict"),
        Wrong("timing_key", key_of_the_text, "have one key after timing_key"),
    ],
)
