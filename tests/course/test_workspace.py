"""A learner's copy is made once, and never overwritten."""

from __future__ import annotations

import json
import os

import nbformat
import pytest

from llmlab.course import copy_links, exercises, workspace
from llmlab.course.book import terms
from llmlab.course.copy_links import with_links_of_a_copy
from llmlab.course.syllabus import built_lessons, find
from llmlab.course.workspace import Kind
from tests.course.learner import ROOT, WELCOME, cell, course, index


@pytest.fixture
def root(tmp_path):
    return course(tmp_path)


def change_course(root, text="A new sentence."):
    """A new version of the exercise, as an update of the course brings it."""
    path = WELCOME.exercise(root)
    nb = json.loads(path.read_text())
    nb["cells"].append(dict(nb["cells"][0], id="new", source=text))
    nb["metadata"]["llmlab"]["version"] = exercises.version(nb)
    path.write_text(json.dumps(nb))
    return nb["metadata"]["llmlab"]["version"]


def cells_of(path):
    """The cells of a notebook as they read, without their outputs."""
    cells = json.loads(path.read_text())["cells"]
    return [(c["cell_type"], "".join(c["source"])) for c in cells]


def with_links(path):
    """The cells of an exercise of Welcome, its two links leading to the copies."""
    ways = {
        "../../notebooks/01-start/01-welcome": "../lessons/01-start/01-welcome.lesson",
        "../../solutions/01-start/01-welcome": (
            "../solutions/01-start/01-welcome.solution"
        ),
    }
    cells = []
    for kind, source in cells_of(path):
        for there, here in ways.items():
            source = source.replace(there, here)
        cells.append((kind, source))
    return cells


def change_lesson(root, text="A new sentence.", printed="1\n"):
    """A new version of the lesson, its only figure printed by its second cell."""
    markdown = nbformat.v4.new_markdown_cell(f"# Welcome\n\n{text}", id="a")
    code = nbformat.v4.new_code_cell("print(1)", id="b", execution_count=1)
    code.outputs = [nbformat.v4.new_output("stream", text=printed)]
    metadata = {"jupytext": {"formats": "ipynb,py:percent"}}
    nb = nbformat.v4.new_notebook(cells=[markdown, code], metadata=metadata)
    nbformat.write(nb, WELCOME.notebook(root))


def edit(root, change, kind=Kind.EXERCISES):
    path = kind.copy(WELCOME, root)
    nb = json.loads(path.read_text())
    change(nb)
    path.write_text(json.dumps(nb, indent=1))


def work_on_it(nb):
    cell(nb["cells"], "exercise-softmax")["source"] = (
        "def softmax(x):\n    return x.softmax(-1)"
    )


def test_made_then_kept(root):
    assert workspace.start(WELCOME, root).what == "made"
    assert cells_of(WELCOME.work(root)) == with_links(WELCOME.exercise(root))
    edit(root, work_on_it)
    before = WELCOME.work(root).read_bytes()
    assert workspace.start(WELCOME, root).what == "kept"
    assert WELCOME.work(root).read_bytes() == before


def test_running_the_cells_is_not_an_edit(root):
    workspace.start(WELCOME, root)
    edit(
        root,
        lambda nb: cell(nb["cells"], "check-softmax").update(
            outputs=[], execution_count=3
        ),
    )
    new = change_course(root)
    assert workspace.start(WELCOME, root).what == "renewed"
    assert (
        json.loads(WELCOME.work(root).read_text())["metadata"]["llmlab"]["version"]
        == new
    )


@pytest.mark.parametrize("drop_metadata", [False, True])
def test_an_edited_copy_stays_when_the_course_changes(root, drop_metadata):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    if drop_metadata:
        edit(root, lambda nb: nb["metadata"].clear())
    mine = WELCOME.work(root).read_bytes()
    change_course(root)
    for _ in range(2):
        done = workspace.start(WELCOME, root)
        assert done.what == "new beside"
        assert "--use-new" in done.message and "01-welcome.new.ipynb" in done.message
        assert WELCOME.work(root).read_bytes() == mine
    beside = workspace.new_path(WELCOME, root)
    assert cells_of(beside) == with_links(WELCOME.exercise(root))
    workspace.new_path(WELCOME, root).write_text("the learner works here already")
    workspace.start(WELCOME, root)
    assert (
        workspace.new_path(WELCOME, root).read_text()
        == "the learner works here already"
    )


