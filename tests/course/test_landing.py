"""The page that `llmlab lab` opens."""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat

from llmlab.course import header, landing
from llmlab.course.syllabus import PARTS, built_lessons, find, lessons
from tests.course.learner import ROOT, course


def lesson_on_disk(root, slug, text="# It"):
    """A lesson with the line on top that `make sync` would write."""
    lesson = find(slug)
    path = lesson.notebook(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    header.put(nb, lesson, {"seconds": 3, "memory_gib": 1}, root)
    nbformat.write(nb, path)
    return lesson


def test_no_number_is_missing(tmp_path):
    root = course(tmp_path)
    lesson_on_disk(root, "01-welcome")
    text = landing.landing(root)
    headings = re.findall(r"^## (\d+)\. (.+)$", text, re.M)
    assert headings == [(str(i), t) for i, t in enumerate(PARTS.values(), 1)]
    assert "*Planned: 7 lessons.*" in text


def test_a_line_says_what_it_takes_and_what_comes_first(tmp_path):
    root = course(tmp_path)
    qlora = lesson_on_disk(root, "07-qlora", "word " * 1700)
    top = landing.top(qlora, root)
    assert (top.read, top.exercises) == ("10", "")
    assert [x.slug for x in top.needs] == [
        "04-peft/05-lora",
        "06-compression/01-quantization-basics",
    ]
    line = next(x for x in landing.landing(root).splitlines() if "[QLoRA]" in x)
    assert line.startswith("| 4.7 | [QLoRA](lessons/04-peft/07-qlora.lesson.ipynb)")
    assert '[4.5](lessons/04-peft/05-lora.lesson.ipynb "LoRA")' in line
    assert "44.8 GB" in line
    welcome = lesson_on_disk(root, "01-welcome")
    minutes = header.exercise_minutes(welcome.exercise(root))
    assert landing.top(welcome, root).minutes == f"5 + {minutes}"


def test_a_lesson_without_a_line_on_top(tmp_path):
    root = course(tmp_path)
    welcome = find("01-welcome")
    nbformat.write(nbformat.v4.new_notebook(), welcome.notebook(root))
    assert landing.top(welcome, root) == landing.Top()
    assert "| 1.1 | [Welcome]" in landing.landing(root)
    welcome.notebook(root).write_text("{")
    assert landing.top(welcome, root) == landing.Top()


def test_what_comes_next(tmp_path):
    root = course(tmp_path)
    lesson_on_disk(root, "01-welcome")
    link = "[1.1 Welcome](lessons/01-start/01-welcome.lesson.ipynb)"
    assert f"**Next: {link}**" in landing.landing(root)


def test_every_built_lesson_has_its_line():
    assert {x.slug for x in built_lessons(ROOT)} <= set(landing.all_lines())
    assert set(landing.all_lines()) <= {x.slug for x in lessons()}
    for text in landing.all_lines().values():
        assert text and len(text) <= 60 and "|" not in text


def test_the_page_loads_nothing_heavy():
    code = (
        "import sys; from llmlab.course import landing, syllabus;"
        "landing.landing(syllabus.course_root());"
        "print({'torch', 'nbformat', 'jupytext', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()", done.stderr
