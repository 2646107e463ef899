"""The tree against a plain list of texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.inference.paged_attention import RadixTree
from llmlab.inference.paged_attention.radix import common, path

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def longest(texts, asked) -> int:
    return max((common(text, asked) for text in texts), default=0)


@given(st.lists(TEXT, max_size=8), TEXT)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_finds_the_longest_prefix_and_stores_each_token_once(texts, asked):
    tree = RadixTree()
    place = 0
    where: dict[tuple, int] = {}  # prefix → the place of its last token
    for n, text in enumerate(texts):
        places = list(range(place, place + len(text)))
        place += len(text)
        known = tree.insert(text, places)
        assert known == longest(texts[:n], text)
        for i in range(known, len(text)):
            where[tuple(text[: i + 1])] = places[i]
        tree.check()
    assert len(tree) == len(where)
    found, node = tree.match(asked)
    assert len(found) == longest(texts, asked)
    assert found == [where[tuple(asked[: i + 1])] for i in range(len(found))]
    above = [n.tokens for n in path(node)][::-1]
    assert [t for run in above for t in run] == asked[: len(found)]
    tree.check()


@given(st.lists(TEXT, min_size=1, max_size=8), st.integers(0, 7), st.integers(1, 30))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_eviction_gives_back_each_place_once_and_never_a_locked_one(texts, pick, count):
    tree = RadixTree()
    place = 0
    for text in texts:
        tree.insert(text, list(range(place, place + len(text))))
        place += len(text)
    locked_text = texts[pick % len(texts)]
    locked, node = tree.match(locked_text)
    tree.lock(node)
    tree.match(locked_text[:1])  # may split the locked edge
    before = len(tree)
    back = tree.evict(count)
    tree.check()
    assert len(set(back)) == len(back)
    assert not set(back) & set(locked)
    assert len(tree) == before - len(back)
    assert len(back) >= min(count, before - len(locked))
    assert tree.match(locked_text)[0] == locked
    tree.unlock(node)
    tree.evict(1000)
    assert len(tree) == 0


def test_an_edge_is_split_where_texts_part():
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    assert tree.insert([1, 2, 9], [10, 11, 12]) == 2
    assert sorted(node.tokens for node in tree.nodes()) == [(1, 2), (3, 4), (9,)]
    assert tree.match([1, 2, 9, 9])[0] == [0, 1, 12]
    assert tree.match([1, 2, 3])[0] == [0, 1, 2]
    assert sorted(node.tokens for node in tree.nodes()) == [(1, 2), (3,), (4,), (9,)]


def test_the_leaf_that_was_not_used_for_longest_goes_first():
    tree = RadixTree()
    tree.insert([1, 2], [0, 1])
    tree.insert([1, 3], [10, 11])
    tree.insert([4, 5], [20, 21])
    tree.match([1, 2])
    assert tree.evict(1) == [11]
    assert tree.evict(1) == [20, 21]
    assert tree.evict(9) == [1, 0]  # the parent after its last child


def test_locks_hold_after_a_split_and_end():
    tree = RadixTree()
    tree.insert([1, 2, 3], [0, 1, 2])
    _, node = tree.match([1, 2, 3])
    tree.lock(node)
    tree.insert([1, 7], [0, 9])  # splits the locked edge
    assert tree.evict(9) == [9]
    tree.unlock(node)
    assert sorted(tree.evict(9)) == [0, 1, 2]


def test_refuses_places_that_do_not_fit_and_unlocking_twice():
    tree = RadixTree()
    with pytest.raises(ValueError, match="2 tokens and 1 places"):
        tree.insert([1, 2], [0])
    tree.insert([1, 2], [0, 1])
    _, node = tree.match([1, 2])
    with pytest.raises(ValueError, match="not locked"):
        tree.unlock(node)
    assert tree.match([])[0] == []