def test_moving_over_keeps_both(root):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    mine = WELCOME.work(root).read_bytes()
    change_course(root)
    workspace.start(WELCOME, root)
    done = workspace.use_new(WELCOME, root)
    assert done.what == "moved over"
    assert WELCOME.work(root).with_suffix(".old-1.ipynb").read_bytes() == mine
    assert workspace.start(WELCOME, root).what == "kept"
    with pytest.raises(workspace.Blocked, match="no work"):
        workspace.use_new(WELCOME, root)


def test_a_broken_copy_is_kept_and_told(root):
    workspace.start(WELCOME, root)
    WELCOME.work(root).write_text('{"cells": [')
    done = workspace.start(WELCOME, root)
    assert done.what == "unreadable" and "JSON is broken" in done.message
    assert WELCOME.work(root).read_text() == '{"cells": ['


def test_a_broken_record_is_survived(root):
    workspace.start(WELCOME, root)
    for text in ("{", "[]", '{"01-start/01-welcome": 3}'):
        (root / "work" / ".copies.json").write_text(text)
        assert workspace.start(WELCOME, root).what == "kept"


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere"
)
def test_a_folder_that_cannot_be_written(root):
    (root / "work").mkdir(mode=0o500)
    with pytest.raises(workspace.Blocked, match="cannot be written"):
        workspace.start(WELCOME, root)


def test_a_file_in_the_place_of_the_folder(root):
    (root / "work").write_text("")
    with pytest.raises(workspace.Blocked, match="cannot be written"):
        workspace.start(WELCOME, root)


def test_checks_are_put_back(root):
    workspace.start(WELCOME, root)
    assert workspace.restore_checks(WELCOME, root).what == "kept"

    def harm(nb):
        cells = nb["cells"]
        work_on_it(nb)
        cells.remove(cell(cells, "check-weight_bytes"))
        cell(cells, "check-tokens_per_second")["source"] = "print('right')"
        cells.append(dict(cell(cells, "check-softmax"), id="twice"))
        cells.append(
            {
                "cell_type": "code",
                "id": "mine",
                "metadata": {},
                "source": "mine = 1",
                "outputs": [],
                "execution_count": 1,
            }
        )

    edit(root, harm)
    harmed = WELCOME.work(root).read_text()
    done = workspace.restore_checks(WELCOME, root)
    assert done.what == "restored"
    assert all(
        name in done.message
        for name in ("weight_bytes", "tokens_per_second", "softmax")
    )
    cells = json.loads(WELCOME.work(root).read_text())["cells"]
    given = json.loads(WELCOME.exercise(root).read_text())["cells"]
    for name in ("weight_bytes", "tokens_per_second", "softmax"):
        there = [c for c in cells if c["id"] == f"check-{name}"]
        assert [c["source"] for c in there] == [cell(given, f"check-{name}")["source"]]
        assert index(cells, f"check-{name}") == index(cells, f"exercise-{name}") + 1
    assert "x.softmax(-1)" in "".join(cell(cells, "exercise-softmax")["source"])
    assert "mine = 1" in "".join(cell(cells, "mine")["source"])
    assert (
        WELCOME.work(root).with_suffix(".before-restore-1.ipynb").read_text() == harmed
    )


def test_restoring_needs_a_notebook(root):
    with pytest.raises(FileNotFoundError, match="llmlab start"):
        workspace.restore_checks(WELCOME, root)
    workspace.start(WELCOME, root)
    WELCOME.work(root).write_text("no")
    with pytest.raises(workspace.Blocked, match="JSON is broken"):
        workspace.restore_checks(WELCOME, root)


def test_all_built_lessons_are_started(root):
    assert [c.path for c in workspace.start_all(root)] == [WELCOME.work(root)]


LESSON = Kind.LESSON


def test_a_lesson_is_copied_when_it_is_asked_for(root):
    change_lesson(root)
    workspace.start_all(root)
    assert not WELCOME.lesson_copy(root).exists()
    assert workspace.start(WELCOME, root, LESSON).what == "made"
    nb = json.loads(WELCOME.lesson_copy(root).read_text())
    assert "jupytext" not in nb["metadata"], "a save must not write a script"
    assert nb["cells"][1]["outputs"][0]["text"] == ["1\n"]
    nbformat.validate(nbformat.from_dict(nb))
    edit(root, lambda nb: nb["cells"][0].update(source="my notes"), LESSON)
    mine = WELCOME.lesson_copy(root).read_bytes()
    assert {c.path: c.what for c in workspace.start_all(root)} == {
        WELCOME.work(root): "kept",
        WELCOME.lesson_copy(root): "kept",
    }
    assert WELCOME.lesson_copy(root).read_bytes() == mine


