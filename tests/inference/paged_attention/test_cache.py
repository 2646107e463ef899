"""Our Llama over blocks writes what it writes over one piece."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference import paged_attention as paged
from llmlab.inference.paged_attention import Batch, BlockManager, PagedCache
from llmlab.models import course_model, real_model
from llmlab.models.cache import KVCache
from llmlab.models.generation import generate
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.models.presets import preset

TINY = LlamaConfig(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]


@pytest.fixture(scope="module")
def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(TINY).eval()


def cache_of(model: Llama, blocks: int = 60, size: int = 4, **options) -> PagedCache:
    manager = BlockManager(blocks, size, **options)
    dtype = model.lm_head.weight.dtype
    return PagedCache(model.config, manager, dtype)


def plain(model: Llama, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    return generate(model, ids, count)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize(
    "way", [paged.paged_attention, paged.paged_attention_by_blocks]
)
def test_the_same_tokens_as_one_by_one_whatever_the_lengths(tiny, size, way):
    cache = cache_of(tiny, size=size)
    for _ in range(2):  # the second time prefixes are found
        run = paged.generate(tiny, cache, PROMPTS, 12, attention=way)
        assert run.tokens == [plain(tiny, prompt, 12) for prompt in PROMPTS]
        cache.manager.check()
        assert cache.manager.used == 0
    assert run.found == [(len(p) - 1) // size * size for p in PROMPTS]


def test_the_logits_are_those_of_a_dense_cache(tiny):
    prompt = PROMPTS[2]
    cache = cache_of(tiny, size=4)
    dense = KVCache(3)
    with torch.inference_mode():
        sequence, _, logits = paged.prefill(tiny, cache, prompt)
        torch.testing.assert_close(
            logits, tiny(torch.tensor([prompt]), cache=dense)[:, -1]
        )
        cache.append(sequence, 7)
        logits = paged.decode(tiny, cache, [sequence])
        torch.testing.assert_close(
            logits, tiny(torch.tensor([[7]]), cache=dense)[:, -1]
        )
    table = cache.manager.tables[sequence]
    for layer in range(3):
        stored = cache.keys[layer][table].flatten(0, 1)[:10].transpose(0, 1)
        torch.testing.assert_close(stored, dense.keys[layer][0, :, :10])


def test_bf16():
    torch.manual_seed(1)
    model = Llama(TINY).bfloat16().eval()
    run = paged.generate(model, cache_of(model), PROMPTS, 6)
    assert run.tokens == [plain(model, prompt, 6) for prompt in PROMPTS]


def test_samples_share_their_prompt_and_each_is_its_own_text(tiny):
    cache = cache_of(tiny, size=4)
    prompt = PROMPTS[2]  # 9 tokens: two full blocks, one with a token
    run = paged.generate(tiny, cache, [prompt], 6, samples=4, temperature=1.0, seed=3)
    assert run.copies == 3  # the fourth is left alone with the old block
    # 14 tokens stored at the end: 4 blocks each, the two full ones shared
    assert (run.blocks, run.unshared) == (2 + 4 * 2, 4 * 4)
    alone = cache_of(tiny, size=16)  # another way to lie, the same text
    again = paged.generate(tiny, alone, [prompt], 6, samples=4, temperature=1.0, seed=3)
    assert again.tokens == run.tokens
    assert len({tuple(tokens) for tokens in run.tokens}) == 4


def test_a_found_prefix_gives_the_same_text_as_a_computed_one(tiny):
    cache = cache_of(tiny, size=4)
    start = [7, 7, 1, 2, 9, 9, 4, 4]
    paged.generate(tiny, cache, [[*start, 5]], 3)
    run = paged.generate(tiny, cache, [[*start, 6, 8]], 8)
    assert run.found == [8]
    assert run.computed == [2]
    assert run.tokens == [plain(tiny, [*start, 6, 8], 8)]


def test_all_is_freed_when_blocks_run_out(tiny):
    cache = cache_of(tiny, blocks=4, size=4)
    with pytest.raises(paged.OutOfBlocks):
        paged.generate(tiny, cache, PROMPTS[:2], 20)
    cache.manager.check()
    assert cache.manager.used == 0


def test_course_model_with_learners_functions():
    model = course_model.load()
    tokenizer = course_model.load_tokenizer()
    prompts = [
        tokenizer.encode(text).ids
        for text in ("The Congress of the United States", "We the people")
    ]
    cache = cache_of(
        model,
        size=5,
        allocate=lambda pool, tokens: paged.allocate(pool, tokens),
        append_slot=lambda pool, table, n: paged.append_slot(pool, table, n),
        free=lambda pool, table: paged.free(pool, table),
    )
    run = paged.generate(model, cache, prompts, 20)
    assert run.tokens == [plain(model, prompt, 20) for prompt in prompts]


@pytest.mark.real_model
def test_real_model():
    model = real_model.load()
    ids = real_model.load_tokenizer().encode("The capital of France is").ids
    run = paged.generate(model, cache_of(model, size=16), [ids, ids[:3]], 8)
    assert run.tokens == [plain(model, ids, 8), plain(model, ids[:3], 8)]


def test_bytes_of_a_block():
    cache = PagedCache(TINY, BlockManager(5, 16), torch.bfloat16)
    assert cache.block_bytes == 2 * 3 * 16 * 2 * 4 * 2
    config = preset("llama-3.1-8b")
    assert (config.num_hidden_layers, config.num_key_value_heads) == (32, 8)


def test_refuses_what_a_batch_cannot_do(tiny):
    cache = cache_of(tiny)
    a, _ = cache.manager.add([1, 2, 3])
    b, _ = cache.manager.add([1, 2])
    with pytest.raises(ValueError, match="gather=True with lengths"):
        Batch(cache, [a, b], gather=True)
    with pytest.raises(ValueError, match="new=2 must be 1"):
        Batch(cache, [a], 2)
    with pytest.raises(ValueError, match="new=4 must lie between 1 and 3"):
        Batch(cache, [a], 4, gather=True)
    with pytest.raises(ValueError, match="samples=0"):
        paged.generate(tiny, cache, PROMPTS, 3, samples=0)
