"""PagedAttention: a key/value cache in blocks that any number of texts can share.

    blocks         block tables, reference counts, copy-on-write, prefixes by hash
    attention      one query per sequence, over blocks
    cache          the memory in blocks, and our Llama on top of it
    radix          the other way to find a prefix: a tree, token by token
    radix_manager  sequences on top of the tree, in the place of a `BlockManager`
    waste          where the memory goes, by four ways to hand it out

Start with `blocks`.
"""

from pathlib import Path

from llmlab.inference.paged_attention import waste
from llmlab.inference.paged_attention.attention import (
    as_tensor,
    check_shapes,
    paged_attention,
    paged_attention_by_blocks,
)
from llmlab.inference.paged_attention.blocks import (
    BlockManager,
    OutOfBlocks,
    Pool,
    allocate,
    append_slot,
    block_keys,
    blocks_for,
    can_allocate,
    check_pool,
    fork,
    free,
    new_pool,
    register,
    take,
    truncate,
)
from llmlab.inference.paged_attention.cache import (
    Batch,
    PagedCache,
    Run,
    decode,
    generate,
    prefill,
)
from llmlab.inference.paged_attention.radix import RadixTree
from llmlab.inference.paged_attention.radix_manager import RadixManager

# What scripts/paged_attention_sweep.py measured, a run a line.
FILE = Path(__file__).parent.parent / "data" / "paged_attention.csv"

__all__ = [
    "FILE",
    "Batch",
    "BlockManager",
    "OutOfBlocks",
    "PagedCache",
    "Pool",
    "RadixManager",
    "RadixTree",
    "Run",
    "allocate",
    "append_slot",
    "as_tensor",
    "block_keys",
    "blocks_for",
    "can_allocate",
    "check_pool",
    "check_shapes",
    "decode",
    "fork",
    "free",
    "generate",
    "new_pool",
    "paged_attention",
    "paged_attention_by_blocks",
    "prefill",
    "register",
    "take",
    "truncate",
    "waste",
]
