"""Time of fused and unfused layers: llmlab/inference/data/fused_transformers.csv.

    python scripts/fused_sweep.py             continue, a group of lines at a time
    python scripts/fused_sweep.py --check 1   run that many groups again and compare

A group is one setting in all its ways, which take turns, so that a busy moment of the
machine meets them all; of all turns the fastest counts. One thread, the processor's
time. Each group is run three times.

    decode    one token more for each of `batch` texts of 64 tokens
    prefill   `batch` texts of `tokens` tokens
    width     decode, on random models of 4 layers whose hidden size grows
    padding   8 texts of unequal lengths, as a table and as a list of tokens
    compile   one layer by itself, and torch.compile's version of it
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from functools import cache
from unittest import mock

import torch
from sweeping import append, read, versions
from torch import nn

from llmlab.inference.fused_transformers import FILE, count, fuse, kernels, padding
from llmlab.models import course_model, real_model
from llmlab.models.attention import sdpa
from llmlab.models.cache import KVCache
from llmlab.models.checkpoint import config_to_hf
from llmlab.models.llama import Llama, LlamaConfig, rope_tables

PAST = 64
LENGTHS = [128, 96, 80, 64, 48, 32, 24, 16]  # texts of the padding task
WIDTHS = (64, 128, 256, 512, 1024)
GROUPS = [
    ("decode", "course", 1, 1),
    ("decode", "course", 8, 1),
    ("decode", "real", 1, 1),
    ("decode", "real", 8, 1),
    ("prefill", "course", 1, 128),
    ("prefill", "real", 1, 128),
    *(("width", str(d), 1, 1) for d in WIDTHS),
    ("padding", "real", len(LENGTHS), max(LENGTHS)),
    ("compile", "course", 1, 1),
    ("compile", "course", 1, 64),
]
RUNS = 3
KEY = ("task", "model", "batch", "tokens", "run")


@cache
def model_of(name: str) -> Llama:
    """A model by its name, or a random one of this hidden size."""
    if name == "course":
        return course_model.load()
    if name == "real":
        return real_model.load()
    d = int(name)
    torch.manual_seed(0)
    shape = {"num_attention_heads": d // 32, "num_key_value_heads": d // 64}
    return Llama(
        LlamaConfig(
            vocab_size=64,
            hidden_size=d,
            intermediate_size=3 * d,
            num_hidden_layers=4,
            **shape,
        )
    ).eval()


@cache
def transformers_model(name: str):
    """transformers' model with the same weights."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    model = model_of(name)
    theirs = LlamaForCausalLM(HFConfig(**config_to_hf(model.config))).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    return theirs


