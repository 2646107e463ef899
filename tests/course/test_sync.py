import json
import os
import sys

import nbformat
import pytest

from llmlab.course import sync
from llmlab.course.book.verified import WIDGET, Records, digest

LESSON = """\
# %% [markdown]
# # A lesson

# %%
x = 20
print(x + 1)

# %% [markdown] tags=["solution"]
# Why.

# %% tags=["exercise"]
x += 1
"""
NAME = "notebooks/01-start/00-a-lesson"  # not in the syllabus: it has no line on top


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of one lesson, which has not run yet."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "solutions").mkdir()
    script = tmp_path / f"{NAME}.py"
    script.parent.mkdir(parents=True)
    script.write_text(LESSON)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(course):
    """The same, in step; made without a kernel, so that most tests are quick."""
    nb, _ = sync.read_pair(course / f"{NAME}.py")
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="21\n")]
    sync.strip(nb)
    (course / f"{NAME}.ipynb").write_text(nbformat.writes(nb) + "\n")
    run = {
        "digest": digest(nb),
        "seconds": 1.0,
        "memory_gib": 0.1,
        "date": "2026-11-24",
        "versions": {},
    }
    (course / "jupyter-book").mkdir()
    (course / "jupyter-book" / "verified.json").write_text(json.dumps({NAME: run}))
    return course


@pytest.fixture
def no_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(
        sync, "execute", lambda *_: calls.append(1) or pytest.fail("it ran a kernel")
    )
    return calls


def read(course):
    return nbformat.read(course / f"{NAME}.ipynb", as_version=4)


def edit(course, old, new):
    script = course / f"{NAME}.py"
    assert old in script.read_text()
    script.write_text(script.read_text().replace(old, new))


def test_a_new_lesson_is_run_and_recorded(course, capsys):
    assert sync.main([]) == 0
    nb = read(course)
    assert nb.cells[1].outputs[0].text == "21\n"
    assert [c.execution_count for c in nb.cells if c.cell_type == "code"] == [1, 2]
    assert nb.cells[2].metadata == {"tags": ["solution"]} and nb.cells[3].metadata == {
        "tags": ["exercise"]
    }
    assert (
        nb.metadata.kernelspec.name == "python3"
        and "version" not in nb.metadata.language_info
    )
    run = Records(course).read()[NAME]
    assert run["digest"] == digest(nb)
    assert 0 < run["seconds"] < 60 and 0.01 < run["memory_gib"] < 3
    assert run["versions"]["python"].startswith("3.")
    assert sync.main(["--check"]) == 0
    assert "checked" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_kernel_is_not_charged_for_what_its_starter_holds(course):
    held = b"x" * 2**30
    assert sync.main([]) == 0
    gib = len(held) / 2**30
    assert 0.01 < Records(course).read()[NAME]["memory_gib"] < gib


def test_nothing_changed_nothing_runs(ran, no_kernel, capsys):
    before = (ran / f"{NAME}.ipynb").read_bytes()
    assert sync.main([]) == 0
    assert (ran / f"{NAME}.ipynb").read_bytes() == before
    assert "unchanged" in capsys.readouterr().out


def test_prose_is_updated_without_a_run(ran, no_kernel):
    edit(ran, "# # A lesson", "# # A better lesson")
    assert sync.main(["--check"]) == 1
    assert sync.main([]) == 0
    nb = read(ran)
    assert nb.cells[0].source == "# A better lesson"
    assert nb.cells[1].outputs[0].text == "21\n"
    assert sync.main(["--check"]) == 0


def test_changed_code_runs(ran):
    edit(ran, "x + 1", "x + 2")
    assert sync.main(["--check"]) == 1
    assert sync.main([NAME + ".ipynb"]) == 0
    assert read(ran).cells[1].outputs[0].text == "22\n"
    assert sync.main(["--check"]) == 0


