"""The room `pipeline`."""

from llmlab.checks.parallelism.pipeline.exercises import check

__all__ = [
    "check",
]
