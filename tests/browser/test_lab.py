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
from playwright.sync_api import Error, TimeoutError

from llmlab.course.book.terms import GLOSSARY
from llmlab.course.syllabus import find
from llmlab.course.workspace import GLOSSARY_PAGE

ROOT = Path(__file__).resolve().parents[2]
WELCOME = find("01-welcome")
LESSON = f"work/lessons/{WELCOME.slug}.lesson.ipynb"
ON_TOP = ".jp-NotebookPanel:not(.lm-mod-hidden)"
# In a script: the cell with this id, of the notebook on top.
CELL = """window.jupyterapp.shell.currentWidget.content.widgets
    .find(w => w.model.id === id)"""
TOAST = ".jp-toast, .Toastify__toast"
# A link that JupyterLab has made its own. A click before that would leave the page.
LINK = "a[href*='/files/']"
WRONG = "def weight_bytes(params, bits=16): return params * bits // 8"
RIGHT = "def weight_bytes(params, bits=16): return math.ceil(params * bits / 8)"
AUTOSAVE = 2  # seconds
LIMIT = 120_000  # milliseconds for one step: a busy machine is several times slower
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
    files.append(ROOT / GLOSSARY)
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
    page.set_default_timeout(LIMIT)
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
    wait_until(page, "name => window.jupyterapp.commands.hasCommand(name)", name)
    done(
        page,
        "async ([name, args]) => {"
        " await window.jupyterapp.commands.execute(name, args); }",
        [name, arguments or {}],
    )


def wait_until(page, script: str, argument=None) -> None:
    """Waits until the script is true in the page; says what is shown when it stays."""
    try:
        page.wait_for_function(script, arg=argument)
    except TimeoutError as error:
        raise AssertionError(
            f"not in {LIMIT / 1000:.0f} s: {script} of {argument}. {asked(page)}"
        ) from error


def done(page, script: str, argument=None):
    """What an asynchronous script of the page answers; it must do so in time."""
    try:
        return page.evaluate(
            f"""argument => Promise.race([
                ({script})(argument),
                new Promise((_, late) => setTimeout(late, {LIMIT}, Error('late'))),
            ])""",
            argument,
        )
    except Error as error:
        raise AssertionError(f"{error} in {script}. {asked(page)}") from error


def asked(page) -> str:
    """What JupyterLab asks or tells the reader now: nothing else can be done then."""
    texts = page.locator(f".jp-Dialog, {TOAST}").all_inner_texts()
    return f"JupyterLab says: {texts}"


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


def cell(page, id_: str, text: str | None = None, *, shows: str = "") -> str:
    """Goes to a cell, types `text` over it, runs it, and returns what it shows.

    Waits until that has the words `shows`: outputs are drawn after a cell has run.
    """
    done(
        page,
        """async id => { const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex =
            notebook.widgets.findIndex(w => w.model.id === id);
        await notebook.scrollToCell(notebook.activeCell);
        await notebook.activeCell.ready;
        notebook.mode = 'edit';
        notebook.activeCell.editor.focus(); }""",
        id_,
    )
    wait_until(
        page,
        f"""id => {{ const cell = {CELL}; return cell.editor.hasFocus()
            && cell.node.contains(document.activeElement); }}""",
        id_,
    )
    if text is not None:
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)
        wait_until(
            page,
            f"([id, text]) => {CELL}.model.sharedModel.getSource() === text",
            [id_, text],
        )
    command(page, "notebook:run-cell")
    wait_until(
        page,
        f"""([id, words]) => {CELL}.outputArea.node.innerText.toLowerCase()
            .includes(words)""",
        [id_, shows],
    )
    return page.evaluate(f"id => {CELL}.outputArea.node.innerText", id_)


def test_it_opens_on_the_landing_page(page):
    page.wait_for_selector(".jp-MarkdownViewer h1:has-text('Start here')")
    # what comes next, and the lesson's own line
    assert page.locator(".jp-MarkdownViewer a:has-text('Welcome')").count() == 2


