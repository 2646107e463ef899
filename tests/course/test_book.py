import base64
import functools
import json
import shutil
from pathlib import Path

import nbformat
import pytest

from llmlab.course.book import build, pages, published, rooms
from llmlab.course.book.build import BookError
from llmlab.course.book.notebooks import (
    Stage,
    dress,
    first_slider,
    header,
    link,
    rewrite,
    stage_notebook,
    whole_shapes,
)
from llmlab.course.book.sphinx import tidy
from llmlab.course.book.verified import WIDGET
from llmlab.course.syllabus import DATA, PARTS, find, lessons

HOME = Path(__file__).resolve().parents[2] / "jupyter-book"
PNG = base64.b64encode(b"not really a PNG").decode()
SLIDER = '<figure class="llmlab-explore"><input type="range"></figure>'
BIB = (
    "@article{hu2021lora, title={LoRA}, author={Hu, Edward}, journal={arXiv},"
    " year={2021}}\n"
)


def notebook(*cells):
    make = {"md": nbformat.v4.new_markdown_cell, "py": nbformat.v4.new_code_cell}
    return nbformat.v4.new_notebook(cells=[make[kind](text) for kind, text in cells])


@pytest.fixture(scope="module", autouse=True)
def the_same_in_every_course():
    """What a page says of the package is worked out once."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((published, "page"), (rooms, "section")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture
def course(tmp_path):
    """A course with one built lesson, 04-peft/05-lora, its exercises and solutions."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n\nWrite plainly.\n")
    shutil.copytree(
        HOME,
        tmp_path / "jupyter-book",
        ignore=shutil.ignore_patterns("_build", "references", "*.json"),
    )
    (tmp_path / "jupyter-book" / "references").mkdir()
    (tmp_path / "jupyter-book" / "references" / "04-peft.bib").write_text(BIB)
    lesson = notebook(
        (
            "md",
            (
                "# LoRA\n\nAs in [Hu et al. 2021](https://arxiv.org/abs/2106.09685"
                ' "hu2021lora").'
            ),
        ),
        ("py", "# NBVAL_IGNORE_OUTPUT\nexplore()"),
        (
            "md",
            (
                "[Exercises](../../work/04-peft/05-lora.ipynb),"
                " [QLoRA](07-qlora.ipynb), $W + BA$"
            ),
        ),
    )
    lesson.cells[1].outputs = [
        nbformat.v4.new_output(
            "display_data", data={"text/html": SLIDER, WIDGET: {"model_id": "x"}}
        ),
        nbformat.v4.new_output(
            "display_data",
            data={"image/png": PNG},
            metadata={"image/png": {"alt": "A <line>.", "width": 576}},
        ),
    ]
    exercise = notebook(
        ("md", "# Exercises: LoRA"),
        ("py", "raise NotImplementedError"),
        ("py", "check.f(f)"),
    )
    exercise.cells[2].metadata["tags"] = ["check"]
    solution = notebook(
        ("md", "# Exercises: LoRA"),
        ("py", "def f():\n    # BEGIN SOLUTION\n    return 1\n    # END SOLUTION"),
    )
    for kind, nb in (
        ("notebooks", lesson),
        ("exercises", exercise),
        ("solutions", solution),
    ):
        path = tmp_path / kind / "04-peft" / "05-lora.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(nb, path)
    (tmp_path / "notebooks" / "04-peft" / "05-lora.py").touch()
    (tmp_path / "llmlab").mkdir()
    (tmp_path / "llmlab" / "lora.py").write_text("x = 1\n")
    return tmp_path


@pytest.fixture
def stage(course):
    return Stage(
        course, course / "jupyter-book" / "_build" / "source", frozenset({"hu2021lora"})
    )


def rewritten(text, stage, page="notebooks/04-peft/05-lora.ipynb"):
    return rewrite(text, lambda match: link(match, page, stage))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[Hu et al. 2021](https://arxiv.org/abs/2106.09685 "hu2021lora")',
            "{cite:t}`hu2021lora`",
        ),
        (
            '[the paper](https://arxiv.org/x "hu2021lora")',
            "[the paper](https://arxiv.org/x) {cite:p}`hu2021lora`",
        ),
        (
            "[Exercises](../../work/04-peft/05-lora.ipynb)",
            "[Exercises](../../exercises/04-peft/05-lora.ipynb)",
        ),
        ("[QLoRA](07-qlora.ipynb)", "[QLoRA](../../parts/04-peft.md)"),
        (
            "[TP](../05-parallelism/05-tensor.ipynb#play)",
            "[TP](../../parts/05-parallelism.md)",
        ),
        ("[source](../../llmlab/lora.py)", "[source](../../llmlab/lora.py)"),
        ("[site](https://example.org/a_(b))", "[site](https://example.org/a_(b))"),
        ("[here](#play)", "[here](#play)"),
        ("`[a](gone.ipynb)`", "`[a](gone.ipynb)`"),
        ("```python\nx[a](b)\n```", "```python\nx[a](b)\n```"),
        ("![image](gone.png)", "![image](gone.png)"),
    ],
)
def test_links(text, expected, stage):
    assert rewritten(text, stage) == expected
    assert stage.errors == []


