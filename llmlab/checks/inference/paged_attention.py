"""Checks of 07-inference/03-paged-attention.

Three exercises change a pool of blocks. An answer is run on copies of several pools;
what it returns and leaves behind is compared with what usual mistakes return and leave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from llmlab.checks.judging import Outcome, judge
from llmlab.checks.telling import telling
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.inference import paged_attention as paged
from llmlab.inference.paged_attention import Pool, block_keys, take

check = Checks("07-inference/03-paged-attention")


# Pools to work on ---------------------------------------------------------------------


def pool_after(size: int, blocks: int, *texts: Sequence[int]) -> tuple[Pool, list]:
    """A pool in which these texts are stored, and their tables."""
    pool = paged.new_pool(blocks, size)
    tables = []
    for text in texts:
        table, _ = paged.allocate(pool, text)
        paged.register(pool, table, text)
        tables.append(table)
    return pool, tables


def whole(value: object, what: str) -> int:
    """A whole number, or a mistake that says what came instead."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise Mistake(f"{what} holds {value!r}, where whole numbers are asked")
    return int(value)


def left_in(pool: Pool) -> Outcome:
    """A pool as plain data that can be compared."""
    return {
        "counts": list(pool.counts),
        "available": list(pool.available),
        "cached": dict(pool.cached),
        "keys": dict(pool.keys),
    }


def shown(value: object) -> str:
    """A part of an outcome, short; keys are digests that say nothing."""
    if isinstance(value, dict):
        blocks = [x for pair in value.items() for x in pair if isinstance(x, int)]
        return f"keys for the blocks {sorted(blocks)}"
    return str(value)


# 1 ------------------------------------------------------------------------------------


def free_cases() -> list[tuple[Pool, list[int]]]:
    """Tables alone, shared in part, shared as a whole; idle blocks in the queue."""
    alone, tables = pool_after(2, 9, [1, 2, 3, 4, 5], [7, 8, 9])
    half, others = pool_after(2, 9, [1, 2, 3, 4, 5], [7, 8, 9])
    paged.free(half, others[0])
    shared, parts = pool_after(2, 9, [1, 2, 3, 4, 5], [1, 2, 6, 7, 8, 9, 9])
    forked, (table,) = pool_after(3, 8, [1, 2, 3, 4, 5, 6, 7])
    paged.fork(forked, table)
    twice, (again, _) = pool_after(2, 8, [1, 2, 3, 4, 5], [6, 6, 7])
    paged.fork(twice, again)
    paged.fork(twice, again)  # held by three
    return [
        (alone, tables[0]),
        (shared, parts[1]),
        (shared, parts[0]),
        (forked, table),
        (twice, again),
        (half, others[1]),
    ]


def run_free(answer: Callable, n: int) -> Outcome:
    """Case n: what comes back, the pool, and the table as it was given."""
    pool, table = copy.deepcopy(free_cases()[n])
    given = list(table)
    what = "free(pool, table)"
    found = expect(answer(pool, table), kind=(list, tuple), what=what)
    back = [whole(block, what) for block in found]
    if table != given:
        raise Mistake("the table itself was changed: it stays as it is")
    return {"the result": back, **left_in(pool)}


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=4,
    in_place=True,
    hints=(
        "Every block of the table loses one reference. Which of them have none left?",
        "Go through the table from its end: `for block in reversed(table)`.",
        (
            "Take 1 from `pool.counts[block]`. If it is 0 now, append the block to"
            " `pool.available` and to the list that you return. `keys` and `cached`"
            " stay as they are."
        ),
    ),
)
def free(answer):
    """The blocks of a sequence that has ended, given back where nobody else reads."""
    judge(answer, run_free, paged.free, wrong_frees(), 6, "free(pool, table)", shown)


def freeing(
    order: Callable = lambda table: list(reversed(table)),
    less: int = 1,
    when: Callable = lambda count: count == 0,
    put: Callable = lambda pool, block: pool.available.append(block),
    also: Callable = lambda pool, block: None,
    result: Callable = lambda table, again: again,
) -> Callable:
    """`free`, and what comes out with one thing changed."""

    def way(pool: Pool, table: list[int]) -> list[int]:
        again = []
        for block in order(table):
            pool.counts[block] -= less
            if when(pool.counts[block]):
                put(pool, block)
                also(pool, block)
                again.append(block)
        return result(table, again)

    return way


