"""How an exercise is marked: the object `check` of a lesson.

    check = Checks("04-peft/05-lora")

    @check.exercise(points=2, minutes=10, difficulty=2, importance=4, hints=("…", "…"))
    def lora_forward(answer):
        \"\"\"One line: what the exercise asks.\"\"\"
        x = torch.randn(2, 5, 8)  # torch, NumPy and random are seeded: do not seed here
        got = expect(
            answer(x), shape=(2, 5, 7), dtype=torch.float32, what="lora_forward(x)"
        )
        diagnose(
            got,
            right=…,
            mistakes={"you scaled by r, not by alpha / r": …},
            what="lora_forward(x)",
        )

In a notebook `check.lora_forward(lora_forward)` prints the verdict, and fails the cell
when it is not "right". A check draws its inputs from the global generators, which the
runner seeds: with seed 0 for the learner, with others where hidden tests run the same
check again. `answer` is the learner's function, guarded: what it is given is compared
before and after, so that it cannot change the check's inputs unseen. A check ends
normally (right) or raises `Mistake`. `grads={"x": 0, "A": 2}` in the decorator says
that the result is trained through: a right value must carry its gradient there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmlab.course.grading.closeness import close
from llmlab.course.grading.diagnosis import Mistake, diagnose, expect
from llmlab.course.grading.guard import (
    guarded,
    learners_error,
    lost_gradient,
    unwritten,
)
from llmlab.course.grading.repairs import repaired
from llmlab.course.grading.resemblance import without_guess
from llmlab.course.grading.slips import named
from llmlab.course.grading.state import neutral

__all__ = [
    "Checks",
    "Exercise",
    "Failed",
    "Mistake",
    "Verdict",
    "close",
    "diagnose",
    "expect",
]


@dataclass(frozen=True)
class Verdict:
    """What a check says about an answer."""

    exercise: str
    # "right", "wrong" (a mistake was named), "error" (the answer raised), "not done"
    # (the stub)
    outcome: str
    points: int
    out_of: int
    message: str = ""
    detail: str = ""  # where in the learner's code the error arose

    def __str__(self) -> str:
        if self.outcome == "right":
            return f"✓ {self.exercise}: right ({count(self.points, 'point')})"
        head = {
            "wrong": "not right yet",
            "error": "your code raised an error",
            "not done": "not done yet",
        }[self.outcome]
        lines = [f"✗ {self.exercise}: {head}"]
        if self.message:
            lines.append(indent(self.message))
        if self.detail:
            lines.append(indent(self.detail))
        return "\n".join(lines)


class Failed(AssertionError):
    """An answer was not right; the text is the verdict.

    Notebooks show it without a traceback.
    """

    def __init__(self, verdict: Verdict, hint: str = "") -> None:
        text = str(verdict)
        if hint:
            text += f"\n{hint}"
        super().__init__(text)
        self.verdict = verdict

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return str(self).split("\n")


@dataclass
class Exercise:
    """One exercise: what it is worth, its hints and the function that marks it.

    Calling it marks an answer.
    """

    name: str
    run: Callable[..., None]
    points: int
    minutes: int
    difficulty: int
    importance: int
    hints: tuple[str, ...] = ()
    in_place: bool = False
    grads: Mapping[str, int] = field(default_factory=dict)
    lesson: str = ""
    shown: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        for name in ("points", "minutes"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(
                    f"{name} of {self.name} must be at least 1, not {value!r}"
                )
        for name in ("difficulty", "importance"):
            value = getattr(self, name)
            if value not in range(1, 6):
                raise ValueError(f"{name} of {self.name} must be 1 to 5, not {value!r}")
        if not 1 <= len(self.hints) <= 3 or isinstance(self.hints, str):
            raise ValueError(
                f"hints of {self.name} must be a tuple of 1 to 3 texts,"
                f" not {self.hints!r}"
            )
        if not (self.run.__doc__ or "").strip():
            raise ValueError(
                f"the check {self.name} needs a docstring:"
                " one line that says what is asked"
            )

    @property
    def asks(self) -> str:
        """What the exercise asks, in one sentence: its docstring's first paragraph."""
        return " ".join(self.run.__doc__.strip().split("\n\n")[0].split())

    @property
    def header(self) -> str:
        """The line of dots, minutes and points below the title of an exercise.

        As in '●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points'.
        """
        return " · ".join(
            [
                f"{dots(self.difficulty)} difficulty",
                f"{dots(self.importance)} importance",
                count(self.minutes, "minute"),
                count(self.points, "point"),
            ]
        )

    def verdict(self, *answers: Any, seed: int = 0) -> Verdict:
        """Marks `answers`, the learner's functions as the check cell passes them.

        It never raises.
        """
        try:
            with neutral(seed):
                self._mark(answers)
        except Mistake as mistake:
            return self._fails("wrong", self._explained(mistake, answers, seed))
        except (Exception, SystemExit) as error:
            stub = unwritten(error, answers)
            if stub is not None:
                return self._fails("not done", stub)
            return self._fails("error", *learners_error(error))
        return Verdict(self.name, "right", self.points, self.points)

    def _mark(self, answers: tuple[Any, ...]) -> None:
        """Runs the check, then looks at the gradient of what it found right."""
        watch = not self.in_place
        watched = [guarded(a, self.name, watch, self.grads) for a in answers]
        self.run(*watched)
        for answer in watched:
            problem = lost_gradient(answer)
            if problem:
                raise Mistake(problem)

    def _explained(self, mistake: Mistake, answers: tuple[Any, ...], seed: int) -> str:
        """The mistake in words, with the slip that leads to it where one is found."""
        text = str(mistake)
        if mistake.foreseen and not text.startswith("right for "):
            return text
        if len(answers) != 1 or self.in_place:
            return self._located(text, answers, seed)
        try:
            with neutral(seed):
                slip = named(self.lesson, self.name, self.run, answers[0])
        except (Exception, SystemExit):  # one that cannot be read tells nothing
            return text
        if slip is None:
            return self._located(text, answers, seed)
        if text.startswith("right for "):
            text = text.split(": ")[0]  # without its guess at the cause
        return f"{without_guess(text)}\nThis is what comes out when {slip}"

    def _located(self, text: str, answers: tuple[Any, ...], seed: int) -> str:
        """The mistake with the place in the learner's code, where one is found.

        Where only some cases are wrong, many changes mend those by chance.
        """
        if text.startswith("right for "):
            return text.replace(": ", ". One possible reason: ", 1)
        try:
            places = repaired(
                self.lesson,
                self.name,
                lambda answer: self._mark((answer, *answers[1:])),
                answers[0],
                seed,
            )
        except (Exception, SystemExit):
            return text
        if not places:
            return text
        where = "\nand at ".join(map(str, places))
        return f"{without_guess(text)}\nIt comes out right with a change at {where}"

    def _fails(self, outcome: str, message: str, detail: str = "") -> Verdict:
        return Verdict(self.name, outcome, 0, self.points, message, detail)

    def __call__(self, *answers: Any, seed: int = 0) -> None:
        """Marks `answers` and prints the verdict.

        Raises:
            Failed: it is not right; the text says why.
        """
        verdict = self.verdict(*answers, seed=seed)
        if verdict.outcome != "right":
            hint = f'  stuck? check.hint("{self.name}") shows a hint'
            raise Failed(verdict, hint) from None
        print(verdict)

    def hint(self, tier: int) -> str:
        """Hint number `tier` (from 1), with what comes next."""
        n = len(self.hints)
        last = "" if tier < n else ", the last"
        return f"{self.hints[tier - 1]}\n(hint {tier} of {n}{last})"


