"""AdaLoRA: low-rank changes in singular-value form, with a shared budget of ranks.

    adalora   the triplets: the equation, one layer, the whole model
    budget    which triplets keep their place, step by step
    files     save and load in `peft`'s format

Start with `adalora`.
"""

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
