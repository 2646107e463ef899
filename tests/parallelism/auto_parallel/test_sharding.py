"""Cutting operators and moving tensors: the shapes, the steps, and the bytes that a
real run sends.
"""

import random
from itertools import product

import pytest
import torch

from llmlab.parallelism import World
from llmlab.parallelism.auto_parallel import execute, graphs, sharding
from llmlab.parallelism.auto_parallel.sharding import (
    DeviceMesh,
    Op,
    moves,
    spec,
    strategies,
)
from llmlab.parallelism.runtime.cost import Link, sent

LINK = Link(1e-6, 1e9)


def mesh_of(*shape, **more):
    return DeviceMesh(shape, (LINK,) * len(shape), **more)


def specs(dims: int, axes: str):
    """Every spec: each axis cuts one dimension or none; two on one dimension in either
    order of size.
    """
    for places in product(range(-1, dims), repeat=len(axes)):
        yield tuple(
            "".join(a for a, d in zip(axes, places, strict=True) if d == at)
            for at in range(dims)
        )


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_move_from_any_cut_to_any_other_gives_the_shard_itself(shape, dims):
    size = shape[0] * shape[1] * 2
    x = torch.arange(size**dims, dtype=torch.float32).view((size,) * dims)
    every = list(specs(dims, "01"))
    pairs = [(a, b) for a in every for b in every]
    random.Random(dims).shuffle(pairs)

    def fn(comm):
        mesh = comm.mesh(*shape)
        for src, dst in pairs[:60]:
            got = execute.reshard(execute.cut(x, src, mesh), src, dst, mesh)
            assert torch.equal(got, execute.cut(x, dst, mesh)), (src, dst)

    World(shape[0] * shape[1]).run(fn)


@pytest.mark.parametrize(
    ("src", "dst", "steps"),
    [
        (("0", ""), ("0", ""), []),
        (("0", ""), ("", ""), [("gather", 0, 0, 0)]),
        (("", ""), ("", "0"), [("slice", 0, 1, 1)]),
        (("0", ""), ("", "0"), [("all_to_all", 0, 0, 1)]),
        (
            ("01", ""),
            ("1", ""),
            [("gather", 1, 0, 0), ("gather", 0, 0, 0), ("slice", 1, 0, 0)],
        ),
        (("01", ""), ("0", "1"), [("all_to_all", 1, 0, 1)]),
        (
            ("0", "1"),
            ("", "01"),
            [
                ("gather", 0, 0, 0),
                ("gather", 1, 1, 1),
                ("slice", 0, 1, 1),
                ("slice", 1, 1, 1),
            ],
        ),
    ],
)
def test_the_steps_of_a_move(src, dst, steps):
    assert moves(src, dst) == steps


def test_a_matrix_product_has_three_parallelisms():
    op = Op("y", "mk,kn->mn", ("x", "w"), {"m": 8, "k": 8, "n": 8}, torch.matmul, (1,))
    mesh = mesh_of(4)
    sends = {
        s[0]: [size for _, _, size in sharding.collectives(op, s, mesh, 4)]
        for s in strategies(op, mesh)
    }
    assert sends == {
        "": [],
        "m": [8 * 8 * 4],  # the weight's gradient: data parallel
        "k": [8 * 8 * 4],  # the output: row parallel
        "n": [8 * 8 * 4],  # the input's gradient: column parallel
    }
    assert spec("mk", ("m",)) == ("0", "") and spec("kn", ("n",)) == ("", "0")


def test_what_does_not_divide_and_what_is_in_capitals_is_not_cut():
    op = Op(
        "y", "bSk,kn->bSn", ("x", "w"), {"b": 6, "S": 8, "k": 4, "n": 3}, None, (1,)
    )
    assert {s for (s,) in strategies(op, mesh_of(3))} == {"", "b", "n"}
    assert {s for (s,) in strategies(op, mesh_of(4))} == {"", "k"}
    assert ("b", "b") in strategies(op, mesh_of(3, 2)) and ("n", "n") not in strategies(
        op, mesh_of(3, 2)
    )


def test_a_mesh_has_a_link_for_each_axis():
    with pytest.raises(ValueError, match="links has 1 entries"):
        DeviceMesh((2, 2), (LINK,))


