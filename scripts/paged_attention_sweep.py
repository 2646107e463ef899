"""A shared prompt, and attention over blocks.

Stored in llmlab/inference/data/paged_attention.csv.

    python scripts/paged_attention_sweep.py            continue, a line a run
    python scripts/paged_attention_sweep.py --check 1  make that many runs again

"prompt": SmolLM2 reads eight requests, each a system prompt of 500 tokens and a
question of its own, with and without finding what was read before; seconds are of all
eight, and `first` of the first. "attention": one query for each of four sequences of up
to 512 tokens, over blocks or over one piece; seconds of a call, the best of many. One
thread. Counts are the same anywhere, seconds are of the machine that ran it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sweeping import sweep, versions

from llmlab.inference import paged_attention as paged
from llmlab.models import course_model, real_model

FIELDS = ["task", "method", "block_size", "run"]
FIELDS += ["computed", "blocks", "first", "seconds", "torch", "python"]
RUNS = [("prompt", how, 16, run) for run in (1, 2) for how in ("alone", "shared")]
RUNS += [
    ("attention", how, size, run)
    for run in (1, 2)
    for size in (1, 4, 16, 64, 256)
    for how in ("gather", "by blocks")
]
RUNS += [("attention", "one piece", 512, run) for run in (1, 2)]
QUESTIONS = (
    "Who speaks here?",
    "Which year is it?",
    "What does the speaker ask of Congress?",
    "Name one country that is mentioned.",
    "Is the speaker hopeful?",
    "Write the first sentence in modern English.",
    "How long is this text?",
    "What is said about money?",
)


def requests() -> list[list[int]]:
    """Token ids: 500 of an address, then a question."""
    tokenizer = real_model.load_tokenizer()
    text = course_model.corpus("addresses", "valid")[:4000]
    prompt = tokenizer.encode(text).ids[:500]
    return [prompt + tokenizer.encode(f"\n\n{q}").ids for q in QUESTIONS]


def read_prompts(method: str, block_size: int) -> list:
    """computed, blocks, first, seconds."""
    model = real_model.load()
    prompts = requests()
    manager = paged.BlockManager(400, block_size, prefix_caching=method == "shared")
    cache = paged.PagedCache(model.config, manager)
    seconds, computed = [], 0
    for prompt in prompts:
        begin = time.process_time()
        _, found, _ = paged.prefill(model, cache, prompt)
        seconds.append(time.process_time() - begin)
        computed += len(prompt) - found
    return [computed, manager.used, f"{seconds[0]:.3f}", f"{sum(seconds):.3f}"]


def best(call: Callable[[], object], times: int = 200) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def attend(method: str, block_size: int) -> list:
    """The same four fields; only the last two mean something."""
    torch.manual_seed(0)
    B, S, H, K, D = 4, 512, 9, 3, 64
    q = torch.randn(B, H, D)
    blocks = B * S // block_size
    store = torch.randn(2, blocks, block_size, K, D)
    order = list(range(blocks))
    random.Random(0).shuffle(order)
    tables = torch.tensor(order).view(B, -1)
    lengths = torch.tensor([512, 500, 431, 257])
    if method == "one piece":
        k, v = (x.view(B, S, K, D).transpose(1, 2).contiguous() for x in store)
        mask = (torch.arange(S) < lengths[:, None])[:, None, None]

        def call():
            return F.scaled_dot_product_attention(
                q[:, :, None], k, v, attn_mask=mask, enable_gqa=True
            )
    else:
        way = paged.paged_attention
        if method == "by blocks":
            way = paged.paged_attention_by_blocks

        def call():
            return way(q, *store, tables, lengths)

    times = 10 if method == "by blocks" and block_size == 1 else 200
    return [0, blocks, 0, f"{best(call, times):.6f}"]


def runner() -> Callable[..., list]:
    """What makes the line of a run."""
    torch.set_num_threads(1)

    def line(task: str, method: str, block_size: int, run: int) -> list:
        make = read_prompts if task == "prompt" else attend
        with torch.inference_mode():
            return [
                task,
                method,
                block_size,
                run,
                *make(method, block_size),
                *versions(),
            ]

    return line


if __name__ == "__main__":
    from llmlab.inference.paged_attention import FILE

    sweep(__doc__, FILE, FIELDS, RUNS, runner, shown="computed")