def forget(pool: Pool, block: int) -> None:
    """The key of a block is gone."""
    key = pool.keys.pop(block, None)
    if key is not None:
        pool.cached.pop(key)


def free_to_zero(pool: Pool, table: list[int]) -> list[int]:
    """As if nobody else had these blocks."""
    for block in reversed(table):
        pool.counts[block] = 0
        pool.available.append(block)
    return list(reversed(table))


def free_shared_only_counts(pool: Pool, table: list[int]) -> list[int]:
    """The count goes down only where others are left."""
    again = []
    for block in reversed(table):
        if pool.counts[block] > 1:
            pool.counts[block] -= 1
        else:
            pool.available.append(block)
            again.append(block)
    return again


def free_to_the_first_shared(pool: Pool, table: list[int]) -> list[int]:
    """Leaves the loop where another table holds a block."""
    again = []
    for block in reversed(table):
        pool.counts[block] -= 1
        if pool.counts[block] > 0:
            break
        pool.available.append(block)
        again.append(block)
    return again


def free_without_keys(pool: Pool, table: list[int]) -> list[int]:
    """Blocks that can be found again are kept out of the queue."""
    again = []
    for block in reversed(table):
        pool.counts[block] -= 1
        if pool.counts[block] == 0 and block not in pool.keys:
            pool.available.append(block)
            again.append(block)
    return again


def wrong_frees() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the blocks come back first block first: the last one first, so that the"
        " beginning of the text is given away last": freeing(order=list),
        "blocks that another table still holds were given away: only those whose count"
        " has become 0": freeing(when=lambda count: True),
        "the counts were set to 0: others may hold the same blocks, so take 1"
        " away": free_to_zero,
        "a block that nobody has must have the count 0: take 1 away there,"
        " too": free_shared_only_counts,
        "blocks become available while one table still holds them: at 0, not at"
        " 1": freeing(when=lambda count: count <= 1),
        "it ends at the first shared block: those in front of it lose a reference,"
        " too": free_to_the_first_shared,
        "blocks with a key did not become available: they do, and can be found until"
        " they are taken": free_without_keys,
        "the counts did not go down: each block of the table loses one"
        " reference": freeing(less=0),
        "the counts went up": freeing(less=-1),
        "the counts are right, but no block became available": freeing(
            when=lambda count: False
        ),
        "the blocks were put at the front of `available`: at its end, for the one that"
        " was freed last is to be taken last": freeing(
            put=lambda pool, block: pool.available.insert(0, block)
        ),
        "`available` was sorted: it is a queue, in the order of freeing": freeing(
            put=lambda pool, block: (
                pool.available.append(block),
                pool.available.sort(),
            )
        ),
        "freed blocks lost their keys: the contents can still be found, until the block"
        " is taken for something else": freeing(also=forget),
        "the whole table is returned: only the blocks that have become"
        " available": freeing(result=lambda table, again: list(table)),
        "the whole table is returned, from its end: only the blocks that have become"
        " available": freeing(result=lambda table, again: list(reversed(table))),
        "the pool is right, but the result is in the order of the table: it is the"
        " order in which the blocks became available": freeing(
            result=lambda table, again: again[::-1]
        ),
        "the pool is right, but nothing is in the list that you return": freeing(
            result=lambda table, again: []
        ),
    }


# 2 ------------------------------------------------------------------------------------


def slot_cases() -> list[tuple[Pool, list[int], int]]:
    """Full and partial last blocks, alone and shared; the first token of all."""
    cases = []
    for length in (4, 5, 6, 7):  # blocks of 4: full, then 1, 2, 3 tokens in the second
        for others in (0, 1, 2):
            pool, (table,) = pool_after(4, 7, list(range(length)))
            for _ in range(others):
                paged.fork(pool, table)
            cases.append((pool, table, length))
    pool, (first,) = pool_after(3, 7, list(range(8)))
    paged.free(pool, first)  # what is taken may have a key
    _, (table, *_) = (pool, [paged.allocate(pool, [50, 51])[0]])
    paged.fork(pool, table)
    cases.append((pool, table, 2))
    # a full block in front is shared, the partial one is not
    pool, tables = pool_after(3, 7, [1, 2, 3, 4], [1, 2, 3, 9])
    cases.append((pool, tables[1], 4))
    cases.append((paged.new_pool(4, 2), [], 0))
    pool, (table,) = pool_after(1, 5, [1, 2])
    paged.fork(pool, table)
    cases.append((pool, table, 2))
    return cases