def reference(graph, leaves):
    return World(1).run(
        lambda c: execute.run(c, (1,), graph, {o.name: ("",) for o in graph}, leaves)
    )[0]


GRAPHS = {
    "mlp": graphs.mlp(b=6, S=3, d=12, f=18),
    "llama": graphs.llama_block(b=6, S=5, d=12, f=18, g=6, R=2, D=4),
    "llama, many heads per group": graphs.llama_block(
        b=6, S=2, d=24, f=12, g=6, R=3, D=2
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (6,), (2, 1, 3)])
def test_any_choice_computes_what_one_process_does_and_sends_what_is_priced(
    name, shape
):
    """Random strategies for every operator: output, every gradient, and the bytes in
    the ledger.
    """
    graph, dice = GRAPHS[name], random.Random(len(shape))
    leaves, mesh = graphs.leaves(graph), mesh_of(*shape)
    out, gradients = reference(graph, leaves)
    for _ in range(3):
        choice = {op.name: dice.choice(strategies(op, mesh)) for op in graph}
        world = World(6)
        for got, grads in world.run(
            lambda c, choice=choice: execute.run(c, shape, graph, choice, leaves)
        ):
            assert torch.allclose(got, out, atol=1e-4)
            assert grads.keys() == gradients.keys()
            assert all(torch.allclose(grads[k], gradients[k], atol=1e-4) for k in grads)
        assert world.ledger.bytes(rank=0) == pytest.approx(
            _priced(graph, choice, mesh, leaves)
        )


def _priced(graph, choice, mesh, leaves) -> float:
    """Bytes that rank 0 sends by the ring, from the steps that the cost model lists."""
    calls, made = [], {op.name: op for op in graph}
    for op in graph:
        calls += sharding.collectives(op, choice[op.name], mesh, 4)
        for dims, name in zip(op.reads, op.inputs, strict=True):
            if name in made:
                source = made[name]
                shape = sharding.shape_of(source.writes, source)
                a, b = spec(source.writes, choice[name]), spec(dims, choice[op.name])
                calls += [
                    *sharding.resharding_collectives(shape, a, b, mesh, 4),
                    *sharding.resharding_collectives(shape, b, a, mesh, 4),
                ]
    calls += _collecting(graph, choice, mesh)
    return sum(
        sent(op, 0, [n / mesh.shape[axis]] * mesh.shape[axis]) for op, axis, n in calls
    )


def _collecting(graph, choice, mesh):
    """What `run` sends in the end to show whole results: not part of a step, and not
    priced.
    """
    last, made, first = graph[-1], {op.name for op in graph}, {}
    shape = sharding.shape_of(last.writes, last)
    calls = [
        *sharding.resharding_collectives(
            shape, spec(last.writes, choice[last.name]), ("",) * len(shape), mesh, 4
        )
    ]
    for op in reversed(graph):
        for dims, name in zip(op.reads, op.inputs, strict=True):
            if name in made:
                continue
            at, whole = spec(dims, choice[op.name]), sharding.shape_of(dims, op)
            if name in first:
                calls += sharding.resharding_collectives(
                    whole, at, first[name], mesh, 4
                )
            first.setdefault(name, at)
            first[name + " shape"] = whole
    for name, at in list(first.items()):
        if not name.endswith(" shape"):
            calls += sharding.resharding_collectives(
                first[name + " shape"], at, ("",) * len(at), mesh, 4
            )
    return calls


def test_the_usual_plan_is_megatrons():
    graph = graphs.llama_block(b=4, S=8, d=16, f=32, g=4, R=1, D=4)
    choice, mesh = graphs.by_hand(graph), mesh_of(2, 4)
    reduced = [
        (op.name, axis)
        for op in graph
        for _, axis, n in sharding.collectives(op, choice[op.name], mesh)
        if axis == 1
    ]
    assert reduced == [
        (name, 1) for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]  # f for q, k, v and for gate, up
    leaves = graphs.leaves(graph)
    got = World(8).run(lambda c: execute.run(c, (2, 4), graph, choice, leaves))[5]
    assert torch.allclose(got[0], reference(graph, leaves)[0], atol=1e-4)
