"""The room `data_parallel`."""

from llmlab.checks.parallelism.data_parallel.exercises import check

__all__ = [
    "check",
]