def run_slot(answer: Callable, n: int) -> Outcome:
    """Case n: what comes back, the table and the pool."""
    pool, table, length = copy.deepcopy(slot_cases()[n])
    what = "append_slot(pool, table, length)"
    found = answer(pool, table, length)
    if found is not None:
        expect(found, kind=(list, tuple), what=what)
        found = tuple(whole(block, what) for block in found)
    return {"the result": found, "the table": list(table), **left_in(pool)}


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    in_place=True,
    hints=(
        (
            "Three cases: the last block is full; it has room and is yours alone; it"
            " has room and others read it."
        ),
        (
            "`length % pool.block_size == 0` says that there is no room (also when"
            " there is no block yet): append `take(pool)` to the table. Otherwise look"
            " at `pool.counts[table[-1]]`."
        ),
        (
            "Shared: `own = take(pool)`, one reference fewer for the old block, `own`"
            " in its place in the table, and return (old, own)."
        ),
    ),
)
def append_slot(answer):
    """Room for one token more; a shared block is copied before it is written."""
    cases = len(slot_cases())
    what = "append_slot(pool, table, length)"
    judge(answer, run_slot, paged.append_slot, wrong_slots(), cases, what, shown)
    pool, (table,) = pool_after(2, 2, [1, 2, 3])
    paged.fork(pool, table)
    before = copy.deepcopy((pool, table))
    try:
        answer(pool, table, 3)
    except paged.OutOfBlocks:
        if (pool, table) != before:
            raise Mistake(
                "when no block is left, `take` raises OutOfBlocks, and the pool must be"
                " as it was: take first, then change counts and table"
            ) from None
        return
    raise Mistake("no block is left, and no OutOfBlocks came: let `take` raise it")


def slot(
    full: Callable = lambda length, size: length % size == 0,
    shared: Callable = lambda count: count > 1,
    own_block: Callable = take,
    less: int = 1,
    keep: bool = False,
    result: Callable = lambda last, own: (last, own),
    fresh: Callable = lambda block: None,
) -> Callable:
    """`append_slot`, and what comes out with one thing changed."""

    def way(pool: Pool, table: list[int], length: int) -> tuple | None:
        if full(length, pool.block_size) or not table:
            table.append(take(pool))
            return fresh(table[-1])
        last = table[-1]
        if not shared(pool.counts[last]):
            return None
        own = own_block(pool)
        pool.counts[last] -= less
        if not keep:
            table[-1] = own
        else:
            table.append(own)
        return result(last, own)

    return way


def slot_of_full_too(pool: Pool, table: list[int], length: int) -> tuple | None:
    """Copies a shared block also when it is full."""
    if table and pool.counts[table[-1]] > 1:
        last, own = table[-1], take(pool)
        pool.counts[last] -= 1
        table[-1] = own
        if length % pool.block_size == 0:
            table.append(take(pool))
        return last, own
    return slot()(pool, table, length)


def slot_of_full_instead(pool: Pool, table: list[int], length: int) -> tuple | None:
    """Looks at the count first: a full block that is shared gets a copy, no room."""
    shared = bool(table) and pool.counts[table[-1]] > 1
    return slot(full=lambda n, size: n % size == 0 and not shared)(pool, table, length)


def slot_counted_twice(pool: Pool, table: list[int], length: int) -> tuple | None:
    """Counts this table, as `take` has done."""
    before = list(table)
    found = slot()(pool, table, length)
    if table != before:
        pool.counts[table[-1]] += 1
    return found


def slot_uncounted(pool: Pool) -> int:
    """A block from the queue whose count nobody has set."""
    block = take(pool)
    pool.counts[block] = 0
    return block


def slot_all_shared(pool: Pool, table: list[int], length: int) -> tuple | None:
    """Copies whenever any block of the table is shared."""
    if length % pool.block_size == 0:
        table.append(take(pool))
        return None
    if all(pool.counts[block] == 1 for block in table):
        return None
    last, own = table[-1], take(pool)
    pool.counts[last] -= 1
    table[-1] = own
    return last, own


