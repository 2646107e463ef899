"""The room `adalora`."""

from llmlab.peft.adalora.adalora import (
    AdaLoRAConfig,
    SVDLinear,
    apply,
    delta_weight,
    layers_of,
    orthogonality,
    ranks,
    regularizer,
    remove,
    triplets,
)
from llmlab.peft.adalora.budget import RankAllocator

__all__ = [
    "AdaLoRAConfig",
    "RankAllocator",
    "SVDLinear",
    "apply",
    "delta_weight",
    "layers_of",
    "orthogonality",
    "ranks",
    "regularizer",
    "remove",
    "triplets",
]
