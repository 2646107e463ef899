"""`llmlab lab`: JupyterLab, opened on the course's landing page.

What would disturb a learner is turned off.

The settings are a folder in the package, so that the learner's own JupyterLab stays as
it is. Nothing is fetched: no news, no update check, no extension list. No file of the
course is written to, so that it can be updated: what a learner opens are copies in
work/ (`lab_contents`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from llmlab.course.kernels import use_warm_kernels, warm_up
from llmlab.course.syllabus import PARTS, Lesson, course_root, lessons

SETTINGS = Path(__file__).parent / "lab_settings"
CONTENTS = "llmlab.course.lab_contents.CourseContents"
EXTENSIONS_OFF = (
    "jupyterlab_jupytext",  # a save must not write a script as well
    "nbgrader.server_extensions.assignment_list",  # the teacher's: seconds to import
    "nbgrader.server_extensions.course_list",
    "nbgrader.server_extensions.formgrader",
    "nbgrader.server_extensions.validate_assignment",
)
LANDING = Path("work") / "START-HERE.md"
TEXT = """\
# Start here

Each lesson is a notebook. Open it, then press **Shift+Enter** to run one cell after the
other: guess where it asks you to, move the sliders, read the code.

Then open its exercises. Fill in a cell, run it and the check below it, and you are
told at once what is right and what is not.

All that you open here are your own copies, in the folder `work/`: try things, write
into them, save. Nothing overwrites them, and nothing leaves this machine.

{lessons}
## In a terminal

| File → New → Terminal | |
|---|---|
| `llmlab check lora` | marks a whole exercise notebook in a fresh kernel |
| `llmlab hint lora` | the next hint |
| `llmlab progress` | the map of the course with what you have done |
| `llmlab reset lora` | a fresh copy of a lesson; yours is kept beside it |
| `llmlab doctor` | when something does not work |

*This page was written when you typed `llmlab lab`; it shows what you had done by then.*
"""


class LabError(Exception):
    """JupyterLab cannot be opened; the message says why and what to do."""


def run(
    port: int | None = None,
    browser: bool = True,
    *,
    ip: str | None = None,
    extra: Sequence[str] = (),
    root: Path | None = None,
    cold: bool = False,
) -> int:
    """Opens JupyterLab and stays until it ends; returns its exit status.

    Args:
        port: the port to serve on; by default the first free one from 8888.
        browser: whether to open a browser.
        ip: the address to listen on; by default this machine alone.
        extra: more options for `jupyter lab`, passed on as they are.
        cold: start each kernel the plain way (`llmlab.course.kernels`).
    """
    try:
        root = root or course_root()
        prepare(root)
        if port is not None:
            check_port(port, ip or "127.0.0.1")
    except (LabError, FileNotFoundError) as error:
        print(f"llmlab: {error}", file=sys.stderr)
        return 1
    argv = command(root, port=port, browser=browser, ip=ip, extra=extra)
    os.chdir(root)
    use_warm_kernels(cold=cold)
    warm_up()  # while JupyterLab starts; it ends with JupyterLab
    sys.stdout.flush()
    os.execv(argv[0], argv)  # so that Ctrl+C reaches JupyterLab alone


def command(
    root: Path,
    *,
    port: int | None,
    browser: bool,
    ip: str | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line that opens JupyterLab on the landing page."""
    argv = [
        *[sys.executable, "-m", "jupyterlab"],
        f"--ServerApp.root_dir={root}",
        f"--LabApp.app_settings_dir={SETTINGS}",
        f"--LabApp.default_url=/lab/workspaces/llmlab/tree/{LANDING.as_posix()}",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        f"--ServerApp.jpserver_extensions={dict.fromkeys(EXTENSIONS_OFF, False)}",
        f"--ServerApp.contents_manager_class={CONTENTS}",
    ]
    if port is not None:
        argv += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if ip:
        argv.append(f"--ServerApp.ip={ip}")
    if not browser:
        argv.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        argv.append("--allow-root")  # in a container, where the learner is often root
    return [*argv, *extra]


def check_port(port: int, ip: str) -> None:
    """Makes sure that the port can be had.

    Raises:
        LabError: another program has it, or it is not a port.
    """
    if not 1 <= port <= 65535:
        raise LabError(f"--port {port}: a port is a number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            why = (error.strerror or "it is taken").lower()
            raise LabError(
                f"port {port} cannot be had ({why}). Another JupyterLab may be"
                " running: `jupyter server list` shows it. Choose another with"
                " --port, or leave --port out"
            ) from None


def prepare(root: Path) -> None:
    """Brings the learner's copies up to date, and writes the landing page.

    Raises:
        LabError: the course's folder cannot be written.
    """
    from llmlab.course import workspace

    try:
        copies = workspace.start_all(root)
        (root / LANDING).parent.mkdir(exist_ok=True)
        (root / LANDING).write_text(landing(root), encoding="utf-8")
    except (OSError, workspace.Blocked) as error:
        raise LabError(str(error)) from None
    for copied in copies:
        if copied.what in ("new beside", "renewed", "unreadable"):
            print(f"llmlab: {copied.message}", flush=True)


def landing(root: Path) -> str:
    """The landing page: what to do, and a table of the lessons with what is done."""
    from llmlab.course import progress

    done, _ = progress.load(root)
    blocks = []
    planned = 0
    for number, (part, title) in enumerate(PARTS.items(), 1):
        rows = []
        for lesson in lessons():
            if lesson.part != part:
                continue
            if lesson.notebook(root).is_file():
                rows.append(row(lesson, root, done["lessons"].get(lesson.slug, {})))
            else:
                planned += 1
        if rows:
            head = [
                f"## {number}. {title}",
                "",
                "| lesson | exercises | done |",
                "|---|---|---|",
            ]
            blocks.append("\n".join([*head, *rows, ""]))
    if planned:
        blocks.append(f"{planned} more lessons are planned.\n")
    return TEXT.format(lessons="\n".join(blocks))


def row(lesson: Lesson, root: Path, entries: dict) -> str:
    """One line of the table.

    `entries` is what the record of progress holds for this lesson, by exercise.
    """
    from llmlab.course.workspace import Kind, new_path

    read = f"[{lesson.title}](lessons/{lesson.slug}.ipynb)"
    exercise = ""
    if lesson.work(root).is_file():
        exercise = f"[exercises]({lesson.slug}.ipynb)"
    if new_path(lesson, root, Kind.LESSON).is_file():
        read += f", [new version](lessons/{lesson.slug}.new.ipynb)"
    if new_path(lesson, root, Kind.EXERCISES).is_file():
        exercise += f", [new version]({lesson.slug}.new.ipynb)"
    right = 0
    for entry in entries.values():
        if entry.get("outcome") == "right" or "first_right" in entry:
            right += 1
    total = count_checks(lesson, root)
    done = ""
    if total:
        done = f"{right} of {total}"
        if right == total:
            done = f"✓ {done}"
    return f"| {read} | {exercise} | {done} |"


def count_checks(lesson: Lesson, root: Path) -> int:
    """How many exercises the lesson has."""
    import json

    path = lesson.exercise(root)
    if not path.is_file():
        return 0
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return sum("check" in cell["metadata"].get("tags", []) for cell in cells)
