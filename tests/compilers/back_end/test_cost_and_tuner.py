"""Costs that can be counted by hand, and a search that goes on where it stopped."""

from __future__ import annotations

import json
import math
import random

import pytest

from llmlab.compilers.back_end import (
    challenge,
    cost,
    interpret,
    machine,
    programs,
    tuner,
)
from llmlab.compilers.back_end.ir import Buffer, Load, Loop, Program, Store, var
from llmlab.compilers.back_end.machine import AVX2, AVX512, NEON, SSE
from llmlab.compilers.back_end.schedule import NotLegal, apply
from llmlab.compilers.back_end.tuner import Choice, CostModel, Log

# Costs --------------------------------------------------------------------------------


def copy(n: int, stride: int = 1) -> Program:
    """y[i] = x[stride i]."""
    store = Store("y", (var("i"),), Load("x", (var("i") * stride,)))
    buffers = (Buffer("x", (n * stride,)), Buffer("y", (n,), role="output"))
    return Program("copy", buffers, (Loop("i", n, (store,)),))


def test_a_copy_moves_each_line_once_and_the_result_there_and_back():
    found = cost.count(copy(64))
    assert found.traffic == 4 * 64 * (1 + 2)  # x in; y in and out
    assert found.work == 64 * (2 + cost.STEP)
    assert found.cycles == found.work + found.traffic // cost.PER_CYCLE


def test_every_number_brings_a_whole_line():
    assert cost.count(copy(64, stride=16)).traffic == 64 * 64 + 2 * 4 * 64


def test_lanes_do_several_at_once_where_they_lie_side_by_side():
    steps = [("tile", "i", 8), ("vectorise", "i_i")]
    assert cost.count(apply(copy(64), steps)).work == 8 * (2 + cost.STEP)
    far = cost.count(apply(copy(64, stride=2), steps))
    assert far.work == 8 * (8 + 1 + cost.STEP)  # eight loads, one store
    rest = cost.count(apply(copy(67, stride=2), steps)).work - far.work
    assert rest == cost.STEP + 3 * (2 + cost.STEP)  # one by one


def test_the_least_recently_used_line_leaves():
    cache = cost.Cache(2 * cost.LINE)
    for line in (0, 1, 0, 2, 0, 1):  # 2 drives out 1
        cache.touch(line, write=False)
    assert cache.traffic == 4 * cost.LINE
    cache.touch(5, write=True)
    cache.touch(6, write=False)
    cache.touch(7, write=False)  # 5 was written, and leaves
    cache.flush()
    assert cache.traffic == (4 + 3 + 1) * cost.LINE


@pytest.mark.parametrize("sizes", [(7, 5, 9), (8, 3, 16), (13, 4, 10)])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 8), (20, 20)])
def test_the_traffic_of_a_product_by_enumeration(sizes, block):
    n, k, m = sizes
    rows, columns = block
    moved = 0
    for i in range(0, n, rows):
        for j in range(0, m, columns):
            height, width = min(rows, n - i), min(columns, m - j)
            moved += height * k + k * width + height * width
    assert cost.product_traffic(*sizes, *block) == 4 * moved


def test_a_block_that_stays_in_registers_moves_less():
    program = programs.matmul(24, 24, 24)
    model = cost.Model(cache=1024)
    naive = cost.count(program, model)
    best = cost.count(apply(program, machine.best_schedule(AVX2)), model)
    assert best.traffic < naive.traffic / 5
    assert best.work < naive.work / 8


# Machines -----------------------------------------------------------------------------


def test_blocks_fit_their_registers():
    for each in (AVX512, AVX2, NEON, SSE):
        rows, columns = each.block
        vectors = columns // each.lanes
        assert rows * vectors + vectors + 1 < each.registers
    assert AVX2.block == (6, 16)
    assert machine.this() in (AVX512, AVX2, NEON, SSE)


def test_the_ladder_ends_with_the_best():
    steps = machine.ladder(AVX2)
    assert next(iter(steps)) == "naive"
    assert steps["pack"] == machine.best_schedule(AVX2)
    program = programs.matmul(5, 7, 40)
    for name, schedule in steps.items():
        assert apply(program, schedule).body, name


# The tuner ----------------------------------------------------------------------------


def pretended(choice: Choice) -> float:
    """Seconds of a machine with a best choice: 6 rows of 2 registers, packed."""
    if choice.rows * choice.vectors > 40:
        raise NotLegal("too large a block")
    away = abs(math.log(choice.rows / 6)) + abs(math.log(choice.vectors / 2))
    return 1.0 + away + 0.2 * (not choice.packed) + 0.1 * (choice.depth > 0)