def wrong_slots() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a shared block was written in place: others read it, so it must be copied"
        " first": slot(shared=lambda count: False),
        "a block that this table alone holds was copied: only where its count is above"
        " 1": slot(shared=lambda count: True),
        "the count of two is not seen as shared: above 1, not above 2": slot(
            shared=lambda count: count > 2
        ),
        "a shared block that is full was copied: nothing will be written to"
        " it": slot_of_full_too,
        "a shared block that is full was copied, and no room was made: a full one is"
        " case 1, shared or not": slot_of_full_instead,
        "the pair names the new block twice: keep the old one's number before you put"
        " the new one in its place": slot(result=lambda last, own: (own, own)),
        "the new block has the count 2: `take` has counted this table": (
            slot_counted_twice
        ),
        "it was copied because an earlier block of the table is shared: only the last"
        " one is written": slot_all_shared,
        "the old block keeps the reference of this table: its count goes down by"
        " 1": slot(less=0),
        "the old block lost two references: this table held one": slot(less=2),
        "the copy stands after the old block: it takes its place in the table": slot(
            keep=True
        ),
        "the pair is the wrong way round: (from, to)": slot(
            result=lambda last, own: (own, last)
        ),
        "the table is right, but the pair (from, to) is not returned: who is to copy"
        " the block?": slot(result=lambda last, own: None),
        "a new block was taken one token too early: the last block has room for one"
        " more": slot(full=lambda length, size: (length + 1) % size == 0),
        "a new block was taken one token too late: `length` tokens are stored, and a"
        " full block has no room": slot(full=lambda length, size: length % size == 1),
        "a new block was taken for every token": slot(full=lambda length, size: True),
        "no new block was taken where the last one is full": slot(
            full=lambda length, size: False
        ),
        "a block for a new token needs no copy: return None there": slot(
            fresh=lambda block: (block, block)
        ),
        "the new block has the count 0: this table holds it. `take` sets it to 1": slot(
            own_block=slot_uncounted
        ),
    }


# 3 ------------------------------------------------------------------------------------


def allocate_cases() -> list[tuple[Pool, list[int]]]:
    """Prompts that find nothing, something, all but one token; running and ended."""
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    cases = []
    for ended in (False, True):
        for prompt in (
            text[:4],  # ends with a full block that is stored
            text[:5],
            text[:8],
            text,
            [*text[:4], 7, 7, 7],  # parts after two blocks
            [3, 2, *text[2:]],  # the same later blocks after another beginning
            [8, 8, 8],
            [3],
        ):
            pool, (table,) = pool_after(2, 14, text)
            if ended:
                paged.free(pool, table)
            cases.append((pool, prompt))
    # few blocks: those found are at the front of the queue
    pool, (table,) = pool_after(3, 5, [1, 2, 3, 4, 5, 6, 7])
    paged.free(pool, table)
    rest = [paged.take(pool) for _ in range(2)]
    pool.available = [0, 1, 2]
    cases.append((pool, [1, 2, 3, 4, 5, 6, 9]))
    # a gap: the second block is forgotten, the third is not
    pool, (table,) = pool_after(2, 12, text)
    forget(pool, table[1])
    cases.append((pool, text))
    # held by two
    pool, (table,) = pool_after(4, 9, text)
    paged.fork(pool, table)
    cases.append((pool, [*text[:8], 1, 2]))
    del rest
    return cases


def run_allocate(answer: Callable, n: int) -> Outcome:
    """Case n: the table, the tokens found, and the pool."""
    pool, prompt = copy.deepcopy(allocate_cases()[n])
    what = "allocate(pool, tokens)"
    found = expect(answer(pool, prompt), kind=(list, tuple), what=what)
    if len(found) != 2 or not isinstance(found[0], list | tuple):
        raise Mistake(f"{what} must return two things: the table, and tokens found")
    return {
        "the table": [whole(block, f"the table of {what}") for block in found[0]],
        "the number of tokens found": whole(found[1], what),
        **left_in(pool),
    }


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    in_place=True,
    hints=(
        (
            "First look only: go through `block_keys(tokens, b)` and collect"
            " `pool.cached[key]` until a key is missing. At most (len(tokens) − 1) // b"
            " blocks, for one token must be left to compute."
        ),
        (
            "Then hold what you found: its count goes up by 1, and a block whose count"
            " was 0 leaves `pool.available`. Only then call `take(pool)`, which could"
            " give it away."
        ),
        (
            "`while len(table) * b < len(tokens): table.append(take(pool))`. The number"
            " that you return is blocks found times b."
        ),
    ),
)
def allocate(answer):
    """A block table for a prompt, with what others have computed in front."""
    cases = len(allocate_cases())
    what = "allocate(pool, tokens)"
    right, wrongs = paged.allocate, wrong_allocates()
    judge(answer, run_allocate, right, wrongs, cases, what, shown)