def test_a_link_leads_to_a_copy_of_the_lesson_whose_stored_slider_moves(page):
    with saved(page, LESSON):  # by itself: JupyterLab finds it changed once it is open
        page.click(f".jp-MarkdownViewer {LINK}:has-text('Welcome')")
    assert opened(page, LESSON) == {"path": LESSON, "writable": True}
    # Off from here on: a save by hand that meets one by itself asks "File Changed".
    command(page, "docmanager:toggle-autosave")
    kernel_is_ready(page)  # JupyterLab takes the focus no more
    figure = page.locator(".jp-Notebook .llmlab-explore").first
    figure.wait_for(state="attached")
    slider, image = figure.locator("input").first, figure.locator("img")
    slider.scroll_into_view_if_needed()
    slider.press("Home")
    before = image.get_attribute("alt")
    slider.press("End")
    last = image.get_attribute("alt")
    assert last != before
    page.keyboard.press("ArrowLeft")  # JupyterLab would go to another cell
    assert image.get_attribute("alt") not in (before, last)
    page.keyboard.press("ArrowRight")
    assert image.get_attribute("alt") == last
    assert page.locator(TOAST).count() == 0, "no news, no questions"


@contextmanager
def saved(page, path: str):
    """Waits until JupyterLab has written `path`."""

    def put(r):
        return r.request.method == "PUT" and f"/{path}" in r.url

    with page.expect_response(put) as answer:
        yield
    assert answer.value.status == 200


def opened(page, path: str) -> dict:
    """The path of what is on top, and whether it can be saved.

    Waits until `path` is on top and has been read.
    """
    wait_until(
        page,
        "path => window.jupyterapp.shell.currentWidget?.context?.path === path",
        path,
    )
    return done(
        page,
        """async () => { const context = window.jupyterapp.shell.currentWidget.context;
        await context.ready; const { path, writable } = context.contentsModel;
        return { path, writable }; }""",
    )


def kernel_is_ready(page) -> None:
    """Waits until the kernel of the notebook on top has started and has nothing to do.

    A notebook that is run, saved or closed earlier is another test than is meant.
    """
    done(
        page,
        """async () => {
        await window.jupyterapp.shell.currentWidget.sessionContext.ready; }""",
    )
    wait_until(
        page,
        """() => window.jupyterapp.shell.currentWidget.sessionContext
            .session?.kernel?.status === 'idle'""",
    )


def test_a_term_leads_to_its_place_in_the_glossary(page):
    link = page.locator(f"{ON_TOP} a[href*='GLOSSARY.md']").first
    assert len(link.get_attribute("title")) > 20, "a hover says what it means"
    word = link.get_attribute("href").partition("#")[2]
    link.click()
    opened(page, GLOSSARY_PAGE.as_posix())
    heading = page.locator(f".jp-MarkdownViewer [data-jupyter-id='{word}']")
    heading.wait_for()
    wait_until(
        page,
        """word => { const viewer = document.querySelector(
            '.jp-MarkdownViewer:has([data-jupyter-id="' + word + '"])');
        const heading = viewer.querySelector(`[data-jupyter-id="${word}"]`);
        const { top, bottom } = viewer.getBoundingClientRect();
        const place = heading.getBoundingClientRect();
        return place.top >= top - 20 && place.bottom <= bottom; }""",
        word,
    )
    command(page, "application:close")
    opened(page, LESSON)  # what was below it


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
    for key in ("ArrowRight", "ArrowRight"):
        handle.press(key)
    # The kernel draws it anew, and after it the caption, once for each key.
    wait_until(
        page,
        """([src, alt]) => {
        const image = document.querySelector('.widget-html .llmlab-explore img');
        const caption = document.querySelector('.jp-Notebook .llmlab-caption');
        const words = text => text.split(/\\s+/).filter(Boolean).join(' ');
        return image && image.getAttribute('src') !== src && image.alt !== alt
            && words(caption.innerText) === words(image.alt); }""",
        before,
    )


