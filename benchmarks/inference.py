"""The engine on the real model beside transformers' `generate`, and what is counted.

The requests are the first 16 of a trace with ShareGPT's published means
(`waste.trace("ShareGPT", 16, seed=0)`), all lengths divided by four so that a round
takes seconds. The text is English. Nobody stops early: each request writes as many
tokens as it asks for. Both sides choose greedily, in fp32.

    ours     all 16 are there at once; each leaves after its own last token
    theirs   one padded batch, which runs until its longest request has ended

`python -m benchmarks.inference` prints what is no ratio of two times: tokens per
second, the cache's waste, and the time to the first token under load. The same requests
on vLLM: `benchmarks.beside_vllm`.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import cache

import torch

from benchmarks.case import Case
from llmlab.compression import kernels
from llmlab.compression import quantization_basics as qb
from llmlab.inference.engine import Engine, EngineConfig, SamplingParams, packed
from llmlab.inference.paged_attention import waste
from llmlab.models import course_model, real_model
from llmlab.models.llama import Llama, LlamaConfig

# tokens of the prompt, tokens of the output
TRACE = (
    (20, 53),
    (49, 46),
    (100, 11),
    (32, 15),
    (23, 38),
    (18, 6),
    (26, 96),
    (131, 118),
    (2, 15),
    (62, 17),
    (30, 11),
    (53, 165),
    (32, 67),
    (29, 26),
    (43, 49),
    (27, 83),
)
PREFIX = 500  # tokens that all requests of `shared_prefix` begin with


@cache
def text() -> list[int]:
    """Tokens of English, many."""
    words = course_model.corpus("addresses", "valid")[:40_000]
    return real_model.load_tokenizer().encode(words).ids


def prompts() -> list[list[int]]:
    """One for each request, one behind the other in the text."""
    found = []
    start = 0
    for length, _ in TRACE:
        found.append(text()[start : start + length])
        start += length
    return found


@cache
def our_model() -> Llama:
    return real_model.load()


@cache
def their_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        real_model.path(), dtype=torch.float32
    ).eval()


def theirs(asked: list[list[int]], new: int) -> list[list[int]]:
    """One padded batch; every row runs to the end. What it writes in each."""
    longest = max(map(len, asked))
    ids = [[0] * (longest - len(each)) + each for each in asked]
    mask = [[0] * (longest - len(each)) + [1] * len(each) for each in asked]
    written = their_model().generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return written[:, longest:].tolist()


def ours(
    model: Llama, asked: list[list[int]], counts: list[int], gamma: int = 0
) -> list[list[int]]:
    """A new engine serves them all. What it writes for each."""
    engine = Engine(model, EngineConfig(num_blocks=512, block_size=16, gamma=gamma))
    params = [SamplingParams(max_new_tokens=count) for count in counts]
    return engine.generate(asked, params)


def sixteen_requests() -> Case:
    """Mixed lengths: continuous batching beside a padded batch."""
    asked = prompts()
    counts = [count for _, count in TRACE]
    model = packed(our_model())
    return Case(
        "16 requests of mixed lengths (transformers, one padded batch)",
        lambda: ours(model, asked, counts),
        lambda: theirs(asked, max(counts)),
        rounds=3,
    )


def sixteen_requests_with_lookup() -> Case:
    """The same with four tokens looked up in the text: the same text comes out."""
    asked = prompts()
    counts = [count for _, count in TRACE]
    model = packed(our_model())
    return Case(
        "the same, with prompt lookup (transformers, one padded batch)",
        lambda: ours(model, asked, counts, gamma=4),
        lambda: theirs(asked, max(counts)),
        rounds=3,
    )


def one_request(new: int = 64) -> Case:
    """A single stream in floats."""
    asked = [text()[:32]]
    model = packed(our_model())
    return Case(
        f"the engine, one request, {new} tokens (transformers)",
        lambda: ours(model, asked, [new]),
        lambda: theirs(asked, new),
        rounds=5,
    )


def one_request_in_four_bits(new: int = 64) -> Case:
    """A single stream with part 06's 4-bit weights, beside their floats."""
    asked = [text()[:32]]
    config = qb.QuantConfig(4, group_size=64)
    model = packed(kernels.fast(qb.apply(real_model.load(), config)))
    return Case(
        f"the engine, one request, {new} tokens, 4 bits (transformers, fp32)",
        lambda: ours(model, asked, [new]),
        lambda: theirs(asked, new),
        rounds=5,
    )