def ran(nb):
    """What running and saving in JupyterLab does to a notebook."""
    nb["cells"][1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["2\n"]}
    ]
    nb["cells"][1]["execution_count"] = 7
    nb["cells"][1]["metadata"]["collapsed"] = True
    nb["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}


@pytest.mark.parametrize("new", [{"text": "Better."}, {"printed": "0.99\n"}])
def test_a_lesson_that_was_run_but_not_edited_is_renewed(root, new):
    change_lesson(root)
    workspace.start(WELCOME, root, LESSON)
    edit(root, ran, LESSON)
    before = WELCOME.lesson_copy(root).read_bytes()
    assert workspace.start(WELCOME, root, LESSON).what == "kept"
    assert WELCOME.lesson_copy(root).read_bytes() == before, "outputs are kept"
    change_lesson(root, **new)
    assert workspace.start(WELCOME, root, LESSON).what == "renewed"
    renewed = WELCOME.lesson_copy(root).read_text()
    assert all(text.strip() in renewed for text in new.values())
    assert workspace.start(WELCOME, root, LESSON).what == "kept"


def test_a_lesson_with_notes_stays_when_the_course_changes(root):
    change_lesson(root)
    workspace.start(WELCOME, root, LESSON)
    note = {"cell_type": "markdown", "id": "n", "metadata": {}, "source": "my guess: 7"}
    edit(root, lambda nb: nb["cells"].append(note), LESSON)
    mine = WELCOME.lesson_copy(root).read_bytes()
    change_lesson(root, printed="0.99\n")
    assert workspace.start(WELCOME, root, LESSON).what == "kept", "only outputs differ"
    change_lesson(root, text="Better.")
    done = workspace.start(WELCOME, root, LESSON)
    assert done.what == "new beside" and "01-welcome.lesson.new.ipynb" in done.message
    assert WELCOME.lesson_copy(root).read_bytes() == mine
    assert workspace.use_new(WELCOME, root, LESSON).what == "moved over"
    old = WELCOME.lesson_copy(root).with_suffix(".old-1.ipynb")
    assert old.read_bytes() == mine
    assert workspace.start(WELCOME, root, LESSON).what == "kept"
    change_lesson(root, text="Better still.")
    assert workspace.start(WELCOME, root, LESSON).what == "renewed"


def test_what_was_written_into_the_new_version_survives_a_newer_one(root):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    change_course(root)
    workspace.start(WELCOME, root)
    beside = workspace.new_path(WELCOME, root)
    change_course(root, "A second sentence.")
    workspace.start(WELCOME, root)
    assert "A second sentence." in beside.read_text()
    assert not WELCOME.work(root).with_suffix(".old-1.ipynb").exists()
    nb = json.loads(beside.read_text())
    work_on_it(nb)
    beside.write_text(json.dumps(nb))
    mine = beside.read_bytes()
    change_course(root, "A third sentence.")
    done = workspace.start(WELCOME, root)
    assert "A third sentence." in beside.read_text()
    old = WELCOME.work(root).with_suffix(".old-1.ipynb")
    assert old.read_bytes() == mine and old.name in done.message


@pytest.mark.parametrize("edited", [False, True])
def test_a_copy_from_before_links_were_changed(root, edited):
    """Its metadata hold only the course's version, and its cells the course's links."""
    WELCOME.work(root).parent.mkdir(parents=True)
    WELCOME.work(root).write_text(WELCOME.exercise(root).read_text())
    if edited:
        edit(root, work_on_it)
    mine = WELCOME.work(root).read_bytes()
    assert workspace.start(WELCOME, root).what == ("kept" if edited else "renewed")
    assert (WELCOME.work(root).read_bytes() == mine) == edited
    assert workspace.start(WELCOME, root).what == "kept"


@pytest.mark.parametrize("kind", [Kind.LESSON, Kind.EXERCISES])
def test_reset_gives_a_fresh_copy_and_keeps_the_former(root, kind):
    change_lesson(root)
    assert workspace.reset(WELCOME, root, kind).what == "made"
    assert workspace.reset(WELCOME, root, kind).what == "kept"
    fresh = kind.copy(WELCOME, root).read_bytes()
    for n in (1, 2):
        edit(root, lambda nb, n=n: nb["cells"][0].update(source=f"mine {n}"), kind)
        mine = kind.copy(WELCOME, root).read_bytes()
        done = workspace.reset(WELCOME, root, kind)
        old = kind.copy(WELCOME, root).with_suffix(f".old-{n}.ipynb")
        assert done.what == "reset" and old.name in done.message
        assert old.read_bytes() == mine
        assert kind.copy(WELCOME, root).read_bytes() == fresh
    assert workspace.start(WELCOME, root, kind).what == "kept"


def test_reset_takes_a_broken_copy_and_an_unread_new_version_away(root):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    change_course(root)
    workspace.start(WELCOME, root)
    WELCOME.work(root).write_text("{")
    assert workspace.reset(WELCOME, root, Kind.EXERCISES).what == "reset"
    assert not workspace.new_path(WELCOME, root).exists()
    assert WELCOME.work(root).with_suffix(".old-1.ipynb").read_text() == "{"


def test_reset_that_cannot_be_written_leaves_the_copy(root, monkeypatch):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    mine = WELCOME.work(root).read_bytes()

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workspace, "write_atomically", full)
    with pytest.raises(workspace.Blocked, match="No space left"):
        workspace.reset(WELCOME, root, Kind.EXERCISES)
    assert WELCOME.work(root).read_bytes() == mine


