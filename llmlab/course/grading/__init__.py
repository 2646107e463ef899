"""The room `grading`."""

from llmlab.course.grading.grading import grade

__all__ = [
    "grade",
]
