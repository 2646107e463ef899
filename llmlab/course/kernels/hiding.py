"""Keeps what was imported ahead out of sight until a cell imports it.

A plain kernel has no torch in `sys.modules` before `import torch`, and code may ask. So
the packages wait here, and an import puts them back at once, with all that they need.
What an import would have read from the environment by then is looked at again:

- OMP_NUM_THREADS and MKL_NUM_THREADS, set in a cell before `import torch`, are obeyed;
- a TRITON_ variable, set before `import triton`, makes it be imported anew;
- any other one that came too late is named in a warning, with what to do.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from llmlab.course.kernels.place import import_time
from llmlab.course.kernels.preload import Package

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Which variables are whose. LC_, MPL and others act on what was imported before.
OWNERS = {
    "torch": ("OMP_", "MKL_", "ATEN_", "TORCH", "PYTORCH", "KMP_"),
    "huggingface_hub": ("HF_", "HUGGINGFACE_"),
    "transformers": ("TRANSFORMERS_", "USE_"),
    "bitsandbytes": ("BNB_", "BITSANDBYTES_"),
    "numpy": ("OPENBLAS_", "NPY_"),
    "matplotlib": ("MPLCONFIGDIR",),
}


class Hidden:
    """A finder for `sys.meta_path`, and the loader of what it finds."""

    def __init__(self, packages: Mapping[str, Package], env: Mapping[str, str]) -> None:
        self.packages = dict(packages)
        self.env = import_time(env)  # as it was when the packages were imported
        self.specs: dict[str, ModuleSpec | None] = {}

    def hide(self) -> None:
        """Takes the packages out of `sys.modules`, and waits for their imports."""
        for package in self.packages.values():
            for name in package.modules:
                sys.modules.pop(name, None)
            for entry in package.filters:
                if entry in warnings.filters:
                    warnings.filters.remove(entry)
        warnings.filterwarnings("default", "", append=True)  # so that it looks again
        warnings.filters.pop()
        sys.meta_path.insert(0, self)

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Where `name` comes from, when it waits here. Looking changes nothing."""
        if name.startswith("triton"):
            self.renew_triton()
        package = self.packages.get(name.partition(".")[0])
        module = package.modules.get(name) if package else None
        if module is None:
            return None
        old = module.__spec__
        origin = old.origin if old else None
        spec = ModuleSpec(
            name, self, origin=origin, is_package=hasattr(module, "__path__")
        )
        if old is not None and old.submodule_search_locations is not None:
            spec.submodule_search_locations = old.submodule_search_locations
        spec.has_location = bool(old and old.has_location)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Puts the package back, and gives the module that was asked for."""
        top = spec.name.partition(".")[0]
        module = self.packages[top].modules[spec.name]
        self.specs[spec.name] = module.__spec__
        self.put_back(top)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module ran long ago; only its own description is put back."""
        module.__spec__ = self.specs.pop(module.__name__)

    def put_back(self, top: str) -> None:
        """Puts a package and all that it needs into `sys.modules`."""
        if top == "triton":
            self.renew_triton()
        package = self.packages.pop(top, None)
        if package is None:
            return
        for other in sorted(package.needs):
            self.put_back(other)
        for name, module in package.modules.items():
            sys.modules.setdefault(name, module)
        for entry in reversed(package.filters):
            if entry not in warnings.filters:
                warnings.filters.insert(0, entry)
        for name, value in package.variables.items():
            if name not in os.environ:
                os.environ[name] = value
                self.env[name] = value
        self.heed(top)
        if not self.packages and self in sys.meta_path:
            sys.meta_path.remove(self)

    def renew_triton(self) -> None:
        """Lets triton be imported anew when its variables changed: whether a function
        is compiled or interpreted is settled where it is defined, triton's own too."""
        now = import_time(os.environ)
        names = [n for n in now.keys() | self.env.keys() if n.startswith("TRITON_")]
        if all(now.get(name) == self.env.get(name) for name in names):
            return
        package = self.packages.pop("triton", None)
        if package is None:
            return
        for name, module in package.modules.items():
            if (name + ".").startswith("triton._C."):  # machine code: loaded once
                sys.modules[name] = module

    def heed(self, top: str) -> None:
        """Looks at the variables that were set since the package was imported."""
        own = OWNERS.get(top, ())
        now = import_time(os.environ)
        changed = [
            name
            for name in sorted(now.keys() | self.env.keys())
            if name.startswith(own) and own and now.get(name) != self.env.get(name)
        ]
        late = []
        for name in changed:
            if top != "torch" or name not in THREADS:
                late.append(name)
        threads = [now[name] for name in THREADS if name in changed and name in now]
        if top == "torch" and threads and threads[0].isdecimal():
            sys.modules["torch"].set_num_threads(max(1, int(threads[0])))
        if late:
            warnings.warn(
                f"{', '.join(late)} changed after this kernel had loaded {top}, and has"
                " no effect on it: set it before the kernel starts, or start cold"
                " kernels (--cold)",
                stacklevel=2,
            )
