"""The room `sequence`."""

from llmlab.parallelism.sequence.activation_memory import (
    GPTShape,
    Saved,
    layer_bytes,
    recompute_flops,
)
from llmlab.parallelism.sequence.cost import AttentionShape, sent, smallest_block
from llmlab.parallelism.sequence.megatron import (
    gather_state,
    pad_to_multiple,
    parallelize,
    sum_replicated_gradients,
)
from llmlab.parallelism.sequence.recomputation import GPTLayer
from llmlab.parallelism.sequence.ring import RingAttention
from llmlab.parallelism.sequence.shards import (
    LAYOUTS,
    join,
    schedule,
    shards,
    split_loss,
    sum_gradients,
    take,
)
from llmlab.parallelism.sequence.softmax_merge import attend, merge
from llmlab.parallelism.sequence.ulysses import UlyssesAttention

__all__ = [
    "LAYOUTS",
    "AttentionShape",
    "GPTLayer",
    "GPTShape",
    "RingAttention",
    "Saved",
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
