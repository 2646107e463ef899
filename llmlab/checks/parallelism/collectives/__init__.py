"""What marks the exercises of 05-parallelism/01-collectives.

    exercises   one function per exercise
    moves       follows a learner's list of messages

Start with `exercises`.
"""

from llmlab.checks.parallelism.collectives.exercises import check

__all__ = [
    "check",
]
