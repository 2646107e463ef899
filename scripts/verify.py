"""Everything that CI runs, in order, and a table of what took the time.

`make test` calls it.

    python scripts/verify.py             all stages
    python scripts/verify.py units book  only these
    python scripts/verify.py --cold      every notebook in a kernel started from nothing
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from llmlab.course.kernels import warm_environment
from scripts import budget

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "verify"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
# Without the plugin that runs notebooks: its grammar takes two seconds in each process.
TESTS = [*PYTEST, "-p", "no:nbval"]
NBVAL = [
    *[*PYTEST, "-o", "addopts=-q", "-p", "scripts.nbval_plugin"],
    *["--nbval-cell-timeout=120", "--nbval-sanitize-with=scripts/sanitize.cfg"],
]
TWO = ["-n", "2", "--dist", "loadscope"]  # two processes of one thread each
UNITS = ["-n", "2", "--dist", "loadscope", "--timeout=300"]
COVERAGE = ["--cov=llmlab", "--cov-report="]
ENOUGH = ["--fail-under=90", "--skip-covered", "--sort=cover"]
STAGES: dict[str, list[list[str]]] = {
    "lint": [["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    "in step": [
        [sys.executable, "scripts/lock.py", "--check"],
        [sys.executable, "-m", "llmlab.course.sync", "--check"],
        [sys.executable, "-m", "llmlab.course.exercises", "--check"],
    ],
    "book": [[sys.executable, "-m", "llmlab.course.book.build"]],
    "model": [["llmlab", "model", "fetch"]],
    "units": [
        [*TESTS, "tests", "-m", "not browser and not peer", *UNITS, *COVERAGE],
        [sys.executable, "-m", "coverage", "report", *ENOUGH],
    ],
    "notebooks": [[*NBVAL, "--nbval", *TWO, "notebooks", "solutions"]],
    "exercises": [[*NBVAL, "--nbval-lax", "--fresh-exercises", *TWO, "exercises"]],
    # A real Triton beside ours; its environment is made first (270 MB, once).
    "peers": [[*TESTS, "tests/inference", "-m", "peer", "-rs", "--timeout=600"]],
    "cpus": [[sys.executable, "scripts/test_cpus.py", "--today"]],
    "browser": [
        [
            *[*TESTS, "tests/browser", "--ignore=tests/browser/test_lab.py"],
            *["-n", "2", "--dist", "loadgroup"],
        ],
        [*TESTS, "tests/browser/test_lab.py"],  # JupyterLab's start is slow by itself
    ],
}
# Stages that run at the same time: each of these keeps one core busy.
TOGETHER = ("lint", "in step", "book")


@dataclass
class Ran:
    """What became of a stage. `speed` is the machine's at that time, see budget.py."""

    seconds: float
    cpu_seconds: float
    passed: bool
    speed: float


def main(arguments: list[str]) -> int:
    """Run the stages that are named, or all; 1 when one fails, 2 for misuse."""
    names = [word for word in arguments if word != "--cold"]
    unknown = set(names) - set(STAGES)
    if unknown:
        print(f"no stage is called {', '.join(sorted(unknown))}")
        print(f"there are: {', '.join(STAGES)}")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in STAGES if not names or name in names]
    results = run_all(chosen, cold="--cold" in arguments)
    cases = [case for name in chosen for case in read_cases(name)]
    print_slowest(cases)
    faults = print_budget(cases, results)
    print_stages(results)
    bad = sum(case["bad"] for case in cases)
    failed = [name for name, ran in results.items() if not ran.passed]
    print_failed(cases)
    print(f"\n{len(cases) - bad} passed, {max(bad, len(failed) + len(faults))} failed")
    return 1 if failed or faults else 0


def run_all(names: list[str], cold: bool) -> dict[str, Ran]:
    """Run the stages in order; those in TOGETHER at the same time."""
    results: dict[str, Ran] = {}
    first = [name for name in names if name in TOGETHER]
    speed = budget.speed()
    if first:
        started = {name: start(name, cold) for name in first}
        results |= {name: finish(name, ran, speed) for name, ran in started.items()}
    for name in names:
        if name in TOGETHER:
            continue
        ran = start(name, cold, shown=True)
        before, speed = speed, budget.speed()
        results[name] = finish(name, ran, (before + speed) / 2)
    return results


@dataclass
class Running:
    """A stage on its way: its commands run one after the other in a process."""

    began: float
    process: subprocess.Popen
    log: Path | None


def start(name: str, cold: bool, shown: bool = False) -> Running:
    """Start a stage; what it prints is shown at once, or kept until it has ended."""
    script = [sys.executable, __file__, "--commands-of", name]
    log = None if shown else OUT / f"{name.replace(' ', '-')}.log"
    if shown:
        print_title(name)
    began = time.time()
    out = None if shown else log.open("w")
    process = subprocess.Popen(
        script,
        cwd=ROOT,
        env=environment(name, cold),
        stdout=out,
        stderr=subprocess.STDOUT if out else None,
    )
    running = Running(began, process, log)
    if shown:
        process.wait()
    return running


def finish(name: str, running: Running, speed: float) -> Ran:
    """Wait for a stage and show what it printed."""
    passed = running.process.wait() == 0
    end, cpu_seconds = map(float, ended(name).read_text().split())
    if running.log is not None:
        print_title(name)
        print(running.log.read_text(), end="", flush=True)
    return Ran(end - running.began, cpu_seconds, passed, speed)


