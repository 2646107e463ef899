"""The array: register by register, in closed form, and as SCALE-Sim counts it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab import chips
from llmlab.chips.tpu import NOTHING, Array, Run, cycles, product, report
from llmlab.chips.tpu.scale_sim import FLOWS
from scripts.golden.tpu_goldens import digest

GOLDEN = json.loads(
    (Path(chips.__path__[0]) / "data" / "tpu_scale_sim.json").read_text("utf-8")
)
SIDES = st.integers(1, 5)
FLOWS_HERE = [
    ("weight", False),
    ("weight", True),
    ("output", False),
    ("input", False),
    ("input", True),
]
FLOW = st.sampled_from(FLOWS_HERE)


def matrices(m, k, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-99, 99, (m, k)), rng.integers(-99, 99, (k, n))


@settings(max_examples=60, deadline=None)
@given(rows=SIDES, columns=SIDES, flow=FLOW, m=st.integers(1, 9), k=st.integers(1, 9))
def test_registers_and_closed_form_agree(rows, columns, flow, m, k):
    n = 1 + (3 * m + 5 * k) % 9
    one = Array(rows, columns, *flow)
    run = Run(one, m, k, n)
    x, w = matrices(m, k, n)
    y, count = product(one, x, w)
    assert np.array_equal(y, x @ w)
    assert count == run.cycles
    for cycle in cycles(one, x, w):
        now = cycle.number
        assert len(cycle.works) == run.busy[now]
        for found, table, width in (
            ([(i, j) for i, j in cycle.read_x], run.demands.x, k),
            ([(i, j) for i, j in cycle.read_w], run.demands.w, n),
            ([(i, j) for i, j, _ in cycle.left], run.demands.y, n),
        ):
            places = sorted(i * width + j for i, j in found)
            assert places == sorted(p for p in table[now].tolist() if p != NOTHING)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    flow=FLOW,
    sizes=st.tuples(*[st.integers(1, 90)] * 3),
)
def test_what_is_counted_adds_up(rows, columns, flow, sizes):
    run = Run(Array(rows, columns, *flow), *sizes)
    m, _, n = sizes
    assert run.demands.counts() == (run.reads_x, run.reads_w, run.writes_y)
    assert run.busy.sum() == run.macs
    assert run.busy.max() <= run.array.cells
    assert run.reads_y == run.writes_y - m * n >= 0
    assert run.utilisation <= run.mapping <= 1
    assert run.utilisation == pytest.approx(run.busy.mean() / run.array.cells)
    # all ports of results are idle at first, and the last cycle has one
    assert (run.demands.y[0] == NOTHING).all() or run.cycles == 1 or rows == 1
    down, across, _ = run.sizes
    full = run.array.dataflow != "output" or down % rows == 0
    if full and across % columns == 0:
        assert (run.demands.y[-1] != NOTHING).any()


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['flow']}")
def test_scale_sim_counts_the_same(case):
    one = Array(*case["array"], FLOWS[case["flow"]])
    run = Run(one, *case["shape"])
    ours = report(run)
    for name in ("cycles", "reads_x", "reads_w", "writes_y"):
        assert getattr(ours, name) == case[name], name
    for name in ("utilisation", "mapping", "compute"):
        assert getattr(ours, name) == pytest.approx(case[name], abs=1e-8), name
    assert case["stalls"] == 0


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['flow']}")
def test_scale_sim_asks_for_the_same_in_each_cycle(case):
    run = Run(Array(*case["array"], FLOWS[case["flow"]]), *case["shape"])
    tables = {"x": run.demands.x, "w": run.demands.w, "y": run.demands.y}
    if case["flow"] == "os":  # there a fold has no cycles in which results leave
        del tables["y"]
        for name, table in tables.items():
            folds = table.reshape(run.folds, run.period, -1)
            tables[name] = folds[:, : -run.array.rows].reshape(-1, table.shape[1])
    for name, table in tables.items():
        assert digest(table) == case[name], name


def test_by_hand():
    # Two rows of x meet a block of 2 × 2: load 2, then 2 + 2 + 2 − 2, cell by cell.
    x, w = np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])
    seen = [*cycles(Array(2, 2), x, w)]
    assert [len(each.works) for each in seen] == [0, 0, 1, 3, 3, 1]
    assert seen[1].weight == [[5, 6], [7, 8]]
    assert [each.left for each in seen[:4]] == [[], [], [], [(0, 0, 19)]]
    assert seen[4].left == [(1, 0, 43), (0, 1, 22)]
    assert seen[5].left == [(1, 1, 50)]
    assert seen[3].x == [[3, 1], [2, None]]
    assert Run(Array(2, 2), 2, 2, 2).utilisation == 8 / 24


def test_a_second_register_hides_the_loads():
    plain, double = Array(4, 4), Array(4, 4, double=True)
    assert Run(plain, 6, 4, 4).cycles == Run(double, 6, 4, 4).cycles == 16
    assert Run(plain, 6, 8, 8).cycles == 4 * 16
    assert Run(double, 6, 8, 8).cycles == 3 * 6 + 16
    assert Run(double, 3, 8, 8).cycles == 3 * 4 + 13  # 3 rows: waits for the weights


def test_inputs_that_stay_are_the_product_turned():
    a = Run(Array(3, 5, "input", True), 7, 4, 11)
    b = Run(Array(3, 5, "weight", True), 11, 4, 7)
    assert (a.cycles, a.macs, a.mapping) == (b.cycles, b.macs, b.mapping)
    assert (a.reads_x, a.reads_w) == (b.reads_w, b.reads_x)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"rows": 0, "columns": 4}, "rows=0 must be a whole number"),
        ({"rows": 4, "columns": -2}, "columns=-2"),
        ({"rows": 4, "columns": 2.5}, "columns=2.5"),
        ({"rows": 4, "columns": 2.0}, "columns=2.0"),
        ({"rows": float("inf"), "columns": 2}, "rows=inf"),
        ({"rows": None, "columns": 2}, "rows=None"),
        ({"rows": True, "columns": 2}, "rows=True"),
        ({"rows": 4, "columns": 4, "dataflow": "row"}, "dataflow='row' must be one of"),
        (
            {"rows": 4, "columns": 4, "dataflow": "output", "double": True},
            "double=True needs a block",
        ),
    ],
)
def test_nonsense_arrays_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        Array(**kwargs)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, -3)])
def test_nonsense_products_are_refused(sizes):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        Run(Array(2, 2), *sizes)


def test_nonsense_matrices_are_refused():
    one, good = Array(2, 2), np.ones((2, 2), dtype=int)
    for x, w, says in (
        (np.ones((2, 3), dtype=int), good, "columns of x are rows of w"),
        (np.ones((2, 2)), good, "x of float64 must hold whole numbers"),
        (good, np.ones((2, 2)), "w of float64"),
    ):
        with pytest.raises(ValueError, match=says):
            next(cycles(one, x, w))
    with pytest.raises(ValueError, match="no second register"):
        report(Run(Array(2, 2, double=True), 2, 2, 2))
