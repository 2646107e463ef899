"""What a lesson says of its answers: folded until asked for, and right when kept."""

import re
from importlib import import_module
from pathlib import Path

import jupytext
import pytest
import torch

from llmlab.course.syllabus import course_root

LESSONS = sorted((course_root() / "notebooks").glob("*/*.py"))
COMMENT = re.compile(r"^# ?", re.MULTILINE)


@pytest.mark.parametrize("script", LESSONS, ids=lambda p: p.stem)
def test_the_answer_to_a_guess_is_folded_and_drawn_later(script: Path):
    cells = jupytext.read(script, fmt="py:percent").cells
    settling = [c for c in cells if c.cell_type == "code" and ".settle(" in c.source]
    assert settling
    for cell in settling:
        assert {"hide-output", "hide-cell"} & set(cell.metadata.get("tags", []))
        assert not re.search(r"^figure\(", cell.source, re.MULTILINE)


@pytest.mark.parametrize(
    ("lesson", "checks", "name"),
    [
        ("04-peft/07-qlora", "peft.qlora", "quantize"),
        ("05-parallelism/06-sequence", "parallelism.sequence", "merge"),
        (
            "06-compression/01-quantization-basics",
            "compression.quantization_basics",
            "quantize_groups",
        ),
    ],
)
def test_the_function_to_keep_passes_its_own_check(lesson, checks, name):
    text = (course_root() / "notebooks" / f"{lesson}.py").read_text()
    kept = text.partition("# ## What to keep\n")[2]
    code = re.search(r"^# ```python\n(.*?)^# ```$", kept, re.MULTILINE | re.DOTALL)
    scope = {"torch": torch}
    exec(COMMENT.sub("", code[1]), scope)
    check = import_module(f"llmlab.checks.{checks}").check
    verdict = getattr(check, name).verdict(scope[name])
    assert verdict.outcome == "right", verdict.message
