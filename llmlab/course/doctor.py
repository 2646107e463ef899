"""`llmlab doctor`: what is wrong with this environment, and what to do about it.

Every examination is a function that returns one `Finding`. The last two do real work: a
forward pass of the course model whose loss is known, and an all-reduce between two real
processes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmlab.course.syllabus import course_root

GOOD, NOTE, BAD = "good", "note", "bad"
# The packages that lessons import by name: a version other than the lock's is the usual
# reason for other numbers.
IMPORTANT = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "triton",
    "numpy",
    "jupyterlab",
    "nbval",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    verdict: str  # GOOD, NOTE (works, but know this) or BAD (lessons will fail)
    found: str
    advice: str = ""


def python() -> Finding:
    """Python 3.11 to 3.13, in an environment of its own."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding(
            "Python",
            BAD,
            found,
            "use Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 env",
        )
    return Finding("Python", GOOD, found)


def packages() -> Finding:
    """Installed versions against requirements.lock."""
    lock = read_lock(course_root() / "requirements.lock")
    differs = {
        name: installed(name) for name, pin in lock.items() if installed(name) != pin
    }
    missing = sorted(name for name, found in differs.items() if found is None)
    other = [
        f"{name} {found} (lock: {lock[name]})"
        for name, found in differs.items()
        if found
    ]
    if missing:
        return Finding(
            "Packages", BAD, f"missing: {', '.join(missing[:6])}", "run `make env`"
        )
    if other:
        grave = any(name in IMPORTANT for name in differs)
        return Finding(
            "Packages",
            BAD if grave else NOTE,
            "; ".join(other[:6]),
            "run `make env` for the lock's versions",
        )
    return Finding("Packages", GOOD, f"{len(lock)} at the lock's versions")


def read_lock(path: Path) -> dict[str, str]:
    """{package: version} of the lines whose marker holds on this platform."""
    from packaging.markers import Marker

    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement, _, marker = line.partition(";")
        if "==" in requirement and (not marker.strip() or Marker(marker).evaluate()):
            name, pin = requirement.strip().split("==")
            pins[name] = pin
    return pins


def installed(name: str) -> str | None:
    """The installed version without its local part (2.13.0+cpu → 2.13.0), or None."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


def memory() -> Finding:
    """Lessons need up to 3 GiB."""
    import psutil

    free = psutil.virtual_memory().available / 2**30
    found = f"{free:.1f} GiB free of {psutil.virtual_memory().total / 2**30:.1f} GiB"
    if free < 3:
        return Finding(
            "Memory", NOTE, found, "lessons need up to 3 GiB: close other programs"
        )
    return Finding("Memory", GOOD, found)


def cores() -> Finding:
    """Two are enough; a limit below the machine's number (containers) is named."""
    allowed = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    found = f"{allowed} usable of {os.cpu_count()}"
    if allowed < 2:
        return Finding(
            "Cores",
            NOTE,
            found,
            "lessons were timed on 2 cores and will take about twice as long",
        )
    return Finding("Cores", GOOD, found)


def cpu() -> Finding:
    """The CPU, its vector instructions, and what they change for the course."""
    from llmlab.course import cpu as this

    note = this.what_it_changes(this.describe())
    return Finding("CPU", NOTE if note else GOOD, str(this.describe()), note)


def four_bits() -> Finding:
    """bitsandbytes' 4-bit weights and one product with them, against the definition."""
    from llmlab.course import four_bits as examination

    said = examination.in_a_process_of_its_own()
    if said.is_broken:
        return Finding(
            "A 4-bit product", BAD, str(said), "run `make env`, then report it"
        )
    return Finding(
        "A 4-bit product", NOTE if said.advice else GOOD, str(said), said.advice
    )


def gpu() -> Finding:
    """No lesson needs one."""
    import torch

    if torch.cuda.is_available():
        return Finding(
            "GPU", GOOD, f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
        )
    if torch.backends.mps.is_available():
        return Finding("GPU", GOOD, "Apple GPU (mps); the lessons run on the CPU")
    return Finding("GPU", GOOD, "none, and none is needed")


