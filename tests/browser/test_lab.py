"""JupyterLab as `llmlab lab` opens it, driven from the landing page to a marked exercise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmlab.course.syllabus import find

ROOT = Path(__file__).resolve().parents[2]
WELCOME = find("01-welcome")
WRONG = "def weight_bytes(params, bits=16): return params * bits // 8"
RIGHT = "def weight_bytes(params, bits=16): return math.ceil(params * bits / 8)"
START = "from llmlab.course.lab import run; run({port}, False, extra=['--IdentityProvider.token=', {flag}])"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of the course with the lesson Welcome alone, so that nobody's work/ is touched."""
    root = tmp_path_factory.mktemp("course")
    shutil.copy(ROOT / "pyproject.toml", root)
    for path in (WELCOME.notebook(ROOT), WELCOME.notebook(ROOT).with_suffix(".py"), WELCOME.exercise(ROOT)):
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


def environment(root: Path) -> dict[str, str]:
    """The learner's, but for settings, workspaces and signatures, which go to a temporary folder."""
    home = root / "home"
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    return os.environ | folders | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def lab(course):
    """The address of a running `llmlab lab`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = START.format(port=port, flag="'--LabApp.expose_app_in_browser=True'")
    log = (course / "lab.log").open("w")
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
        pytest.fail((course / "lab.log").read_text()[-2000:])
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def page(chromium, lab):
    """The page that `llmlab lab` opens; it may ask only its own server, and its scripts may not fail."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(90_000)
    faults = []
    own = (lab, lab.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else faults.append(f"asked {r.url}"))
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.goto(lab)
    yield page
    page.close()
    assert not faults, faults


def command(page, name: str, arguments: dict | None = None) -> None:
    """Executes one of JupyterLab's commands, once its extension has registered it, and waits until it is done."""
    page.wait_for_function("name => window.jupyterapp.commands.hasCommand(name)", arg=name)
    page.evaluate(
        "async ([name, args]) => { await window.jupyterapp.commands.execute(name, args); }", [name, arguments or {}]
    )


def check(course: Path) -> tuple[int, dict]:
    """`llmlab check 01-welcome`: its exit status, and what became of each exercise."""
    argv = [sys.executable, "-c", "from llmlab.course.cli import main; main()", "check", "01-welcome", "--json", "-"]
    done = subprocess.run(argv, cwd=course, env=environment(course), capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def cell(page, id_: str, text: str | None = None) -> str:
    """Goes to a cell, types `text` over what it holds, runs it, and returns what it shows."""
    page.evaluate(
        """id => { const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = notebook.widgets.findIndex(w => w.model.id === id); notebook.mode = 'edit';
        return notebook.scrollToCell(notebook.activeCell); }""",
        id_,
    )
    if text is not None:
        editor = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-mod-active .cm-content")
        editor.focus()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)
    command(page, "notebook:run-cell")
    return page.evaluate(
        """id => window.jupyterapp.shell.currentWidget.content.widgets.find(w => w.model.id === id)
        .outputArea.node.innerText""",
        id_,
    )


def test_it_opens_on_the_landing_page(page):
    page.wait_for_selector(".jp-MarkdownViewer h1:has-text('Start here')")
    assert page.locator(".jp-MarkdownViewer a:has-text('Welcome')").count() == 1
    page.wait_for_timeout(1500)
    assert page.locator(".jp-toast, .Toastify__toast").count() == 0, "no news, no questions"


def test_a_link_leads_to_the_lesson_whose_stored_slider_moves(page):
    page.click(".jp-MarkdownViewer a:has-text('Welcome')")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")
    figure = page.locator(".jp-Notebook .llmlab-explore").first
    figure.wait_for(state="attached")
    slider, image = figure.locator("input").first, figure.locator("img")
    slider.scroll_into_view_if_needed()
    slider.focus()
    page.keyboard.press("Home")
    before = image.get_attribute("alt")
    page.keyboard.press("End")
    assert image.get_attribute("alt") != before


def test_run_all_and_the_widget_moves_the_figure(page):
    command(page, "notebook:run-all-cells")
    failed = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.outputArea &&
        [...Array(w.outputArea.model.length).keys()].some(i => w.outputArea.model.get(i).type === 'error')).length"""
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
        "before => document.querySelector('.widget-html .llmlab-explore img').src !== before", arg=before[0]
    )
    assert image.get_attribute("alt") != before[1]
    caption = page.locator(".jp-Notebook .llmlab-caption").first
    assert caption.inner_text().split() == image.get_attribute("alt").split()


def test_an_exercise_done_wrongly_then_rightly(page, course):
    command(page, "notebook:shutdown-kernel")
    command(page, "docmanager:open", {"path": "work/START-HERE.md", "factory": "Markdown Preview"})
    page.click(".jp-MarkdownViewer a:has-text('exercises')")
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget?.context?.path?.startsWith('work/01-start/01-welcome')"
    )
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.ready; }")
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready; }")
    imports = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets.find(w => w.model.type === 'code').model.id"""
    )
    cell(page, imports)
    cell(page, "exercise-weight_bytes")
    assert "not done" in cell(page, "check-weight_bytes").lower()
    cell(page, "exercise-weight_bytes", WRONG)
    wrong = cell(page, "check-weight_bytes")
    assert "round" in wrong.lower(), f"the diagnosis names the mistake: {wrong}"
    command(page, "docmanager:save")
    status, result = check(course)
    assert status == 1 and "right" not in outcomes(result)
    cell(page, "exercise-weight_bytes", RIGHT)
    right = cell(page, "check-weight_bytes")
    assert "1 point" in right or "✓" in right or "right" in right.lower(), right
    command(page, "docmanager:save")
    status, result = check(course)
    assert status == 1 and outcomes(result).count("right") == 1, "two exercises are still to do"


def outcomes(result: dict) -> list[str]:
    """The outcome of each exercise in the JSON of `llmlab check`."""
    (lesson,) = result["lessons"]
    return [exercise["outcome"] for exercise in lesson["exercises"]]