def test_shapes_in_tables_stay_on_one_line():
    text = "16 × 4\n\n| 64 × 128 | 2 × (8 × 128 + 8) | d × k |\n|---|---|---|"
    assert whole_shapes(text) == (
        "16 × 4\n\n| 64\u00a0×\u00a0128 | 2 × (8\u00a0×\u00a0128 + 8) | d × k |\n"
        "|---|---|---|"
    )


def test_a_linked_file_comes_along(stage):
    rewritten("[source](../../llmlab/lora.py)", stage)
    assert (stage.source / "llmlab" / "lora.py").read_text() == "x = 1\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[Nobody 2020](https://x.org "nobody2020")', "cites 'nobody2020'"),
        (
            "[gone](../04-peft/99-gone.ipynb)",
            "links to ../04-peft/99-gone.ipynb, which does not exist",
        ),
        ("[gone](../../llmlab/gone.py)", "does not exist"),
    ],
)
def test_wrong_links_are_reported_with_their_page(text, complaint, stage):
    rewritten(text, stage)
    assert len(stage.errors) == 1
    assert (
        complaint in stage.errors[0]
        and "notebooks/04-peft/05-lora.ipynb" in stage.errors[0]
    )


def test_figures_become_accessible_files(stage):
    stage_notebook("notebooks", find("lora"), None, stage)
    nb = nbformat.read(stage.source / "notebooks/04-peft/05-lora.ipynb", as_version=4)
    cell = nb.cells[2]
    assert cell.source == "explore()"
    assert set(cell.outputs[0].data) == {"text/html"}
    html = cell.outputs[1].data["text/html"]
    assert (
        'alt="A &lt;line&gt;."' in html
        and 'width="576"' in html
        and "min-width:346px" in html
    )
    (name,) = (stage.source / "_static" / "figures").iterdir()
    assert (
        name.read_bytes() == b"not really a PNG"
        and f"../../_static/figures/{name.name}" in html
    )


def test_a_figure_without_alt_is_an_error(stage):
    nb = notebook(("py", "plot()"))
    nb.cells[0].outputs = [
        nbformat.v4.new_output("display_data", data={"image/png": PNG})
    ]
    dress(nb, "notebooks/04-peft/05-lora.ipynb", stage)
    assert "without alternative text" in stage.errors[0]


def test_solutions_are_marked_and_lose_the_machine_marks(stage):
    stage_notebook("solutions", find("lora"), None, stage)
    nb = nbformat.read(stage.source / "solutions/04-peft/05-lora.ipynb", as_version=4)
    assert nb.cells[0].source.startswith("# Solutions: LoRA")
    assert (
        "spoilers" in nb.cells[1].source
        and "../../exercises/04-peft/05-lora.ipynb" in nb.cells[1].source
    )
    assert nb.cells[2].source == "def f():\n    return 1\n"


def test_exercises_say_how_to_do_them(stage):
    text = header("exercises", find("lora"), None, stage)
    assert (
        "work/04-peft/05-lora.ipynb" in text
        and "../../solutions/04-peft/05-lora.ipynb" in text
    )


def test_pages_lead_to_each_other_and_say_what_they_take(stage):
    run = {"seconds": 12.3, "memory_gib": 0.91}
    assert "Runs in 12 s, 0.9 GiB" in header("solutions", find("lora"), run, stage)
    text = header("notebooks", find("lora"), run, stage)
    assert "Runs in" not in text, "a lesson's own first line says so"
    assert 'href="../../_sources/notebooks/04-peft/05-lora.ipynb" download' in text
    assert 'href="../../exercises/04-peft/05-lora.html"' in text


def test_toc_holds_what_exists_in_order(course):
    toc = pages.toc([find("lora")], course)
    assert [p["caption"] for p in toc["parts"]] == [
        f"{i}. {t}" for i, t in enumerate(PARTS.values(), 1)
    ] + ["Reference"]
    files = [c["file"] for c in toc["parts"][3]["chapters"]]
    assert files == ["parts/04-peft", "notebooks/04-peft/05-lora"]
    below = [c["file"] for c in toc["parts"][3]["chapters"][1]["sections"]]
    assert below == ["exercises/04-peft/05-lora", "solutions/04-peft/05-lora"]


def test_map_and_part_pages_show_every_lesson(course):
    built = [find("lora")]
    the_map = pages.course_map(built, course)
    assert the_map.count("<li") == len(PARTS) + len(lessons())
    assert the_map.count("planned</span>") == len(lessons()) - 1
    assert '<a href="notebooks/04-peft/05-lora.html">LoRA</a>' in the_map
    page = pages.part_page("04-peft", built, course)
    for lesson in lessons():
        assert (f"{lesson.title}" in page) or lesson.part != "04-peft"
    assert page.count("planned</span>") == 10


