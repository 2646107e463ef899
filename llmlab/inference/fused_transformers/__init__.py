"""Fused transformers: one Llama layer in a quarter of the launches.

pieces     what each fused kernel computes, as plain functions; start here
counting   the launches and bytes of any function, counted as it runs
kernels    the same functions as kernels, in C (`kernels.c`) where it compiles
layer      a model of fused layers, made from one that is not: `fuse`
padding    texts of unequal lengths as one list of tokens
memory     which results may share memory: lifetimes and a plan
cost       launches and bytes predicted from a shape, and how long they take
"""

from llmlab.inference.fused_transformers import cost, kernels, memory, padding
from llmlab.inference.fused_transformers.counting import Counter, Launch, count
from llmlab.inference.fused_transformers.layer import (
    FusedLayer,
    FusedLlama,
    StaticCache,
    fuse,
)
from llmlab.inference.fused_transformers.memory import (
    Lifetime,
    arena,
    lifetimes,
    lower_bound,
    optimum,
    plan_buffers,
)
from llmlab.inference.fused_transformers.padding import (
    remove_padding,
    restore_padding,
)
from llmlab.inference.fused_transformers.pieces import (
    add_rms_norm,
    pack_qkv,
    rope_and_store,
    split_qkv,
    swiglu,
)

FILE = cost.FILE

__all__ = [
    "FILE",
    "Counter",
    "FusedLayer",
    "FusedLlama",
    "Launch",
    "Lifetime",
    "StaticCache",
    "add_rms_norm",
    "arena",
    "cost",
    "count",
    "fuse",
    "kernels",
    "lifetimes",
    "lower_bound",
    "memory",
    "optimum",
    "pack_qkv",
    "padding",
    "plan_buffers",
    "remove_padding",
    "restore_padding",
    "rope_and_store",
    "split_qkv",
    "swiglu",
]
