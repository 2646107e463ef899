"""The room `moe`."""

from llmlab.checks.parallelism.moe.exercises import check

__all__ = [
    "check",
]