class Checks:
    """The exercises of one lesson.

    `check.<name>(answer)` marks an answer; `check.hint("<name>")` helps.
    """

    def __init__(self, slug: str) -> None:
        self.slug = slug
        self.exercises: dict[str, Exercise] = {}

    def exercise(
        self,
        *,
        points: int,
        minutes: int,
        difficulty: int,
        importance: int,
        hints: tuple[str, ...],
        in_place: bool = False,
        grads: Mapping[str, int] | None = None,
    ) -> Callable[[Callable[..., None]], Exercise]:
        """Makes the decorated function the check of the exercise of that name.

        Args:
            points: earned when right.
            minutes: that a learner needs.
            difficulty: 1 to 5.
            importance: 1 to 5.
            hints: 1 to 3 texts, each telling more than the one before.
            in_place: whether answers are meant to change what they are given.
            grads: name → position of the arguments that are trained through the
                result: a right value whose gradient does not reach them is a mistake.
        """

        def register(run: Callable[..., None]) -> Exercise:
            name = run.__name__
            if name in self.exercises or hasattr(type(self), name):
                raise ValueError(f"the exercise name {name!r} is taken in {self.slug}")
            self.exercises[name] = Exercise(
                name,
                run,
                points,
                minutes,
                difficulty,
                importance,
                hints,
                in_place,
                grads or {},
                self.slug,
            )
            return self.exercises[name]

        return register

    def __getattr__(self, name: str) -> Exercise:
        exercises = self.__dict__.get("exercises", {})
        if name in exercises:
            return exercises[name]
        known = ", ".join(exercises) or "none"
        raise AttributeError(f"no exercise is called {name!r}: this lesson has {known}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.exercises]

    def __repr__(self) -> str:
        lines = [f"{self.slug}: {count(self.out_of, 'point')}"]
        for e in self.exercises.values():
            lines.append(f"  {e.name:<28} {count(e.points, 'point'):>9}  {e.asks}")
        return "\n".join(lines)

    @property
    def out_of(self) -> int:
        """All points of the lesson."""
        return sum(e.points for e in self.exercises.values())

    def hint(self, name: str) -> None:
        """Prints the next hint for exercise `name`; after the last, the last again."""
        exercise = self.__getattr__(name)
        exercise.shown = min(exercise.shown + 1, len(exercise.hints))
        print(exercise.hint(exercise.shown))


def dots(n: int) -> str:
    """`n` of 5 as dots: '●●○○○'."""
    return "●" * n + "○" * (5 - n)


def count(n: int, noun: str) -> str:
    """'1 point', '2 points'."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def indent(text: str) -> str:
    """Each line moved in by two."""
    return "\n".join(f"  {line}" for line in text.splitlines())