def run_commands(name: str) -> int:
    """All commands of one stage, also after one failed; 1 when any did."""
    failed = 0
    for i, command in enumerate(STAGES[name]):
        if command[: len(PYTEST)] == PYTEST:
            command = [*command, f"--junit-xml={junit(name, i)}"]
        failed |= subprocess.run(command, cwd=ROOT).returncode != 0
    ended(name).write_text(f"{time.time()} {children_cpu()}")
    return failed


def ended(name: str) -> Path:
    """Where a stage writes down when it ended, and its CPU seconds."""
    return OUT / f"{name.replace(' ', '-')}.ended"


def children_cpu() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def environment(stage: str, cold: bool) -> dict[str, str]:
    """The caller's environment, with the venv's programs first.

    A browser is looked for where one is needed. Notebooks get warm kernels.
    """
    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    env["LLMLAB_RECORD"] = str(OUT / "notebooks")
    env["TOKENIZERS_PARALLELISM"] = "false"
    if processes_of(stage) == 2:
        env["OMP_NUM_THREADS"] = "1"
    if stage in ("notebooks", "exercises") and not cold:
        env = warm_environment(env)
    if stage == "browser":
        env["CHROMIUM"] = browser()
    return env


def processes_of(stage: str) -> int:
    """How many tests a stage runs at the same time."""
    return 2 if any("-n" in command for command in STAGES[stage]) else 1


def browser() -> str:
    """A Chromium's path; it is installed when there is none."""
    script = [sys.executable, "scripts/browser.py"]
    found = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        return "chromium"
    return found.stdout.strip().splitlines()[-1]


def junit(stage: str, command: int) -> Path:
    """The report of one command of a stage."""
    return OUT / f"{stage.replace(' ', '-')}-{command}.xml"


def read_cases(stage: str) -> list[dict]:
    """The tests of one stage, from its JUnit files."""
    found = []
    for i in range(len(STAGES[stage])):
        path = junit(stage, i)
        if not path.exists():
            continue
        for case in ET.parse(path).iter("testcase"):
            why = [said for tag in ("failure", "error") for said in case.iter(tag)]
            found.append(
                {
                    "stage": stage,
                    "where": f"{case.get('classname')}::{case.get('name')}",
                    "seconds": float(case.get("time", 0)),
                    "bad": bool(why),
                    "why": "".join(said.text or "" for said in why),
                }
            )
    return found


def print_title(name: str) -> None:
    """The line above what a stage prints."""
    print(f"\n=== {name} " + "=" * (70 - len(name)), flush=True)


def print_slowest(cases: list[dict]) -> None:
    """The slowest tests, and the slowest notebooks with their memory."""
    print("\nSlowest tests     seconds")
    tests = [case for case in cases if case["stage"] in ("units", "browser")]
    for case in sorted(tests, key=lambda c: -c["seconds"])[:12]:
        print(f"{case['seconds']:>25.1f}  {case['where']}")
    paths = sorted((OUT / "notebooks").glob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    print("\nSlowest notebooks seconds      MiB")
    for record in sorted(records, key=lambda r: -r["seconds"])[:12]:
        took, held = record["seconds"], record["peak_mib"]
        print(f"{took:>25.1f} {held:>8.0f}  {record['notebook']}")


def print_budget(cases: list[dict], results: dict[str, Ran]) -> list[str]:
    """What lessons cost against what they may; the sentences on those over it."""
    speeds = {name: ran.speed for name, ran in results.items()}
    processes = {name: processes_of(name) for name in results}
    costs = budget.costs(cases, speeds, processes)
    print(f"\n{budget.report(costs)}")
    faults = budget.over(costs)
    for fault in faults:
        print(f"OVER BUDGET: {fault}")
    if len(results) == len(STAGES):
        wall = {name: ran.seconds for name, ran in results.items()}
        minutes = budget.projection(costs, wall, speeds)
        print(f"{budget.LESSONS} lessons like these: {minutes:.0f} minutes")
    return faults


def print_failed(cases: list[dict]) -> None:
    """The failed tests by name, last of all, where a cut log still shows them."""
    bad = [case for case in cases if case["bad"]]
    for case in bad[:20]:
        said = [line for line in case["why"].splitlines() if line.startswith("E ")]
        print(f"\nFAILED {case['stage']}: {case['where']}")
        for line in said[:6]:
            print(f"  {line[:200]}")
    if len(bad) > 20:
        print(f"\nand {len(bad) - 20} more")


def print_stages(results: dict[str, Ran]) -> None:
    """Each stage with its time, on the wall and of the CPUs."""
    print("\nStage             seconds   CPU seconds   speed")
    for name, ran in results.items():
        verdict = "passed" if ran.passed else "FAILED"
        times = f"{ran.seconds:>8.0f} {ran.cpu_seconds:>13.0f} {ran.speed:>7.2f}"
        print(f"{name:<16} {times}  {verdict}")
    total = sum(ran.seconds for name, ran in results.items() if name not in TOGETHER)
    together = [ran.seconds for name, ran in results.items() if name in TOGETHER]
    print(f"{'total':<16} {total + max(together, default=0.0):>8.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--commands-of"]:
        sys.exit(run_commands(sys.argv[2]))
    sys.exit(main(sys.argv[1:]))