@pytest.mark.parametrize("strategy", tuner.STRATEGIES)
def test_searches_find_what_is_good(strategy):
    reached = []
    for seed in range(4):
        best = tuner.search(strategy, 40, Log(), pretended, seed=seed, machine=AVX2)
        assert len(best) == 40
        assert best == sorted(best, reverse=True)
        reached.append(best[-1])
    assert sorted(reached)[2] < 1.8
    if strategy == "evolution":
        assert sorted(reached)[1] <= 1.21


def test_every_choice_is_a_schedule_that_computes_the_same():
    program = programs.matmul(9, 70, 35)
    draw = random.Random(0)
    for _ in range(12):
        choice = tuner.drawn(draw)
        apply(program, tuner.schedule_of(choice, draw.choice((SSE, AVX2))))


def test_children_are_new_and_of_the_fastest():
    fast, slow = Choice(6, 2, 0, True, True), Choice(1, 4, 64, False, False)
    measured = {slow: 9.0, fast: 1.0, Choice(14, 4, 0, True, True): math.inf}
    children = tuner.next_generation(measured, 8, random.Random(0), best=1)
    assert len(set(children)) == 8 and not {*children} & {*measured}
    for child in children:
        differ = [n for n in tuner.KNOBS if getattr(child, n) != getattr(fast, n)]
        assert len(differ) == 1
    # nothing has run: they are drawn; and a space that is used up gives fewer
    assert len(tuner.next_generation({}, 5, random.Random(0))) == 5
    everything = dict.fromkeys(tuner.next_generation({}, 400, random.Random(0)), 1.0)
    assert len(tuner.next_generation(everything, 400, random.Random(1))) < 400


def test_the_log_goes_on_where_it_was_cut_off(tmp_path):
    file = tmp_path / "new" / "log.jsonl"
    asked = []

    def run(choice: Choice) -> float:
        asked.append(choice)
        return pretended(choice)

    tuner.search("evolution", 10, Log(file), run, machine=AVX2)
    text = file.read_text()
    file.write_text(text + '{"choice": {"rows": 6, "vec')  # the power failed
    log = Log(file)
    assert len(log.measured) == 10
    tuner.search("evolution", 14, log, run, machine=AVX2)
    assert len(asked) == len(set(asked)) == 14
    again = Log(file)
    assert again.measured == log.measured
    assert again.best[1] == min(log.measured.values())
    failed = [json.loads(x) for x in file.read_text().splitlines() if '"why"' in x]
    assert all(line["seconds"] is None for line in failed)
    with pytest.raises(ValueError, match="nothing has been measured"):
        Log().best
    with pytest.raises(ValueError, match="strategy='luck' must be one of"):
        tuner.search("luck", 1, Log(), run)


def test_what_cannot_run_is_logged_with_the_reason(tmp_path):
    def never(choice: Choice) -> float:
        raise NotLegal("lanes would meet")

    file = tmp_path / "log.jsonl"
    best = tuner.search("random", 3, Log(file), never, machine=AVX2)
    assert best == [math.inf] * 3
    assert file.read_text().count("lanes would meet") == 3


def test_the_model_ranks_what_it_has_seen():
    model = CostModel(AVX2)
    assert model.seconds(Choice(1, 1, 0, True, True)) == 1.0
    measured = {
        c: pretended_by_loads(c)
        for c in tuner.next_generation({}, 60, random.Random(3))
    }
    model.fit(measured)
    order = sorted(measured, key=model.seconds)
    best, worst = order[:10], order[-10:]
    mean = lambda some: sum(measured[c] for c in some) / len(some)  # noqa: E731
    assert mean(best) < mean(worst) / 1.5


def pretended_by_loads(choice: Choice) -> float:
    return 1 / choice.rows + 1 / (8 * choice.vectors) + 0.1 * (not choice.packed)


def test_a_choice_is_measured_as_machine_code():
    seconds = tuner.measure(Choice(4, 1, 0, True, True), AVX2, n=32, target="llvm")
    assert 0 < seconds < 1


# The challenge ------------------------------------------------------------------------


def test_the_challenge_is_not_met_by_what_the_package_has():
    naive, first = (
        challenge.judge([]),
        challenge.judge(machine.attention_schedule(AVX2)),
    )
    for score in (naive, first):
        assert score.wrong == ()
        assert score.cycles > challenge.CYCLES
    keys = 2 * 4 * challenge.KEYS * challenge.WIDTH
    assert keys < first.traffic < challenge.TRAFFIC < naive.traffic
    with pytest.raises(NotLegal, match="step 1"):
        challenge.judge([("vectorise", "k7")])


def test_a_wrong_program_would_be_seen(monkeypatch):
    run = interpret.run
    monkeypatch.setattr(interpret, "run", lambda *all_of: [run(*all_of)[0] + 0.1])
    assert challenge.judge([]).wrong == challenge.ODD