def fastest(ways: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Of each way, the shortest of its turns within so many seconds."""
    best = dict.fromkeys(ways, float("inf"))
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 5 or time.perf_counter() < end:
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
        turns += 1
    return best


def passes(name: str, batch: int, tokens: int, task: str) -> dict[str, Callable]:
    """One pass in each way, over new tokens behind a cache or over a prompt."""
    from transformers import DynamicCache

    model = model_of(name)
    past = 0 if task == "prefill" else PAST
    random = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    prompt = torch.randint(size, (batch, PAST), generator=random)
    ids = torch.randint(size, (batch, tokens), generator=random)
    ways: dict[str, Callable] = {}

    if task != "width":
        theirs = transformers_model(name)
        held = DynamicCache(config=theirs.config)
        if past:
            theirs(prompt, past_key_values=held)

        def by_transformers():
            theirs(ids, past_key_values=held, logits_to_keep=1)
            held.crop(-tokens)

        ways["transformers"] = by_transformers

    mine = KVCache(model.config.num_hidden_layers, PAST + 2 * tokens)
    if past:
        model(prompt, cache=mine)

    def by_ours():
        model(ids, cache=mine, logits_to_keep=1)
        mine.truncate(past)

    ways["ours"] = by_ours
    for way in ("packed", "fused", "fused, 8 bits"):
        ways[way] = fused_pass(model, way, prompt if past else None, ids)
    return ways


def fused_pass(model: Llama, way: str, prompt, ids) -> Callable:
    """A pass of a fused model; "packed" has packed products, and PyTorch's passes."""
    fused = fuse(model)
    if "8" in way:
        fused.to_8bit()
    held = fused.new_cache(len(ids), PAST + ids.shape[1])
    if prompt is not None:
        fused(prompt, held)
    past = held.length

    def run():
        fused(ids, held, 1)
        held.length = past

    def run_packed():
        with mock.patch.object(kernels, "library", lambda: None):
            run()

    return run_packed if way == "packed" else run


def unequal() -> dict[str, Callable]:
    """The texts of LENGTHS as a padded table and as a list, by the fused model."""
    fused = fuse(model_of("real"))
    random = torch.Generator().manual_seed(0)
    size = model_of("real").config.vocab_size
    table = torch.randint(size, (len(LENGTHS), max(LENGTHS)), generator=random)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens, _, starts = padding.remove_padding(table, mask)
    return {
        "padded": lambda: fused(table),
        "without padding": lambda: fused.packed(tokens, starts),
    }


class OnePlace:
    """A cache whose new token always goes to one place: nothing to compile anew."""

    length = PAST

    def __init__(self, config: LlamaConfig) -> None:
        shape = (1, config.num_key_value_heads, 2 * PAST, config.head_dim)
        self.keys, self.values = torch.randn(shape), torch.randn(shape)

    def append(self, layer: int, k, v):
        stop = PAST + 1
        self.keys[:, :, PAST:stop] = k
        self.values[:, :, PAST:stop] = v
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def compiled(tokens: int) -> tuple[dict[str, Callable], dict[str, int]]:
    """One layer as it is and compiled, and the launches of both."""
    from torch._inductor.utils import run_and_get_code

    model = model_of("course")
    block: nn.Module = model.model.layers[0]
    past = PAST if tokens == 1 else 0
    cache = OnePlace(model.config) if past else None
    h = torch.randn(1, tokens, model.config.hidden_size)
    positions = torch.arange(past, past + tokens)[None]
    rope = rope_tables(positions, model.model.theta)
    torch._dynamo.reset()
    fast = torch.compile(block, dynamic=False)
    out, code = run_and_get_code(fast, h, rope, None, cache, sdpa)
    torch.testing.assert_close(out, block(h, rope, None, cache, sdpa))
    body = "\n".join(code)
    body = body[body.index("def call(") :]
    called = re.findall(r"extern_kernels\.\w+\(|torch\.ops\.\S+\(|cpp_fused\w*\(", body)
    ways = {
        "ours": lambda: block(h, rope, None, cache, sdpa),
        "compiled": lambda: fast(h, rope, None, cache, sdpa),
    }
    return ways, {"compiled": len(called)}


def lines(task: str, name: str, batch: int, tokens: int, run: int) -> list[dict]:
    """A group's lines."""
    torch.set_num_threads(1)
    torch.manual_seed(run)
    counted: dict[str, int] = {}
    with torch.no_grad():
        if task == "compile":
            ways, counted = compiled(tokens)
        elif task == "padding":
            ways = unequal()
        else:
            ways = passes(name, batch, tokens, task)
        seconds = fastest(ways, 4 if name == "real" else 2)
    torch_version, python = versions()
    return [
        dict(zip(KEY, (task, name, batch, tokens, run), strict=True))
        | {
            "way": way,
            "seconds": f"{seconds[way]:.3g}",
            "launches": counted.get(way) or len(count(ways[way])),
            "torch": torch_version,
            "python": python,
        }
        for way in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=int, default=0)
    asked = parser.parse_args()
    stored = read(FILE)
    groups = [(*group, run) for run in range(RUNS) for group in GROUPS]
    if asked.check:
        for group in groups[: asked.check]:
            for new in lines(*group):
                names = (*KEY, "way")
                (old,) = [x for x in stored if all(x[n] == str(new[n]) for n in names)]
                then = old["seconds"]
                print(*group, new["way"], then, "then,", new["seconds"], "now")
        return
    done = {tuple(line[name] for name in KEY) for line in stored}
    for group in groups:
        if tuple(map(str, group)) not in done:
            for line in lines(*group):
                append(FILE, line)


if __name__ == "__main__":
    main()
