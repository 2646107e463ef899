"""The cache of a batch: places, masks, and the same tokens as one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from llmlab.inference.prefill_decode_kv_cache import (
    BatchCache,
    append,
    generate,
    read,
    visible,
)
from llmlab.models import course_model
from llmlab.models.cache import KVCache
from llmlab.models.generation import generate as generate_one
from llmlab.models.llama import Llama
from llmlab.models.presets import preset

TEXTS = ("The Congress of the United States", "We the people", "I am", "Peace")


@pytest.fixture(scope="module")
def model() -> Llama:
    return course_model.load()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = course_model.load_tokenizer()
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture
def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(preset("tiny")).eval()


def test_append_writes_each_row_at_its_own_length():
    buffer = torch.arange(2 * 3 * 6 * 2, dtype=torch.float32).reshape(2, 3, 6, 2)
    before = buffer.clone()
    new = -torch.rand(2, 3, 4, 2) - 1
    lengths, counts = torch.tensor([1, 3]), torch.tensor([4, 2])
    assert append(buffer, new, lengths, counts).tolist() == [5, 5]
    assert lengths.tolist() == [1, 3]
    torch.testing.assert_close(buffer[0, :, 1:5], new[0])
    torch.testing.assert_close(buffer[1, :, 3:5], new[1, :, :2])
    buffer[0, :, 1:5] = before[0, :, 1:5]
    buffer[1, :, 3:5] = before[1, :, 3:5]
    torch.testing.assert_close(buffer, before)  # nothing else was touched


def test_append_refuses_a_full_row_and_writes_nothing():
    buffer = torch.zeros(2, 1, 4, 2)
    lengths = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="a row would have 5 tokens in 4 places"):
        append(buffer, torch.ones(2, 1, 2, 2), lengths, torch.tensor([2, 2]))
    assert not buffer.any()
    append(buffer, torch.ones(2, 1, 2, 2), lengths, torch.tensor([2, 1]))  # just fits
    assert buffer[:, 0, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


def test_a_new_token_sees_its_own_place_and_no_later_one():
    mask = visible(torch.tensor([0, 2]), new=2, places=4)
    assert mask.shape == (2, 1, 2, 4)
    assert mask.int()[:, 0].tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


def test_rows_of_unequal_lengths_are_as_alone(tiny):
    """Prefill in two pieces of unequal sizes, then decoding: the logits of each row."""
    torch.manual_seed(1)
    ids = torch.randint(97, (3, 12))
    cache = BatchCache(2, batch=3, capacity=12)
    read(tiny, ids[:, :5], cache, torch.tensor([5, 2, 3]))
    # row b goes on behind what it has; row 2 rests
    second = torch.stack([ids[0, 5:9], ids[1, 2:6], torch.full((4,), 96)])
    read(tiny, second, cache, torch.tensor([1, 4, 0]))
    assert cache.lengths.tolist() == [6, 6, 3]
    third = torch.stack([ids[0, 6:7], ids[1, 6:7], ids[2, 3:4]])
    logits = read(tiny, third, cache)
    for row, length in enumerate((7, 7, 4)):
        alone = tiny(ids[row : row + 1, :length])[0, -1]
        torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-4)


def test_what_a_row_left_behind_is_not_seen(tiny):
    cache = BatchCache(2, batch=2, capacity=10)
    read(tiny, torch.randint(97, (2, 8)), cache)
    cache.truncate(1)
    ids = torch.tensor([[3], [5]])
    logits = read(tiny, ids, cache)
    assert cache.lengths.tolist() == [9, 1]
    torch.testing.assert_close(logits[1], tiny(ids[1:])[0, -1], atol=1e-5, rtol=1e-4)


def test_places_nobody_wrote_to_do_no_harm(tiny):
    """A weight of 0 times NaN is NaN, so what is allocated must be finite."""
    cache = BatchCache(2, batch=2, capacity=9)
    ids = torch.randint(97, (2, 7))
    logits = read(tiny, ids, cache, torch.tensor([7, 1]))
    assert cache.keys[0][1, :, 1:].abs().max() == 0
    assert cache.values[1][1, :, 1:].abs().max() == 0
    assert logits.isfinite().all()


def test_truncate_goes_back(tiny):
    ids = torch.randint(97, (2, 6))
    cache = BatchCache(2, batch=2, capacity=6)
    once = read(tiny, ids, cache)
    cache.truncate(0, 4)
    again = read(tiny, ids[:, 4:], cache, torch.tensor([2, 0]))
    torch.testing.assert_close(once[0], again[0])
    with pytest.raises(ValueError, match="length=7 must lie between 0 and the 6"):
        cache.truncate(1, 7)


def test_it_stands_in_for_the_plain_cache(tiny):
    """`Llama` can be given one, if all rows are equally long."""
    ids = torch.randint(97, (2, 5))
    cache = BatchCache(2, batch=2, capacity=8)
    cache.counts = torch.tensor([4, 4])
    tiny(ids[:, :4], cache=cache)
    cache.advance()
    cache.counts = torch.tensor([1, 1])
    plain = KVCache(2)
    tiny(ids[:, :4], cache=plain)
    torch.testing.assert_close(
        tiny(ids[:, 4:], cache=cache), tiny(ids[:, 4:], cache=plain)
    )


def test_bytes_are_those_of_all_places(tiny):
    cache = BatchCache(2, batch=3, capacity=10)
    read(tiny, torch.randint(97, (3, 4)), cache, torch.tensor([4, 2, 0]))
    assert cache.nbytes == 2 * 2 * 3 * 2 * 10 * 8 * 4  # k, v · L · B · K · C · D · fp32
    assert cache.used == pytest.approx(6 / 30)


def test_generate_as_one_prompt_at_a_time(model, prompts):
    found = generate(model, prompts, 20)
    for prompt, new in zip(prompts, found, strict=True):
        alone = generate_one(model, torch.tensor([prompt]), 20)[0, len(prompt) :]
        assert new == alone.tolist()


def test_generate_as_transformers(model, prompts):
    theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    found = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert generate(model, prompts, 16) == found[:, longest:].tolist()


def test_a_token_more_than_fits_is_refused_before_anything_changes(tiny):
    cache = BatchCache(2, batch=2, capacity=4)
    read(tiny, torch.randint(97, (2, 3)), cache, torch.tensor([3, 1]))
    keys = cache.keys[0].clone()
    with pytest.raises(ValueError, match="a row would have 5 tokens in 4 places"):
        read(tiny, torch.randint(97, (2, 2)), cache)
    assert cache.lengths.tolist() == [3, 1]
    torch.testing.assert_close(cache.keys[0], keys)


@pytest.mark.parametrize("counts", [[3, 1], [-1, 2], [1]])
def test_counts_are_of_the_table(tiny, counts):
    cache = BatchCache(2, batch=2, capacity=8)
    with pytest.raises(ValueError, match="must be 2 numbers from 0 to 2"):
        read(tiny, torch.zeros(2, 2, dtype=torch.long), cache, torch.tensor(counts))


def test_refusals(tiny):
    with pytest.raises(ValueError, match="capacity=0"):
        BatchCache(1, 1, 0)
    with pytest.raises(ValueError, match="at least one token each"):
        generate(tiny, [[1], []], 2)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(tiny, [[1]], 0)
