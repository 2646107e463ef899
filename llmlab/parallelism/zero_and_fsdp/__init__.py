"""ZeRO and FSDP: optimizer state, gradients and weights cut over the ranks.

    zero      stages 0, 1 and 2
    fsdp      stage 3: weights are whole only while a block needs them
    units     what all stages share: a unit of parameters, AdamW on a rank's pieces
    layout    how a group of parameters is cut into equal pieces
    offload   the optimizer's state in host memory
    cost      bytes held and bytes sent, by stage

Start with `zero`.
"""

from llmlab.parallelism.zero_and_fsdp.cost import (
    TABLE_1,
    TABLE_2,
    agreement,
    largest_model,
    sent_bytes,
    state_bytes,
    total_bytes,
)
from llmlab.parallelism.zero_and_fsdp.fsdp import Fsdp, Shard
from llmlab.parallelism.zero_and_fsdp.layout import padding
from llmlab.parallelism.zero_and_fsdp.offload import Host, offload_seconds
from llmlab.parallelism.zero_and_fsdp.units import Adam, adamw_, held, units_of, update
from llmlab.parallelism.zero_and_fsdp.zero import Zero, summed_loss, train_step

__all__ = [
    "TABLE_1",
    "TABLE_2",
    "Adam",
    "Fsdp",
    "Host",
    "Shard",
    "Zero",
    "adamw_",
    "agreement",
    "held",
    "largest_model",
    "offload_seconds",
    "padding",
    "sent_bytes",
    "state_bytes",
    "summed_loss",
    "total_bytes",
    "train_step",
    "units_of",
    "update",
]
