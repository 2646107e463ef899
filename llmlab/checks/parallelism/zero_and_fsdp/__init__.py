"""The room `zero_and_fsdp`."""

from llmlab.checks.parallelism.zero_and_fsdp.exercises import check

__all__ = [
    "check",
]
