"""The room `the_course_models`."""

from llmlab.checks.start.the_course_models.exercises import check

__all__ = [
    "check",
]
