"""Runs a notebook in a fresh kernel, and records what that took.

The record is `jupyter-book/verified.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llmlab.course import cpu

CELL_TIMEOUT = 120  # seconds
WIDGET = "application/vnd.jupyter.widget-view+json"
VERSIONS = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "triton",
    "numpy",
    "matplotlib",
)
# What the kernel is asked after the last cell: its peak memory and its children's, in
# bytes, and versions. On Linux its own peak is VmHWM: ru_maxrss begins with what the
# process held that started it.
PROBE = """
import json as _j, pathlib as _l, platform as _p, resource as _r, sys as _s
from importlib.metadata import version as _v
_unit = 1 if _s.platform == "darwin" else 1024
_peaks = [_r.getrusage(w).ru_maxrss for w in (_r.RUSAGE_SELF, _r.RUSAGE_CHILDREN)]
_status = _l.Path("/proc/self/status")
if _status.is_file():
    _high = [x for x in _status.read_text().splitlines() if x.startswith("VmHWM:")]
    _peaks[0] = int(_high[0].split()[1]) if _high else _peaks[0]
_versions = {n: _v(n) for n in %r if n in _s.modules}
_torch = _s.modules.get("torch")
print(_j.dumps({
    "memory": max(_peaks) * _unit,
    "versions": {"python": _p.python_version()} | _versions,
    "capability": _torch.backends.cpu.get_cpu_capability() if _torch else "",
}))
"""


@dataclass
class Run:
    """What is known of a notebook's last run. `digest` is that of the code that ran.

    Attributes:
        seconds: of all cells, on the clock.
        memory_gib: the kernel's peak.
        cpu: the CPU's name; '' in records from before it was kept.
        flags: its vector instructions.
        capability: the kernels that torch chose there, '' where torch was not used.
    """

    digest: str
    seconds: float
    memory_gib: float
    date: str
    versions: dict[str, str] = field(default_factory=dict)
    cpu: str = ""
    flags: list[str] = field(default_factory=list)
    capability: str = ""


def digest(nb: NotebookNode) -> str:
    """A hash of the code alone: editing prose does not make outputs stale."""
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def execute(nb: NotebookNode, folder: Path) -> Run:
    """Runs the notebook in place, in a fresh kernel started in `folder`, as nbval does.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds its
            traceback.
    """
    from nbclient import NotebookClient

    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    start = time.perf_counter()
    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    probe = nbformat.v4.new_code_cell(PROBE % (VERSIONS,))
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            client.execute_cell(cell, i)
        seconds = time.perf_counter() - start
        nb.cells.append(probe)
        client.execute_cell(probe, len(nb.cells) - 1)
        nb.cells.pop()
    said = json.loads(probe.outputs[0].text)
    date = datetime.now(UTC).date().isoformat()
    name, flags = cpu.identify()
    return Run(
        digest=digest(nb),
        seconds=round(seconds, 1),
        memory_gib=round(said["memory"] / 2**30, 2),
        date=date,
        versions=said["versions"],
        cpu=name,
        flags=list(flags),
        capability=said["capability"],
    )


class Records:
    """verified.json, safe to update while others do."""

    def __init__(self, root: Path) -> None:
        self.path = root / "jupyter-book" / "verified.json"

    def read(self) -> dict[str, dict]:
        """All runs, by notebook: 'notebooks/04-peft/05-lora'."""
        if not self.path.is_file():
            return {}
        return json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, name: str, run: Run) -> None:
        """Records one run."""
        self.path.parent.mkdir(exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            runs = self.read() | {name: asdict(run)}
            in_order = dict(sorted(runs.items()))
            text = json.dumps(in_order, indent=1, ensure_ascii=False)
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text(f"{text}\n", encoding="utf-8")
            fresh.replace(self.path)
        finally:
            os.close(folder)
