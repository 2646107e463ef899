"""The room `collectives`."""

from llmlab.checks.parallelism.collectives.exercises import check

__all__ = [
    "check",
]