def test_code_changed_on_both_sides_has_still_not_run(ran):
    edit(ran, "x + 1", "x + 2")
    nb = read(ran)
    nb.cells[1].source = nb.cells[1].source.replace("x + 1", "x + 2")
    (ran / f"{NAME}.ipynb").write_text(nbformat.writes(nb) + "\n")
    assert sync.main(["--check"]) == 1


def test_only_indentation_changed_still_counts_as_code(ran):
    edit(ran, "print(x + 1)", "print( x + 1)")
    assert sync.main(["--check"]) == 1


def test_check_changes_nothing(ran):
    edit(ran, "x + 1", "x + 2")
    before = {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()}
    sync.main(["--check"])
    assert {p: p.read_bytes() for p in ran.rglob("*") if p.is_file()} == before


def test_an_edited_notebook_is_out_of_step(ran, no_kernel):
    nb = read(ran)
    nb.cells[0].source = "# Edited in the wrong place"
    (ran / f"{NAME}.ipynb").write_text(nbformat.writes(nb) + "\n")
    assert sync.main(["--check"]) == 1
    assert sync.main([]) == 0
    assert read(ran).cells[0].source == "# A lesson"


def test_a_deleted_cell_is_found_and_never_lost(ran):
    nb = read(ran)
    del nb.cells[3]
    (ran / f"{NAME}.ipynb").write_text(nbformat.writes(nb) + "\n")
    newer = (ran / f"{NAME}.py").stat().st_mtime + 10
    os.utime(ran / f"{NAME}.ipynb", (newer, newer))
    assert sync.main(["--check"]) == 1
    assert sync.main([]) == 0
    assert (ran / f"{NAME}.py").read_text() == LESSON
    assert len(read(ran).cells) == 4


def test_ids_stay_and_are_never_random(ran, no_kernel):
    before = [c.id for c in read(ran).cells]
    edit(ran, "# # A lesson", "# # Another title")
    sync.main([])
    assert [c.id for c in read(ran).cells][1:] == before[1:]
    (ran / f"{NAME}.ipynb").unlink()
    first = [c.id for c in sync.read_pair(ran / f"{NAME}.py")[0].cells]
    assert first == [c.id for c in sync.read_pair(ran / f"{NAME}.py")[0].cells]
    assert len(set(first)) == 4


def test_equal_cells_have_different_ids(course):
    (course / f"{NAME}.py").write_text("# %%\nx = 1\n\n# %%\nx = 1\n\n# %%\nx = 1\n")
    assert len({c.id for c in sync.read_pair(course / f"{NAME}.py")[0].cells}) == 3


def test_a_failing_cell_fails_and_leaves_the_old_notebook(ran, capsys):
    before = (ran / f"{NAME}.ipynb").read_bytes()
    edit(ran, "x + 1", "x + undefined")
    assert sync.main([]) == 1
    assert "NameError" in capsys.readouterr().out
    assert (ran / f"{NAME}.ipynb").read_bytes() == before


def output(**data):
    return nbformat.v4.new_output(
        "display_data", data={k.replace("_", "/"): v for k, v in data.items()}
    )


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            nbformat.v4.new_output("stream", name="stdout", text="/home/me/x.py\n"),
            "absolute path",
        ),
        (output(text_html="<code>/tmp/ipykernel_1/2.py</code>"), "absolute path"),
        (
            nbformat.v4.new_output("stream", name="stderr", text="UserWarning: old\n"),
            "stderr: UserWarning: old",
        ),
        (
            nbformat.v4.new_output(
                "error", ename="ValueError", evalue="no", traceback=["no"]
            ),
            "ValueError: no",
        ),
    ],
)
def test_what_no_notebook_may_hold(ran, made, message):
    nb = read(ran)
    nb.cells[1].outputs = [made]
    assert any(message in line for line in sync.problems(nb))


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/me",
        "./tmp/x",
        "model.layers.0/work/x",
        "a/opt/b",
        "</tmp>",
    ],
)
def test_what_is_no_absolute_path(text):
    assert not sync.ABSOLUTE.search(text)