def test_coverage_maps_every_row_of_the_index(course):
    text = pages.coverage([find("lora")])
    rows = (DATA / "index.csv").read_text().splitlines()[1:]
    table = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| topic")
    ]
    assert len(table) == len(rows)
    assert (
        sum(line.endswith("| built |") for line in table)
        == sum(row.endswith("04-peft/05-lora") for row in rows)
        == 1
    )
    assert "1 of 131 rows" in text


def test_verified_lists_only_what_is_there(course):
    run = {
        "date": "2026-11-24",
        "seconds": 9.5,
        "memory_gib": 0.5,
        "versions": {"torch": "2.13.0"},
    }
    text = pages.verified(
        {"notebooks/04-peft/05-lora": run, "notebooks/04-peft/07-qlora": run},
        [find("lora")],
        course,
    )
    assert (
        "| [LoRA](notebooks/04-peft/05-lora.ipynb) | 2026-11-24 | 9.5 | 0.50 |" in text
    )
    assert "QLoRA" not in text and "| torch | 2.13.0 |" in text


def test_facts_are_counted(course):
    text = pages.facts(
        {"notebooks/04-peft/05-lora": {"seconds": 12.4}}, [find("lora")], course
    )
    assert (
        "<strong>1 of 80</strong>" in text
        and "<strong>1</strong> exercises" in text
        and "<strong>12 s</strong>" in text
    )


def test_the_test_run_renews_what_was_recorded(course, monkeypatch, tmp_path):
    records = {
        "notebooks/04-peft/05-lora": {
            "seconds": 9.0,
            "memory_gib": 1.0,
            "date": "d",
            "versions": {},
            "digest": "x",
        }
    }
    (course / "jupyter-book" / "verified.json").write_text(json.dumps(records))
    folder = tmp_path / "records"
    folder.mkdir()
    record = {
        "notebook": "notebooks/04-peft/05-lora.ipynb",
        "seconds": 4.0,
        "peak_mib": 2048,
        "date": "e",
    }
    (folder / "x.json").write_text(json.dumps(record))
    monkeypatch.setenv("LLMLAB_RECORD", str(folder))
    run = build.latest_runs(course)["notebooks/04-peft/05-lora"]
    assert (run["seconds"], run["memory_gib"], run["date"]) == (4.0, 2.0, "e")


def test_first_slider(course):
    assert first_slider(course / "notebooks/04-peft/05-lora.ipynb") == SLIDER
    assert first_slider(course / "exercises/04-peft/05-lora.ipynb") is None
    assert first_slider(course / "gone.ipynb") is None


def test_duplicate_and_broken_references_stop_the_book(course):
    folder = course / "jupyter-book" / "references"
    (folder / "05-parallelism.bib").write_text(BIB)
    with pytest.raises(
        BookError, match=r"hu2021lora stands in 04-peft.bib and in 05-parallelism.bib"
    ):
        build.references(course)
    (folder / "05-parallelism.bib").write_text("@article{x, title = {no end")
    with pytest.raises(BookError, match=r"05-parallelism\.bib"):
        build.references(course)


def test_the_book_stops_at_the_first_look_at_a_wrong_link(course):
    nb = notebook(("md", "# LoRA\n\n[gone](gone.ipynb)"))
    nbformat.write(nb, course / "notebooks/04-peft/05-lora.ipynb")
    with pytest.raises(BookError, match=r"gone.ipynb, which does not exist"):
        build.build(course)


def test_a_taken_port_is_said_plainly(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BookError, match="--port"):
            build.serve(tmp_path, taken.getsockname()[1])


def test_tidy():
    better = tidy(
        '<link rel="stylesheet" href="_static/sphinx-thebe.css?v=1" /><div'
        ' class="highlight"><pre>x'
    )
    assert better == '<div class="highlight"><pre tabindex="0">x'


@pytest.mark.slow
def test_a_whole_book(course, monkeypatch):
    """Sphinx accepts what is staged without a warning; nothing reaches outside."""
    monkeypatch.chdir(course)
    shutil.copytree(
        HOME / "references", course / "jupyter-book" / "references", dirs_exist_ok=True
    )  # "Published" cites them
    out = build.build(course)
    page = (out / "notebooks/04-peft/05-lora.html").read_text()
    assert "bibliography.html#" in page
    assert 'href="../../exercises/04-peft/05-lora.html"' in page
    assert "thebe" not in page and "unpkg" not in page and "cdn" not in page
    original = (course / "notebooks/04-peft/05-lora.ipynb").read_bytes()
    assert (out / "_sources/notebooks/04-peft/05-lora.ipynb").read_bytes() == original
    assert (out / "_static/mathjax/tex-mml-chtml.js").is_file()
    assert (out / "solutions/04-peft/05-lora.html").is_file()


@pytest.mark.slow
def test_a_warning_of_sphinx_is_an_error(course, monkeypatch):
    monkeypatch.chdir(course)
    nb = notebook(("md", "# LoRA\n\n{term}`no such term`"))
    nbformat.write(nb, course / "notebooks/04-peft/05-lora.ipynb")
    with pytest.raises(BookError, match="no such term"):
        build.build(course)
