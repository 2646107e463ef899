"""The same text through IREE, a compiler that is made of MLIR: its stages, what it
dispatches, what it writes for which device.

    linalg   what we wrote
    flow     the program is cut: a dispatch is what will be one kernel
    stream   when each dispatch runs, and where its buffers lie
    hal      calls of a device's driver, and the kernels as binaries
    vm       instructions of a small machine that makes these calls

A compiler needs no device. For a GPU that is not here it writes PTX, a code object or
SPIR-V, which can be read and not run.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

STAGES = ("input", "flow", "stream", "hal", "vm")
CPU = ("--iree-llvmcpu-target-cpu=generic",)
# a CPU that is named, so that a stage reads the same wherever it is made
NAMED = (*CPU, "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu")
DEVICES: dict[str, tuple[str, tuple[str, ...], str]] = {
    # name: back end, its flags, the ending of the file that holds the kernel
    "NVIDIA sm_80": ("cuda", ("--iree-cuda-target=sm_80",), "ptx"),
    "AMD gfx942": ("rocm", ("--iree-rocm-target=gfx942",), "hsaco"),
    "Vulkan, Mali Valhall": (
        "vulkan-spirv",
        ("--iree-vulkan-target=valhall",),
        "spv",
    ),
}


@dataclass(frozen=True)
class Kernel:
    """What a compiler wrote for a device.

    Attributes:
        module: bytes of the whole artefact, with the calls of the driver.
        files: the kernels' own files, by name.
        listing: the kernel as text that can be read.
    """

    module: int
    files: dict[str, bytes]
    listing: str


def compiled(text: str, backend: str, flags: Sequence[str]) -> bytes:
    """What iree-compile makes of it."""
    from iree.compiler import compile_str

    return compile_str(text, target_backends=[backend], extra_args=list(flags))


def stage(text: str, name: str) -> str:
    """The program after one stage, for any x86-64.

    Raises:
        ValueError: there is no such stage.
    """
    if name not in STAGES:
        raise ValueError(f"name={name!r} must be one of {', '.join(STAGES)}")
    flags = (*NAMED, f"--compile-to={name}")
    return without_locations(compiled(text, "llvm-cpu", flags).decode())


def without_locations(text: str) -> str:
    """IREE writes at each line where it came from."""
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#loc"))


def dispatches(flow: str) -> list[str]:
    """The kernels that a program in flow calls, in their order."""
    return re.findall(r"flow\.dispatch @\w+::@\w+?_dispatch_\d+_(\w+)", flow)


def counts(text: str) -> dict[str, int]:
    """How many operations of each dialect stand in a text."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name = re.match(r'\s*(?:%[^=]*= )?"?([a-z_]+)\.[a-z_.]+', line)
        if name:
            found[name[1]] = found.get(name[1], 0) + 1
    return dict(sorted(found.items()))


def run(text: str, *arguments: Tensor) -> list[Tensor]:
    """Compile for a CPU, and run it with IREE's runtime, on one thread."""
    from iree import runtime

    config = runtime.Config("local-sync")
    code = runtime.VmModule.copy_buffer(
        config.vm_instance, compiled(text, "llvm-cpu", CPU)
    )
    context = runtime.SystemContext(config=config)
    context.add_vm_module(code)
    found = context.modules[code.name]["main"](*(x.numpy() for x in arguments))
    results = found if isinstance(found, tuple | list) else [found]
    return [torch.from_numpy(each.to_host().copy()) for each in results]


def for_device(text: str, device: str) -> Kernel:
    """What is written for a device of DEVICES that need not be here.

    Raises:
        ValueError: another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} must be one of {', '.join(DEVICES)}")
    backend, flags, ending = DEVICES[device]
    with tempfile.TemporaryDirectory() as folder:
        dumps = [
            f"--iree-hal-dump-executable-{what}-to={folder}"
            for what in ("binaries", "intermediates")
        ]
        module = compiled(text, backend, [*flags, *dumps])
        paths = sorted(Path(folder).iterdir())
        files = {
            path.name: path.read_bytes() for path in paths if path.suffix[1:] == ending
        }
        texts = {"ptx": ".ptx", "hsaco": ".rocmasm", "spv": ".spirv.mlir"}
        listing = "\n".join(
            path.read_text(errors="replace")
            for path in paths
            if path.name.endswith(texts[ending])
        )
    return Kernel(len(module), files, listing)
