"""What marks the exercises of 06-compression/01-quantization-basics.

    exercises   inputs, hints, and what is wrong with an answer
    answers     right results, and those that usual mistakes give

Start with `exercises`.
"""

from llmlab.checks.compression.quantization_basics.exercises import check

__all__ = [
    "check",
]
