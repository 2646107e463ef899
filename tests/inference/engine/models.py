"""Models that are small enough to run thousands of times."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmlab.inference.engine import Engine, EngineConfig
from llmlab.models.generation import generate
from llmlab.models.llama import Llama, LlamaConfig

VOCAB = 31
TINY = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.4,  # far from uniform: each text goes its own way
)


def make(seed: int = 0, **changes) -> Llama:
    torch.manual_seed(seed)
    return Llama(replace(TINY, **changes)).eval()


def plain(model: Llama, prompt: list[int], count: int) -> list[int]:
    """One request by itself, over a cache in one piece."""
    return generate(model, torch.tensor([prompt]), count)[0, len(prompt) :].tolist()


def small(model: Llama, *, pieces=None, adapters=None, draft=None, **sizes) -> Engine:
    """An engine of few and small blocks."""
    config = EngineConfig(**{"num_blocks": 60, "block_size": 4, **sizes})
    return Engine(model, config, pieces=pieces, adapters=adapters, draft=draft)


def finish(engine: Engine) -> dict[int, list[int]]:
    """Steps until nobody is left; what each request wrote."""
    written: dict[int, list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            written.setdefault(event.id, []).append(event.token)
        engine.check()
    assert engine.blocks_in_use == 0
    return written
