"""Counts against torch's counter and published tables; the roofline's two sides."""

from __future__ import annotations

import csv

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlab.inference.prefill_decode_kv_cache import (
    FILE,
    MACHINES,
    Machine,
    cache_bytes,
    decode_time,
    max_batch,
    passes,
    weights_read,
)
from llmlab.models.accounting import kv_cache_bytes, parameters
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama
from llmlab.models.machine import bandwidth, speed
from llmlab.models.presets import preset

# DeepSeek-V2: 128 heads of 128 channels, d_c = 4 · 128, d_h^R = 128 / 2, 60 layers
V2 = {"layers": 60, "heads": 128, "head_dim": 128}


def test_the_table_of_deepseek_v2():
    """Table 1 in elements: 2 n_h d_h l, 2 n_g d_h l, 2 d_h l, (d_c + d_h^R) l."""
    mha = cache_bytes("MHA", **V2, bytes_each=1)
    mla = cache_bytes("MLA", **V2, latent=512, rope=64, bytes_each=1)
    assert mha == 2 * 128 * 128 * 60
    assert cache_bytes("GQA", **V2, groups=8, bytes_each=1) == mha / 16
    assert cache_bytes("MQA", **V2, bytes_each=1) == mha / 128
    assert mla == 9 / 2 * 128 * 60
    # "equal to GQA with only 2.25 groups"
    assert mla == cache_bytes("GQA", **V2, groups=1, bytes_each=1) * 2.25


def test_the_caches_of_its_appendix():
    """Table 9: thousands of elements per token, MHA and MLA, at two sizes."""
    mla = {"latent": 512, "rope": 64, "bytes_each": 1}
    assert round(cache_bytes("MLA", 60, 128, 128, **mla) / 1e3, 1) == 34.6
    assert round(cache_bytes("MLA", 27, 16, 128, **mla) / 1e3, 1) == 15.6
    assert round(cache_bytes("MHA", 27, 16, 128, bytes_each=1) / 1e3, 1) == 110.6


def test_the_93_percent_of_its_abstract():
    """Against DeepSeek 67B, 95 layers with 8 groups in bf16, with 6 bits a number."""
    mine = cache_bytes("MLA", **V2, latent=512, rope=64, bytes_each=6 / 8)
    theirs = cache_bytes("GQA", 95, 64, 128, groups=8)
    assert round(100 * (1 - mine / theirs), 1) == 93.3


def test_grouped_queries_as_the_course_counts_them():
    config = preset("llama-3-8b")
    D = config.head_dim
    assert cache_bytes("GQA", 32, 32, D, groups=8) == kv_cache_bytes(config, 1, 1)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind='mha' must be one of MHA, GQA"):
        cache_bytes("mha", 1, 1, 1)


def eager(q, k, v, mask):
    """Attention as two products: torch's counter has no formula for the fused one."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(("batch", "new", "past"), [(1, 1, 0), (2, 5, 0), (3, 1, 7)])
def test_flops_as_torch_counts_them(batch, new, past):
    model = Llama(preset("tiny"))
    cache = KVCache(2)
    if past:
        model(torch.zeros(batch, past, dtype=torch.long), cache=cache)
    with FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(batch, new, dtype=torch.long),
            cache=cache,
            logits_to_keep=1,
            attention=eager,
        )
    machine = Machine(1, 1)
    found = passes(model.config, machine, batch=batch, new=new, past=past)
    assert counter.get_total_flops() == found.flops


def test_weights_read_leave_out_what_is_only_looked_up():
    tiny, tied = preset("tiny"), preset("course")
    assert weights_read(tiny) == 2 * (parameters(tiny) - 97 * 32)
    assert weights_read(tied, torch.float32) == 4 * parameters(tied)


def test_bytes_are_weights_once_and_the_cache_of_each_row():
    config = preset("tiny")
    one = passes(config, Machine(1, 1), batch=1, past=9)
    four = passes(config, Machine(1, 1), batch=4, past=9)
    assert one.bytes - weights_read(config) == kv_cache_bytes(config, 1, 10)
    assert four.bytes - weights_read(config) == 4 * kv_cache_bytes(config, 1, 10)


def test_the_slower_of_the_two_decides():
    scalars = {"weights": 100.0, "cache": 2.0, "work": 10.0}
    assert decode_time(4, 5, **scalars, bandwidth=10, speed=1e9) == 14
    assert decode_time(4, 5, **scalars, bandwidth=1e9, speed=10) == 4
    config = preset("llama-3-8b")
    for machine in MACHINES.values():
        assert passes(config, machine, new=2048).intensity > machine.ridge
        assert passes(config, machine, past=2048).intensity < 2


def test_decode_time_is_a_pass_of_one_token():
    config, machine = preset("llama-2-7b"), MACHINES["A100 80GB"]
    for batch in (1, 16, 4096):
        one = passes(config, machine, batch=batch, past=99)
        cache = kv_cache_bytes(config, 1, 1)
        assert one.seconds == pytest.approx(
            decode_time(
                batch,
                100,
                weights=weights_read(config),
                cache=cache,
                work=one.flops / batch,
                bandwidth=machine.bandwidth,
                speed=machine.speed,
            )
        )


def test_gpt_fast_read_the_bytes_that_we_count():
    """Its table: bytes per second over tokens per second are the bytes of a token."""
    for name, rate, gigabytes in (
        ("llama-2-7b", 104.9, 1397.31),
        ("llama-3.1-8b", 93.89, 1410.76),
    ):
        mine = weights_read(preset(name)) / 1e9
        assert gigabytes / rate == pytest.approx(mine, rel=0.02)


def test_rows_that_fit():
    assert max_batch(100, 40, 1, 20) == 3
    assert max_batch(100, 40, 1, 61) == 0
    assert max_batch(30, 40, 1, 1) == 0


def test_refusals():
    with pytest.raises(ValueError, match="bandwidth=0"):
        Machine(0, 1)
    with pytest.raises(ValueError, match="new=0"):
        passes(preset("tiny"), Machine(1, 1), new=0)


def test_what_this_machine_does_is_measured():
    assert 1e8 < bandwidth(megabytes=32, trials=2) < 5e12
    assert 1e8 < speed(size=128, trials=2) < 1e15


def test_the_stored_runs_are_whole():
    with FILE.open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert {run["task"] for run in runs} == {
        "prefill",
        "decode",
        "context",
        "attention",
    }
    assert all(float(run["seconds"]) > 0 for run in runs)
