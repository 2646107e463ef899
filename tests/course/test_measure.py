"""What a tired reader has before them: cells, lines of code and words of the main line.

The lessons that were brought to the measure keep to it; the list may only get longer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import nbformat
import pytest

from llmlab.course import header
from llmlab.course.syllabus import find
from tests.course.learner import ROOT

LESSONS = (
    "01-start/01-welcome",
    "04-peft/05-lora",
    "04-peft/07-qlora",
    "05-parallelism/06-sequence",
    "06-compression/01-quantization-basics",
    "06-compression/02-llm-int8",
    "06-compression/03-smoothquant",
    "06-compression/04-zeroquant",
    "06-compression/05-gptq",
    "06-compression/06-awq",
    "06-compression/07-llm-qat",
    "06-compression/08-peqa-and-qlora",
    "06-compression/09-magnitude-wanda-sparsegpt",
    "06-compression/10-llm-pruner",
    "06-compression/11-loraprune",
    "06-compression/12-distillation",
    "06-compression/13-distilling-abilities",
    "06-compression/14-low-rank",
    "06-compression/15-compression-compared",
    "07-inference/01-prefill-decode-kv-cache",
    "07-inference/02-flash-attention",
    "07-inference/03-paged-attention",
    "07-inference/04-continuous-batching",
    "07-inference/05-sampling-and-speculation",
    "07-inference/06-fused-transformers",
    "07-inference/07-model-server",
    "07-inference/08-engine",
    "08-compilers/01-overview",
    "08-compilers/02-front-end",
    "08-compilers/03-back-end",
    "08-compilers/04-tvm",
    "08-compilers/05-mlir",
    "08-compilers/06-triton",
    "08-compilers/07-tensorrt",
    "09-chips/01-chips-and-roofline",
    "09-chips/02-nvidia-gpu",
    "09-chips/03-tpu",
    "09-chips/04-ascend-and-other-accelerators",
    "09-chips/05-clusters-and-networks",
    "09-chips/06-precision-power-cost",
)
CELLS = 28  # at most
LINES = 150  # of code that is not folded, at most
WORDS = (1200, 1800)
NO_PROSE = (
    re.compile(r"<details>.*?</details>", re.DOTALL),
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"\$[^$]*\$"),
    re.compile(r"\]\([^)]*\)"),
)


@dataclass(frozen=True)
class Measure:
    """The main line of a lesson: what is neither folded nor for the curious."""

    cells: int
    lines: int
    words: int


def measure(nb: nbformat.NotebookNode) -> Measure:
    """A folded cell counts where it shows something, as a figure; the line on top not.

    Folded text and code, mathematics and the targets of links are no words.
    """
    cells = 0
    lines = 0
    words = 0
    for cell in nb.cells:
        if cell.id == header.ID:
            continue
        if cell.cell_type == "markdown":
            cells += 1
            text = cell.source
            for pattern in NO_PROSE:
                text = pattern.sub(" ", text)
            words += len(re.findall(r"[A-Za-z][A-Za-z'-]+", text))
            continue
        tags = cell.metadata.get("tags", [])
        if "hide-cell" in tags or ("hide-input" in tags and not cell.outputs):
            continue
        cells += 1
        if "hide-input" not in tags:
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    return Measure(cells, lines, words)


@pytest.mark.parametrize("slug", LESSONS)
def test_a_lesson_keeps_to_the_measure(slug):
    found = measure(nbformat.read(find(slug).notebook(ROOT), as_version=4))
    assert found.cells <= CELLS
    assert found.lines <= LINES
    assert WORDS[0] <= found.words <= WORDS[1]


def test_what_is_folded_does_not_count():
    def code(source: str, *tags: str, shows: bool = False):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
        if shows:
            cell.outputs = [nbformat.v4.new_output("stream", text="seen")]
        return cell

    text = nbformat.v4.new_markdown_cell
    nb = nbformat.v4.new_notebook(
        cells=[
            text("# Two words"),
            text("not counted", id=header.ID),
            code("import torch\nimport math", "hide-input"),
            code("draw()\nshow()", "hide-input", shows=True),
            code("x = 1\n\ny = 2", shows=True),
            code("answer()", "hide-cell", shows=True),
            text(
                "One [link](no/words/here) $x_{max}$\n<details>\nno\n\nno\n</details>"
            ),
        ]
    )
    assert measure(nb) == Measure(cells=4, lines=2, words=4)
