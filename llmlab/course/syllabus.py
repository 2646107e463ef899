"""The course as data: its parts and lessons, and where the files of each lesson are.

One name per topic, everywhere: lesson `04-peft/05-lora` is
`notebooks/04-peft/05-lora.py`, `llmlab/checks/peft/lora.py`, `tests/peft/test_lora.py`.
Whoever knows one path knows all.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from llmlab.course.words import did_you_mean

DATA = Path(__file__).parent / "data"
NEAR = 0.7  # how alike two names must be, of 1, to be asked about

PARTS = {
    "01-start": "Start here",
    "02-models": "Models",
    "03-training": "Training",
    "04-peft": "Parameter-efficient fine-tuning",
    "05-parallelism": "Parallelism",
    "06-compression": "Compression",
    "07-inference": "Inference",
    "08-compilers": "Compilers",
    "09-chips": "Chips and clusters",
    "10-applications": "Applications",
}


def course_root(start: Path | None = None) -> Path:
    """The checkout that holds the lessons.

    It is the nearest folder above `start` with `notebooks/`, else the package's own.

    Raises:
        FileNotFoundError: the package was installed without the course's notebooks.
    """
    start = (start or Path.cwd()).resolve()
    for folder in [start, *start.parents, Path(__file__).resolve().parents[2]]:
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(
        "the course's folder (the one with notebooks/ and pyproject.toml) was not"
        " found: change into your copy of the course and try again"
    )


@dataclass(frozen=True)
class Lesson:
    """One lesson. `slug` is its name everywhere, as in '04-peft/05-lora'."""

    slug: str
    title: str
    teaches: str
    aha: str
    against: str

    @property
    def part(self) -> str:
        """'04-peft'."""
        return self.slug.split("/")[0]

    @property
    def topic(self) -> str:
        """'05-lora'."""
        return self.slug.split("/")[1]

    @property
    def short(self) -> str:
        """'05-lora', where that names one lesson only; else the slug."""
        same_topic = [x for x in lessons() if x.topic == self.topic]
        return self.topic if len(same_topic) == 1 else self.slug

    @property
    def package(self) -> str:
        """'peft': the folder under `llmlab/`, `llmlab/checks/` and `tests/`."""
        return self.part.split("-", 1)[1]

    @property
    def module(self) -> str:
        """'lora': the file's name under those folders."""
        return self.topic.split("-", 1)[1].replace("-", "_")

    def notebook(self, root: Path) -> Path:
        """The lesson with its outputs (`.with_suffix('.py')` is its source)."""
        return root / "notebooks" / f"{self.slug}.ipynb"

    def exercise(self, root: Path) -> Path:
        """The unsolved exercises, made from the solution."""
        return root / "exercises" / f"{self.slug}.ipynb"

    def solution(self, root: Path) -> Path:
        """The worked exercises (`.with_suffix('.py')` is their source)."""
        return root / "solutions" / f"{self.slug}.ipynb"

    def work(self, root: Path) -> Path:
        """The learner's own copy of the exercises."""
        return root / "work" / f"{self.slug}.ipynb"

    def lesson_copy(self, root: Path) -> Path:
        """The learner's own copy of the lesson.

        Its name differs from that of the exercises: a tab shows the name alone.
        """
        return root / "work" / "lessons" / f"{self.slug}.lesson.ipynb"

    def solution_copy(self, root: Path) -> Path:
        """The learner's own copy of the worked exercises, made when it is opened."""
        return root / "work" / "solutions" / f"{self.slug}.solution.ipynb"

    def is_built(self, root: Path) -> bool:
        """Whether the lesson exists yet, or is only planned."""
        return self.notebook(root).with_suffix(".py").is_file()


@cache
def lessons() -> tuple[Lesson, ...]:
    """All lessons of the course, in order, built or planned."""
    out = []
    with (DATA / "syllabus.csv").open(encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            slug = row.pop("lesson")
            out.append(Lesson(slug, **row))
    return tuple(out)


@cache
def notes(file: str) -> dict[str, str]:
    """lesson → what stands beside it in `data/<file>`, a table of two columns."""
    with (DATA / file).open(encoding="utf-8", newline="") as f:
        return dict(row for row in csv.reader(f) if row[0] != "lesson")


def built_lessons(root: Path | None = None) -> list[Lesson]:
    """The lessons that exist in this checkout."""
    root = root or course_root()
    return [lesson for lesson in lessons() if lesson.is_built(root)]


def find(name: str) -> Lesson:
    """The lesson called `name`.

    A name is '04-peft/05-lora', '05-lora', 'lora', 'LoRA', a path to one of the
    lesson's files, or whole words at the beginning of one name only ('quantization').

    Raises:
        ValueError: no lesson, or more than one, goes by that name; the message lists
            the near ones.
    """
    path = name.strip().lower().rstrip("/")
    for ending in (".ipynb", ".py", ".lesson", ".solution"):
        path = path.removesuffix(ending)
    steps = path.replace("\\", "/").split("/")[-2:]  # the part, if named, and the topic
    topic = steps[-1]
    found = [x for x in lessons() if x.slug == "/".join(steps)]
    if not found and steps[0] not in PARTS:  # '03-training/05-lora' is not 04-peft's
        for lesson in lessons():
            words = lesson.topic.split("-", 1)[1]
            if topic in (lesson.topic, lesson.module, words):
                found.append(lesson)
    if not found and len(steps) == 1:
        found = _beginning_with(topic)
        found = found if len(found) == 1 else []
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(x.slug for x in found)
        raise ValueError(f"more than one lesson is called {name!r}: {names}")
    asks = did_you_mean([x.short for x in near_lessons(topic)])
    raise ValueError(
        f"no lesson is called {name!r}. {asks}`llmlab progress --all` lists them"
    )


def _beginning_with(words: str) -> list[Lesson]:
    """The lessons that have a name whose first words these are."""
    start = words.replace(" ", "-") + "-"
    return [
        lesson
        for lesson in lessons()
        if any(f"{own}-".startswith(start) for own in _names(lesson))
    ]


def near_lessons(name: str, most: int = 3) -> list[Lesson]:
    """The lessons whose names or titles are near to `name`, the nearest first.

    'welcom' is near to 01-welcome, 'zero' to 03-zero-and-fsdp.
    """
    wanted = "-".join(re.findall(r"[a-z0-9()³]+", name.lower()))
    if not wanted:
        return []
    rated = []
    for place, lesson in enumerate(lessons()):
        best = max(_likeness(wanted, own) for own in _names(lesson))
        if best >= NEAR:
            rated.append((-best, place, lesson))
    return [lesson for _, _, lesson in sorted(rated)[:most]]


def _names(lesson: Lesson) -> list[str]:
    """What a lesson may be called, in lower case."""
    words = lesson.topic.split("-", 1)[1]
    return [lesson.topic, words, lesson.slug, lesson.title.lower().replace(" ", "-")]


def _likeness(wanted: str, own: str) -> float:
    """From 0 to 1; a word of the name, or the beginning of one, counts as near."""
    ratio = SequenceMatcher(None, wanted, own).ratio()
    if f"-{wanted}" in f"-{own}" and len(wanted) > 2:
        return max(ratio, 0.9)
    return ratio
