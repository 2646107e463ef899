"""Everything that CI runs, in order, with a table of what took the time. `make test` calls it.

python scripts/verify.py                 all stages
python scripts/verify.py units book      only these
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "verify"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
NBVAL = [*PYTEST, "-o", "addopts=-q", "-p", "scripts.nbval_plugin", "--nbval-cell-timeout=120"]
TWO = ["-n", "2", "--dist", "loadscope"]  # two processes of one thread each
STAGES: dict[str, list[list[str]]] = {
    "lint": [["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    "in step": [
        [sys.executable, "scripts/lock.py", "--check"],
        [sys.executable, "-m", "llmlab.course.sync", "--check"],
        [sys.executable, "-m", "llmlab.course.exercises", "--check"],
    ],
    "model": [["llmlab", "model", "fetch"]],
    "units": [
        [*PYTEST, "tests", "-m", "not browser", *TWO, "--timeout=300", "--cov=llmlab", "--cov-report="],
        [sys.executable, "-m", "coverage", "report", "--fail-under=90", "--skip-covered", "--sort=cover"],
    ],
    "notebooks": [[*NBVAL, "--nbval", "--nbval-sanitize-with=scripts/sanitize.cfg", "notebooks", "solutions"]],
    "exercises": [[*NBVAL, "--nbval-lax", "--fresh-exercises", *TWO, "exercises"]],
    "book": [[sys.executable, "-m", "llmlab.course.book"]],
    "browser": [
        [*PYTEST, "tests/browser/test_book.py", "-m", "browser", "-n", "2"],
        [*PYTEST, "tests/browser/test_lab.py", "-m", "browser"],  # JupyterLab's start is slow enough by itself
    ],
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(STAGES)
    if unknown:
        print(f"no stage is called {', '.join(sorted(unknown))}; there are: {', '.join(STAGES)}")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    results = {name: run(name) for name in STAGES if not names or name in names}
    cases = [case for name in results for case in read_cases(name)]
    print_slowest(cases)
    print("\nStage             seconds")
    for name, (seconds, passed) in results.items():
        print(f"{name:<16} {seconds:>8.0f}  {'passed' if passed else 'FAILED'}")
    failed = [name for name, (_, passed) in results.items() if not passed]
    print(f"{'total':<16} {sum(s for s, _ in results.values()):>8.0f}")
    bad = sum(case["bad"] for case in cases)
    print(f"\n{len(cases) - bad} passed, {max(bad, len(failed))} failed")
    return 1 if failed else 0


def run(name: str) -> tuple[float, bool]:
    """Run one stage's commands; (seconds, whether all of them succeeded)."""
    print(f"\n=== {name} " + "=" * (70 - len(name)), flush=True)
    started, passed = time.time(), True
    for i, command in enumerate(STAGES[name]):
        if command[: len(PYTEST)] == PYTEST:
            command = [*command, f"--junit-xml={junit(name, i)}"]
        passed &= subprocess.run(command, cwd=ROOT, env=environment(name)).returncode == 0
    return time.time() - started, passed


def environment(stage: str) -> dict[str, str]:
    """The caller's environment with the venv's programs first, and a browser where one is needed."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(ROOT), "LLMLAB_RECORD": str(OUT / "notebooks"), "TOKENIZERS_PARALLELISM": "false"}
    if any("-n" in command for command in STAGES[stage]):
        env["OMP_NUM_THREADS"] = "1"
    if stage == "browser":
        found = subprocess.run([sys.executable, "scripts/browser.py"], cwd=ROOT, capture_output=True, text=True)
        env["CHROMIUM"] = found.stdout.strip().splitlines()[-1] if found.returncode == 0 else "chromium"
    return env


def junit(stage: str, command: int) -> Path:
    return OUT / f"{stage.replace(' ', '-')}-{command}.xml"


def read_cases(stage: str) -> list[dict]:
    """The tests of one stage, from its JUnit files."""
    found = []
    for i in range(len(STAGES[stage])):
        path = junit(stage, i)
        for case in ET.parse(path).iter("testcase") if path.exists() else ():
            bad = any(case.find(tag) is not None for tag in ("failure", "error"))
            where = f"{case.get('classname')}::{case.get('name')}"
            found.append({"stage": stage, "where": where, "seconds": float(case.get("time", 0)), "bad": bad})
    return found


def print_slowest(cases: list[dict]) -> None:
    """The slowest tests, and every notebook by its time and memory."""
    print("\nSlowest tests     seconds")
    tests = [case for case in cases if case["stage"] in ("units", "browser")]
    for case in sorted(tests, key=lambda c: -c["seconds"])[:12]:
        print(f"{case['seconds']:>25.1f}  {case['where']}")
    records = [json.loads(p.read_text()) for p in sorted((OUT / "notebooks").glob("*.json"))]
    print("\nSlowest notebooks seconds      MiB")
    for record in sorted(records, key=lambda r: -r["seconds"])[:12]:
        print(f"{record['seconds']:>25.1f} {record['peak_mib']:>8.0f}  {record['notebook']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
