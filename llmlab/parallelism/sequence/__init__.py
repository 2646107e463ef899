"""Sequence parallelism: one sequence on several ranks.

    megatron            activations cut between the products of tensor parallelism
    ring                ring attention, with attention in pieces
    ulysses             all-to-alls that exchange tokens for heads
    shards              which rank has which tokens, and a loss over all of them
    recomputation       a GPT layer that forgets its scores and computes them again
    activation_memory   what a layer keeps for backward, counted and as a formula
    cost                what each method sends

Start with `ring`.
"""

from llmlab.parallelism.sequence.activation_memory import (
    GPTShape,
    Saved,
    layer_bytes,
    recompute_flops,
)
from llmlab.parallelism.sequence.cost import AttentionShape, sent, smallest_block
from llmlab.parallelism.sequence.megatron import (
    LinearsOfShard,
    ScatterSequence,
    gather_state,
    pad_to_multiple,
    parallelize,
    sum_replicated_gradients,
)
from llmlab.parallelism.sequence.recomputation import GPTLayer
from llmlab.parallelism.sequence.ring import (
    RingAttention,
    RingAttentionFunction,
    attend,
    merge,
)
from llmlab.parallelism.sequence.shards import (
    LAYOUTS,
    join,
    schedule,
    shards,
    split_loss,
    sum_gradients,
    take,
)
from llmlab.parallelism.sequence.ulysses import UlyssesAttention

__all__ = [
    "LAYOUTS",
    "AttentionShape",
    "GPTLayer",
    "GPTShape",
    "LinearsOfShard",
    "RingAttention",
    "RingAttentionFunction",
    "Saved",
    "ScatterSequence",
    "UlyssesAttention",
    "attend",
    "gather_state",
    "join",
    "layer_bytes",
    "merge",
    "pad_to_multiple",
    "parallelize",
    "recompute_flops",
    "schedule",
    "sent",
    "shards",
    "smallest_block",
    "split_loss",
    "sum_gradients",
    "sum_replicated_gradients",
    "take",
]
