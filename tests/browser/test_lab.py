"""JupyterLab as `llmlab lab` opens it, from the landing page to a marked exercise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmlab.course.syllabus import find

ROOT = Path(__file__).resolve().parents[2]
WELCOME = find("01-welcome")
LESSON = f"work/lessons/{WELCOME.slug}.ipynb"
ON_TOP = ".jp-NotebookPanel:not(.lm-mod-hidden)"
WRONG = "def weight_bytes(params, bits=16): return params * bits // 8"
RIGHT = "def weight_bytes(params, bits=16): return math.ceil(params * bits / 8)"
AUTOSAVE = 2  # seconds
START = (
    "from llmlab.course.lab import run; run({port}, False,"
    " extra=['--IdentityProvider.token=', {flag}])"
)

pytestmark = pytest.mark.slow


def git(folder: Path, *words: str) -> str:
    """What git says; it must succeed."""
    who = ["-c", "user.name=Course", "-c", "user.email=course@example.org"]
    argv = ["git", "-C", str(folder), *who, *words]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The course's repository, with the lesson Welcome alone."""
    root = tmp_path_factory.mktemp("published")
    files = [ROOT / "pyproject.toml", ROOT / ".gitignore", WELCOME.exercise(ROOT)]
    for path in (WELCOME.notebook(ROOT), WELCOME.solution(ROOT)):
        files += [path, path.with_suffix(".py")]
    for path in files:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "the course")
    return root


@pytest.fixture(scope="module")
def course(published, tmp_path_factory):
    """A learner's clone, so that nobody's work/ is touched; JupyterLab saves often."""
    root = tmp_path_factory.mktemp("learner") / "course"
    git(published, "clone", "--quiet", str(published), str(root))
    folder = home(root) / "config/lab/user-settings/@jupyterlab/docmanager-extension"
    folder.mkdir(parents=True)
    settings = folder / "plugin.jupyterlab-settings"
    settings.write_text(json.dumps({"autosaveInterval": AUTOSAVE}))
    return root


def home(root: Path) -> Path:
    """Where the learner's settings are: beside the course."""
    return root.parent / "home"


