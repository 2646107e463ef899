"""Plans of memory: never an overlap, against the optimum, and run for real."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from llmlab.inference.fused_transformers import (
    Lifetime,
    arena,
    count,
    lifetimes,
    lower_bound,
    optimum,
    plan_buffers,
)
from llmlab.inference.fused_transformers.counting import storage, tensors
from llmlab.inference.fused_transformers.memory import lowest
from llmlab.models.attention import sdpa
from llmlab.models.llama import rope_tables
from tests.models.hugging_face import make


def drawn(seed: int, n: int) -> list[Lifetime]:
    random.seed(seed)
    results = []
    for i in range(n):
        first = random.randrange(6)
        last = first + random.randrange(4)
        results.append(Lifetime(f"r{i}", random.randrange(1, 9), first, last))
    return results


def test_by_hand():
    """a and c never meet: they share. b meets both and lies behind."""
    a, b, c = Lifetime("a", 4, 0, 1), Lifetime("b", 3, 1, 2), Lifetime("c", 2, 2, 3)
    assert plan_buffers([a, b, c]) == {"a": 0, "b": 4, "c": 0}
    assert arena([a, b, c], plan_buffers([a, b, c])) == 7


def test_the_smallest_gap_that_is_large_enough():
    """When "new" comes, b and d are gone: gaps of 8 and of 3. It takes that of 3."""
    always, early = (0, 5), (0, 1)
    results = [
        Lifetime("a", 9, *always),
        Lifetime("b", 8, *early),
        Lifetime("c", 7, *always),
        Lifetime("d", 3, *early),
        Lifetime("e", 2, *always),
        Lifetime("new", 1, 3, 5),
    ]
    offsets = plan_buffers(results)
    assert offsets == {"a": 0, "b": 9, "c": 17, "d": 24, "e": 27, "new": 24}


def test_equal_sizes_come_in_the_order_given():
    both = [Lifetime("x", 2, 0, 1), Lifetime("y", 2, 0, 1)]
    assert plan_buffers(both) == {"x": 0, "y": 2}
    assert plan_buffers(both[::-1]) == {"y": 0, "x": 2}


def test_the_last_launch_counts():
    """What is read in the launch that makes the next one must not be written over."""
    touching = [Lifetime("x", 2, 0, 1), Lifetime("y", 2, 1, 2)]
    apart = [Lifetime("x", 2, 0, 1), Lifetime("y", 2, 2, 3)]
    assert arena(touching, plan_buffers(touching)) == 4
    assert arena(apart, plan_buffers(apart)) == 2


@pytest.mark.parametrize("seed", range(60))
def test_no_overlap_and_not_below_the_bound(seed):
    results = drawn(seed, 12)
    size = arena(results, plan_buffers(results))  # refuses an overlap
    assert lower_bound(results) <= size <= sum(x.size for x in results)


def test_against_the_optimum():
    """On 60 small graphs greedy is never below it, and seldom above."""
    above = 0
    for seed in range(60):
        results = drawn(seed, 6)
        best = optimum(results)
        greedy = arena(results, plan_buffers(results))
        assert lower_bound(results) <= best <= greedy
        above += greedy > best
    assert 0 < above < 12


def test_the_optimum_by_trying_all_offsets():
    """Another brute force: every offset, not every order."""
    for seed in range(25):
        random.seed(seed)
        results = [
            Lifetime(f"r{i}", random.randrange(1, 4), a, a + random.randrange(3))
            for i, a in enumerate(random.choices(range(4), k=4))
        ]
        best = optimum(results)
        found = []
        for offsets in product(range(best + 1), repeat=4):
            named = dict(zip([x.name for x in results], offsets, strict=True))
            try:
                found.append(arena(results, named))
            except ValueError:
                continue
        assert min(found) == best


def test_an_overlap_is_told():
    both = [Lifetime("x", 4, 0, 1), Lifetime("y", 4, 1, 2)]
    with pytest.raises(ValueError, match="y and x overlap in 2 … 4"):
        arena(both, {"x": 0, "y": 2})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((0, 0, 1), "size=0 of x"),
        ((1, 2, 1), "first=2 and last=1 of x"),
        ((1, -1, 1), "first=-1"),
    ],
)
def test_lifetimes_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Lifetime("x", *wrong)


def test_too_many_to_try():
    with pytest.raises(ValueError, match="results has 9 entries: at most 8"):
        optimum(drawn(0, 9))
    assert arena([], {}) == lower_bound([]) == 0
    assert lowest(drawn(1, 3))


def test_lifetimes_of_a_function():
    """a: made in 0, read in 2. b: 1 to 2. c: made in 2, and the result."""

    def function(x):
        a = x * 2
        b = x[:1] + 1
        c = a @ b.T
        b.view(-1)
        return c.view(-1)

    x = torch.randn(3, 4)
    found = lifetimes(count(function, x))
    assert [(r.name, r.size, r.first, r.last) for r in found] == [
        ("0 mul", 48, 0, 2),
        ("1 add", 16, 1, 2),
        ("2 mm", 12, 2, 2),
    ]


def test_the_result_lives_to_the_end_and_writes_in_place_count():
    def function(x):
        a = x * 2
        b = x + 1
        b.add_(1)
        (x * 3).sum()
        return a

    found = {r.name: r for r in lifetimes(count(function, torch.ones(2)))}
    assert found["0 mul"].last == 4
    assert found["1 add"].last == 2
    assert len(found) == 4


class InArena(TorchDispatchMode):
    """Runs a function whose results lie in one arena, at the planned offsets."""

    def __init__(self, size: int, places: list[int]) -> None:
        super().__init__()
        self.arena = torch.zeros(size, dtype=torch.uint8)
        self.places = places  # of the n-th new result
        self.here: dict[int, int] = {}  # storage → offset
        self.kept: list = []
        self.made = 0

    def moved(self, x):
        """x where the plan puts it."""
        if not isinstance(x, torch.Tensor) or storage(x) not in self.here:
            return x
        at = self.here[storage(x)] // x.element_size() + x.storage_offset()
        return self.arena.view(x.dtype).as_strided(x.size(), x.stride(), at)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shadow = func(*args, **(kwargs or {}))  # shapes, and which memory is whose
        inside = {storage(x) for x in tensors((args, kwargs))}
        fresh = [x for x in tensors(shadow) if storage(x) not in inside]
        if not fresh and not func._schema.name.endswith("_"):
            return shadow
        real = func(*tree_map(self.moved, args), **tree_map(self.moved, kwargs or {}))
        for x, value in zip(tensors(shadow), tensors(real), strict=True):
            if storage(x) in inside:
                continue
            self.here[storage(x)] = self.places[self.made]
            self.made += 1
            self.kept.append(x)
            self.moved(x).copy_(value)
        return shadow


@torch.no_grad()
def test_a_layer_runs_in_its_arena():
    """Results lie where the plan says, and the last one is right: nothing that is still
    needed is written over. Two results in one place, and it is wrong.
    """
    model = make(num_key_value_heads=2)
    block = model.model.layers[0]
    h = torch.randn(2, 5, 32)
    rope = rope_tables(torch.arange(5)[None], model.model.theta)
    results = lifetimes(count(block, h, rope, None, None, sdpa))
    offsets = plan_buffers(results)
    assert (
        lower_bound(results)
        <= arena(results, offsets)
        < 0.5 * sum(x.size for x in results)
    )

    def run(offsets):
        size = arena(results, plan_buffers(results))
        mode = InArena(size, [offsets[x.name] for x in results])
        with mode:
            out = block(h, rope, None, None, sdpa)
        assert mode.made == len(results)
        return mode.moved(out)

    expected = block(h, rope, None, None, sdpa)
    torch.testing.assert_close(run(offsets), expected)
    all_in_one_place = dict.fromkeys(offsets, 0)
    assert not torch.allclose(run(all_in_one_place), expected, atol=0.1)
