"""Kinds and groups, beside those of TVM's passes."""

from __future__ import annotations

from functools import cache

import pytest

from llmlab.compilers.tvm import fusion, graph
from llmlab.compilers.tvm.expressions import (
    compute,
    exp,
    placeholder,
    reduce_axis,
    sum_over,
)
from llmlab.compilers.tvm.fusion import Kind, Step
from tests.compilers.tvm import graphs

E, B, INJECTIVE, R, A, OPAQUE = Kind


@cache
def tvm_kind(operation: str) -> int:
    import tvm
    from tvm import relax

    function = graphs.prim_func(graphs.expression(operation))
    module = relax.transform.AnnotateTIROpPattern()(tvm.IRModule({"main": function}))
    return int(module["main"].attrs["op_pattern"])


@pytest.mark.parametrize("operation", graphs.ALONE)
def test_the_kinds_of_tvm(operation):
    assert fusion.kind_of(graphs.expression(operation)) == tvm_kind(operation)


def test_all_kinds_come_up():
    found = {fusion.kind_of(graphs.expression(name)) for name in graphs.ALONE}
    assert found == {E, B, INJECTIVE, R, A}


def test_an_index_that_the_result_does_not_have_and_no_sum_is_opaque():
    a = graphs.square("a")
    k = reduce_axis("k", 6)
    y = compute("y", (6,), lambda i: sum_over(a[i, k], k))
    assert fusion.read_kind(["i"], y.reads[0]) is OPAQUE
    assert fusion.read_kind(["i", "k"], y.reads[0]) is E


def test_a_dimension_of_one_is_a_broadcast():
    row = placeholder("row", (1, 6))
    y = compute("y", (6, 6), lambda i, j: exp(row[0, j]))
    assert fusion.kind_of(y) is B


@pytest.mark.parametrize("seed", range(60))
def test_the_groups_of_tvm(seed):
    nodes = graphs.random_graph(seed)
    outputs = graphs.results(nodes, seed)
    stages = graph.lowered(graphs.relax_module(nodes, outputs))
    names = graphs.names_of_steps(stages["fuse"])
    theirs = [[names[each] for each in group] for group in graph.groups(stages["fuse"])]
    ours = fusion.fuse_groups(graphs.steps(nodes), outputs)
    assert sorted(map(sorted, ours)) == sorted(map(sorted, theirs)), (nodes, outputs)


def groups(*steps: Step, outputs: tuple[str, ...] = ()) -> list[list[str]]:
    return fusion.fuse_groups(steps, outputs or (steps[-1].name,))


def test_a_product_takes_what_follows_and_not_what_comes_before():
    found = groups(
        Step("scale", E),
        Step("matmul", A, ("scale",)),
        Step("bias", E, ("matmul",)),
        Step("gelu", E, ("bias",)),
    )
    assert found == [["scale"], ["matmul", "bias", "gelu"]]


def test_a_softmax_is_an_anchor_and_two_do_not_fuse():
    found = groups(Step("matmul", A), Step("softmax", A, ("matmul",)))
    assert found == [["matmul"], ["softmax"]]


def test_the_other_branch_comes_along():
    found = groups(
        Step("matmul", A),
        Step("other", E),
        Step("sum", E, ("matmul", "other")),
    )
    assert found == [["matmul", "other", "sum"]]


def test_a_diamond_joins_as_a_whole():
    found = groups(
        Step("x", E),
        Step("left", E, ("x",)),
        Step("right", B, ("x",)),
        Step("end", R, ("left", "right")),
    )
    assert found == [["x", "left", "right", "end"]]


def test_two_results_keep_what_both_read():
    found = groups(
        Step("x", E),
        Step("left", E, ("x",)),
        Step("right", E, ("x",)),
        outputs=("left", "right"),
    )
    assert found == [["x"], ["left"], ["right"]]


def test_what_is_returned_is_written():
    found = groups(Step("x", E), Step("y", E, ("x",)), outputs=("x", "y"))
    assert found == [["x"], ["y"]]


def test_the_post_dominator_is_where_all_ways_meet():
    steps = [
        Step("x", E),
        Step("a", E, ("x",)),
        Step("b", INJECTIVE, ("x",)),
        Step("c", E, ("b",)),
        Step("y", E, ("a", "c")),
        Step("z", R, ("y",)),
    ]
    found = fusion.dominators(steps, ["z"])
    assert found["x"] == ("y", INJECTIVE)
    assert found["y"] == ("z", R)
    assert found["z"] is None
    used = fusion.readers(steps)
    assert sorted(fusion.between(used, "x", "y")) == ["a", "b", "c"]