def environment(root: Path) -> dict[str, str]:
    """The learner's environment.

    Only settings, workspaces and signatures go to a temporary folder.
    """
    folders = {
        f"JUPYTER_{name}_DIR": str(home(root) / name.lower())
        for name in ("CONFIG", "DATA", "RUNTIME")
    }
    return os.environ | folders | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def lab(course):
    """The address of a running `llmlab lab`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = START.format(port=port, flag="'--LabApp.expose_app_in_browser=True'")
    log = (home(course) / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=course,
        env=environment(course),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while time.time() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.3)
    else:
        pytest.fail((home(course) / "lab.log").read_text()[-2000:])
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def page(chromium, lab):
    """The page that `llmlab lab` opens.

    It may ask only its own server, and its scripts may not fail.
    """
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(90_000)
    faults = []
    own = (lab, lab.replace("http", "ws"), "data:", "blob:")
    page.on(
        "request",
        lambda r: None if r.url.startswith(own) else faults.append(f"asked {r.url}"),
    )
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.goto(lab)
    yield page
    page.close()
    assert not faults, faults


def command(page, name: str, arguments: dict | None = None) -> None:
    """Executes one of JupyterLab's commands, and waits until it is done.

    First it waits until the command's extension has registered it.
    """
    page.wait_for_function(
        "name => window.jupyterapp.commands.hasCommand(name)", arg=name
    )
    page.evaluate(
        "async ([name, args]) => { await window.jupyterapp.commands.execute(name,"
        " args); }",
        [name, arguments or {}],
    )


def check(course: Path) -> tuple[int, dict]:
    """`llmlab check 01-welcome`: its exit status, and what became of each exercise."""
    argv = [
        sys.executable,
        "-c",
        "from llmlab.course.cli.main import main; main()",
        "check",
        "01-welcome",
        "--json",
        "-",
    ]
    done = subprocess.run(
        argv,
        cwd=course,
        env=environment(course),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def cell(page, id_: str, text: str | None = None) -> str:
    """Goes to a cell, types `text` over it, runs it, and returns what it shows."""
    page.evaluate(
        """id => { const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex =
            notebook.widgets.findIndex(w => w.model.id === id);
        notebook.mode = 'edit';
        return notebook.scrollToCell(notebook.activeCell); }""",
        id_,
    )
    if text is not None:
        editor = page.locator(
            ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-mod-active .cm-content"
        )
        editor.focus()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)
    command(page, "notebook:run-cell")
    return page.evaluate(
        """id => window.jupyterapp.shell.currentWidget.content.widgets
            .find(w => w.model.id === id).outputArea.node.innerText""",
        id_,
    )


def test_it_opens_on_the_landing_page(page):
    page.wait_for_selector(".jp-MarkdownViewer h1:has-text('Start here')")
    assert page.locator(".jp-MarkdownViewer a:has-text('Welcome')").count() == 1


def test_a_link_leads_to_a_copy_of_the_lesson_whose_stored_slider_moves(page):
    with saved(page, LESSON):  # by itself: JupyterLab finds it changed once it is open
        page.click(".jp-MarkdownViewer a:has-text('Welcome')")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")
    assert opened(page) == {"path": LESSON, "writable": True}
    # Off from here on: a save by hand that meets one by itself asks "File Changed".
    command(page, "docmanager:toggle-autosave")
    figure = page.locator(".jp-Notebook .llmlab-explore").first
    figure.wait_for(state="attached")
    slider, image = figure.locator("input").first, figure.locator("img")
    slider.scroll_into_view_if_needed()
    slider.focus()
    page.keyboard.press("Home")
    before = image.get_attribute("alt")
    page.keyboard.press("End")
    assert image.get_attribute("alt") != before
    assert page.locator(".jp-toast, .Toastify__toast").count() == 0, (
        "no news, no questions"
    )


@contextmanager
def saved(page, path: str):
    """Waits until JupyterLab has written `path`."""

    def put(r):
        return r.request.method == "PUT" and f"/{path}" in r.url

    with page.expect_response(put) as answer:
        yield
    assert answer.value.status == 200


def opened(page) -> dict:
    """The path of what is on top, and whether it can be saved."""
    return page.evaluate(
        """async () => { const context = window.jupyterapp.shell.currentWidget.context;
        await context.ready; const { path, writable } = context.contentsModel;
        return { path, writable }; }"""
    )


def test_run_all_and_the_widget_moves_the_figure(page):
    command(page, "notebook:run-all-cells")
    failed = page.evaluate(
        """() => {
        const failed = w => [...Array(w.outputArea?.model.length ?? 0).keys()]
            .some(i => w.outputArea.model.get(i).type === 'error');
        return window.jupyterapp.shell.currentWidget.content.widgets
            .filter(failed).length; }"""
    )
    assert failed == 0
    handle = page.locator(".jp-Notebook .widget-slider .noUi-handle").first
    handle.wait_for(state="attached")
    handle.scroll_into_view_if_needed()
    image = page.locator(".jp-Notebook .widget-html .llmlab-explore img").first
    before = image.get_attribute("src"), image.get_attribute("alt")
    handle.focus()
    for key in ("ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.wait_for_function(
        "before => document.querySelector('.widget-html .llmlab-explore img').src !=="
        " before",
        arg=before[0],
    )
    assert image.get_attribute("alt") != before[1]
    caption = page.locator(".jp-Notebook .llmlab-caption").first
    assert caption.inner_text().split() == image.get_attribute("alt").split()


def read_the_landing_page(page) -> None:
    """Brings the landing page to the front."""
    landing = {"path": "work/START-HERE.md", "factory": "Markdown Preview"}
    command(page, "docmanager:open", landing)


def test_what_was_opened_run_and_saved_is_in_no_tracked_file(page, course):
    with saved(page, LESSON):
        command(page, "docmanager:save")
    assert git(course, "status", "--porcelain") == ""


def test_the_courses_own_file_can_be_scribbled_on_but_not_saved(page, course):
    own = WELCOME.notebook(course).relative_to(course).as_posix()
    command(page, "docmanager:open", {"path": own})
    assert opened(page) == {"path": own, "writable": False}
    page.wait_for_selector(f"{ON_TOP} :text('notebook is read-only')")
    page.evaluate("""() => { const { content } = window.jupyterapp.shell.currentWidget;
        content.widgets[0].model.sharedModel.setSource('mine'); }""")
    page.locator(f"{ON_TOP} .jp-Notebook").focus()
    page.keyboard.press("Control+s")
    page.wait_for_selector(".Toastify__toast:has-text('Save as')")
    refused = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.context.save().catch(String)"""
    )
    assert "the course's own file" in refused, "even where JupyterLab would save"
    page.click(".jp-Dialog button:has-text('Close')")
    page.evaluate("() => { window.jupyterapp.commands.execute('application:close'); }")
    page.click(".jp-Dialog button:has-text('Discard')")
    assert git(course, "status", "--porcelain") == ""


