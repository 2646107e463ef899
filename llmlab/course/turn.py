"""`your_turn(check.name, answer)`: an exercise inside a lesson.

The lesson goes on whatever the answer is. The marks are for the exercise notebook.
"""

from __future__ import annotations

from typing import Any

from llmlab.course.grading.checking import Exercise


def your_turn(exercise: Exercise, *answers: Any) -> None:
    """Prints what the check says about an answer, and never raises.

    Args:
        exercise: one of the lesson's checks, as in `check.merge`.
        answers: the reader's function, or functions.
    Raises:
        ValueError: `exercise` is no exercise.
    """
    if not isinstance(exercise, Exercise):
        raise ValueError(
            f"exercise={exercise!r} must be one of the lesson's checks, as in"
            " check.merge"
        )
    verdict = exercise.verdict(*answers)
    if verdict.outcome == "right":
        print(f"✓ {exercise.name}: right. The exercises ask for it again, for points.")
        return
    print(verdict)
    print(f'  stuck? check.hint("{exercise.name}") shows a hint')
