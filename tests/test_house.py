"""The rules of the house that a machine can hold us to."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from llmlab.course.book import rooms

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmlab"
PARTS = (
    "training",
    "peft",
    "parallelism",
    "compression",
    "inference",
    "compilers",
    "chips",
    "applications",
)
SOURCES = sorted(PACKAGE.rglob("*.py"))
PART_SOURCES = [
    p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in (*PARTS, "models")
]
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
).stdout.splitlines()


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, read once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path", PART_SOURCES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_arrows_point_down(path):
    """A part imports itself and models; models import nothing above them.

    No part imports the course, the checks or another part.
    """
    own = path.relative_to(PACKAGE).parts[0]
    allowed = {"models", own} if own != "models" else {"models"}
    parts = {name.split(".")[1] for name in rooms.imported(path) if "." in name}
    assert parts <= allowed, f"{path.relative_to(ROOT)} imports {parts - allowed}"


# Who may import whom among the rooms of a part. A room that is not named imports none.
ARROWS = {
    "models": {
        "accounting": "llama",
        "checkpoint": "llama",
        "course_model": "checkpoint llama",
        "fetching": "gguf_import",
        "generation": "cache llama",
        "gguf_import": "checkpoint llama",
        "llama": "attention cache",
        "presets": "llama",
        "real_model": "checkpoint fetching llama",
    },
    "peft": {
        "adalora": "checkpoint walk",
        "adapters": "checkpoint walk",
        "best_practice": "adalora label_head p_tuning walk",
        "bitfit": "checkpoint vectors walk",
        "checkpoint": "walk",
        "examples": (
            "adapters bitfit ia3 lora mam_and_unipelt p_tuning "
            "prompt_and_prefix_tuning walk"
        ),
        "ia3": "checkpoint vectors walk",
        "label_head": "walk",
        "lora": "checkpoint walk",
        "mam_and_unipelt": "adapters checkpoint lora prompt_and_prefix_tuning walk",
        "p_tuning": "label_head prompt_and_prefix_tuning",
        "prompt_and_prefix_tuning": "checkpoint label_head walk",
        "published": "lora qlora",
        "qlora": "lora walk",
        "vectors": "walk",
    },
    "parallelism": {
        "auto_parallel": "runtime",
        "choosing": "runtime",
        "collectives": "runtime",
        "data_parallel": "runtime",
        "examples": (
            "data_parallel frameworks hybrid pipeline runtime sequence tensor "
            "zero_and_fsdp"
        ),
        "frameworks": "pipeline runtime",
        "hybrid": "pipeline runtime tensor",
        "moe": "runtime tensor",
        "pipeline": "runtime",
        "published": "choosing runtime",
        "sequence": "runtime tensor",
        "tensor": "runtime",
        "zero_and_fsdp": "runtime",
    },
    "compression": {
        "awq": "calibration folding quantization_basics walk",
        "compression_compared": "kernels quantization_basics recipes walk",
        "dependencies": "calibration walk",
        "distilling_abilities": "distillation",
        "formats": "quantization_basics walk",
        "gptq": "calibration hessian quantization_basics walk",
        "hessian": "calibration",
        "kernels": "quantization_basics recipes",
        "llm_int8": "integer_matmul walk",
        "llm_pruner": "calibration dependencies walk",
        "llm_qat": "quantization_basics walk",
        "loraprune": "calibration dependencies walk",
        "low_rank": "calibration quantization_basics walk",
        "magnitude_wanda_sparsegpt": "calibration hessian quantization_basics walk",
        "peqa_and_qlora": "quantization_basics walk",
        "recipes": (
            "awq gptq llm_int8 low_rank magnitude_wanda_sparsegpt peqa_and_qlora "
            "quantization_basics smoothquant walk zeroquant"
        ),
        "smoothquant": "calibration folding integer_matmul walk",
        "zeroquant": "calibration integer_matmul quantization_basics walk",
    },
    "inference": {
        "continuous_batching": "paged_attention",
        "engine": (
            "continuous_batching fused_transformers paged_attention "
            "sampling_and_speculation"
        ),
        "serving": "engine",
    },
    "compilers": {
        "back_end": "front_end json_lines llvm program",
        "mlir": "front_end llvm",
        "overview": "llvm program",
        "tensorrt": "front_end",
        "tvm": "json_lines",
    },
    "chips": {
        "clusters_and_networks": "checked",
        "precision_power_cost": "checked",
        "tpu": "checked",
    },
    "course": {
        "book": "cpu syllabus",
        "cli": (
            "book doctor exercises families files fits grading kernels lab "
            "model_shapes new peers progress release served standing syllabus words "
            "workspace"
        ),
        "copy_links": "syllabus",
        "doctor": "cpu four_bits syllabus",
        "exercises": "files grading syllabus",
        "fits": "kernels model_shapes",
        "grading": "families grammar progress syllabus words",
        "header": "syllabus",
        "lab": "kernels landing syllabus workspace",
        "lab_contents": "syllabus workspace",
        "landing": "grading header progress standing syllabus workspace",
        "model_shapes": "words",
        "mine": "grading standing syllabus words",
        "new": "files syllabus",
        "peers": "files words",
        "numbers": "printed",
        "progress": "files",
        "release": "exercises files grading syllabus",
        "predicting": "inline",
        "sliders": "figures inline traces",
        "served": "mine standing syllabus",
        "standing": "grading progress syllabus",
        "steppers": "inline words",
        "syllabus": "words",
        "sync": "book header kernels syllabus",
        "traces": "figures",
        "turn": "grading",
        "workspace": "book copy_links files grading syllabus",
    },
}


@pytest.mark.parametrize("part", ARROWS)
def test_rooms_import_only_whom_they_may(part):
    found = {room: used for room, used in rooms.arrows(part).items() if used}
    allowed = {room: set(used.split()) for room, used in ARROWS[part].items()}
    assert found == allowed, "change ARROWS only if the new arrow should be there"


@pytest.mark.parametrize("part", ARROWS)
def test_rooms_stand_on_floors(part):
    """No circle, so that each part reads from the ground up; few floors."""
    assert len(rooms.floors(part)) <= 7


def test_the_floors_of_a_part_show_a_circle(monkeypatch):
    circle = {"a": {"b"}, "b": {"a"}, "c": set()}
    monkeypatch.setattr(rooms, "arrows", lambda part: circle)
    with pytest.raises(ValueError, match="import each other: \\['a', 'b'\\]"):
        rooms.floors("any")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_is_entered_by_its_front(path):
    """From another room come public names; of a method only what its front shows."""
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        words = node.module.split(".")
        if words[0] != "llmlab":
            continue
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        private = [a.name for a in node.names if re.match(r"_[a-z]", a.name)]
        assert not private, f"{where} imports {private} of {node.module}"
        inside = len(words) > 3 and words[1] in PARTS and own[:2] != tuple(words[1:3])
        assert not inside, f"{where}: import from {'.'.join(words[:3])} instead"


def test_functions_are_short():
    """At most 60 lines of code; sentences for the learner are not code."""
    lengths = {}
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                name = f"{path.relative_to(ROOT)}:{node.name}"
                lengths[name] = code_lines(node, lines)
    long = {name: n for name, n in lengths.items() if n > 60}
    assert not long
    assert statistics.median(lengths.values()) <= 12


def code_lines(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of a function without its docstring, and without lines of text alone."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    if not body:
        return 0
    head = lines[function.lineno - 1 : function.body[0].lineno - 1]
    rest = lines[body[0].lineno - 1 : function.end_lineno]
    only_text = re.compile(r'\s*(f?".*"|[()\[\]{}])?[,:)\]}]*\s*')
    return sum(not only_text.fullmatch(line) for line in head + rest)


@pytest.mark.parametrize(
    "path", PART_SOURCES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_methods_do_not_print_or_read_the_environment(path):
    if "examples" in path.parts:
        pytest.skip("a script prints")
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", (
                f"{path.relative_to(ROOT)}:{node.lineno} prints"
            )


def test_import_is_fast():
    """`import llmlab` takes under 0.3 s and pulls in no heavy library (best of three:
    the machine may be busy).
    """
    code = (
        "import sys, llmlab; print(sorted({'torch', 'transformers', 'matplotlib',"
        " 'IPython'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        heavy = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        seconds.append(time.perf_counter() - started)
        assert heavy == "[]"
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert min(seconds) - (time.perf_counter() - bare) < 0.3


def test_no_file_is_unfinished():
    """`llmlab new` leaves TODO where an author is wanted; none may be left."""
    marker = "TO" + "DO"
    scaffold = {
        "CONTRIBUTING.md",
        "tests/test_house.py",
        "llmlab/course/new.py",
        "tests/course/test_new.py",
    }
    names = [
        n
        for n in TRACKED
        if n.endswith((".py", ".md", ".ipynb", ".bib", ".yml")) and n not in scaffold
    ]
    left = [
        n
        for n in names
        if (ROOT / n).exists()
        and re.search(rf"\b{marker}\b", (ROOT / n).read_text("utf-8"))
    ]
    assert not left


def test_no_file_is_large_and_no_path_is_absolute():
    for name in TRACKED:
        path = ROOT / name
        if not path.exists():
            continue
        assert path.stat().st_size <= 20 * 2**20, f"{name} is over 20 MB"
        if path.suffix in (".py", ".ipynb", ".md", ".toml", ".yml", ".cfg"):
            text = path.read_text(encoding="utf-8")
            here = [
                p
                for p in (str(ROOT), str(Path.home()) + "/")
                if len(p) > 6 and p in text
            ]
            assert not here, f"{name} contains {here}"


# Lessons ------------------------------------------------------------------------------

LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*/[0-9]*.py"))
# Where they are there, they come in this order.
HEADINGS = [
    "What it costs",
    "Predict",
    "By hand",
    "The idea",
    "Your turn",
    "The code",
    "Against the library",
    "The experiment",
    "Play",
    "At scale",
    "What to keep",
]


@cache
def cells(path: Path) -> list[tuple[str, str]]:
    """(kind, text) of each cell of a percent script."""
    import jupytext

    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_lesson_has_its_form(path):
    """Its size, the headings in order, one course import line, no pip, no device."""
    found = cells(path)
    assert 20 <= len(found) <= 45, f"{len(found)} cells"
    prose = "\n".join(text for kind, text in found if kind == "markdown")
    plain = re.sub(r"\$[^$]*\$|\]\([^)]*\)", " ", prose)
    words = len(re.findall(r"[A-Za-z][A-Za-z'-]+", plain))
    assert 1200 <= words <= 2600, f"{words} words"
    headings = re.findall(r"^## (.+)$", prose, flags=re.M)
    known = [heading for heading in headings if heading in HEADINGS]
    assert known == sorted(known, key=HEADINGS.index)
    if not path.parent.name.startswith("01-"):
        assert {"Predict", "The code", "Play", "At scale"} <= set(known)
    code = "\n".join(text for kind, text in found if kind == "code")
    assert len(re.findall(r"^from llmlab\.course import", code, flags=re.M)) == 1
    assert not re.search(r"pip install|cuda:\d|^\s*!", code, flags=re.M)
    assert "explore(" in code, "a lesson has a figure that moves"


NOTEBOOKS = sorted(
    path for kind in ("notebooks", "solutions") for path in (ROOT / kind).glob("*/*.py")
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: "/".join(p.parts[-3:]))
def test_code_cells_end_at_column_88(path):
    """Beyond it a line is cut off at the edge of a page of 1280 pixels."""
    code = [text for kind, text in cells(path) if kind == "code"]
    long = [line for text in code for line in text.splitlines() if len(line) > 88]
    assert not long


def test_every_lesson_has_all_its_files():
    from llmlab.course.syllabus import built_lessons

    for lesson in built_lessons(ROOT):
        paths = [
            lesson.notebook(ROOT),
            lesson.solution(ROOT),
            lesson.solution(ROOT).with_suffix(".py"),
            lesson.exercise(ROOT),
            ROOT / "tests" / "checks" / lesson.package / f"test_{lesson.module}.py",
        ]
        missing = [str(p.relative_to(ROOT)) for p in paths if not p.exists()]
        checks = PACKAGE / "checks" / lesson.package / lesson.module
        if not checks.is_dir() and not checks.with_suffix(".py").is_file():
            missing.append(str(checks.relative_to(ROOT)))
        assert not missing, f"{lesson.slug} lacks {missing}"
