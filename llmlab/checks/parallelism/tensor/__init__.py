"""What marks the exercises of 05-parallelism/05-tensor.

    exercises   one function per exercise
    mlp         the mistakes of a split MLP

Start with `exercises`.
"""

from llmlab.checks.parallelism.tensor.exercises import check

__all__ = [
    "check",
]