def test_noise_is_stripped():
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", execution_count=17)]
    )
    nb.cells[0].metadata["execution"] = {"iopub.execute_input": "2026"}
    nb.cells[0].outputs = [
        nbformat.v4.new_output(
            "execute_result", data={"text/plain": "1", WIDGET: {}}, execution_count=17
        )
    ]
    sync.strip(nb)
    assert nb.cells[0].metadata == {} and nb.cells[0].execution_count == 1
    assert (
        nb.cells[0].outputs[0].data == {"text/plain": "1"}
        and nb.cells[0].outputs[0].execution_count == 1
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("seconds", 31.0, "31.0 s"), ("memory_gib", 3.5, "3.5 GiB")],
)
def test_limits(ran, key, value, message, capsys):
    path = ran / "jupyter-book" / "verified.json"
    runs = json.loads(path.read_text())
    runs[NAME][key] = value
    path.write_text(json.dumps(runs))
    assert sync.main(["--check"]) == 1
    assert message in capsys.readouterr().out


def test_a_notebook_without_its_script_is_an_orphan(ran, capsys):
    (ran / f"{NAME}.py").unlink()
    assert sync.main(["--check"]) == 1
    assert "its script is gone" in capsys.readouterr().out


def test_misuse(course, tmp_path, capsys):
    assert sync.main(["nowhere.py"]) == 2
    (course / "other.py").touch()
    assert sync.main(["other.py"]) == 2
    assert "not under" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tags", "folded"),
    [
        (["hide-input", "slider"], {"source_hidden": True}),
        (["hide-output"], {"outputs_hidden": True}),
        (["hide-cell"], {"source_hidden": True, "outputs_hidden": True}),
    ],
)
def test_jupyterlab_folds_what_the_book_folds(tags, folded):
    assert sync.metadata(tags) == {"tags": tags, "jupyter": folded}


def test_nothing_is_folded_unasked():
    assert sync.metadata([]) == {}
    assert sync.metadata(["check"]) == {"tags": ["check"]}


def test_a_lesson_of_the_syllabus_has_its_line_on_top(ran):
    folder = ran / "notebooks" / "01-start"
    for kind in ("py", "ipynb"):
        (folder / f"00-a-lesson.{kind}").rename(folder / f"01-welcome.{kind}")
    records = ran / "jupyter-book" / "verified.json"
    records.write_text(records.read_text().replace("00-a-lesson", "01-welcome"))
    script = folder / "01-welcome.py"
    (wrong,) = sync.check(script, ran)
    assert "out of step" in wrong
    assert sync.sync(script, ran) == ("updated", [])
    assert sync.check(script, ran) == []
    nb = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert "5 seconds" in nb.cells[1].source
    records.write_text(records.read_text().replace('"seconds": 1.0', '"seconds": 9.0'))
    assert sync.check(script, ran), "the line says what the run before took"


def test_text_below_the_line_on_top_is_no_line(ran):
    """Text that takes the place of a cell is paired with the line, but stays."""
    folder = ran / "notebooks" / "01-start"
    for kind in ("py", "ipynb"):
        (folder / f"00-a-lesson.{kind}").rename(folder / f"01-welcome.{kind}")
    records = ran / "jupyter-book" / "verified.json"
    records.write_text(records.read_text().replace("00-a-lesson", "01-welcome"))
    script = folder / "01-welcome.py"
    sync.sync(script, ran)
    text = script.read_text()
    added = "# A lesson\n\n# %% [markdown]\n# How to read it.\n"
    script.write_text(text.replace("# A lesson\n", added, 1))
    assert sync.sync(script, ran) == ("updated", [])
    nb = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert "**It takes**" in nb.cells[1].source
    assert nb.cells[2].source == "How to read it."
    assert sync.check(script, ran) == []