def allocating(
    most: Callable = lambda length, size: (length - 1) // size,
    keys: Callable = block_keys,
    miss: str = "stop",
    hold: Callable = lambda pool, block: None,
    up: int = 1,
    leave: bool = True,
    late: bool = False,
    needed: Callable = lambda length, size: -(-length // size),
    found: Callable = lambda blocks, size: blocks * size,
    new: Callable = take,
) -> Callable:
    """`allocate`, and what comes out with one thing changed."""

    def reserve(pool: Pool, table: list[int]) -> None:
        for block in table:
            if leave and pool.counts[block] == 0 and block in pool.available:
                pool.available.remove(block)
            hold(pool, block)
            pool.counts[block] += up

    def way(pool: Pool, tokens: list[int]) -> tuple[list[int], int]:
        size = pool.block_size
        table = []
        for key in keys(tokens, size)[: most(len(tokens), size)]:
            if key in pool.cached:
                table.append(pool.cached[key])
            elif miss == "stop":
                break
        known = list(table)
        if not late:
            reserve(pool, known)
        while len(table) < needed(len(tokens), size):
            table.append(new(pool))
        if late:
            reserve(pool, known)
        return table, found(len(known), size)

    return way


def keys_alone(tokens: Sequence[int], size: int) -> list[bytes]:
    """Keys that do not know what stands before their block."""
    full = len(tokens) // size * size
    return [block_keys(tokens[i : i + size], size)[0] for i in range(0, full, size)]


def allocate_nothing(pool: Pool, tokens: list[int]) -> tuple[list[int], int]:
    """New blocks only."""
    return allocating(most=lambda length, size: 0)(pool, tokens)


def allocate_from_running(pool: Pool, tokens: list[int]) -> tuple[list[int], int]:
    """Finds only blocks that some table holds."""

    def held(tokens: Sequence[int], size: int) -> list[bytes]:
        keys = block_keys(tokens, size)
        idle = (pool.cached.get(key) in pool.available for key in keys)
        return keys[: next((i for i, is_idle in enumerate(idle) if is_idle), None)]

    return allocating(keys=held)(pool, tokens)


def allocate_and_register(pool: Pool, tokens: list[int]) -> tuple[list[int], int]:
    """Gives the new blocks their keys at once."""
    table, found = allocating()(pool, tokens)
    paged.register(pool, table, tokens)
    return table, found


def allocate_zero(pool: Pool) -> int:
    """A block whose count is not set."""
    block = take(pool)
    pool.counts[block] = 0
    return block


def allocate_last(pool: Pool) -> int:
    """The block from the wrong end of the queue."""
    pool.available.insert(0, pool.available.pop())
    return take(pool)


def wrong_allocates() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "nothing is reused: look the keys of the full blocks up in"
        " `pool.cached`": allocate_nothing,
        "the whole prompt was found, and no token is left to compute: without one the"
        " model says nothing. At most (len(tokens) − 1) // b blocks": allocating(
            most=lambda length, size: length // size
        ),
        "one block too few is reused: with one token beyond it, a full block may be"
        " found": allocating(most=lambda length, size: (length - 2) // size),
        "one block is always left to compute, but one token is enough": allocating(
            most=lambda length, size: max(0, length // size - 1)
        ),
        "blocks after a gap are reused: stop at the first key that is missing, or the"
        " table is out of order": allocating(miss="go on"),
        "found blocks that no table holds were passed over: they can be reused"
        " until they are taken": allocate_from_running,
        "the new blocks were given keys: their contents are not computed"
        " yet": allocate_and_register,
        "the keys know nothing of what stands before their block: take"
        " `block_keys(tokens, …)` of the whole text": allocating(keys=keys_alone),
        "found blocks stay in `available`: one whose count was 0 must leave"
        " it": allocating(leave=False),
        "found blocks were held too late: `take` had given one of them away. Hold them"
        " first": allocating(late=True),
        "the counts of found blocks did not go up: one table more holds"
        " them": allocating(up=0),
        "the counts of found blocks were set to 1: others may hold them, so add"
        " 1": allocating(
            up=1, hold=lambda pool, block: pool.counts.__setitem__(block, 0)
        ),
        "found blocks lost their keys: they can be found again by others": allocating(
            hold=forget
        ),
        "the last block, which is not full, is missing: round up": allocating(
            needed=lambda length, size: length // size
        ),
        "one block too many: a prompt that fills its last block needs no"
        " other": allocating(needed=lambda length, size: length // size + 1),
        "the number of blocks is returned: tokens are asked": allocating(
            found=lambda blocks, size: blocks
        ),
        "the number found is not right: 0 was returned": allocating(
            found=lambda blocks, size: 0
        ),
        "the new blocks have the count 0: this table holds them. `take` sets it to"
        " 1": allocating(new=allocate_zero),
        "new blocks come from the end of `available`: it is a queue, take from its"
        " front, as `take` does": allocating(new=allocate_last),
    }


# 4 ------------------------------------------------------------------------------------

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def attention_inputs(
    B: int = 3, H: int = 4, K: int = 2, D: int = 3, b: int = 4, M: int = 3
) -> Inputs:
    """Queries, shuffled blocks, tables, and lengths that end within a block."""
    N = B * M + 2
    keys, values = torch.randn(2, N, b, K, D)
    tables = torch.randperm(N)[: B * M].view(B, M)
    lengths = torch.tensor([M * b - 1, b + 1, 2 * b, 1, M * b][:B])
    return 2 * torch.randn(B, H, D), keys, values, tables, lengths


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "`keys[tables]` has shape (B, M, b, K, D): a table's blocks in order."
            " `.flatten(1, 2)` makes it (B, M·b, K, D)."
        ),
        (
            "For shared heads `repeat_interleave(H // K, dim=2)`. Scores by"
            " `torch.einsum('bhd,bshd->bhs', q, k) * D**-0.5`."
        ),
        (
            "Before the softmax: −∞ where `torch.arange(M * b) >= lengths[:, None]`,"
            " with a dimension put in for the heads."
        ),
    ),
)
def paged_attention(answer):
    """One query per sequence over keys and values that lie in blocks."""
    inputs = telling(attention_inputs, paged.paged_attention, wrong_attentions)
    what = "paged_attention(q, keys, values, tables, lengths)"
    got = expect(
        answer(*inputs), shape=(3, 4, 3), dtype=torch.float32, what=what, finite=False
    )
    if got.isnan().any():
        raise Mistake(f"{what} holds NaN: is a whole row of scores −∞?")
    diagnose(
        got,
        right=paged.paged_attention(*inputs),
        mistakes=wrong_attentions(*inputs),
        what=what,
    )
    for sizes in ((2, 3, 3, 5, 2, 4), (5, 6, 1, 2, 3, 2), (1, 2, 2, 4, 1, 5)):
        inputs = attention_inputs(*sizes)
        B, H, _, D = sizes[:4]
        try:
            got = answer(*inputs)
        except RuntimeError as error:
            raise Mistake(f"{sizes_wrong(sizes)} ({error})") from None
        expect(got, shape=(B, H, D), what=what)
        if not torch.allclose(got, paged.paged_attention(*inputs), atol=1e-5):
            raise Mistake(sizes_wrong(sizes))