def test_a_broken_file_of_the_course_is_told(root):
    WELCOME.exercise(root).write_text("{")
    with pytest.raises(workspace.Blocked, match="git checkout -- exercises/"):
        workspace.start(WELCOME, root)


def test_a_planned_lesson_has_no_copies(root):
    for kind in Kind:
        with pytest.raises(FileNotFoundError, match="it is planned"):
            workspace.start(find("05-capstone"), root, kind)


def test_which_copy_lies_where(root):
    for kind in Kind:
        path = kind.copy(WELCOME, root).relative_to(root).as_posix()
        assert workspace.find_copy(path, root) == (WELCOME, kind)
    for path in ("work/START-HERE.md", "notebooks/01-start/01-welcome.ipynb", ""):
        assert workspace.find_copy(path, root) is None


@pytest.mark.parametrize(
    ("written", "copied"),
    [
        ("[a](05-lora.ipynb)", "[a](05-lora.lesson.ipynb)"),
        ("[a](05-lora.ipynb#merge 'see')", "[a](05-lora.lesson.ipynb#merge 'see')"),
        ("[a](../../work/04-peft/05-lora.ipynb)", "[a](../../04-peft/05-lora.ipynb)"),
        (
            "[a](../../exercises/04-peft/05-lora.ipynb)",
            "[a](../../04-peft/05-lora.ipynb)",
        ),
        (
            "[a](../../solutions/04-peft/05-lora.ipynb)",
            "[a](../../solutions/04-peft/05-lora.solution.ipynb)",
        ),
        ("![a](<../../pyproject.toml>)", "![a](<../../../pyproject.toml>)"),
        ("[a]: ../../pyproject.toml", "[a]: ../../../pyproject.toml"),
        ('<img src="../../pyproject.toml">', '<img src="../../../pyproject.toml">'),
        ("[a](https://example.org/05-lora.ipynb)",) * 2,
        ("[a](#merge), [b](/lab), [c](missing.png)",) * 2,
    ],
)
def test_links_lead_from_a_copy_to_the_same_things(root, written, copied):
    lora = find("05-lora")
    there, here = lora.notebook(root), lora.lesson_copy(root)
    assert with_links_of_a_copy(written, there, here, root) == copied


def test_every_link_of_every_copy_leads_to_a_copy_or_a_file():
    """Of all lessons, exercises and solutions of the course."""
    copies = {k.copy(x, ROOT) for k in Kind for x in built_lessons(ROOT)}
    copies.add(ROOT / workspace.GLOSSARY_PAGE)
    seen = 0
    for lesson in built_lessons(ROOT):
        for kind in Kind:
            fresh = workspace.fresh_copy(lesson, ROOT, kind)
            copy = kind.copy(lesson, ROOT)
            for link in copy_links.links_of(json.loads(fresh.text)["cells"]):
                target = (copy.parent / link.split("#")[0]).resolve()
                safe = target.is_file() and target.suffix != ".ipynb"
                assert target in copies or safe, f"{copy}: {link} is not a copy"
                seen += 1
    assert seen >= 3 * len(built_lessons(ROOT)), "two of an exercise, one of a lesson"


