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

# The verdict of a finding.
GOOD = "good"
NOTE = "note"
BAD = "bad"
SLOW = 5.0  # seconds of a forward pass of the course model
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
        advice = "use Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 env"
        return Finding("Python", BAD, found, advice)
    return Finding("Python", GOOD, found)


def packages() -> Finding:
    """Installed versions against requirements.lock."""
    lock = read_lock(course_root() / "requirements.lock")
    missing = []
    other = []
    is_grave = False
    for name, pin in lock.items():
        found = installed(name)
        if found is None:
            missing.append(name)
        elif found != pin:
            other.append(f"{name} {found} (lock: {pin})")
            is_grave = is_grave or name in IMPORTANT
    if missing:
        named = ", ".join(sorted(missing)[:6])
        return Finding("Packages", BAD, f"missing: {named}", "run `make env`")
    if other:
        verdict = BAD if is_grave else NOTE
        advice = "run `make env` for the lock's versions"
        return Finding("Packages", verdict, "; ".join(other[:6]), advice)
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
        advice = "lessons need up to 3 GiB: close other programs"
        return Finding("Memory", NOTE, found, advice)
    return Finding("Memory", GOOD, found)


def cores() -> Finding:
    """Two are enough; a limit below the machine's number (containers) is named."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    found = f"{allowed} usable of {os.cpu_count()}"
    if allowed < 2:
        advice = "lessons were timed on 2 cores and will take about twice as long"
        return Finding("Cores", NOTE, found, advice)
    return Finding("Cores", GOOD, found)


def cpu() -> Finding:
    """The CPU, its vector instructions, and what they change for the course."""
    from llmlab.course.cpu import describe, what_it_changes

    described = describe()
    note = what_it_changes(described)
    verdict = NOTE if note else GOOD
    return Finding("CPU", verdict, str(described), note)


def four_bits() -> Finding:
    """bitsandbytes' 4-bit weights and one product with them, against the definition."""
    from llmlab.course import four_bits as examination

    what = "A 4-bit product"
    result = examination.in_a_process_of_its_own()
    if result.is_broken:
        return Finding(what, BAD, str(result), "run `make env`, then report it")
    verdict = NOTE if result.advice else GOOD
    return Finding(what, verdict, str(result), result.advice)


def gpu() -> Finding:
    """No lesson needs one."""
    import torch

    if torch.cuda.is_available():
        found = f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
        return Finding("GPU", GOOD, found)
    if torch.backends.mps.is_available():
        return Finding("GPU", GOOD, "Apple GPU (mps); the lessons run on the CPU")
    return Finding("GPU", GOOD, "none, and none is needed")


def compiler() -> Finding:
    """torch.compile and the compiler lessons call the system's C++ compiler."""
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return Finding("C++ compiler", GOOD, path)
    advice = "needed by part 08 only: apt install g++, or xcode-select --install"
    return Finding("C++ compiler", NOTE, "none", advice)


def real_model() -> Finding:
    """SmolLM2-135M-Instruct in the user's cache."""
    from llmlab.models import real_model as real

    if not real.is_fetched():
        advice = "run `llmlab model fetch` (98 MB); some lessons need it"
        return Finding("Real model", NOTE, "not fetched", advice)
    return Finding("Real model", GOOD, str(real.path()))


def ports() -> Finding:
    """JupyterLab's usual port.

    A port that is taken is not an error: JupyterLab looks for the next one.
    """
    with socket.socket() as s:
        taken = s.connect_ex(("127.0.0.1", 8888)) == 0
    if taken:
        advice = "JupyterLab will take the next free one, or: llmlab lab --port 9999"
        return Finding("Port 8888", NOTE, "taken", advice)
    return Finding("Port 8888", GOOD, "free")


def forward() -> Finding:
    """The course model's loss on a fixed text is the one stored with its weights."""
    import torch

    from llmlab.models import course_model
    from llmlab.models.language_model import next_token_loss

    what = "A forward pass"
    text = (course_model.MODEL / "golden.json").read_text(encoding="utf-8")
    golden = json.loads(text)
    started = time.time()
    with torch.inference_mode():
        model = course_model.load()
        ids = torch.tensor([course_model.load_tokenizer().encode(golden["text"]).ids])
        loss = next_token_loss(model(ids), ids).item()
    seconds = time.time() - started
    if not math.isclose(loss, golden["loss"], abs_tol=1e-3):
        found = f"loss {loss:.4f}, expected {golden['loss']:.4f}"
        advice = "torch computes something else here: run `make env`, then report it"
        return Finding(what, BAD, found, advice)
    found = f"loss {loss:.3f} as expected, in {seconds:.1f} s"
    if seconds > SLOW:
        advice = (
            "that is slow: something else keeps the CPU busy, or torch's threads wait"
            " for each other; OMP_NUM_THREADS=1 in front of a command helps then"
        )
        return Finding(what, NOTE, found, advice)
    return Finding(what, GOOD, found)


def _sum_over_ranks(comm) -> list[float]:
    import torch

    return comm.all_reduce(torch.tensor([comm.rank + 1.0, 10.0])).tolist()


def all_reduce() -> Finding:
    """Two real processes over gloo agree on a sum."""
    from llmlab.parallelism.runtime import launch

    what = "Two processes"
    started = time.time()
    sums = launch(_sum_over_ranks, 2, timeout=60)
    seconds = time.time() - started
    if sums != [[3.0, 20.0]] * 2:
        found = f"all-reduce gave {sums}, expected [3, 20] twice"
        return Finding(what, BAD, found, "see part 05")
    return Finding(what, GOOD, f"all-reduce agreed, in {seconds:.1f} s")


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
    """Run all examinations.

    One that raises becomes a finding, so that the others are still made.
    """
    findings = []
    for examination in EXAMINATIONS:
        try:
            findings.append(examination())
        except Exception as error:
            name = examination.__name__.replace("_", " ").capitalize()
            found = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(Finding(name, BAD, found, "run `make env`"))
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
    if bad:
        noun = "problem" if bad == 1 else "problems"
        console.print(f"{bad} {noun}: see the last column.")
    else:
        console.print("All is well: `llmlab lab` opens the course.")
    if json_path is not None:
        report = {"ok": not bad, "findings": [asdict(f) for f in findings]}
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad else 0
