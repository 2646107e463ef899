"""What the warm process imports, and what it notes down meanwhile.

Not llmlab: a learner or an author edits it between two kernels. Not DeepSpeed: it reads
DS_ACCELERATOR when it is imported, and lessons set that in a cell.

A step whose import prints something is left out, and the process begins anew: a plain
kernel would have printed it in the learner's cell.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

# What each kernel has at its first cell, lesson or not.
BASE = (
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "ipykernel.datapub",
    "IPython.core.completer",
    "IPython.core.history",
    "psutil",
)
# (what a cell imports, with what it then needs at once)
STEPS: tuple[tuple[str, ...], ...] = (
    ("numpy",),
    ("matplotlib", "matplotlib.pyplot", "matplotlib.patches", "matplotlib.animation"),
    ("einops",),
    ("jaxtyping",),
    ("ipywidgets",),
    ("torch", "torch.nn.functional", "torch.utils.flop_counter"),
    (
        "torch.distributed",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
        "torch.distributed.tensor.parallel",
        "torch.nn.parallel",
    ),
    ("safetensors", "safetensors.torch"),
    ("tokenizers",),
    (
        "transformers",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.utils.logging",
    ),
    ("bitsandbytes", "bitsandbytes.functional"),
    ("accelerate",),
    ("peft",),
    ("gguf",),
)


@dataclass
class Package:
    """One package that was imported ahead: its modules, and what came with them."""

    modules: dict[str, ModuleType] = field(default_factory=dict)
    needs: set[str] = field(default_factory=set)  # other packages, by name
    filters: list[tuple] = field(default_factory=list)  # of module warnings
    variables: dict[str, str] = field(default_factory=dict)  # that its import set


class Outside(Exception):
    """A package would be imported from outside the environment."""


class Noisy(Exception):
    """An import printed something; `step` is its name."""

    def __init__(self, step: str, said: str) -> None:
        super().__init__(f"{step} prints when it is imported: {said.strip()[:200]}")
        self.step = step


def import_ahead(
    steps: Sequence[tuple[str, ...]], without: Sequence[str] = ()
) -> dict[str, Package]:
    """Imports all steps and returns the packages that came, by name.

    Args:
        steps: what to import, in order.
        without: the names of steps to leave out.

    Raises:
        Noisy: an import printed something.
        Outside: a package lies neither in the environment nor in Python itself.
    """
    packages: dict[str, Package] = {}
    graph: dict[str, set[str]] = {}
    known = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names
    for step in steps:
        if step[0] in without:
            continue
        had = set(sys.modules)
        filters = list(warnings.filters)
        variables = dict(os.environ)
        with silence() as said, traced(graph):
            for name in step:
                if not import_one(name):
                    break
        if said:
            raise Noisy(step[0], said[0])
        first: dict[str, set[str]] = {}
        for name in sys.modules.keys() - had:
            top = name.partition(".")[0]
            if top not in known and top not in packages:
                first.setdefault(top, set()).add(name)
        new = [entry for entry in warnings.filters if entry not in filters]
        added = {n: v for n, v in os.environ.items() if n not in variables}
        for top, names in first.items():
            packages[top] = Package(needs=names, filters=new, variables=added)
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in packages:
            packages[top].modules[name] = module
    for top, package in packages.items():
        check_home(top, package)
        package.needs = reached(package.needs, graph) & packages.keys() - {top}
    return packages


def reached(names: set[str], graph: dict[str, set[str]]) -> set[str]:
    """The packages of all modules that were imported on the way from these modules."""
    seen: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        parent = name.rpartition(".")[0]
        next_names = graph.get(name, set()) | ({parent} if parent else set())
        waiting |= next_names - seen
    return {name.partition(".")[0] for name in seen}


@contextmanager
def traced(graph: dict[str, set[str]]):
    """Notes which module imports which, in full names."""
    plain = builtins.__import__

    def note(name, globals=None, locals=None, fromlist=(), level=0):
        module = plain(name, globals, locals, fromlist, level)
        importer = (globals or {}).get("__name__")
        if importer:
            full = name
            if level:
                package = globals.get("__package__") or importer.rpartition(".")[0]
                full = importlib.util.resolve_name("." * level + name, package)
            found = graph.setdefault(importer, set())
            found.add(full)
            for item in fromlist or ():
                if f"{full}.{item}" in sys.modules:
                    found.add(f"{full}.{item}")
        return module

    builtins.__import__ = note
    try:
        yield
    finally:
        builtins.__import__ = plain


def import_one(name: str) -> bool:
    """Imports one module; False when it is not installed."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def check_home(top: str, package: Package) -> None:
    """Makes sure that a package lies where what is installed is watched.

    Raises:
        Outside: it lies elsewhere, as on a PYTHONPATH.
    """
    file = getattr(package.modules.get(top), "__file__", None)
    homes = {sys.prefix, sys.base_prefix}
    homes |= {p for p in sys.path if p.endswith(("site-packages", "dist-packages"))}
    if file and not any(file.startswith(home + os.sep) for home in homes):
        raise Outside(f"{top} would come from {file}, which is outside the environment")


@contextmanager
def silence():
    """Catches what is written to the two output streams; gives a list, filled at the
    end with the text if there was any."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            text = file.read().decode(errors="replace")
            if text:
                said.append(text)
