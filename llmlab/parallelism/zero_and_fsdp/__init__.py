"""The room `zero_and_fsdp`."""

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
