"""The test suite before and after a change, as whole processes, in turn.

    make bench-suite                                  against 322f7f2, three lessons
    python -m benchmarks.suite --before HEAD~5        against another commit
    python -m benchmarks.suite --whole                every stage of `make test`

Both commits are cloned to a temporary folder and run with this environment, one after
the other, the order changing from round to round. Printed are seconds on the wall and
of the CPUs, and the ratio after / before. A ratio is worth more than its seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.verify import children_cpu

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "322f7f2"  # the last commit before warm kernels
LESSONS = ("01-start/01-welcome", "04-peft/07-qlora", "05-parallelism/04-pipeline")
STAGES = ("units", "notebooks", "exercises", "book", "browser")
FIRST_CELL = "import torch, transformers, peft\nprint(torch.__version__)"


@dataclass(frozen=True)
class Spent:
    """Seconds of one run."""

    wall: float
    cpu: float


def timed(command: list[str], checkout: Path, **env: str) -> Spent:
    """Run a command in a checkout.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    before, started = children_cpu(), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    spent = Spent(time.perf_counter() - started, children_cpu() - before)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
    return spent


def stage(name: str) -> Callable[[Path], Spent]:
    """One stage of `make test`."""
    return lambda checkout: timed([sys.executable, "scripts/verify.py", name], checkout)


def lessons(slugs: tuple[str, ...]) -> Callable[[Path], Spent]:
    """Some lessons under nbval, in one process, as `make test` runs them."""
    paths = [f"notebooks/{slug}.ipynb" for slug in slugs]
    script = f"""
import os, subprocess, sys
from scripts import verify
stage = verify.STAGES["notebooks"][0]
words = [w for w in stage if w not in ("notebooks", "solutions", *verify.TWO)]
env = dict(os.environ)
try:
    from llmlab.course.kernels import warm_environment
    env = warm_environment(env)
except ImportError:
    pass
sys.exit(subprocess.run([*words, *{paths!r}], env=env).returncode)
"""
    return lambda checkout: timed([sys.executable, "-c", script], checkout)


def first_cell(checkout: Path) -> Spent:
    """From starting a kernel to the result of a cell that imports three libraries.

    A kernel is started once before, as in a running JupyterLab: where kernels are
    warm, the warm process stands.
    """
    script = f"""
import time
from jupyter_client.manager import start_new_kernel
try:
    from llmlab.course.kernels import use_warm_kernels
    use_warm_kernels()
except ImportError:
    pass
for _ in range(2):
    started = time.perf_counter()
    manager, client = start_new_kernel()
    client.execute_interactive({FIRST_CELL!r}, timeout=120, output_hook=print)
    took = time.perf_counter() - started
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    time.sleep(15)
print("took", took)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    return Spent(float(done.stdout.split()[-1]), float("nan"))


def clone(commit: str, folder: Path) -> Path:
    """A checkout of one commit."""
    quiet = {"check": True, "capture_output": True}
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], **quiet)
    subprocess.run(["git", "checkout", "-q", commit], cwd=folder, **quiet)
    return folder


def compare(
    name: str, run: Callable[[Path], Spent], before: Path, after: Path, rounds: int
) -> str:
    """One line of the table: medians of both, and the median ratio of the rounds."""
    olds, news = [], []
    for i in range(rounds):
        order = [(before, olds), (after, news)]
        for checkout, spent in order if i % 2 == 0 else reversed(order):
            spent.append(run(checkout))
    pairs = list(zip(news, olds, strict=True))
    wall = statistics.median(new.wall / old.wall for new, old in pairs)
    cpu = statistics.median(new.cpu / old.cpu for new, old in pairs)
    old, new = (statistics.median(s.wall for s in x) for x in (olds, news))
    return f"| {name} | {old:.1f} s | {new:.1f} s | {wall:.2f} | {cpu:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BEFORE, help="a commit")
    parser.add_argument("--after", default="HEAD", help="a commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="all stages, once")
    arguments = parser.parse_args()
    cases: dict[str, Callable[[Path], Spent]] = {
        "first cell": first_cell,
        f"{len(LESSONS)} lessons under nbval": lessons(LESSONS),
    }
    if arguments.whole:
        cases = {name: stage(name) for name in STAGES}
    rounds = 1 if arguments.whole else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="llmlab-suite-") as name:
        before = clone(arguments.before, Path(name) / "before")
        after = clone(arguments.after, Path(name) / "after")
        print(f"| what | {arguments.before} | {arguments.after} | wall | CPU |")
        print("|---|---|---|---|---|")
        for title, run in cases.items():
            print(compare(title, run, before, after, rounds), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