def sizes_wrong(sizes: tuple[int, ...]) -> str:
    """Right on the first inputs, wrong on others."""
    named = ", ".join(f"{n}={x}" for n, x in zip("BHKDbM", sizes, strict=True))
    return (
        f"right for 4 heads that share 2, wrong for {named}: take every size from the"
        " arguments"
    )


def attending(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    heads: Callable = lambda x, G: x.repeat_interleave(G, 2),
    beyond: Callable = lambda at, lengths, b: at >= lengths[:, None],
    scale: Callable = lambda D, S: D**-0.5,
    order: Callable = lambda x: x.flatten(1, 2),
    fill: float = -torch.inf,
    axis: int = -1,
    after: bool = False,
    value_tables: Tensor | None = None,
) -> Tensor:
    """Paged attention, and what comes out with one thing changed."""
    G = q.shape[1] // keys.shape[2]
    k = heads(order(keys[tables]), G)
    v = heads(order(values[tables if value_tables is None else value_tables]), G)
    scores = torch.einsum("bhd,bshd->bhs", q, k) * scale(q.shape[2], k.shape[1])
    hidden = beyond(torch.arange(k.shape[1]), lengths, keys.shape[1])[:, None]
    if after:
        weights = scores.softmax(axis).masked_fill(hidden, 0)
    else:
        weights = scores.masked_fill(hidden, fill).softmax(axis)
    return torch.einsum("bhs,bshd->bhd", weights, v)