def compiler() -> Finding:
    """torch.compile and the compiler lessons call the system's C++ compiler."""
    found = next(
        (path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None
    )
    if found is None:
        advice = "needed by part 08 only: apt install g++, or xcode-select --install"
        return Finding("C++ compiler", NOTE, "none", advice)
    return Finding("C++ compiler", GOOD, found)


def real_model() -> Finding:
    """SmolLM2-135M-Instruct in the user's cache."""
    from llmlab.models import real_model as real

    if not real.is_fetched():
        return Finding(
            "Real model",
            NOTE,
            "not fetched",
            "run `llmlab model fetch` (98 MB); some lessons need it",
        )
    return Finding("Real model", GOOD, str(real.path()))


def ports() -> Finding:
    """JupyterLab's usual port; a taken one is not an error, JupyterLab looks for the
    next.
    """
    with socket.socket() as s:
        taken = s.connect_ex(("127.0.0.1", 8888)) == 0
    if taken:
        return Finding(
            "Port 8888",
            NOTE,
            "taken",
            "JupyterLab will take the next free one, or: llmlab lab --port 9999",
        )
    return Finding("Port 8888", GOOD, "free")


def forward() -> Finding:
    """The course model's loss on a fixed text equals the one stored beside its
    weights.
    """
    import torch

    from llmlab.models import course_model
    from llmlab.models.language_model import next_token_loss

    golden = json.loads(
        (course_model.MODEL / "golden.json").read_text(encoding="utf-8")
    )
    started = time.time()
    with torch.inference_mode():
        ids = torch.tensor([course_model.load_tokenizer().encode(golden["text"]).ids])
        loss = next_token_loss(course_model.load()(ids), ids).item()
    if not math.isclose(loss, golden["loss"], abs_tol=1e-3):
        found = f"loss {loss:.4f}, expected {golden['loss']:.4f}"
        return Finding(
            "A forward pass",
            BAD,
            found,
            "torch computes something else here: run `make env`, then report it",
        )
    return Finding(
        "A forward pass",
        GOOD,
        f"loss {loss:.3f} as expected, in {time.time() - started:.1f} s",
    )


def _sum_over_ranks(comm) -> list[float]:
    import torch

    return comm.all_reduce(torch.tensor([comm.rank + 1.0, 10.0])).tolist()


def all_reduce() -> Finding:
    """Two real processes over gloo agree on a sum."""
    from llmlab.parallelism.runtime import launch

    started = time.time()
    sums = launch(_sum_over_ranks, 2, timeout=60)
    if sums != [[3.0, 20.0]] * 2:
        return Finding(
            "Two processes",
            BAD,
            f"all-reduce gave {sums}, expected [3, 20] twice",
            "see part 05",
        )
    return Finding(
        "Two processes", GOOD, f"all-reduce agreed, in {time.time() - started:.1f} s"
    )


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    python,
    packages,
    memory,
    cores,
    cpu,
    gpu,
    compiler,
    real_model,
    ports,
    forward,
    four_bits,
    all_reduce,
)


def examine() -> list[Finding]:
    """Run all examinations; one that raises becomes a finding, so that the others are
    still made.
    """
    findings = []
    for examination in EXAMINATIONS:
        try:
            findings.append(examination())
        except Exception as error:
            name = examination.__name__.replace("_", " ").capitalize()
            findings.append(
                Finding(
                    name,
                    BAD,
                    f"{type(error).__name__}: {error}".splitlines()[0],
                    "run `make env`",
                )
            )
    return findings


def run(json_path: Path | None = None) -> int:
    """Print the report (and write it as JSON); 0 when nothing is bad, else 1."""
    from rich.console import Console
    from rich.table import Table

    findings = examine()
    table = Table(title="llmlab doctor", show_lines=False, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    marks = {GOOD: "[green]ok[/]", NOTE: "[yellow]note[/]", BAD: "[red]BAD[/]"}
    for f in findings:
        table.add_row(marks[f.verdict], f.what, f.found, f.advice)
    bad = sum(f.verdict == BAD for f in findings)
    console = Console()
    console.print(table)
    console.print(
        f"{bad} problem{'s' * (bad != 1)}: see the last column."
        if bad
        else "All is well: `llmlab lab` opens the course."
    )
    if json_path is not None:
        json_path.write_text(
            json.dumps(
                {"ok": not bad, "findings": [asdict(f) for f in findings]}, indent=1
            )
            + "\n"
        )
    return 1 if bad else 0
