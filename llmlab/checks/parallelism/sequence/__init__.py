"""The room `sequence`."""

from llmlab.checks.parallelism.sequence.exercises import check

__all__ = [
    "check",
]
