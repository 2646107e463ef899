"""Emissions against those that were published."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips.precision_power_cost import carbon

RUNS = {each.name: each for each in carbon.TRAININGS}


@pytest.mark.parametrize("name", ["GPT-3", "BLOOM"])
def test_published_runs_by_the_formula(name):
    run = RUNS[name]
    assert run.kwh / 1000 == pytest.approx(run.printed_mwh, rel=1e-3)
    assert run.tonnes == pytest.approx(run.printed_tonnes, rel=1e-3)


def test_all_of_bloom():
    idle = carbon.running_kg(kwh=carbon.BLOOM_IDLE_KWH, grams_per_kwh=57) / 1000
    assert idle == pytest.approx(14.6, abs=0.05)
    total = RUNS["BLOOM"].tonnes + idle + carbon.BLOOM_MADE_TONNES
    assert total == pytest.approx(carbon.BLOOM_ALL_TONNES, abs=0.1)


def test_llamas_three_lines_stand_for_one_intensity():
    lines = {1.46e6: 420, 7.0e6: 2040, 30.84e6: 8930, 39.3e6: 11_390}
    found = [
        carbon.implied_grams_per_kwh(
            kg=tonnes * 1000, kwh=carbon.energy_kwh(gpu_hours=hours, watts=700)
        )
        for hours, tonnes in lines.items()
    ]
    assert max(found) / min(found) < 1.02
    assert RUNS["Llama 3.1"].tonnes is None  # neither PUE nor grid is printed


def test_by_hand():
    kwh = carbon.energy_kwh(gpu_hours=100, watts=500, pue=1.2)
    assert kwh == pytest.approx(60)
    assert carbon.running_kg(kwh=kwh, grams_per_kwh=50) == pytest.approx(3.0)
    made = carbon.made_kg(machine_kg=160, used_hours=100, life_hours=40_000, busy=0.5)
    assert made == pytest.approx(0.8)


@given(kwh=st.floats(1e-3, 1e9), grams=st.floats(0, 1000), pue=st.floats(1, 3))
def test_back_and_forth(kwh, grams, pue):
    kg = carbon.running_kg(kwh=kwh, grams_per_kwh=grams)
    assert carbon.implied_grams_per_kwh(kg=kg, kwh=kwh) == pytest.approx(grams)
    one = carbon.energy_kwh(gpu_hours=kwh, watts=1000, pue=pue)
    assert one == pytest.approx(kwh * pue)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: carbon.energy_kwh(gpu_hours=1, watts=1, pue=0.99), "pue=0.99"),
        (lambda: carbon.energy_kwh(gpu_hours=-1, watts=1), "gpu_hours=-1"),
        (lambda: carbon.energy_kwh(gpu_hours=1, watts=-1), "watts=-1"),
        (lambda: carbon.running_kg(kwh=-1, grams_per_kwh=1), "kwh=-1"),
        (lambda: carbon.running_kg(kwh=1, grams_per_kwh=-1), "grams_per_kwh=-1"),
        (
            lambda: carbon.made_kg(machine_kg=1, used_hours=1, life_hours=0),
            "life_hours=0",
        ),
        (
            lambda: carbon.made_kg(machine_kg=1, used_hours=1, life_hours=1, busy=2),
            "busy=2",
        ),
        (lambda: carbon.implied_grams_per_kwh(kg=1, kwh=0), "kwh=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()
