"""The integer program equals brute force; memory binds; the usual plan is found where
it is best and beaten where it is not.
"""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallelism import auto_parallel
from llmlab.parallelism.auto_parallel import graphs
from llmlab.parallelism.auto_parallel.sharding import DeviceMesh
from llmlab.parallelism.auto_parallel.stages import cut_stages, every_cut, latency
from llmlab.parallelism.runtime.cost import Link

FAST, SLOW = Link(5e-6, 300e9), Link(5e-6, 25e9)


def mesh_of(shape=(2, 4), slow=SLOW, memory=float("inf")):
    return DeviceMesh(shape, (slow, FAST), flops=190e12, memory=memory)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([4, 16, 64]),
    st.sampled_from([64, 1024, 4096]),
    st.sampled_from([1e9, 25e9, 300e9]),
    st.sampled_from([None, 1.2, 2.0]),
)
def test_the_program_equals_brute_force(b, d, speed, tight):
    graph = graphs.mlp(b, 128, d, 4 * d)
    p = auto_parallel.problem(graph, mesh_of(slow=Link(5e-6, speed)))
    if tight:
        least = sum(m.min() for m in p.bytes)
        p = auto_parallel.problem(
            graph, mesh_of(slow=Link(5e-6, speed), memory=tight * least)
        )
    assert auto_parallel.solve(p)[1] == pytest.approx(
        auto_parallel.brute_force(p)[1], rel=1e-9
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_program_equals_brute_force_on_branches(seed):
    """Four operators of a block: two consumers of one tensor, whose results meet in the
    last, and random prices.
    """
    # norm2, gate, up, act
    graph = graphs.llama_block(b=8, S=64, d=256, f=512, g=4, R=1, D=64)[7:11]
    p = auto_parallel.problem(graph, mesh_of((4, 2)))
    dice = np.random.default_rng(seed)
    for row in p.seconds:
        row *= dice.uniform(0.2, 5, row.shape)
    for matrix in p.edges.values():
        matrix *= dice.uniform(0.2, 5, matrix.shape)
    assert auto_parallel.solve(p)[1] == pytest.approx(
        auto_parallel.brute_force(p)[1], rel=1e-9
    )


def block(b, **more):
    return graphs.llama_block(b=b, S=4096, d=4096, f=11008, g=32, R=1, D=128, **more)


def test_it_finds_megatron_with_data_parallelism_over_the_slow_link():
    graph = block(16)
    p = auto_parallel.problem(graph, mesh_of((4, 8)))
    assert auto_parallel.solve(p)[1] == pytest.approx(
        auto_parallel.seconds_of(p, auto_parallel_hand(graph))[0], rel=1e-9
    )


def auto_parallel_hand(graph):
    return graphs.by_hand(graph)


@pytest.mark.parametrize(
    ("b", "slow", "at_least"), [(4, 2.5e9, 1.5), (64, 25e9, 1.02), (256, 25e9, 1.2)]
)
def test_it_beats_the_hand_made_plan(b, slow, at_least):
    p = auto_parallel.problem(block(b), mesh_of((4, 8), Link(5e-6, slow)))
    best = auto_parallel.solve(p)[1]
    assert auto_parallel.seconds_of(p, graphs.by_hand(p.ops))[0] > at_least * best


def test_memory_forces_another_choice():
    graph = block(256)
    free = auto_parallel.problem(graph, mesh_of((4, 8)))
    choice, seconds = auto_parallel.solve(free)
    used = auto_parallel.seconds_of(free, choice)[1]
    tight = auto_parallel.problem(graph, mesh_of((4, 8), memory=0.8 * used))
    other, slower = auto_parallel.solve(tight)
    assert slower > seconds and auto_parallel.seconds_of(tight, other)[1] <= 0.8 * used
    none = auto_parallel.problem(graph, mesh_of((4, 8), memory=1e6))
    for search in (auto_parallel.solve, auto_parallel.brute_force):
        with pytest.raises(ValueError, match=r"combinations|most frugal"):
            search(none)


def test_a_graph_must_be_in_order_with_names_of_its_own():
    graph = graphs.mlp(4, 2, 8, 8)
    with pytest.raises(ValueError, match="'down' reads 'gelu', which comes later"):
        auto_parallel.problem(graph[::-1], mesh_of())
    with pytest.raises(ValueError, match="the name 'up' occurs twice"):
        auto_parallel.problem([graph[0], graph[0]], mesh_of())
    p = auto_parallel.problem(graph, mesh_of())
    with pytest.raises(ValueError, match="is not a strategy of it"):
        auto_parallel.seconds_of(p, {op.name: ("z", "z") for op in graph})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_stages_equal_brute_force(layers, devices, m, seed):
    dice = random.Random(seed)
    work = [dice.uniform(1, 5) for _ in range(layers)]
    shares = (1, 2, 3)

    def seconds(i, j, n):
        return sum(work[i:j]) / n + 0.3 * (n - 1) + (float("inf") if j - i > 3 else 0)

    every = [
        latency([seconds(*s) for s in cut], m)
        for cut in every_cut(layers, devices, shares)
    ]
    best = min(every, default=float("inf"))
    if best == float("inf"):
        with pytest.raises(ValueError, match="no cut of"):
            cut_stages(layers, devices, m, seconds, shares)
        return
    stages, found = cut_stages(layers, devices, m, seconds, shares)
    assert found == pytest.approx(best)
    assert latency([seconds(*s) for s in stages], m) == pytest.approx(found)
    assert sum(n for *_, n in stages) == devices
    assert [i for i, *_ in stages] == [0, *(j for _, j, _ in stages[:-1])] and stages[
        -1
    ][1] == layers


def test_stages_ask_for_sensible_counts():
    with pytest.raises(ValueError, match="m=0"):
        cut_stages(3, 2, 0, lambda i, j, n: 1.0)
