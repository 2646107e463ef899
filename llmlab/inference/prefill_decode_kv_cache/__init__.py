"""Prefill, decode and the KV cache: what a token costs, and what is kept to make it
cheap.

    cache    keys and values of a batch, preallocated, each row with its own length
    cost     FLOPs and bytes of a pass; the roofline; tokens per second, requests
    mla      multi-head latent attention: one small vector per token in the cache

Begin with `cost`: it says why a cache is kept, and why decoding is slow with it.
"""

from llmlab.inference.prefill_decode_kv_cache.cache import (
    BatchCache,
    append,
    generate,
    read,
    visible,
)
from llmlab.inference.prefill_decode_kv_cache.cost import (
    FILE,
    KINDS,
    MACHINES,
    Machine,
    Pass,
    cache_bytes,
    decode_time,
    max_batch,
    passes,
    weights_read,
)
from llmlab.inference.prefill_decode_kv_cache.mla import (
    LatentAttention,
    LatentConfig,
    absorbed,
    expanded,
)

__all__ = [
    "FILE",
    "KINDS",
    "MACHINES",
    "BatchCache",
    "LatentAttention",
    "LatentConfig",
    "Machine",
    "Pass",
    "absorbed",
    "append",
    "cache_bytes",
    "decode_time",
    "expanded",
    "generate",
    "max_batch",
    "passes",
    "read",
    "visible",
    "weights_read",
]
