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
from llmlab.course.landing import landing
from llmlab.course.syllabus import course_root

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
STARTING = (
    "llmlab: JupyterLab starts. Its address comes in a moment; Ctrl+C twice ends it."
)


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
    print(STARTING, flush=True)
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
        "--Application.log_level=WARN",  # what extensions say of themselves is noise
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
        workspace.write_glossary(root)
    except (OSError, workspace.Blocked) as error:
        raise LabError(str(error)) from None
    for copied in copies:
        if copied.what in ("new beside", "renewed", "unreadable"):
            print(f"llmlab: {copied.message}", flush=True)
