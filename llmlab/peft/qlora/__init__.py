"""QLoRA: LoRA on a base that is frozen in 4 bits.

    nf4      the 4-bit codebooks and double quantisation
    qlora    the 4-bit linear, the whole model, the memory plan
    paging   unified memory: what paged optimizers do

Start with `nf4`.
"""

from llmlab.peft.qlora.paging import UnifiedMemory
from llmlab.peft.qlora.qlora import (
    FrozenProduct,
    QLoRAConfig,
    apply,
    memory_plan,
    merge_and_unload,
    quantize,
    remove,
    save,
)

__all__ = [
    "FrozenProduct",
    "QLoRAConfig",
    "UnifiedMemory",
    "apply",
    "memory_plan",
    "merge_and_unload",
    "quantize",
    "remove",
    "save",
]
