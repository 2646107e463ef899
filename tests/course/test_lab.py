import json
import socket
from types import SimpleNamespace

import nbformat
import pytest

from llmlab.course import lab, workspace
from llmlab.course.lab import LabError
from llmlab.course.syllabus import find, lessons


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course with one lesson and one exercise; the learner's home is a temporary folder."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "pyproject.toml").touch()
    lesson = find("01-welcome")
    for path in (lesson.notebook(tmp_path), lesson.exercise(tmp_path)):
        path.parent.mkdir(parents=True)
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("check.f(f)", metadata={"tags": ["check"]})])
        nb.cells[0].id = "check-f"
        nb.metadata["llmlab"] = {"version": "1"}
        nbformat.write(nb, path)
    lesson.notebook(tmp_path).with_suffix(".py").touch()
    return tmp_path


def test_prepare_makes_copies_and_a_landing_page(course):
    lab.prepare(course)
    assert find("01-welcome").work(course).is_file()
    text = (course / lab.LANDING).read_text()
    assert "[Welcome](../notebooks/01-start/01-welcome.ipynb) | [exercises](01-start/01-welcome.ipynb) | 0 of 1" in text
    assert f"{len(lessons()) - 1} more lessons are planned" in text


def test_links_of_the_landing_page_lead_somewhere(course):
    import re

    lab.prepare(course)
    page = course / lab.LANDING
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert len(targets) == 2
    assert all((page.parent / target).is_file() for target in targets)


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
    told = [workspace.Copied(course, "new beside", "the course changed"), workspace.Copied(course, "kept", "quiet")]
    monkeypatch.setattr(workspace, "start_all", lambda root: told)
    lab.prepare(course)
    out = capsys.readouterr().out
    assert "the course changed" in out and "quiet" not in out


def test_notebooks_of_the_course_are_trusted(course):
    from nbformat.sign import NotebookNotary

    lab.prepare(course)
    nb = nbformat.read(find("01-welcome").notebook(course), as_version=4)
    assert NotebookNotary().check_signature(nb)


def test_a_folder_that_cannot_be_written(course, monkeypatch):
    def blocked(root):
        raise workspace.Blocked("work cannot be written")

    monkeypatch.setattr(workspace, "start_all", blocked)
    with pytest.raises(LabError, match="cannot be written"):
        lab.prepare(course)
    assert lab.run(root=course) == 1


def test_command():
    from pathlib import Path

    argv = lab.command(Path("/course"), port=9001, browser=False, ip="0.0.0.0", extra=["--debug"])
    assert {"--no-browser", "--ServerApp.port=9001", "--ServerApp.port_retries=0", "--ServerApp.ip=0.0.0.0"} <= set(
        argv
    )
    assert argv[-1] == "--debug" and "--ServerApp.root_dir=/course" in argv
    quiet = lab.command(Path("/course"), port=None, browser=True)
    assert not [a for a in quiet if "port" in a or "browser" in a or "ip=" in a]


def test_settings_are_in_the_package():
    settings = json.loads((lab.SETTINGS / "overrides.json").read_text())
    assert settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {"markdown": "Markdown Preview"}
    assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"


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
    monkeypatch.setattr(lab.os, "execv", lambda program, argv: setattr(seen, "argv", argv))
    monkeypatch.chdir(course)
    lab.run(browser=False)
    assert seen.argv[1:3] == ["-m", "jupyterlab"] and f"--ServerApp.root_dir={course}" in seen.argv


def test_no_course(tmp_path, monkeypatch, capsys):
    def none():
        raise FileNotFoundError("the course's folder was not found")

    monkeypatch.setattr(lab, "course_root", none)
    assert lab.run() == 1
    assert "was not found" in capsys.readouterr().err
