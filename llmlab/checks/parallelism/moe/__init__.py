"""What marks the exercises of 05-parallelism/09-moe.

    exercises   inputs, hints, and what is wrong with an answer
    dispatch    the same for the rows of the last exercise, rank by rank

Start with `exercises`.
"""

from llmlab.checks.parallelism.moe.exercises import check

__all__ = [
    "check",
]
