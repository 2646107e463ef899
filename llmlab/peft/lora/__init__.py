"""The room `lora`."""

from llmlab.peft.lora.lora import (
    LoRAConfig,
    LoRALinear,
    adapters,
    apply,
    delta_weight,
    low_rank,
    merge,
    merge_and_unload,
    num_parameters,
    remove,
    set_adapter,
    unmerge,
)

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "adapters",
    "apply",
    "delta_weight",
    "low_rank",
    "merge",
    "merge_and_unload",
    "num_parameters",
    "remove",
    "set_adapter",
    "unmerge",
]
