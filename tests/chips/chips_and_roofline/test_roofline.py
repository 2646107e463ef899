"""The roofline against arithmetic, and against figures that vendors publish."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips import chips_and_roofline as cr
from llmlab.models import codes
from llmlab.models.accounting import forward_flops, kv_cache_bytes, parameters
from llmlab.models.chips import Chip, chip, chips
from llmlab.models.presets import preset

positive = st.floats(1e-3, 1e18)


@given(flops=positive, moved=positive, peak=positive, bandwidth=positive)
def test_the_roof_and_the_time_say_the_same(flops, moved, peak, bandwidth):
    work = cr.Work("work", flops, moved)
    reached = cr.attainable(work.intensity, peak, bandwidth)
    assert cr.seconds(work, peak, bandwidth) == pytest.approx(flops / reached)


@given(peak=positive, bandwidth=positive)
def test_at_the_ridge_both_take_equally_long(peak, bandwidth):
    intensity = cr.ridge(peak, bandwidth)
    assert cr.attainable(intensity, peak, bandwidth) == pytest.approx(peak)
    assert cr.attainable(intensity / 2, peak, bandwidth) == pytest.approx(peak / 2)


def test_work_adds_up():
    both = cr.Work("a", 3.0, 4.0) + cr.Work("b", 1.0, 0.0)
    assert (both.name, both.flops, both.bytes) == ("a + b", 4.0, 4.0)
    assert cr.Work("b", 1.0, 0.0).intensity == math.inf


@given(
    m=st.integers(1, 5),
    k=st.integers(1, 5),
    n=st.integers(1, 5),
    sizes=st.tuples(*[st.sampled_from([0.5, 1, 2, 4, 8])] * 3),
)
def test_a_product_is_counted_one_by_one(m, k, n, sizes):
    flops = sum(2 for _ in range(m) for _ in range(n) for _ in range(k))
    x, w, y = torch.ones(m, k), torch.ones(k, n), torch.ones(m, n)
    moved = sum(t.numel() * b for t, b in zip((x, w, y), sizes, strict=True))
    work = cr.product(m, k, n, *sizes)
    assert (work.flops, work.bytes) == (flops, moved)


@given(
    k=st.integers(1, 400),
    n=st.integers(1, 400),
    peak=st.floats(1e9, 1e13),
    sizes=st.tuples(*[st.sampled_from([0.5, 1, 2, 4])] * 3),
)
def test_the_smallest_batch_by_trying(k, n, peak, sizes):
    bandwidth = 1e11
    found = cr.smallest_batch(k, n, peak, bandwidth, *sizes)

    def computes(m):
        work = cr.product(m, k, n, *sizes)
        return work.flops / peak >= work.bytes / bandwidth * (1 - 1e-12)

    if found is None:
        assert not computes(10**12)
    else:
        assert computes(found)
        assert found == 1 or not computes(found * (1 - 1e-9) - 1)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "smollm2-135m"])
def test_a_step_counts_what_accounting_counts(name):
    config = preset(name)
    prefill = cr.step(config, 3, 100)
    assert prefill.flops == forward_flops(config, 3, 100)
    whole = cr.step(config, 2, 100).flops
    # one after the other: attention looks at fewer keys, the rest is the same
    parts = sum(cr.step(config, 2, 1, past).flops for past in range(100))
    heads = config.num_attention_heads * config.head_dim
    keys = sum(100 - (past + 1) for past in range(100))
    fewer = 4 * 2 * config.num_hidden_layers * heads * keys
    assert whole - parts == fewer


def test_a_step_reads_the_weights_once_and_the_cache_of_all():
    config = preset("llama-3.1-8b")
    table = config.vocab_size * config.hidden_size  # only looked up
    one = cr.step(config, 1, 1, 99)
    assert one.bytes == 2 * (parameters(config) - table) + kv_cache_bytes(
        config, 1, 100
    )
    many = cr.step(config, 5, 1, 99, weight_bytes=0.5, cache_bytes=1)
    weights = (parameters(config) - table) / 2
    assert many.bytes == weights + kv_cache_bytes(config, 5, 100) / 2
    tied = preset("smollm2-135m")
    assert cr.step(tied, 1, 1).bytes == 2 * parameters(tied) + kv_cache_bytes(
        tied, 1, 1
    )


def test_products_of_a_layer_have_its_parameters():
    config = preset("llama-3.1-8b")
    works = cr.layer_products(config, 1)
    linears = sum(work.flops for work in works) / 2 * config.num_hidden_layers
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    tables = 2 * config.vocab_size * config.hidden_size
    assert linears == parameters(config) - norms - tables


# Ranking ------------------------------------------------------------------------------


def made(name="x", peak=1e12, memory=1e9, bandwidth=1e9, power=None):
    return Chip(name, "nobody", 2026, {"bf16": peak}, memory, bandwidth, None, power)


def test_chips_are_ranked_by_what_one_pays_for():
    work = cr.Work("work", 4e12, 1e9)
    slow, wide = made("slow"), made("wide", peak=8e12, power=100.0)
    places = cr.rank(work, 2.5e9, [slow, wide], "bf16", free=1.0)
    assert [place.chip.name for place in places] == ["wide", "slow"]
    first, last = places
    assert (first.chips, first.bound, first.joules) == (3, "memory", pytest.approx(100))
    assert first.seconds == pytest.approx(1 / 3)
    assert (last.chips, last.bound, last.joules) == (3, "compute", None)
    assert last.chip_seconds == pytest.approx(4)


def test_chips_without_a_clear_figure_are_left_out():
    nothing = Chip("nothing", "nobody", 2026, {}, 1e9, 1e9)
    unknown = Chip("unknown", "nobody", 2026, {"bf16": 1e12}, None, 1e9)
    assert cr.rank(cr.Work("w", 1, 1), 1, [nothing, unknown], "bf16") == []
    assert cr.rank(cr.Work("w", 1, 1), 1, [made()], "fp8") == []
    named = [p.chip.name for p in cr.rank(cr.Work("w", 1, 1), 1, [*chips().values()])]
    assert named == []


@pytest.mark.parametrize(("held", "wanted"), [(0.9e9, 1), (0.91e9, 2), (1.8e9, 2)])
def test_how_many_chips_hold_it(held, wanted):
    assert cr.chips_needed(held, 1e9) == wanted


# units, FLOPs of one in a clock, hertz: Austin et al. 2025, chapter 12, and the data
# sheets' clocks; MI355X: 32 units on each of 8 dies
@pytest.mark.parametrize(
    ("name", "kind", "per_clock", "hertz"),
    [
        ("A100", "bf16", 432 * 512, 1.41e9),
        ("H100", "bf16", 528 * 1024, 1.83e9),
        ("MI355X", "fp8", 8 * 32 * 8192, 2.4e9),
        ("TPU v3", "bf16", 2 * 2 * 128**2 * 2, 0.94e9),
        ("TPU v4", "bf16", 2 * 4 * 128**2 * 2, 1.05e9),
    ],
)
def test_published_peaks_are_units_times_clock(name, kind, per_clock, hertz):
    clock = cr.implied_clock(chip(name).flops[kind], per_clock)
    assert clock == pytest.approx(hertz, rel=0.01)


def test_a_sparse_figure_betrays_itself_by_its_clock():
    """Twice the clock that the same chip runs at."""
    assert cr.implied_clock(1979e12, 528 * 1024) == pytest.approx(3.66e9, rel=0.01)


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cr.Work("w", -1, 1), "flops=-1 must not be negative"),
        (lambda: cr.Work("w", 1, math.nan), "bytes=nan must not be negative"),
        (lambda: cr.Work("w", 0, 0), "both 0"),
        (lambda: cr.attainable(1, 0, 1), "peak=0 must be above 0"),
        (lambda: cr.seconds(cr.Work("w", 1, 1), 1, -2), "bandwidth=-2 must be"),
        (lambda: cr.ridge(1, 0), "bandwidth=0 must be above 0"),
        (lambda: cr.product(0, 1, 1), "m=0 must be above 0"),
        (lambda: cr.smallest_batch(1, 1, 1, 0), "bandwidth=0 must be above 0"),
        (lambda: cr.smallest_batch(1, 1, 1, 1, w_bytes=0), "w_bytes=0 must be"),
        (lambda: cr.step(preset("tiny"), 1, 0), "new=0 must be above 0"),
        (lambda: cr.step(preset("tiny"), 1, 1, -1), "past=-1 must not be negative"),
        (lambda: cr.chips_needed(1, 1, 1.5), "free=1.5 is a part of the memory"),
        (lambda: cr.implied_clock(1, 0), "per_clock=0 must be above 0"),
    ],
)
def test_nonsense_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# This machine -------------------------------------------------------------------------


def test_this_machine_is_measured():
    found, missing = cr.measure(megabytes=8, size=128, limit=0.05)
    assert {*found.flops, *missing} == {*cr.FORMATS}
    assert found.flops["fp32"] > 1e8
    assert found.bandwidth > 1e7
    assert found.memory > 1e8
    assert found.power is None


def test_a_format_that_a_machine_lacks_is_named(monkeypatch):
    def fail(a, b):
        raise NotImplementedError("not for int8\nat all")

    monkeypatch.setattr(codes, "product", fail)
    found, missing = cr.measure(megabytes=1, size=64, limit=0.01)
    assert missing == {"int8": "not for int8"}
    assert "int8" not in found.flops


def test_measuring_keeps_to_its_time():
    from llmlab.chips.chips_and_roofline import cpu

    now = iter(range(10_000))
    cpu.speed(torch.float32, size=4096, limit=3, clock=lambda: next(now))
    assert next(now) < 20, "it went on to larger products"
    with pytest.raises(ValueError, match="size=32 must be at least 64"):
        cpu.speed(torch.float32, size=32)
    with pytest.raises(ValueError, match="limit=0 must be above 0"):
        cpu.speed(torch.float32, limit=0)
