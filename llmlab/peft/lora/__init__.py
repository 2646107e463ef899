"""LoRA: a low-rank change of frozen weights.

    lora    the method: the equation, one layer, the whole model; DoRA
    starts  where A and B start: Kaiming, PiSSA, OLoRA
    copies  what trains besides: biases, whole modules
    files   save and load in `peft`'s format, combine adapters, serve one per row

Start with `lora`.
"""

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