def test_the_course_is_updated_and_the_copy_with_it(page, course, published):
    path = WELCOME.notebook(published)
    nb = json.loads(path.read_text())
    nb["cells"][0]["source"].append("\n\nA sentence that is new.")
    path.write_text(json.dumps(nb))
    git(published, "commit", "--quiet", "--all", "--message", "a better lesson")
    git(course, "pull", "--quiet", "--ff-only")
    assert git(course, "status", "--porcelain") == ""
    command(page, "notebook:shutdown-kernel")
    command(page, "docmanager:open", {"path": LESSON})
    command(page, "application:close")
    read_the_landing_page(page)
    page.click(".jp-MarkdownViewer a:has-text('Welcome')")
    page.wait_for_selector(f"{ON_TOP} .jp-RenderedMarkdown :text('is new.')")
    assert opened(page) == {"path": LESSON, "writable": True}


def test_an_exercise_done_wrongly_then_rightly(page, course):
    read_the_landing_page(page)
    page.click(".jp-MarkdownViewer a:has-text('exercises')")
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget?.context?.path"
        "?.startsWith('work/01-start/01-welcome')"
    )
    page.evaluate(
        "async () => { await window.jupyterapp.shell.currentWidget.context.ready; }"
    )
    page.evaluate(
        "async () => { await"
        " window.jupyterapp.shell.currentWidget.sessionContext.ready; }"
    )
    imports = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
            .find(w => w.model.type === 'code').model.id"""
    )
    cell(page, imports)
    cell(page, "exercise-weight_bytes")
    assert "not done" in cell(page, "check-weight_bytes").lower()
    cell(page, "exercise-weight_bytes", WRONG)
    wrong = cell(page, "check-weight_bytes")
    assert "round" in wrong.lower(), f"the diagnosis names the mistake: {wrong}"
    cell(page, "exercise-weight_bytes", RIGHT)
    right = cell(page, "check-weight_bytes")
    assert "1 point" in right or "✓" in right or "right" in right.lower(), right
    command(page, "docmanager:save")
    status, result = check(course)
    assert status == 1 and outcomes(result).count("right") == 1, (
        "two exercises are still to do"
    )


def test_the_solution_is_a_copy_made_when_it_is_asked_for(page, course):
    assert not WELCOME.solution_copy(course).exists()
    page.locator(f"{ON_TOP} a[href*='solutions']").first.click()
    page.wait_for_function("""() => window.jupyterapp.shell.currentWidget.context?.path
        ?.startsWith('work/solutions/')""")
    path = WELCOME.solution_copy(course).relative_to(course).as_posix()
    assert opened(page) == {"path": path, "writable": True}
    assert git(course, "status", "--porcelain") == ""


def outcomes(result: dict) -> list[str]:
    """The outcome of each exercise in the JSON of `llmlab check`."""
    (lesson,) = result["lessons"]
    return [exercise["outcome"] for exercise in lesson["exercises"]]
