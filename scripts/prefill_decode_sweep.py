"""Passes of the real model, timed: llmlab/inference/data/prefill_decode.csv.

    python scripts/prefill_decode_sweep.py            continue, a line a run
    python scripts/prefill_decode_sweep.py --check 1  run that many lines again

SmolLM2-135M in fp32 on one thread. Seconds are the CPU's, the best of a few. The rates
of the machine, in GB/s and GFLOP/s, are measured between the passes of a line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from sweeping import append, read, versions

from llmlab.inference.prefill_decode_kv_cache import FILE
from llmlab.models import real_model
from llmlab.models.attention import sdpa
from llmlab.models.cache import KVCache
from llmlab.models.machine import bandwidth, product_bandwidth, seconds, speed

# task, rows, new tokens, tokens in the cache
RUNS = [("prefill", 1, n, 0) for n in (1, 4, 16, 64, 128, 256, 512)]
RUNS += [("decode", rows, 1, 128) for rows in (1, 2, 4, 8, 16)]
RUNS += [("context", 1, 1, past) for past in (512, 2048, 4096)]
# attention alone, all layers: here "rows" are query heads, over three key heads
RUNS += [("attention", heads, 1, 4096) for heads in (3, 9)]
FIELDS = ("task", "rows", "new", "past")


def filled(model, rows: int, past: int) -> KVCache:
    """A cache with random keys and values: only their number matters here."""
    config = model.config
    K, D = config.num_key_value_heads, config.head_dim
    cache = KVCache(config.num_hidden_layers, capacity=past + 1)
    for layer in range(config.num_hidden_layers if past else 0):
        cache.append(
            layer, torch.randn(rows, K, past, D), torch.randn(rows, K, past, D)
        )
    return cache


def attention(model, heads: int, past: int) -> Callable[[], None]:
    """One query per head over the cached keys of every layer."""
    cache = filled(model, 1, past)
    D = model.config.head_dim
    q = torch.randn(1, heads, 1, D)

    def run() -> None:
        for k, v in zip(cache.keys, cache.values, strict=True):
            sdpa(q, k[:, :, :past], v[:, :, :past], None)

    return run


@torch.inference_mode()
def line(model, key: tuple) -> dict:
    """A pass, timed."""
    task, rows, new, past = key
    ids = torch.randint(1000, 40_000, (rows, new))
    cache = filled(model, rows, past)

    def run() -> None:
        model(ids, cache=cache, logits_to_keep=1)
        cache.truncate(past)

    if task == "attention":
        run = attention(model, rows, past)
    clock = time.process_time
    rates = {"sum": 0.0, "product": 0.0, "flops": 0.0}
    best = float("inf")
    for _ in range(3 if new > 200 else 6):
        rates["sum"] = max(rates["sum"], bandwidth(128, 3, clock))
        rates["product"] = max(rates["product"], product_bandwidth(128, 3, clock))
        rates["flops"] = max(rates["flops"], speed(1024, 2, clock))
        best = min(best, seconds(run, clock))
    torch_version, python = versions()
    return {
        **dict(zip(FIELDS, key, strict=True)),
        "seconds": round(best, 5),
        **{name: round(rate / 1e9, 2) for name, rate in rates.items()},
        "torch": torch_version,
        "python": python,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = real_model.load()
    stored = read(FILE)
    if asked.check:
        for old in stored[: asked.check]:
            key = (old["task"], *(int(old[name]) for name in FIELDS[1:]))
            new = line(model, key)
            print(*key, f"{old['seconds']} then, {new['seconds']} now", flush=True)
        return
    done = {tuple(row[name] for name in FIELDS) for row in stored}
    for key in RUNS:
        if tuple(map(str, key)) not in done:
            append(FILE, line(model, key))


if __name__ == "__main__":
    main()
