"""SmolLM2 as engine folders: built, opened, and what was measured to choose.

Stored in llmlab/inference/data/engine_build.csv.

    python scripts/engine_sweep.py            continue, a line a run
    python scripts/engine_sweep.py --check 1  make that many runs again

"build" and "open" are of the whole folder, "size" is to open it without reading it for
its checksum; "checkpoint" loads the folder that it was built from. "product" is one
plugin with so many tokens, the least of ten, other memory touched between. One thread;
seconds are of the machine that ran it. "int8" has 8-bit codes in all its products.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from sweeping import sweep, versions

from llmlab.compression.kernels import PLUGINS
from llmlab.inference import engine
from llmlab.inference.engine import BuildConfig
from llmlab.inference.engine.plugins import CACHES, TORCH, seconds
from llmlab.models import checkpoint, real_model

FILE = Path(__file__).parents[1] / "llmlab" / "inference" / "data" / "engine_build.csv"
FIELDS = ["task", "name", "tokens", "run", "seconds", "bytes", "torch", "python"]
ENGINES = {
    "fp32": {},
    "int8": {"linears": ("int8",), "head": ("int8",)},
}
SHAPES = ((3072, 576), (576, 1536), (960, 576), (576, 576), (49152, 576))
RUNS = [
    (task, name, 0, run)
    for run in (1, 2)
    for name in ENGINES
    for task in ("build", "open", "size")
]
RUNS += [("checkpoint", "fp32", 0, run) for run in (1, 2)]
RUNS += [
    ("product", f"{rows} × {columns} {plugin}", tokens, run)
    for run in (1, 2)
    for tokens in (1, 2, 4, 8)
    for rows, columns in SHAPES
    for plugin in ("torch", "int8", "int4")
    if not (plugin == "int4" and rows > 10_000)
]


class Runner:
    """Makes a run; engine folders are built once."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name)
        self.source = real_model.path()
        self.plugins = {"torch": TORCH, **PLUGINS}

    def __call__(self, task: str, name: str, tokens: int, run: int) -> list:
        took, size = getattr(self, task)(name, tokens)
        return [task, name, tokens, run, f"{took:.6f}", size, *versions()]

    def built(self, name: str, sequences: int = 8) -> Path:
        """An engine folder, made where it is missing."""
        out = self.folder / f"{name}-{sequences}"
        if not out.exists():
            config = BuildConfig(sequences, 256, num_blocks=64, **ENGINES[name])
            engine.build(self.source, out, config, plugins=PLUGINS)
        return out

    def build(self, name: str, tokens: int) -> tuple[float, int]:
        out = self.folder / "anew"
        config = BuildConfig(num_blocks=64, **ENGINES[name])
        started = time.perf_counter()
        engine.build(self.source, out, config, plugins=PLUGINS)
        took = time.perf_counter() - started
        size = sum(file.stat().st_size for file in out.iterdir())
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
        return took, size

    def open(self, name: str, tokens: int, verify: bool = True) -> tuple[float, int]:
        folder = self.built(name)
        options = {"plugins": PLUGINS, "verify": verify}
        took = seconds(lambda: engine.open_engine(folder, **options), repeats=3)
        return took, 0

    def size(self, name: str, tokens: int) -> tuple[float, int]:
        return self.open(name, tokens, verify=False)

    def checkpoint(self, name: str, tokens: int) -> tuple[float, int]:
        return seconds(lambda: checkpoint.load(self.source), repeats=3), 0

    def product(self, name: str, tokens: int) -> tuple[float, int]:
        rows, _, columns, plugin = name.split()
        weight = torch.randn(int(rows), int(columns))
        packed = self.plugins[plugin].pack(weight)
        x = torch.randn(1, tokens, int(columns))
        product = self.plugins[plugin].product
        size = sum(t.numel() * t.element_size() for t in packed.values())
        with torch.inference_mode():
            took = seconds(lambda: product(x, packed), others=CACHES, repeats=10)
            return took, size


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, Runner, shown="seconds")