def test_a_guess_is_compared_with_the_answer(page):
    field = page.locator(f"{ON_TOP} .llmlab-predict input[type=text]").first
    field.scroll_into_view_if_needed()
    field.fill("49")
    page.locator(f"{ON_TOP} .llmlab-predict :text('Kept.')").wait_for()
    settles = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
            .map(w => w.model)
            .find(m => m.sharedModel.getSource().includes('guess.settle(')).id"""
    )
    told = cell(page, settles, shows="you said")
    assert "You said 49: the answer is 13.7 times as large." in told


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
    assert opened(page, own) == {"path": own, "writable": False}
    kernel_is_ready(page)
    page.wait_for_selector(f"{ON_TOP} :text('notebook is read-only')")
    page.evaluate("""() => { const { content } = window.jupyterapp.shell.currentWidget;
        content.widgets[0].model.sharedModel.setSource('mine'); }""")
    page.locator(f"{ON_TOP} .jp-Notebook").press("Control+s")
    page.wait_for_selector(".Toastify__toast:has-text('Save as')")
    refused = done(
        page,
        """() => window.jupyterapp.shell.currentWidget.context.save().catch(String)""",
    )
    assert "the course's own file" in refused, "even where JupyterLab would save"
    page.click(".jp-Dialog button:has-text('Close')")
    page.wait_for_selector(".jp-Dialog", state="detached")
    page.evaluate("() => { window.jupyterapp.commands.execute('application:close'); }")
    page.click(".jp-Dialog button:has-text('Discard')")
    opened(page, LESSON)  # what was below it
    assert git(course, "status", "--porcelain") == ""


def test_the_course_is_updated_and_the_copy_with_it(page, course, published):
    path = WELCOME.notebook(published)
    nb = json.loads(path.read_text())
    nb["cells"][0]["source"].append("\n\nA sentence that is new.")
    path.write_text(json.dumps(nb))
    git(published, "commit", "--quiet", "--all", "--message", "a better lesson")
    git(course, "pull", "--quiet", "--ff-only")
    assert git(course, "status", "--porcelain") == ""
    command(page, "docmanager:open", {"path": LESSON})
    opened(page, LESSON)
    command(page, "notebook:shutdown-kernel")
    # Closed by hand it may ask whether to save: a widget whose kernel went is a change.
    page.evaluate("() => window.jupyterapp.shell.currentWidget.dispose()")
    wait_until(
        page,
        """path => ![...window.jupyterapp.shell.widgets('main')]
            .some(w => w.context?.path === path)""",
        LESSON,
    )
    read_the_landing_page(page)
    page.click(f".jp-MarkdownViewer {LINK}:has-text('Welcome')")
    page.wait_for_selector(f"{ON_TOP} .jp-RenderedMarkdown :text('is new.')")
    assert opened(page, LESSON) == {"path": LESSON, "writable": True}
    kernel_is_ready(page)


def test_an_exercise_done_wrongly_then_rightly(page, course):
    read_the_landing_page(page)
    page.click(f".jp-MarkdownViewer {LINK}:has-text('exercises')")
    opened(page, WELCOME.work(course).relative_to(course).as_posix())
    kernel_is_ready(page)
    imports = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
            .find(w => w.model.type === 'code').model.id"""
    )
    cell(page, imports)
    cell(page, "exercise-weight_bytes")
    cell(page, "check-weight_bytes", shows="not done")
    cell(page, "exercise-weight_bytes", WRONG)
    # The diagnosis names the mistake.
    cell(page, "check-weight_bytes", shows="round")
    cell(page, "exercise-weight_bytes", RIGHT)
    cell(page, "check-weight_bytes", shows="1 point")
    command(page, "docmanager:save")
    status, result = check(course)
    assert status == 1 and outcomes(result).count("right") == 1, (
        "two exercises are still to do"
    )


def test_the_solution_is_a_copy_made_when_it_is_asked_for(page, course):
    copy = WELCOME.solution_copy(course)
    assert not copy.exists()
    page.locator(f"{ON_TOP} {LINK}[href*='solutions']").first.click()
    path = copy.relative_to(course).as_posix()
    assert opened(page, path) == {"path": path, "writable": True}
    kernel_is_ready(page)
    assert git(course, "status", "--porcelain") == ""


def outcomes(result: dict) -> list[str]:
    """The outcome of each exercise in the JSON of `llmlab check`."""
    (lesson,) = result["lessons"]
    return [exercise["outcome"] for exercise in lesson["exercises"]]
