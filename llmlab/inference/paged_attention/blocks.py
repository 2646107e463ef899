"""Who owns which block of the cache: block tables, reference counts, copy-on-write, and
prompts that find what earlier prompts have computed.

Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4. The key/value cache of a
sequence lies in blocks of b tokens, anywhere in memory; its block table says where:

    token i  lies in  block table[i // b],  at place i mod b

    b          block_size, tokens in a block
    table      the blocks of one sequence, in the order of its tokens
    counts     for each block, in how many tables it stands
    available  the blocks that stand in none, in the order in which they are taken
    keys       block → key, for full blocks whose contents can be found again
    cached     key → block, the same the other way round

A key names the contents of a full block *and of all that stands before it*, for the
keys and values of a token depend on the whole text up to it. A block that leaves its
last table keeps its key until it is taken for something else: `available` is a queue,
so that is the one which has been free for longest.

Simplified: taking a block out of the middle of `available` is a search through a list
(vLLM: a linked list); a block that is full twice with the same contents stays double;
nothing is moved to the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from llmlab.inference.paged_attention.sequences import Sequences, check_prompt

Key = bytes
Copy = tuple[int, int]  # block that is read, block that is written


class OutOfBlocks(RuntimeError):
    """No block is available: somebody has to wait, or to be sent back to the queue."""


@dataclass
class Pool:
    """All blocks. The functions below change it."""

    block_size: int
    counts: list[int]
    available: list[int]
    keys: dict[int, Key] = field(default_factory=dict)
    cached: dict[Key, int] = field(default_factory=dict)


def new_pool(num_blocks: int, block_size: int) -> Pool:
    """`num_blocks` blocks that nobody has.

    Raises:
        ValueError: a number below 1.
    """
    if num_blocks < 1 or block_size < 1:
        raise ValueError(
            f"num_blocks={num_blocks} and block_size={block_size} must be at least 1"
        )
    return Pool(block_size, [0] * num_blocks, list(range(num_blocks)))


def blocks_for(length: int, block_size: int) -> int:
    """⌈length / b⌉."""
    return -(-length // block_size)


def block_keys(tokens: Sequence[int], block_size: int) -> list[Key]:
    """A key for each full block of a text: of its tokens and the key before it."""
    keys: list[Key] = []
    before = b""
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = ",".join(map(str, tokens[start : start + block_size]))
        before = hashlib.sha256(before + block.encode()).digest()
        keys.append(before)
    return keys


def take(pool: Pool) -> int:
    """The block that has been available for longest, for one table.

    What it held cannot be found any more.

    Raises:
        OutOfBlocks: there is none. Nothing has changed then.
    """
    if not pool.available:
        raise OutOfBlocks(f"all {len(pool.counts)} blocks are in use")
    block = pool.available.pop(0)
    key = pool.keys.pop(block, None)
    if key is not None:
        del pool.cached[key]
    pool.counts[block] = 1
    return block


def prefix_blocks(pool: Pool, tokens: Sequence[int]) -> list[int]:
    """The blocks that hold the beginning of a text already.

    One token at least is left over: the model has to compute something to say what
    comes next.
    """
    found = []
    most = (len(tokens) - 1) // pool.block_size
    for key in block_keys(tokens, pool.block_size)[:most]:
        if key not in pool.cached:
            break  # what stands after a gap was computed after another text
        found.append(pool.cached[key])
    return found


def can_allocate(pool: Pool, tokens: Sequence[int]) -> bool:
    """Whether `allocate` finds enough blocks."""
    found = prefix_blocks(pool, tokens)
    # those that nobody has at present stand in the queue themselves
    idle = sum(pool.counts[block] == 0 for block in found)
    needed = blocks_for(len(tokens), pool.block_size) - len(found)
    return needed <= len(pool.available) - idle


def allocate(pool: Pool, tokens: Sequence[int]) -> tuple[list[int], int]:
    """A block table for a prompt.

    Returns:
        The table, and how many tokens need not be computed.
    Raises:
        OutOfBlocks: `can_allocate` was not asked.
    """
    table = prefix_blocks(pool, tokens)
    for block in table:  # first of all: else `take` may give them away
        if pool.counts[block] == 0:
            pool.available.remove(block)
        pool.counts[block] += 1
    found = len(table) * pool.block_size
    while len(table) * pool.block_size < len(tokens):
        table.append(take(pool))
    return table, found


def append_slot(pool: Pool, table: list[int], length: int) -> Copy | None:
    """Room for one token after the `length` tokens of a table, which is changed.

    A block that others read is not written: if the token falls into a shared block that
    is not full, the sequence gets a copy of its own.

    Returns:
        (from, to) when a block must be copied before the token is written.
    Raises:
        OutOfBlocks: a block is needed, and there is none. Nothing has changed then.
    """
    if length % pool.block_size == 0:  # the last block is full, or there is none
        table.append(take(pool))
        return None
    last = table[-1]
    if pool.counts[last] == 1:
        return None
    own = take(pool)
    pool.counts[last] -= 1
    table[-1] = own
    return last, own


def fork(pool: Pool, table: Sequence[int]) -> list[int]:
    """A second table with the same blocks. Nothing is copied."""
    for block in table:
        pool.counts[block] += 1
    return list(table)


def free(pool: Pool, table: Sequence[int]) -> list[int]:
    """A sequence has ended: blocks that stand in no other table become available.

    The last block first, so that the beginning of a text, which others are likelier to
    ask for, is given away last. Keys stay.

    Returns:
        The blocks that have become available, in that order.
    """
    again = []
    for block in reversed(table):
        pool.counts[block] -= 1
        if pool.counts[block] == 0:
            pool.available.append(block)
            again.append(block)
    return again


def truncate(
    pool: Pool,
    table: list[int],
    length: int,
    free: Callable[[Pool, Sequence[int]], list[int]] = free,
) -> Copy | None:
    """Only the first `length` tokens of a table stay; the table is changed.

    Speculative decoding takes back what it has stored for nothing. A block that is no
    longer full will be written again. So nobody may find it from now on, and if others
    read it, the sequence gets a copy of its own at once.

    Returns:
        (from, to) when a block must be copied.
    Raises:
        OutOfBlocks: a block is needed, and there is none. Nothing has changed then.
    """
    kept = blocks_for(length, pool.block_size)
    dropped = table[kept:]
    last = table[kept - 1]
    partial = length % pool.block_size > 0
    shared = pool.counts[last] > 1
    again = any(pool.counts[block] == 1 for block in dropped)
    if partial and shared and not pool.available and not again:
        raise OutOfBlocks(f"all {len(pool.counts)} blocks are in use")
    del table[kept:]
    if dropped:
        free(pool, dropped)
    if not partial:
        return None
    if shared:
        table[-1] = take(pool)
        pool.counts[last] -= 1
        return last, table[-1]
    key = pool.keys.pop(last, None)
    if key is not None:
        del pool.cached[key]
    return None


def register(pool: Pool, table: Sequence[int], tokens: Sequence[int]) -> None:
    """The keys and values of `tokens` are stored: their full blocks can be found.

    Where another block has the same key, that one stays the one which is found.
    """
    keys = block_keys(tokens, pool.block_size)
    for block, key in zip(table, keys, strict=False):
        if key not in pool.cached:
            pool.cached[key] = block
            pool.keys[block] = key


def check_pool(pool: Pool, tables: Iterable[Sequence[int]]) -> None:
    """What holds after every call, whatever was called.

    Raises:
        RuntimeError: it does not; the text says what.
    """
    standing = [0] * len(pool.counts)
    for table in tables:
        for block in table:
            standing[block] += 1
    if standing != pool.counts:
        raise RuntimeError(f"counts are {pool.counts}, in the tables are {standing}")
    unused = [block for block, count in enumerate(pool.counts) if count == 0]
    if sorted(pool.available) != unused:
        raise RuntimeError(f"available is {pool.available}, unused are {unused}")
    if {key: block for block, key in pool.keys.items()} != pool.cached:
        raise RuntimeError("keys and cached do not say the same")


class BlockManager(Sequences):
    """Sequences over the blocks of a pool.

    The three functions can be others of the same signature: a learner's own.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        prefix_caching: bool = True,
        allocate: Callable[[Pool, Sequence[int]], tuple[list[int], int]] = allocate,
        append_slot: Callable[[Pool, list[int], int], Copy | None] = append_slot,
        free: Callable[[Pool, Sequence[int]], list[int]] = free,
    ) -> None:
        super().__init__()
        self.pool = new_pool(num_blocks, block_size)
        self.prefix_caching = prefix_caching
        self._allocate = allocate
        self._append_slot = append_slot
        self._free = free

    @property
    def block_size(self) -> int:
        return self.pool.block_size

    @property
    def num_blocks(self) -> int:
        return len(self.pool.counts)

    @property
    def used(self) -> int:
        """Blocks that stand in a table."""
        return len(self.pool.counts) - len(self.pool.available)

    def can_add(self, tokens: Sequence[int]) -> bool:
        """Whether there are blocks for this prompt now."""
        return can_allocate(self.pool, tokens)

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A new sequence.

        Returns:
            Its number, and how many of its tokens are stored already.
        Raises:
            ValueError: no token.
            OutOfBlocks: not enough blocks. Nothing has changed then.
        """
        check_prompt(tokens)
        if not self.can_add(tokens):
            needed = blocks_for(len(tokens), self.block_size)
            raise OutOfBlocks(
                f"a prompt of {len(tokens)} tokens takes {needed} blocks, and"
                f" {len(self.pool.available)} are available"
            )
        table, found = self._allocate(self.pool, tokens)
        return self._enter(table, tokens), found

    def append(self, sequence: int, token: int) -> Copy | None:
        """One token more. See `append_slot`."""
        tokens = self._known(sequence)
        copy = self._append_slot(self.pool, self.tables[sequence], len(tokens))
        tokens.append(token)
        return copy

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens, in the same blocks."""
        tokens = self._known(sequence)
        return self._enter(fork(self.pool, self.tables[sequence]), tokens)

    def free(self, sequence: int) -> list[int]:
        """The sequence is gone. Returns the blocks that have become available."""
        return self._free(self.pool, self._leave(sequence))

    def truncate(self, sequence: int, length: int) -> Copy | None:
        """Only its first `length` tokens stay. See `truncate`.

        Raises:
            ValueError: fewer than one token, or more than there are.
        """
        tokens = self._to_cut(sequence, length)
        copy = truncate(self.pool, self.tables[sequence], length, self._free)
        del tokens[length:]
        return copy

    def stored(self, sequence: int) -> None:
        """Keys and values of all its tokens are stored: others can find them."""
        tokens = self._known(sequence)
        if self.prefix_caching:
            register(self.pool, self.tables[sequence], tokens)

    def check(self) -> None:
        """The invariants of `check_pool`, and that every table has its length.

        Raises:
            RuntimeError: one does not hold.
        """
        check_pool(self.pool, self.tables.values())
        for sequence, table in self.tables.items():
            length = len(self.tokens[sequence])
            if len(table) != blocks_for(length, self.block_size):
                raise RuntimeError(
                    f"sequence {sequence} has {length} tokens and {len(table)} blocks"
                )
