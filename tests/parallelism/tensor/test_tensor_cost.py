"""The cost model is held to the ledger: an MLP of two matrices, forward and backward,
in every dimension.
"""

from __future__ import annotations

import pytest

from llmlab.parallelism import World
from llmlab.parallelism.tensor.cost import (
    METHODS,
    MLPShape,
    crossover,
    llama_sent,
    mesh_for,
    mlp_cost,
)
from llmlab.parallelism.tensor.grid import measure, mlp_step

SHAPE = MLPShape(M=144, d=36, f=72)


CASES = [
    (m, p, 2)
    for m in METHODS
    for p in (1, 2, 4, 8, 9, 18, 27, 36)
    if mesh_for(m, p) and (m != "1-D" or SHAPE.f % p == 0)
] + [("2.5-D", 12, 3)]


@pytest.mark.parametrize(("method", "p", "depth"), CASES)
def test_bytes_and_numbers_are_those_measured(method, p, depth):
    world, cost = World(p), mlp_cost(method, p, SHAPE, depth=depth)
    held = world.run(mlp_step, method, SHAPE, depth)
    assert world.ledger.per_rank() == pytest.approx([cost.sent] * p), (
        "every rank sends the same"
    )
    assert held == [(cost.parameters / 4, cost.activations / 4)] * p


def test_measure_is_what_the_model_predicts():
    assert measure("3-D", 8, SHAPE) == mlp_cost("3-D", 8, SHAPE)


def test_two_dimensions_send_less_for_large_p_and_more_for_small():
    shape = MLPShape(M=8192, d=1024, f=4096)
    p = crossover(shape)
    assert 4 < p < 64

    def sent(m, p):
        return mlp_cost(m, p, shape).sent

    assert sent("2-D", p) < sent("1-D", p) and sent("2-D", 4) > sent("1-D", 4)
    assert sent("1-D", 4096) == pytest.approx(4 * shape.M * shape.d * 4, rel=1e-3), (
        "1-D does not fall with p"
    )
    assert sent("3-D", 4096) < sent("2-D", 4096) < sent("2-D", 1024)
    assert crossover(MLPShape(M=1, d=1024, f=4096), limit=400) is None, (
        "a single token: the weights are what is large"
    )


def test_the_blocks_of_a_7b_model():
    """32 layers · 4 all-reduces · 2 · 7/8 · 4096 tokens · 4096 · 2 bytes."""
    assert llama_sent(8, 4096, 4096, 32) == 32 * 4 * 1.75 * 4096 * 4096 * 2
    assert (
        llama_sent(8, 4096, 4096, 32, backward=False)
        == llama_sent(8, 4096, 4096, 32) / 2
    )


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="p=6 ranks do not form"):
        mlp_cost("2-D", 6, SHAPE)
    with pytest.raises(ValueError, match="method='4-D'"):
        mesh_for("4-D", 16)
    with pytest.raises(ValueError, match="6 ranks do not form"):
        World(6).run(mlp_step, "2-D", SHAPE)
