"""The tuner's moves, its log, and what a search finds."""

from __future__ import annotations

import json
import math
import random

import pytest

from llmlab.compilers.tvm import tuner
from llmlab.compilers.tvm.tuner import Choice, Record, Tile

SPACE = {"i": Tile(24, most=8), "j": Tile(16, parts=3, most=4), "up": Choice((1, 2))}


def test_tiles_are_all_of_them():
    found = tuner.tiles(12, 2, 4)
    assert found == [(3, 4), (4, 3), (6, 2), (12, 1)]
    every = tuner.tiles(24, 3, 24)
    assert len(every) == len(set(every)) == 30  # C(5, 2) · C(3, 2)
    assert all(math.prod(tile) == 24 for tile in every)


def test_primes():
    assert [tuner.primes(n) for n in (1, 2, 12, 49, 97)] == [
        [],
        [2],
        [2, 3],
        [7],
        [97],
    ]


def test_a_neighbour_is_one_prime_away_and_back():
    for tile in tuner.tiles(24, 3, 24):
        near = tuner.neighbours(tile, 24)
        assert tile not in near
        assert all(math.prod(other) == 24 for other in near)
        assert all(tile in tuner.neighbours(other, 24) for other in near)
        ratios = [[a / b for a, b in zip(tile, other, strict=True)] for other in near]
        assert all(ratio.count(1) == 1 for ratio in ratios)


def test_every_tile_can_be_reached():
    reached, waiting = {(24, 1, 1)}, [(24, 1, 1)]
    while waiting:
        for other in tuner.neighbours(waiting.pop(), 24):
            if other not in reached:
                reached.add(other)
                waiting.append(other)
    assert reached == {*tuner.tiles(24, 3, 24)}


def test_a_mutation_changes_one_decision_and_stays_in_the_space():
    draw = random.Random(0)
    decisions = tuner.sample(SPACE, draw)
    for _ in range(200):
        new = tuner.mutate(decisions, SPACE, draw)
        assert sum(new[name] != decisions[name] for name in SPACE) == 1
        assert all(new[n] in SPACE[n].options for n in SPACE)
        decisions = new


def test_where_there_is_nothing_to_change():
    space = {"i": Tile(1), "c": Choice((3,))}
    decisions = tuner.sample(space, random.Random(0))
    assert tuner.mutate(decisions, space, random.Random(0)) == decisions


def cost(decisions) -> float:
    """Best at i = (3, 8), j = (4, 1, 4), up = 2."""
    far = abs(math.log(decisions["i"][-1] / 8)) + abs(math.log(decisions["j"][-1] / 4))
    return 1 + far + decisions["j"][1] / 8 + (decisions["up"] == 1)


def test_the_search_finds_the_best_and_measures_nothing_twice(tmp_path):
    seen = []

    def measure(decisions):
        seen.append(tuner.key(decisions))
        return cost(decisions)

    records = tuner.tune("t", SPACE, measure, tmp_path / "log", trials=40)
    assert len(seen) == len(set(seen)) == len(records) == 40
    assert tuner.best(records).decisions == {"i": (3, 8), "j": (4, 1, 4), "up": 2}


def test_a_small_space_ends_by_itself(tmp_path):
    space = {"up": Choice((1, 2, 3))}
    records = tuner.tune("t", space, lambda d: float(d["up"]), tmp_path / "log", 50)
    assert [record.decisions["up"] for record in records] != []
    assert len(records) == 3


def test_a_log_is_gone_on_with_and_read_without_measuring(tmp_path):
    log = tmp_path / "log"
    first = tuner.tune("t", SPACE, cost, log, trials=10)
    again = tuner.tune("t", SPACE, cost, log, trials=25)
    assert again[:10] == first
    assert len(log.read_text().splitlines()) == 25
    assert tuner.read(log, "t") == again
    assert tuner.read(log, "another") == []

    def never(decisions):
        raise AssertionError("measured")

    assert tuner.tune("t", SPACE, never, log, trials=25) == again


def test_what_fails_is_written_down_and_not_tried_again(tmp_path):
    def measure(decisions):
        if decisions["up"] == 1:
            raise RuntimeError("no registers left")
        return cost(decisions)

    records = tuner.tune("t", SPACE, measure, tmp_path / "log", trials=40)
    failed = [record for record in records if record.seconds is None]
    assert failed
    assert {record.problem for record in failed} == {"no registers left"}
    assert tuner.best(records).decisions["up"] == 2
    assert tuner.best(failed) is None


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    log = tmp_path / "log"
    tuner.append(log, Record("t", {"i": (3, 8), "packed": True}, 0.5))
    with log.open("a") as file:
        file.write(json.dumps({"task": "t"}) + "\n" + '{"task": "t", "decis')
    (record,) = tuner.read(log, "t")
    assert record == Record("t", {"i": (3, 8), "packed": True}, 0.5)
    another = Record("t", {"i": (6, 4), "packed": False}, 0.25)
    tuner.append(log, another)
    assert tuner.read(log, "t") == [record, another]


def test_tiles_that_there_are_not():
    with pytest.raises(ValueError, match="most=0"):
        Tile(4, most=0)
    with pytest.raises(ValueError, match="no tile"):
        Tile(9, most=8, least=4)


def test_the_space_of_a_product():
    space = tuner.product_space(512, 512, 512)
    assert tuner.size(space) == 300
    decisions = tuner.sample(space, random.Random(1))
    schedule = tuner.product_schedule(decisions)
    rows, columns = decisions["i"][-1], decisions["j"][-1]
    assert ("split", "C", "i", (None, rows)) in schedule
    assert ("split", "C", "j", (None, columns)) in schedule
