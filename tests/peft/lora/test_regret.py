"""The runs that the lesson tells of: complete, searched to the end, and run again.

`scripts/lora_regret.py` makes them.
"""

from __future__ import annotations

import json

import pytest
import torch

from scripts import lora_regret
from scripts.lora_regret import BY_MUON, GRID, REGRET, SEVERAL, Study

STUDIES = {"regret": REGRET, "variants": SEVERAL, "muon": BY_MUON}


@pytest.fixture(scope="module")
def text():
    return lora_regret.texts()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_is_done(study: Study):
    runs = study.read()
    assert list(lora_regret.plan(study, runs)) == []
    made = {(run["method"], run["rate"], run["seed"]) for run in runs}
    assert len(made) == len(runs)
    assert {run["method"] for run in runs} == {m.name for m in study.methods}
    assert all(len(run["test"]) == len(study.marks) for run in runs)
    head = json.loads(study.file.read_text(encoding="utf-8"))
    assert head["command"] == study.command
    assert head["versions"]["torch"] and head["date"]
    assert head["steps"] == list(study.marks)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_the_best_rate_has_a_neighbour_on_either_side(study: Study):
    """After all steps and after 20: else the search ended too early."""
    for method in study.methods:
        dev = lora_regret.losses_of(study.read(), method.name, 0)
        for mark in (study.marks[-1], lora_regret.SHORT):
            best = lora_regret.best_rate(dev, study.marks.index(mark))
            place = GRID.index(best)
            assert {GRID[place - 1], GRID[place + 1]} <= set(dev), method.name


def test_attention_and_mlp_train_the_same_number():
    by_name = {method.name: method for method in REGRET.methods}
    numbers = [
        sum(
            p.numel()
            for p in lora_regret.adapted(by_name[name], 0).parameters()
            if p.requires_grad
        )
        for name in ("attention, r=12", "MLP, r=7")
    ]
    assert numbers == [43_008, 43_008]


@pytest.mark.parametrize(
    ("study", "method", "rate"),
    [
        (REGRET, "r=4", 4e-3),
        (SEVERAL, "PiSSA", 2e-3),
        (BY_MUON, "full, Muon", None),
    ],
    ids=["regret", "variants", "muon"],
)
def test_a_run_again_gives_what_is_written(study, method, rate, text, one_thread):
    old = next(
        run
        for run in study.read()
        if run["method"] == method and run["rate"] == (rate or run["rate"])
    )
    by_name = {m.name: m for m in study.methods}
    mark = study.marks[:1]
    new = lora_regret.run(by_name[method], old["rate"], old["seed"], text, mark)
    assert new["test"][0] == pytest.approx(old["test"][0], abs=0.01)


def test_the_search_goes_on_until_the_best_has_neighbours():
    method = lora_regret.Method("any", 1, middle=GRID[5])
    marks = (20, 80)
    dev: dict[float, list[float]] = {}
    # the best rate is the third below the middle after 80 steps, the middle after 20
    while (rate := lora_regret.next_rate(method, dev, marks)) is not None:
        place = GRID.index(rate)
        dev[rate] = [abs(place - 5), abs(place - 2)]
    assert sorted(dev) == list(GRID[1:7])
