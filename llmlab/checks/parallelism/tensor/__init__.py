"""The room `tensor`."""

from llmlab.checks.parallelism.tensor.exercises import check

__all__ = [
    "check",
]
