"""What marks the exercises of 01-start/02-the-course-models.

    exercises   inputs, hints, and what is wrong with an answer
    models      right results, and small models to try answers on

Start with `exercises`.
"""

from llmlab.checks.start.the_course_models.exercises import check

__all__ = [
    "check",
]
