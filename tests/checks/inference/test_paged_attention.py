"""Wrong answers to 07-inference/03-paged-attention, each with its diagnosis."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmlab.checks.inference import paged_attention as checks
from llmlab.checks.inference.paged_attention import check
from llmlab.inference import paged_attention as paged
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "07-inference/03-paged-attention"

# Right, written otherwise ------------------------------------------------------------


def free_by_comprehension(pool, table):
    for block in table:
        pool.counts[block] -= 1
    again = [block for block in table[::-1] if not pool.counts[block]]
    pool.available += again
    return tuple(again)


def free_with_a_new_queue(pool, table):
    left = list(table)
    again = []
    while left:
        block = left.pop()
        pool.counts[block] = max(0, pool.counts[block] - 1)
        again += [block] * (pool.counts[block] == 0)
    pool.available = [*pool.available, *again]
    return again


def slot_by_blocks(pool, table, length):
    if len(table) * pool.block_size == length:
        table += [take_by_hand(pool)]
    elif pool.counts[table[-1]] > 1:
        own = take_by_hand(pool)
        old, table[-1] = table[-1], own
        pool.counts[old] = pool.counts[old] - 1
        return [old, own]


def take_by_hand(pool):
    if not pool.available:
        raise paged.OutOfBlocks("none")
    block, *pool.available = pool.available
    if block in pool.keys:
        pool.cached.pop(pool.keys.pop(block))
    pool.counts[block] += 1
    return block


def slot_with_match(pool, table, length):
    room = -length % pool.block_size
    match (room > 0, room > 0 and pool.counts[table[-1]] > 1):
        case (False, _):
            table.append(paged.take(pool))
        case (True, True):
            table.append(paged.take(pool))
            old = table.pop(-2)
            pool.counts[old] -= 1
            return old, table[-1]
    return None


def allocate_by_while(pool, tokens):
    b, keys, table = pool.block_size, paged.block_keys(tokens, pool.block_size), []
    while (
        (len(table) + 1) * b < len(tokens)
        and len(table) < len(keys)
        and keys[len(table)] in pool.cached
    ):
        table.append(pool.cached[keys[len(table)]])
    pool.available = [block for block in pool.available if block not in table]
    for block in table:
        pool.counts[block] += 1
    new = -(-len(tokens) // b) - len(table)
    return table + [take_by_hand(pool) for _ in range(new)], b * len(table)


def allocate_prefixes_anew(pool, tokens):
    b = pool.block_size
    table = []
    for stop in range(b, len(tokens), b):
        block = pool.cached.get(paged.block_keys(tokens[:stop], b)[-1])
        if block is None:
            break
        if block in pool.available:
            pool.available.remove(block)
        pool.counts[block] += 1
        table.append(block)
    found = b * len(table)
    for _ in range(found, len(tokens), b):
        table.append(paged.take(pool))
    return table, found


def attention_by_sequence(q, keys, values, tables, lengths):
    rows = []
    for each, table, n in zip(q, tables, lengths.tolist(), strict=True):
        k, v = (x[table].flatten(0, 1)[:n].transpose(0, 1) for x in (keys, values))
        out = F.scaled_dot_product_attention(
            each[None, :, None], k[None], v[None], enable_gqa=True
        )
        rows.append(out[0, :, 0])
    return torch.stack(rows)


RIGHT = {
    "free": (free_by_comprehension, free_with_a_new_queue),
    "append_slot": (slot_by_blocks, slot_with_match),
    "allocate": (allocate_by_while, allocate_prefixes_anew),
    "paged_attention": (attention_by_sequence, paged.paged_attention_by_blocks),
}


test_right_answers_written_otherwise = accepts(check, RIGHT, seeds=range(4))


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "free": ByCases(checks.run_free, paged.free, checks.wrong_frees, checks.free_cases),
    "append_slot": ByCases(
        checks.run_slot,
        paged.append_slot,
        checks.wrong_slots,
        checks.slot_cases,
    ),
    "allocate": ByCases(
        checks.run_allocate,
        paged.allocate,
        checks.wrong_allocates,
        checks.allocate_cases,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def free_nothing_returned(pool, table):
    paged.free(pool, table)


def free_floats(pool, table):
    return [float(block) for block in paged.free(pool, table)]


def free_clears(pool, table):
    again = paged.free(pool, table)
    table.clear()
    return again


def free_two_less(pool, table):
    return checks.freeing(less=2, when=lambda count: count <= 0)(pool, table)


def slot_counts_first(pool, table, length):
    if length % pool.block_size == 0:
        table.append(paged.take(pool))
        return None
    last = table[-1]
    if pool.counts[last] == 1:
        return None
    pool.counts[last] -= 1
    table[-1] = paged.take(pool)
    return last, table[-1]


def slot_swallows(pool, table, length):
    try:
        return paged.append_slot(pool, table, length)
    except paged.OutOfBlocks:
        return None


def slot_returns_block(pool, table, length):
    paged.append_slot(pool, table, length)
    return table[-1]


def allocate_table_only(pool, tokens):
    return paged.allocate(pool, tokens)[0]


def allocate_registers(pool, tokens):
    table, found = paged.allocate(pool, tokens)
    paged.register(pool, table, tokens)
    return table, found


def attention(**changes):
    def answer(q, keys, values, tables, lengths):
        return checks.attending(q, keys, values, tables, lengths, **changes)

    return answer


def attention_from_block_0(q, keys, values, tables, lengths):
    tables = torch.arange(tables.shape[1]).expand_as(tables)
    return checks.attending(q, keys, values, tables, lengths)


def attention_for_two_each(q, keys, values, tables, lengths):
    return checks.attending(
        q, keys, values, tables, lengths, heads=lambda x, G: x.repeat_interleave(2, 2)
    )


def attention_in_place(q, keys, values, tables, lengths):
    q.mul_(q.shape[-1] ** -0.5)
    return checks.attending(q, keys, values, tables, lengths, scale=lambda D, S: 1.0)


P = "paged_attention"
test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("free", free_nothing_returned, "returned None"),
        Wrong("free", free_floats, "whole numbers are asked"),
        Wrong("free", free_clears, "the table itself was changed"),
        Wrong("free", free_two_less, "counts"),
        Wrong("append_slot", slot_counts_first, "take first"),
        Wrong("append_slot", slot_swallows, "no OutOfBlocks came"),
        Wrong("append_slot", slot_returns_block, "list or tuple"),
        Wrong("allocate", allocate_table_only, "two things"),
        Wrong("allocate", allocate_registers, "the new blocks were given keys"),
        Wrong(
            P,
            attention(beyond=lambda at, n, b: (at < 0).expand(len(n), -1)),
            "is not hidden",
        ),
        Wrong(P, attention(beyond=lambda at, n, b: at > n[:, None]), "one place too"),
        Wrong(
            P,
            attention(beyond=lambda at, n, b: (at >= n[:, None] - 1) & (at > 0)),
            "the last token is not seen",
        ),
        Wrong(
            P,
            attention(beyond=lambda at, n, b: at >= (-(-n // b) * b)[:, None]),
            "the whole last block",
        ),
        Wrong(P, attention(fill=0.0), "have the score 0"),
        Wrong(P, attention(after=True), "after the softmax"),
        Wrong(P, attention(scale=lambda D, S: 1.0), "1/√D is missing"),
        Wrong(P, attention(scale=lambda D, S: 1 / D), "by its root"),
        Wrong(P, attention(heads=lambda x, G: x.repeat(1, 1, G, 1)), "not repeat"),
        Wrong(
            P,
            attention(order=lambda x: x.transpose(1, 2).flatten(1, 2)),
            "in the wrong order",
        ),
        Wrong(P, attention(axis=1, fill=-30.0), "over the heads"),
        Wrong(P, attention_from_block_0, "from block 0 on"),
        Wrong(P, checks.block_by_block, "a softmax of its own"),
        Wrong(P, attention_for_two_each, "B=2, H=3"),
        Wrong(P, attention_in_place, "in place"),
    ],
)
