"""Sequences on top of a tree write what sequences over blocks write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.inference import paged_attention as paged
from llmlab.inference.paged_attention import OutOfBlocks, PagedCache, RadixManager
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
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [3, 1, 4, 8, 9, 7], [3, 1, 4, 1, 5, 9]]


@pytest.fixture(scope="module")
def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(TINY).eval()


def plain(model: Llama, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    return generate(model, ids, count)[0, len(prompt) :].tolist()


def test_the_same_tokens_and_prefixes_found_to_the_token(tiny):
    cache = PagedCache(TINY, RadixManager(200))
    run = paged.generate(tiny, cache, PROMPTS, 12)
    assert run.tokens == [plain(tiny, prompt, 12) for prompt in PROMPTS]
    assert run.found == [0, 0, 3, 5]  # blocks of four would find none, or 4
    cache.manager.check()
    assert cache.manager.used == 0
    again = paged.generate(tiny, cache, PROMPTS, 12)
    assert again.tokens == run.tokens
    assert again.found == [len(prompt) - 1 for prompt in PROMPTS]


def test_what_was_written_is_found_as_a_prompt(tiny):
    cache = PagedCache(TINY, RadixManager(64))
    (written,) = paged.generate(tiny, cache, [PROMPTS[0]], 9).tokens
    dialogue = [*PROMPTS[0], *written, 7, 7]
    run = paged.generate(tiny, cache, [dialogue], 6)
    # the last token that was written has no keys and values
    assert run.found == [len(PROMPTS[0]) + 8]
    assert run.tokens == [plain(tiny, dialogue, 6)]


def test_samples_of_one_prompt_share_it(tiny):
    cache = PagedCache(TINY, RadixManager(64))
    run = paged.generate(tiny, cache, [PROMPTS[2]], 8, samples=3, temperature=1.0)
    assert run.blocks == len(PROMPTS[2]) + 3 * 7
    cache.manager.check()
    assert cache.manager.used == 0


def test_leaves_go_when_room_is_short_and_the_text_stays_right(tiny):
    cache = PagedCache(TINY, RadixManager(24))
    for prompt in [*PROMPTS, *PROMPTS]:
        run = paged.generate(tiny, cache, [prompt], 12)
        assert run.tokens == [plain(tiny, prompt, 12)]
        cache.manager.check()
    assert len(cache.manager.tree) <= 24


def test_a_prompt_that_does_not_fit_changes_nothing():
    manager = RadixManager(6)
    sequence, _ = manager.add([1, 2, 3, 4])
    manager.stored(sequence)
    assert not manager.can_add([5, 6, 7])
    with pytest.raises(OutOfBlocks, match="3 places are needed, and 2 are available"):
        manager.add([5, 6, 7])
    # of four, three are found and locked already
    assert manager.can_add([1, 2, 3, 9])
    manager.check()
    manager.free(sequence)
    assert manager.can_add([5, 6, 7])
    manager.add([5, 6, 7])
    manager.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_invariants_after_any_calls(data):
    manager = RadixManager(data.draw(st.integers(1, 30)))
    for _ in range(data.draw(st.integers(1, 25))):
        known = sorted(manager.tables)
        call = data.draw(st.sampled_from(["add", "append", "fork", "free", "cut"]))
        try:
            if call == "add":
                text = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
                fits = manager.can_add(text)
                sequence, _ = manager.add(text)
                assert fits
                if data.draw(st.booleans()):
                    manager.stored(sequence)
            elif known:
                sequence = data.draw(st.sampled_from(known))
                if call == "append":
                    manager.append(sequence, data.draw(st.integers(0, 2)))
                    manager.stored(sequence)
                elif call == "free":
                    manager.free(sequence)
                elif call == "cut":
                    text = manager.tokens[sequence]
                    length = data.draw(st.integers(1, len(text)))
                    manager.truncate(sequence, length)
                    assert manager.tokens[sequence] == text[:length]
                else:
                    manager.stored(sequence)
                    manager.fork(sequence)
        except OutOfBlocks:
            pass
        manager.check()
    for sequence in sorted(manager.tables):
        manager.free(sequence)
    manager.check()
    assert manager.used == 0
    assert len(manager.available) + len(manager.tree) == manager.num_blocks


def drafting(model: Llama, cache: PagedCache, prompt: list[int], count: int):
    """Greedy tokens, of which two are drafted in each pass: one right, one wrong."""
    wanted = plain(model, prompt, count)
    sequence, _, logits = paged.prefill(model, cache, prompt)
    written = [int(logits.argmax())]
    while len(written) < count:
        done = len(prompt) + len(written)
        drafted = [*wanted[len(written) : len(written) + 1], 30]
        for token in [written[-1], *drafted]:
            cache.append(sequence, token)
        new = 1 + len(drafted)
        batch = paged.Batch(cache, [sequence], new, gather=True)
        ids = torch.tensor([[written[-1], *drafted]])
        with torch.inference_mode():
            rows = model(ids, cache=batch)[0].argmax(-1).tolist()
        kept = 1
        while kept < new and drafted[kept - 1] == rows[kept - 1]:
            kept += 1
        written += rows[:kept]
        assert not cache.truncate(sequence, done - 1 + kept)
        cache.manager.check()
    cache.manager.free(sequence)
    return written[:count]


def test_drafted_tokens_are_taken_back(tiny):
    """Twice, so that the second time all of it is found; another reads it meanwhile."""
    cache = PagedCache(TINY, RadixManager(60))
    reader, _ = cache.manager.add([*PROMPTS[0], 30, 30])
    for _ in range(2):
        written = drafting(tiny, cache, PROMPTS[0], 9)
        assert written == plain(tiny, PROMPTS[0], 9)
        cache.manager.check()
    cache.manager.free(reader)
    assert cache.manager.used == 0


def test_a_cut_gives_back_what_the_tree_does_not_have():
    manager = RadixManager(9)
    sequence, _ = manager.add([1, 2, 3])
    manager.stored(sequence)  # three lie in the tree
    manager.append(sequence, 4)
    manager.append(sequence, 5)
    manager.truncate(sequence, 4)
    assert manager.used == 4 and len(manager.available) == 5
    manager.truncate(sequence, 2)
    manager.check()
    assert manager.tokens[sequence] == [1, 2] and manager.used == 2
    assert len(manager.available) == 6 and len(manager.tree) == 3
    assert manager.add([1, 2, 3, 7])[1] == 3
    manager.append(sequence, 8)
    with pytest.raises(ValueError, match="has 3 tokens, and only 2 are stored"):
        manager.fork(sequence)
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"length={length} must lie between 1 and"):
            manager.truncate(sequence, length)


def test_refusals():
    with pytest.raises(ValueError, match="num_blocks=0"):
        RadixManager(0)
    manager = RadixManager(4)
    with pytest.raises(ValueError, match="tokens is empty"):
        manager.add([])
    with pytest.raises(ValueError, match="sequence=3 is not known"):
        manager.free(3)
    sequence, _ = manager.add([1, 2])
    with pytest.raises(ValueError, match="has 2 tokens, and only 0 are stored"):
        manager.fork(sequence)
