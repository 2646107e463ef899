"""LLM-Pruner: whole heads and channels leave a model, and it is smaller and faster.

    importance   what a unit is worth: its size, or what the loss would grow by
    pruning      which units stay; the whole model
    folder       a pruned model on the disk, each layer of a width of its own

Which weights go together is found by `llmlab.compression.dependencies`. Start with
`importance`.
"""

from llmlab.compression.llm_pruner.folder import load, save
from llmlab.compression.llm_pruner.importance import (
    Slopes,
    axis_scores,
    group_importance,
    slopes,
    weight_scores,
)
from llmlab.compression.llm_pruner.pruning import (
    FILE,
    PrunerConfig,
    apply,
    importance,
    kept_count,
    kept_units,
    prunable,
)

__all__ = [
    "FILE",
    "PrunerConfig",
    "Slopes",
    "apply",
    "axis_scores",
    "group_importance",
    "importance",
    "kept_count",
    "kept_units",
    "load",
    "prunable",
    "save",
    "slopes",
    "weight_scores",
]
