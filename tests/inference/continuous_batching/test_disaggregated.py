"""Prefill here, decoding there: the same tokens, and the bytes of the formula."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference.continuous_batching import (
    Cost,
    Limits,
    Link,
    Request,
    decode_rank,
    lognormal,
    moved_bytes,
    percentile,
    poisson,
    prefill_rank,
    read_out,
    serve_trace,
    simulate,
    simulate_apart,
    simulate_together,
    trace,
    write_in,
)
from llmlab.inference.paged_attention import BlockManager, PagedCache, prefill
from llmlab.inference.prefill_decode_kv_cache import cache_bytes
from llmlab.models import course_model
from llmlab.parallelism.runtime import World, launch

OUTPUTS = [6, 1, 3, 8]


@pytest.fixture(scope="module")
def model():
    return course_model.load()


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(0)
    return [torch.randint(5, 900, (n,)).tolist() for n in (3, 12, 7, 1)]


def rank(comm, model, prompts, outputs):
    """Rank 0 reads prompts, rank 1 writes."""
    cache = PagedCache(model.config, BlockManager(60, 4))
    if comm.rank == 0:
        result = prefill_rank(comm, model, cache, prompts)
    else:
        result = decode_rank(comm, model, cache, outputs)
    assert cache.manager.used == 0
    return result


@pytest.mark.parametrize("start", [lambda fn, *a: World(2).run(fn, *a), None])
def test_two_processes_write_the_tokens_of_one(model, prompts, start):
    if start is None:
        sent, tokens = launch(rank, 2, model, prompts, OUTPUTS, timeout=60)
    else:
        sent, tokens = start(rank, model, prompts, OUTPUTS)
    cache = PagedCache(model.config, BlockManager(60, 4))
    assert tokens == serve_trace(model, cache, prompts, OUTPUTS, "alone").tokens
    config = model.config
    total = sum(map(len, prompts))
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    assert sent == moved_bytes(total, *shape, 4)
    per_token = cache_bytes(
        "GQA",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.head_dim,
        groups=config.num_key_value_heads,
        bytes_each=4,
    )
    assert sent == total * per_token


def test_what_is_read_out_and_written_in_is_the_same(model, prompts):
    """Into other blocks, of another size."""
    here = PagedCache(model.config, BlockManager(60, 4))
    there = PagedCache(model.config, BlockManager(60, 5))
    there.manager.add([1, 2, 3])
    prompt = prompts[1]
    sequence, _, _ = prefill(model, here, prompt)
    values = read_out(here, sequence)
    config = model.config
    assert values.shape == (
        2,
        config.num_hidden_layers,
        len(prompt),
        config.num_key_value_heads,
        config.head_dim,
    )
    moved = write_in(there, prompt, values)
    assert torch.equal(read_out(there, moved), values)
    there.manager.check()


# In virtual time ----------------------------------------------------------------------

COST = Cost(0.02, 0.001)
LIMITS = Limits(max_tokens=10**5, max_sequences=16, chunked=False)


def test_apart_by_hand():
    """Two prompts; the link carries one after the other."""
    requests = [Request(0.0, 10, 3), Request(0.0, 20, 2), Request(5.0, 4, 1)]
    link = Link(bytes_per_second=100.0, bytes_per_token=2.0)
    served = simulate_apart(requests, Cost(0.1, 0.0), LIMITS, link)
    # both prompts at 0.1; the first has come at 0.3, the second 0.4 s after it
    assert served.times[0] == pytest.approx([0.1, 0.4, 0.5])
    assert served.times[1] == pytest.approx([0.1, 0.8])
    assert served.times[2] == pytest.approx([5.1])


def test_a_link_without_delay_and_one_request_is_one_machine():
    requests = [Request(1.0, 30, 9)]
    fast = Link(1e30, 1.0)
    one = simulate(requests, COST, LIMITS)
    assert simulate_apart(requests, COST, LIMITS, fast).times[0] == pytest.approx(
        one.times[0]
    )


def test_together_deals_the_requests_out():
    requests = trace([0.0, 0.0, 1.0], [5, 6, 7], [2, 2, 2])
    served = simulate_together(requests, COST, LIMITS)
    even = simulate([requests[0], requests[2]], COST, LIMITS)
    odd = simulate([requests[1]], COST, LIMITS)
    assert served.times == [even.times[0], odd.times[0], even.times[1]]


def long_prompts(seed: int) -> list[Request]:
    return trace(
        poisson(2.0, 80, seed),
        lognormal(300, 80, longest=1500, seed=seed),
        lognormal(40, 80, longest=200, seed=seed + 9),
    )


@pytest.mark.parametrize("seed", range(3))
def test_apart_no_prompt_stops_a_text(seed):
    """The longest step beside a text is one of decoding; but a slow link costs more."""
    requests = long_prompts(seed)
    together = simulate_together(requests, COST, LIMITS)
    fast = simulate_apart(requests, COST, LIMITS, Link(1e12, 1e5))
    slow = simulate_apart(requests, COST, LIMITS, Link(2e7, 1e5))
    p99 = {
        name: percentile(run.latencies()[1], 99)
        for name, run in (("together", together), ("fast", fast), ("slow", slow))
    }
    assert p99["fast"] < p99["together"] / 2
    assert p99["slow"] > p99["together"]
    assert [len(t) for t in fast.times] == [r.output for r in requests]
