"""What marks the exercises of 05-parallelism/06-sequence.

    exercises   one function per exercise
    ring        the mistakes of a ring attention

Start with `exercises`.
"""

from llmlab.checks.parallelism.sequence.exercises import check

__all__ = [
    "check",
]
