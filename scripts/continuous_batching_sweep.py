"""What a step costs, and three ways to serve twelve requests, on the real model.

Stored in llmlab/inference/data/continuous_batching.csv.

    python scripts/continuous_batching_sweep.py            continue, a line a run
    python scripts/continuous_batching_sweep.py --check 1  make that many runs again

"decode": one new token for each of so many texts of equal length; "prefill": one text.
`tokens` are computed in the step, `cached` in the cache before it; seconds are of one
step, the best of several; the sizes come three times round. "serve": twelve requests
with long and short answers, four at a time; `tokens` are written in all. One thread;
seconds of processor time, so that the machine may have other things to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from sweeping import sweep, versions

from llmlab.inference import continuous_batching as batching
from llmlab.inference.paged_attention import Batch, BlockManager, PagedCache, decode
from llmlab.models import course_model, real_model

FIELDS = ["task", "method", "tokens", "cached", "run", "seconds", "steps", "busy"]
FIELDS += ["torch", "python"]
DECODES = [(n, n * past) for past in (16, 128, 384) for n in (1, 4, 8, 16)]
PREFILLS = [(n, 0) for n in (32, 64, 128, 256, 512)] + [(64, 256), (128, 512)]
OUTPUTS = (48, 4, 6, 5, 40, 8, 4, 6, 36, 5, 4, 8)
SERVED = sum(OUTPUTS)
SIZES = [("decode", *size) for size in DECODES]
SIZES += [("prefill", *size) for size in PREFILLS]
RUNS = [("step", *size, run) for run in (1, 2, 3) for size in SIZES]
RUNS += [
    ("serve", way, SERVED, 0, run)
    for run in (1, 2, 3)
    for way in ("alone", "static", "continuous")
]


def best(call: Callable[[], object], least: float = 1.0) -> float:
    """Seconds of the fastest call, over a second and two calls at least."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < least:
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def step(model, method: str, tokens: int, cached: int) -> list:
    """seconds, and two fields that mean nothing here."""
    manager = BlockManager(2000, 16, prefix_caching=False)
    cache = PagedCache(model.config, manager)
    if method == "decode":
        past = cached // tokens
        rows = [manager.add(range(past + 1))[0] for _ in range(tokens)]
        seconds = best(lambda: decode(model, cache, rows))
    else:
        sequence, _ = manager.add(range(cached + tokens))
        ids = torch.arange(cached, cached + tokens)[None]

        def read():
            batch = Batch(cache, [sequence], tokens, gather=True)
            model(ids, cache=batch, logits_to_keep=1)

        seconds = best(read)
    return [f"{seconds:.4f}", 1, 1]


def serve(model, way: str) -> list:
    """seconds, decoding steps, and the share of rows that somebody wanted."""
    text = course_model.corpus("addresses", "valid")
    ids = real_model.load_tokenizer().encode(text[:4000]).ids
    prompts = [ids[30 * i : 30 * i + 12] for i in range(len(OUTPUTS))]
    cache = PagedCache(model.config, BlockManager(200, 16))
    begin = time.process_time()
    run = batching.serve_trace(model, cache, prompts, OUTPUTS, way)
    return [f"{time.process_time() - begin:.3f}", len(run.rows), f"{run.busy:.4f}"]


def runner() -> Callable[..., list]:
    """What makes the line of a run."""
    torch.set_num_threads(1)
    model = real_model.load()

    def line(task: str, method: str, tokens: int, cached: int, run: int) -> list:
        with torch.inference_mode():
            if task == "step":
                found = step(model, method, tokens, cached)
            else:
                found = serve(model, method)
        return [task, method, tokens, cached, run, *found, *versions()]

    return line


if __name__ == "__main__":
    sweep(__doc__, batching.FILE, FIELDS, RUNS, runner, shown="seconds")