def block_by_block(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> Tensor:
    """The mean of what the blocks of a text give alone."""
    b = keys.shape[1]
    rows = []
    for i, n in enumerate(lengths.tolist()):
        parts = [
            attending(
                q[i : i + 1],
                keys,
                values,
                tables[i : i + 1, m : m + 1],
                torch.tensor([min(b, n - m * b)]),
            )
            for m in range(-(-n // b))
        ]
        rows.append(torch.cat(parts).mean(0))
    return torch.stack(rows)


def wrong_attentions(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Diagnosis → what this mistake gives."""
    inputs = (q, keys, values, tables, lengths)

    def with_(**changes) -> Callable[[], Tensor]:
        return lambda: attending(*inputs, **changes)

    def by_place(x: Tensor) -> Tensor:
        # (B, M, b, K, D) → (B, b, M, K, D) → (B, b·M, K, D)
        return x.transpose(1, 2).flatten(1, 2)

    in_order = torch.arange(tables.numel()).view(tables.shape)
    first = torch.arange(tables.shape[1]).expand_as(tables)
    return {
        "what stands beyond a text is not hidden: the last block is not full, and"
        " shorter tables are filled up": with_(
            beyond=lambda at, lengths, b: (at < 0).expand(len(lengths), -1)
        ),
        "one place too many is seen: token j is there if j < length": with_(
            beyond=lambda at, lengths, b: at > lengths[:, None]
        ),
        "the last token is not seen: token j is there if j < length": with_(
            beyond=lambda at, lengths, b: (at >= lengths[:, None] - 1) & (at > 0)
        ),
        "the whole last block is seen: hide its places from the length on": with_(
            beyond=lambda at, lengths, b: at >= (-(-lengths // b) * b)[:, None]
        ),
        "all sequences are cut at the length of the first": with_(
            beyond=lambda at, lengths, b: (at >= lengths[0])[None].expand(
                len(lengths), -1
            )
        ),
        "all sequences are cut at the shortest length": with_(
            beyond=lambda at, lengths, b: (at >= lengths.min())[None].expand(
                len(lengths), -1
            )
        ),
        "places beyond the text have the score 0, which still counts: −∞": with_(
            fill=0.0
        ),
        "the mask came after the softmax: its sum is no longer 1": with_(after=True),
        "the scale 1/√D is missing": with_(scale=lambda D, S: 1.0),
        "the scores are divided by D: by its root": with_(scale=lambda D, S: 1 / D),
        "the scores are multiplied by √D: divide": with_(scale=lambda D, S: D**0.5),
        "the wrong query heads share: heads 0 … G−1 go with key head 0. That is"
        " repeat_interleave, not repeat": with_(
            heads=lambda x, G: x.repeat(1, 1, G, 1)
        ),
        "all query heads read the first key head": with_(
            heads=lambda x, G: x[:, :, :1].expand(-1, -1, G * x.shape[2], -1)
        ),
        "the tables are not used: blocks were read in the order of the memory": (
            lambda: attending(q, keys, values, in_order, lengths)
        ),
        "the tables are not used: every text was read from block 0 on": (
            lambda: attending(q, keys, values, first, lengths)
        ),
        "each block has a softmax of its own: one runs over all tokens of a text": (
            lambda: block_by_block(*inputs)
        ),
        "the tables are used for the keys only: values lie in the same blocks": with_(
            value_tables=in_order
        ),
        "tokens are in the wrong order: first all of block 0, then of block 1": with_(
            order=by_place
        ),
        "the softmax runs over the heads: over the tokens": with_(axis=1, fill=-30.0),
        "the keys are averaged: the values are": lambda: attending(
            q, keys, keys, tables, lengths
        ),
    }
