"""All checks of the course that want a GPU, in under five minutes on one NVIDIA GPU.

    python scripts/gpu_check.py --out gpu.json      every check, on the GPU
    python scripts/gpu_check.py --cpu               those that have a form for a CPU
    python scripts/gpu_check.py --list              what there is
    python scripts/gpu_check.py --only triton_kernels models

Each check runs in a process of its own, with a time-out: one that fails, hangs or dies
does not stop the others. What is not installed is skipped, by its name. The file has
versions, the device and what every check found; it is written anew after each.

The checks themselves are functions in `scripts/gpu_checks.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python scripts/gpu_check.py` finds `scripts`, too

from llmlab.course.files import write_atomically  # noqa: E402
from scripts.gpu_checks import CHECKS, Check, Skipped  # noqa: E402

WITHIN = 285.0  # seconds, of all checks together
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate")
PACKAGES += ("compressed-tensors", "gptqmodel", "gguf", "numba", "numpy")
PACKAGES += ("safetensors",)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where a check failed, 2 where there is no GPU."""
    options = parsed(arguments)
    if options.list:
        for check in CHECKS.values():
            needs = ", ".join(check.needs) or "torch"
            cpu = "" if check.cpu else " (GPU only)"
            print(f"{check.name:22} {needs}{cpu}: {check.asks}")
        return 0
    if options.run:
        return run_here(options.run, "cpu" if options.cpu else "cuda", options.result)
    if not options.cpu and not has_gpu():
        print("no GPU that PyTorch sees: --cpu runs the checks that can do without")
        return 2
    device = "cpu" if options.cpu else "cuda"
    return run_all(options.only or [*CHECKS], device, options.out, options.within)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--out", type=Path, help="a JSON file with all results")
    parser.add_argument("--only", nargs="+", choices=[*CHECKS], metavar="CHECK")
    parser.add_argument("--within", type=float, default=WITHIN, metavar="SECONDS")
    parser.add_argument("--list", action="store_true", help="names the checks")
    parser.add_argument("--run", choices=[*CHECKS], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_all(names: list[str], device: str, out: Path | None, within: float) -> int:
    """Runs checks one after the other, and keeps what each has found."""
    started = time.monotonic()
    report = {
        "device": device,
        "versions": versions(),
        "within": within,
        "checks": {},
    }
    for name in names:
        left = within - (time.monotonic() - started)
        found = one(CHECKS[name], device, left)
        report["checks"][name] = found
        report["seconds"] = round(time.monotonic() - started, 1)
        if out:
            write(out, report)
        why = f": {found['why']}" if found.get("why") else ""
        print(
            f"{found['status']:8} {name:22} {found['seconds']:6.1f} s{why}", flush=True
        )
    every = [found["status"] for found in report["checks"].values()]
    counts = {status: every.count(status) for status in dict.fromkeys(every)}
    print(", ".join(f"{n} {status}" for status, n in counts.items()), end="")
    print(f" in {report['seconds']:.0f} s")
    return int(any(status not in ("passed", "skipped") for status in every))


def one(check: Check, device: str, left: float) -> dict:
    """A check in a process of its own, or why it was not run."""
    why = reason_to_skip(check, device, left)
    if why:
        return {"status": "skipped", "seconds": 0.0, "why": why}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmlab-gpu-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--run", check.name]
        command += ["--result", str(result)] + (["--cpu"] if device == "cpu" else [])
        interpret = "1" if device == "cpu" and check.interprets else "0"
        env = os.environ | {"TRITON_INTERPRET": interpret, "TMPDIR": folder}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
        limit = min(check.limit, left)
        ended = finished(command, env, limit)
        took = round(time.monotonic() - started, 1)
        if ended is None:
            why = f"took longer than {limit:.0f} s"
            return {"status": "timeout", "seconds": took, "why": why}
        if result.exists():
            return {**json.loads(result.read_text(encoding="utf-8")), "seconds": took}
        last = ended[1].strip().splitlines()[-1:] or ["no message"]
        why = f"the process ended with {ended[0]}: {last[0]}"
        return {"status": "failed", "seconds": took, "why": why}


def reason_to_skip(check: Check, device: str, left: float) -> str:
    """'' where it can run."""
    missing = [name for name in check.needs if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if device == "cpu" and not check.cpu:
        return "it has no form for a CPU"
    if left < 5:
        return "no time is left"
    return ""


def finished(
    command: list[str], env: dict[str, str], limit: float
) -> tuple[int, str] | None:
    """Exit status and what it said; None, and all that it started ended, at `limit`."""
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=limit)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return process.returncode, said


def run_here(name: str, device: str, result: Path | None) -> int:
    """One check in this process; what it found goes to the file `result`."""
    try:
        found = {"status": "passed", "results": CHECKS[name].run(device)}
    except Skipped as reason:
        found = {"status": "skipped", "why": str(reason)}
    except Exception as problem:
        found = {"status": "failed", "why": f"{type(problem).__name__}: {problem}"}
        found["why"] = found["why"][:2000]
    if result:
        write(result, found)
    else:
        print(json.dumps(found, indent=2))
    return int(found["status"] == "failed")


def write(file: Path, content: dict) -> None:
    """Whole, or not at all."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of Python and of what is installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
