"""The engine writes what one-by-one generation writes, whatever it does on the way."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference.engine import Engine, EngineConfig, SamplingParams
from llmlab.models.generation import generate
from llmlab.models.llama import Llama, LlamaConfig

TINY = LlamaConfig(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(TINY).eval()


def plain(model: Llama, prompt: list[int], count: int) -> list[int]:
    return generate(model, torch.tensor([prompt]), count)[0, len(prompt) :].tolist()


def test_greedy_tokens(tiny):
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
    engine = Engine(tiny, EngineConfig(num_blocks=20, block_size=4, max_tokens=6))
    written = engine.generate(prompts, SamplingParams(max_new_tokens=12))
    assert written == [plain(tiny, prompt, 12) for prompt in prompts]
    engine.check()
    assert engine.blocks_in_use == 0
