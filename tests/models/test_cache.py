"""The key/value cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models.cache import KVCache


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    capacity=st.integers(1, 20),
)
def test_append_gives_back_all_that_was_stored(pieces, capacity):
    cache = KVCache(num_layers=2, capacity=capacity)
    whole = torch.randn(2, 3, sum(pieces), 4)
    start = 0
    for n in pieces:
        for layer in range(2):
            assert cache.length == start, "a token counts once the last layer has it"
            part = whole[:, :, start : start + n]
            k, v = cache.append(layer, part, -part)
            assert torch.equal(k, whole[:, :, : start + n]) and torch.equal(
                v, -whole[:, :, : start + n]
            )
        start += n
    assert cache.length == start
    assert cache.nbytes == 2 * 2 * whole.numel() * 4


def test_growing_copies_rarely():
    cache, buffers = KVCache(1, capacity=8), set()
    for _ in range(100):
        cache.append(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        buffers.add(cache.keys[0].shape[2])
    assert buffers == {8, 16, 32, 64, 128}


def test_truncate():
    cache, k = KVCache(1), torch.arange(6.0).reshape(1, 1, 6, 1)
    cache.append(0, k, k)
    cache.truncate(4)
    got, _ = cache.append(0, torch.full((1, 1, 1, 1), 9.0), torch.zeros(1, 1, 1, 1))
    assert got.flatten().tolist() == [0, 1, 2, 3, 9]
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"length={wrong}"):
            cache.truncate(wrong)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="num_layers=0"):
        KVCache(0)
    with pytest.raises(ValueError, match="capacity=0"):
        KVCache(1, capacity=0)