def shared_prefix(count: int = 8, new: int = 8) -> Case:
    """The same 500 tokens in front of each of 8 prompts."""
    prefix = text()[:PREFIX]
    asked = [[*prefix, *text()[600 + 9 * i : 609 + 9 * i]] for i in range(count)]
    model = packed(our_model())
    return Case(
        f"{count} requests with the same {PREFIX} tokens in front (transformers)",
        lambda: ours(model, asked, [new] * count),
        lambda: theirs(asked, new),
        rounds=3,
    )


CASES = (
    sixteen_requests,
    sixteen_requests_with_lookup,
    one_request,
    one_request_in_four_bits,
    shared_prefix,
)


# What is counted, and what has no other side ------------------------------------------


def cache_waste(count: int = 48) -> float:
    """Empty slots in blocks in use, over the steps, for lengths as ShareGPT's.

    Lengths decide it, so that the model can be tiny.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    engine = Engine(Llama(config), EngineConfig(num_blocks=1000, max_tokens=512))
    draw = random.Random(0)
    for prompt, output in waste.trace("ShareGPT", count):
        tokens = [draw.randrange(64) for _ in range(prompt)]
        engine.add(tokens, SamplingParams(max_new_tokens=output))
    while not engine.idle:
        engine.step()
    return engine.stats.waste


def first_tokens(rate: float, rounds: int = 2) -> list[float]:
    """Seconds from a request's arrival to its first token.

    Requests of the trace arrive at random, `rate` of them in a second on average.
    """
    model = packed(our_model())
    engine = Engine(model, EngineConfig(num_blocks=512, max_tokens=128))
    draw = random.Random(0)
    arrivals = []
    at = 0.0
    for _ in range(rounds):
        for prompt, (_, count) in zip(prompts(), TRACE, strict=True):
            at += draw.expovariate(rate)
            arrivals.append((at, prompt, count))
    came: dict[int, float] = {}
    waited: list[float] = []
    started = time.perf_counter()
    while arrivals or not engine.idle:
        now = time.perf_counter() - started
        while arrivals and arrivals[0][0] <= now:
            at, prompt, count = arrivals.pop(0)
            id = engine.add(prompt, SamplingParams(max_new_tokens=count))
            came[id] = at
        if engine.idle:
            time.sleep(arrivals[0][0] - now)
        for event in engine.step():
            if event.id in came:
                now = time.perf_counter() - started
                waited.append(now - came.pop(event.id))
    return sorted(waited)


def main() -> None:
    model = packed(our_model())
    asked = prompts()
    counts = [count for _, count in TRACE]
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        ours(model, asked, counts)
        seconds.append(time.perf_counter() - started)
    written = sum(counts)
    print(f"{torch.get_num_threads()} threads")
    print(
        f"16 requests, {written} tokens:"
        f" {min(seconds):.2f} s at best, {statistics.median(seconds):.2f} s in the"
        f" middle; {written / min(seconds):.0f} tokens/s"
    )
    print(f"waste of the cache, ShareGPT's lengths: {cache_waste():.1%}")
    rate = 0.5 * len(TRACE) / min(seconds)
    waited = first_tokens(rate)
    print(
        f"first token at {rate:.2f} requests/s: p50 {statistics.median(waited):.2f} s,"
        f" p99 {waited[int(0.99 * len(waited))]:.2f} s"
    )


if __name__ == "__main__":
    main()
