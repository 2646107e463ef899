"""The room `qlora`."""

from llmlab.peft.qlora.paging import UnifiedMemory
from llmlab.peft.qlora.qlora import (
    QLoRAConfig,
    apply,
    memory_plan,
    quantize,
    remove,
    save,
)

__all__ = [
    "QLoRAConfig",
    "UnifiedMemory",
    "apply",
    "memory_plan",
    "quantize",
    "remove",
    "save",
]
