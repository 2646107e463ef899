import asyncio
import json
import socket
from types import SimpleNamespace

import nbformat
import pytest
from tornado.web import HTTPError

from llmlab.course import lab, workspace
from llmlab.course.book import terms
from llmlab.course.lab import LabError
from llmlab.course.syllabus import find, lessons
from llmlab.course.workspace import Kind


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course with one lesson and one exercise.

    The learner's home is a temporary folder.
    """
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "pyproject.toml").touch()
    lesson = find("01-welcome")
    for path in (lesson.notebook(tmp_path), lesson.exercise(tmp_path)):
        path.parent.mkdir(parents=True)
        nb = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell("check.f(f)", metadata={"tags": ["check"]})
            ]
        )
        nb.cells[0].id = "check-f"
        nb.metadata["llmlab"] = {"version": "1"}
        nbformat.write(nb, path)
    lesson.notebook(tmp_path).with_suffix(".py").touch()
    return tmp_path


def contents(course):
    """What JupyterLab reads and writes files with, as `llmlab lab` configures it."""
    from traitlets.utils.importstring import import_item

    return import_item(lab.CONTENTS)(root_dir=str(course), delete_to_trash=False)


def found(course, path, content=True):
    """The file as JupyterLab gets it."""
    return asyncio.run(contents(course).get(path, content=content))


def test_prepare_makes_copies_and_a_landing_page(course):
    lab.prepare(course)
    assert find("01-welcome").work(course).is_file()
    text = (course / lab.LANDING).read_text()
    lesson = "[Welcome](lessons/01-start/01-welcome.lesson.ipynb)"
    assert f"{lesson} | [exercises](01-start/01-welcome.ipynb) | 0 of 1" in text
    assert f"{len(lessons()) - 1} more lessons are planned" in text


def test_links_of_the_landing_page_lead_somewhere(course):
    import re

    lab.prepare(course)
    page = course / lab.LANDING
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert len(targets) == 3, "the lesson as what comes next, its line, its exercises"
    for target in targets:
        path = (page.parent / target).relative_to(course).as_posix()
        assert found(course, path)["writable"], "a copy, made now if it was not there"


def test_landing_page_shows_a_new_version(course):
    lab.prepare(course)
    for kind in (Kind.LESSON, Kind.EXERCISES):
        beside = workspace.new_path(find("01-welcome"), course, kind)
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        link = beside.relative_to(course / "work").as_posix()
        assert f", [new version]({link}) |" in lab.landing(course)


def test_landing_page_shows_what_is_done(course):
    lab.prepare(course)
    progress = {
        "schema": "llmlab.progress/1",
        "lessons": {"01-start/01-welcome": {"f": {"outcome": "right"}}},
        "hints": {},
    }
    (course / "work" / ".progress.json").write_text(json.dumps(progress))
    assert "✓ 1 of 1" in lab.landing(course)


def test_a_copy_that_needs_the_learner_is_told(course, monkeypatch, capsys):
    told = [
        workspace.Copied(course, "new beside", "the course changed"),
        workspace.Copied(course, "kept", "quiet"),
    ]
    monkeypatch.setattr(workspace, "start_all", lambda root: told)
    lab.prepare(course)
    out = capsys.readouterr().out
    assert "the course changed" in out and "quiet" not in out


def test_a_folder_that_cannot_be_written(course, monkeypatch):
    def blocked(root):
        raise workspace.Blocked("work cannot be written")

    monkeypatch.setattr(workspace, "start_all", blocked)
    with pytest.raises(LabError, match="cannot be written"):
        lab.prepare(course)
    assert lab.run(root=course) == 1


def test_command():
    from pathlib import Path

    argv = lab.command(
        Path("/course"), port=9001, browser=False, ip="0.0.0.0", extra=["--debug"]
    )
    assert {
        "--no-browser",
        "--ServerApp.port=9001",
        "--ServerApp.port_retries=0",
        "--ServerApp.ip=0.0.0.0",
    } <= set(argv)
    assert argv[-1] == "--debug" and "--ServerApp.root_dir=/course" in argv
    assert f"--ServerApp.contents_manager_class={lab.CONTENTS}" in argv
    quiet = lab.command(Path("/course"), port=None, browser=True)
    assert not [a for a in quiet if "port" in a or "browser" in a or "ip=" in a]


def test_extensions_that_are_off_exist():
    """A wrong name turns nothing off, and says nothing."""
    from jupyter_core.paths import jupyter_config_path
    from jupyter_server.extension.config import ExtensionConfigManager

    manager = ExtensionConfigManager(read_config_path=jupyter_config_path())
    assert set(lab.EXTENSIONS_OFF) <= set(manager.get_jpserver_extensions())


def test_settings_are_in_the_package():
    settings = json.loads((lab.SETTINGS / "overrides.json").read_text())
    assert settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {
        "markdown": "Markdown Preview"
    }
    assert (
        settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    )


def test_a_busy_port_is_said_plainly(course, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert lab.run(port=port, root=course) == 1
    said = capsys.readouterr().err
    assert f"port {port}" in said and "--port" in said


@pytest.mark.parametrize("port", [0, 70000, -1])
def test_what_is_no_port(port):
    with pytest.raises(LabError, match="1 to 65535"):
        lab.check_port(port, "127.0.0.1")


def test_run_becomes_jupyterlab(course, monkeypatch):
    seen = SimpleNamespace()
    monkeypatch.setattr(
        lab.os, "execv", lambda program, argv: setattr(seen, "argv", argv)
    )
    monkeypatch.chdir(course)
    lab.run(browser=False)
    assert (
        seen.argv[1:3] == ["-m", "jupyterlab"]
        and f"--ServerApp.root_dir={course}" in seen.argv
    )


def test_no_course(tmp_path, monkeypatch, capsys):
    def none():
        raise FileNotFoundError("the course's folder was not found")

    monkeypatch.setattr(lab, "course_root", none)
    assert lab.run() == 1
    assert "was not found" in capsys.readouterr().err


LESSON = "notebooks/01-start/01-welcome.ipynb"
COPY = "work/lessons/01-start/01-welcome.lesson.ipynb"


def test_a_copy_is_made_when_it_is_opened_and_renewed_when_it_is_opened_again(course):
    for content in (False, True):
        assert not (course / COPY).exists()
        assert found(course, COPY, content)["writable"]
        (course / COPY).unlink()
    found(course, COPY)
    nb = nbformat.read(course / LESSON, as_version=4)
    nb.cells[0].source = "better = 1"
    nbformat.write(nb, course / LESSON)
    before = (course / COPY).read_bytes()
    found(course, COPY, content=False)
    assert (course / COPY).read_bytes() == before, "JupyterLab looks before it saves"
    assert found(course, COPY)["content"]["cells"][0]["source"] == "better = 1"


def test_the_glossary_is_written_by_prepare_and_when_it_is_asked_for(course):
    page = workspace.GLOSSARY_PAGE
    lab.prepare(course)
    assert not (course / page).exists(), "this course has none"
    source = course / terms.GLOSSARY
    source.parent.mkdir(parents=True)
    source.write_text("# Glossary\n\nWords.\n\n```{glossary}\nToken\n  A piece.\n```\n")
    lab.prepare(course)
    assert "### Token" in (course / page).read_text()
    (course / page).unlink()
    assert "### Token" in found(course, page.as_posix())["content"]


def test_no_copy_of_what_is_planned(course):
    with pytest.raises(HTTPError) as error:
        found(course, "work/lessons/10-applications/05-capstone.lesson.ipynb")
    assert error.value.status_code == 404


def test_a_copy_that_cannot_be_made_says_why(course):
    (course / "work").write_text("")
    with pytest.raises(HTTPError, match="make it writable") as error:
        found(course, COPY)
    assert error.value.status_code == 403


def test_a_copy_that_cannot_be_renewed_opens_as_it_is(course, monkeypatch):
    found(course, COPY)

    def blocked(*args):
        raise workspace.Blocked("work cannot be written")

    monkeypatch.setattr(workspace, "start", blocked)
    assert found(course, COPY)["content"]["cells"]


def everything(course):
    """Each file under the course's own folders and what it holds."""
    paths = [
        p for home in ("notebooks", "exercises") for p in (course / home).rglob("*")
    ]
    return {p: p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.parametrize("path", [LESSON, f"/{LESSON}", f"work/../{LESSON}"])
def test_files_of_the_course_are_read_only(course, path):
    (course / "work").mkdir()
    manager = contents(course)
    before = everything(course)
    model = asyncio.run(manager.get(LESSON))
    assert not model["writable"]
    model = {"type": "notebook", "content": model["content"]}
    acts = (
        lambda: manager.save(model, path),
        lambda: manager.delete_file(path),
        lambda: manager.rename_file(path, "work/mine.ipynb"),
        lambda: manager.rename_file("pyproject.toml", path + "2"),
        lambda: manager.copy(path),
        lambda: manager.copy("pyproject.toml", path.rsplit("/", 1)[0]),
        lambda: manager.new_untitled(path.rsplit("/", 1)[0], type="notebook"),
    )
    for act in acts:
        with pytest.raises(HTTPError, match="the course's own file") as error:
            asyncio.run(act())
        assert error.value.status_code == 403
    assert everything(course) == before
    assert asyncio.run(manager.copy(LESSON, "work"))["writable"]
    asyncio.run(manager.save(model, "work/mine.ipynb"))
    asyncio.run(manager.delete_file("work/mine.ipynb"))


def shown(text):
    return nbformat.v4.new_output("display_data", {"text/html": text})


def trusted(course, path):
    """Whether each cell of a notebook is trusted as JupyterLab opens it."""
    cells = found(course, path)["content"]["cells"]
    return [cell["metadata"].get("trusted") for cell in cells]


def test_outputs_of_the_course_are_trusted_and_others_are_not(course):
    nb = nbformat.read(course / LESSON, as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell("g", outputs=[shown("<b>\\n2</b>")]))
    nb.cells[0].outputs = [shown("<input type=range>")]
    nbformat.write(nb, course / LESSON)
    assert trusted(course, LESSON) == trusted(course, COPY) == [True, True]
    mine = nbformat.read(course / COPY, as_version=4)
    mine.cells[1].outputs = [shown("<script>")]
    nbformat.write(mine, course / COPY)
    assert trusted(course, COPY) == [True, False]
    beside = (course / COPY).with_suffix(".new.ipynb")
    nbformat.write(nb, beside)
    assert trusted(course, COPY.replace(".ipynb", ".new.ipynb")) == [True, True]
    nbformat.write(nb, course / "work" / "other.ipynb")
    assert trusted(course, "work/other.ipynb") == [False, False]
