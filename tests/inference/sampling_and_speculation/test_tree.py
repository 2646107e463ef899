"""The mask of a tree: each node reads as if its path alone stood there."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference.sampling_and_speculation import (
    depths,
    follow,
    keep_path,
    tree,
    tree_mask,
)
from llmlab.models.cache import KVCache
from tests.models.hugging_face import make

PARENTS = [-1, 0, 0, 1, 1, 2, 3]


def path_to(node):
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


@pytest.mark.parametrize("past", [0, 1, 5])
def test_the_mask_is_the_path_and_the_cache(past):
    mask = tree_mask(PARENTS, past)
    assert mask.shape == (7, past + 7) and mask.dtype == torch.bool
    assert mask[:, :past].all()
    for i in range(7):
        assert mask[i, past:].nonzero()[:, 0].tolist() == path_to(i)
    assert depths(PARENTS) == [len(path_to(i)) - 1 for i in range(7)]
    chain = tree_mask([-1, 0, 1, 2], past)
    assert torch.equal(chain[:, past:], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("past", [0, 4])
def test_a_node_reads_as_if_its_path_alone_stood_there(past):
    model = make(num_key_value_heads=2).double()
    text = torch.tensor([[5, 6, 7, 8]])[:, :past]
    tokens = [10, 11, 12, 13, 14, 15, 16]
    cache = KVCache(2)
    with torch.no_grad():
        if past:
            model(text, cache=cache)
        logits = tree.read_tree(model, cache, tokens, PARENTS)
        for node in range(7):
            path = [tokens[i] for i in path_to(node)]
            alone = model(torch.tensor([text[0].tolist() + path]))[0, -1]
            torch.testing.assert_close(logits[node], alone)
        # and what stays in the cache is the path, too
        keep_path(cache, past, path_to(6))
        assert cache.length == past + 4
        path = [tokens[i] for i in path_to(6)]
        after = model(torch.tensor([[20]]), cache=cache)[0, -1]
        whole = torch.tensor([text[0].tolist() + path + [20]])
        torch.testing.assert_close(after, model(whole)[0, -1])


def test_following_goes_down_as_long_as_a_child_stays():
    tokens = [9, 1, 2, 3, 4, 5, 6]
    best = {0: 1, 1: 3, 3: 7}

    def choose(node, children):
        found = [c for c in children if tokens[c] == best[node]]
        return (children.index(found[0]) if found else None), best[node]

    assert follow(tokens, PARENTS, choose) == ([0, 1, 3], [1, 3, 7])


def test_a_parent_stands_before_its_child():
    for parents in ([-1, 1], [-1, 2, 0], [-2]):
        with pytest.raises(ValueError, match="parents"):
            depths(parents)