@pytest.fixture
def glossary(root):
    """A course with a lesson, and a glossary of two terms."""
    change_lesson(root, "Each token is a token.")
    path = root / terms.GLOSSARY
    path.parent.mkdir(parents=True)
    path.write_text(
        "# Glossary\n\nWords.\n\n```{glossary}\nKV cache\n键值缓存\n"
        '  What was `computed`: "kept".\n\nToken\n词元\n  A piece of text.\n```\n'
    )
    return path


def markdown_of(fresh):
    cells = fresh.notebook["cells"]
    return "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")


def test_a_lessons_copy_links_each_term_once_and_says_what_it_means(root, glossary):
    text = markdown_of(workspace.fresh_copy(WELCOME, root, Kind.LESSON))
    assert text.count("GLOSSARY.md#Token") == 1
    link = '[token](../../GLOSSARY.md#Token "A piece of text.")'
    assert f"Each {link} is a token." in text
    plain = WELCOME.notebook(root).read_text()
    assert "GLOSSARY" not in plain
    exercises_text = markdown_of(workspace.fresh_copy(WELCOME, root, Kind.EXERCISES))
    assert "GLOSSARY" not in exercises_text


def test_the_glossary_is_a_page_with_a_heading_for_each_term(root, glossary):
    workspace.write_glossary(root)
    page = (root / workspace.GLOSSARY_PAGE).read_text()
    assert "### KV cache\n\n键值缓存 · What was `computed`" in page
    assert page.index("### KV cache") < page.index("### Token")


def test_a_course_without_a_glossary_has_copies_without_links(root):
    change_lesson(root)
    workspace.write_glossary(root)
    assert not (root / workspace.GLOSSARY_PAGE).exists()
    assert "GLOSSARY" not in workspace.fresh_copy(WELCOME, root, Kind.LESSON).text


def test_a_copy_from_before_terms_were_links_is_renewed_unless_edited(root, glossary):
    words = glossary.read_text()
    glossary.unlink()
    workspace.start(WELCOME, root, Kind.LESSON)
    glossary.write_text(words)
    assert workspace.start(WELCOME, root, Kind.LESSON).what == "renewed"
    edit(root, lambda nb: nb["cells"][1].update(source="mine = 1"), Kind.LESSON)
    glossary.write_text(words.replace("piece", "part"))
    terms.entries.cache_clear()
    assert workspace.start(WELCOME, root, Kind.LESSON).what == "kept"


def test_tabs_have_different_names():
    names = {kind.copy(WELCOME, ROOT).name for kind in Kind}
    assert len(names) == len(Kind)


@pytest.mark.parametrize("kind", [Kind.LESSON, Kind.SOLUTION])
def test_a_copy_with_its_former_name_is_taken_over(root, kind):
    """It stays what it was, with what was written into it."""
    text = WELCOME.exercise(root).read_text()
    kind.source(WELCOME, root).write_text(text)
    path = kind.copy(WELCOME, root)
    workspace.start(WELCOME, root, kind)
    former = path.with_name("01-welcome.ipynb")
    mine = json.loads(path.read_text())
    mine["cells"][0]["source"] = "my note"
    former.write_text(json.dumps(mine))
    path.unlink()
    beside = former.with_suffix(".new.ipynb")
    beside.write_text(text)
    workspace.start_all(root)
    assert not former.exists() and not beside.exists()
    assert json.loads(path.read_text())["cells"][0]["source"] == "my note"
    assert workspace.new_path(WELCOME, root, kind).is_file()


def test_a_copy_of_exercises_keeps_its_name(root):
    workspace.start(WELCOME, root)
    before = WELCOME.work(root).read_text()
    workspace.take_over(WELCOME, root, Kind.EXERCISES)
    assert WELCOME.work(root).read_text() == before


def test_a_former_copy_never_replaces_one(root):
    change_lesson(root)
    workspace.start(WELCOME, root, Kind.LESSON)
    path = WELCOME.lesson_copy(root)
    path.write_text("mine")
    former = path.with_name("01-welcome.ipynb")
    former.write_text("older")
    workspace.take_over(WELCOME, root, Kind.LESSON)
    assert (path.read_text(), former.read_text()) == ("mine", "older")
