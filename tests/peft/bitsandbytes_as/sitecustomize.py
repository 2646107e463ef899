"""bitsandbytes as it behaves on another CPU, for every process that finds this folder.

    PYTHONPATH=tests/peft/bitsandbytes_as BITSANDBYTES_AS_ON=avx512bf16 python -m pytest
    …

Python imports a `sitecustomize` by itself at its start, so that kernels of notebooks
are reached too. `BITSANDBYTES_AS_ON` names the CPU:

    avx2         4-bit weights are decoded by definition, nothing is repacked
    avx512       a row is taken to have ⌊n / block⌋ scales of its own
    avx512bf16   the same, and the first forward in eval mode repacks the weight

Only the functions of bitsandbytes' native library that differ are replaced, by what
0.50.2's csrc/cpu_ops.cpp does there, in torch; all of its Python code runs as it is. So
a run says how the project fares with this behaviour. It says nothing of speed, nor of
the last digit of a product in bf16.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

CPUS = ("avx2", "avx512", "avx512bf16")
FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
AVX512_FLOATS = 16  # floats in one register: other row lengths take the scalar path


def view(pointer: ctypes.c_void_p, count: int, dtype: Any):
    """The `count` values at an address, as a tensor that shares their memory."""
    import torch

    values = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer.value)
    return torch.frombuffer(values, dtype=dtype)


def levels(kind: str):
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(kind, device="cpu")


def decoder(kind: str, dtype: str, avx512: bool):
    """Stands for `cdequantize_blockwise_cpu_<kind>_<float>`."""
    import torch

    def decode(packed, scales, out, block, rows, columns) -> None:
        block, m, n = block.value, rows.value, columns.value
        pairs = view(packed, m * n // 2, torch.uint8)
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().int()
        place = torch.arange(m * n)
        owner = place // block
        if avx512 and n % AVX512_FLOATS == 0:
            owner = place // n * (n // block) + place % n // block
        scales = view(scales, -(-m * n // block), torch.float32)
        result = view(out, m * n, getattr(torch, dtype))
        result.copy_(levels(kind)[codes] * scales[owner])

    return decode


def product(kind: str):
    """Stands for `gemv_4bit_inference_cpu_<kind>_bf16`, on weights packed for it."""
    import torch

    def multiply(m, n, k, x, packed, scales, out, block, x_stride, out_stride) -> None:
        m, n, k, block = m.value, n.value, k.value, block.value
        if (x_stride.value, out_stride.value) != (k, n):
            raise ValueError("the stand-in for the product takes contiguous rows only")
        pairs = view(packed, n * k // 2, torch.uint8).view(-1, 32)
        codes = torch.cat([pairs & 15, pairs >> 4], dim=1)
        codes = codes.view(n // 32, k // 2, 32, 2).transpose(1, 2).reshape(n, k)
        scale = view(scales, k // block * n, torch.bfloat16).view(-1, n).T
        scale = scale.float().repeat_interleave(block, dim=1)
        weight = (levels(kind)[codes.int()] * scale).bfloat16()
        rows = view(x, m * k, torch.bfloat16).view(m, k)
        result = view(out, m * n, torch.bfloat16).view(m, n)
        result.copy_(rows.float() @ weight.float().T)

    return multiply


def change(module: ModuleType, cpu: str) -> None:
    """Makes a module of bitsandbytes, just imported, behave as on `cpu`."""
    if module.__name__ == "bitsandbytes.backends.cpu.ops":
        module._has_avx512 = cpu != "avx2"
        return
    for kind in ("nf4", "fp4"):
        for short, dtype in FLOATS.items():
            name = f"cdequantize_blockwise_cpu_{kind}_{short}"
            setattr(module.lib, name, decoder(kind, dtype, avx512=cpu != "avx2"))
        setattr(module.lib, f"gemv_4bit_inference_cpu_{kind}_bf16", product(kind))
    module.lib.has_avx512f_cpu = lambda: cpu != "avx2"
    module.lib.has_avx512bf16_cpu = lambda: cpu == "avx512bf16"


class Changed(Loader):
    """Loads a module as usual, then changes it."""

    def __init__(self, loader: Loader, cpu: str) -> None:
        self.loader = loader
        self.cpu = cpu

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        change(module, self.cpu)


class Finder(MetaPathFinder):
    """Finds the two modules that differ by CPU."""

    def __init__(self, cpu: str) -> None:
        self.cpu = cpu

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in ("bitsandbytes.cextension", "bitsandbytes.backends.cpu.ops"):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Changed(spec.loader, self.cpu)
        return spec


def install(cpu: str) -> None:
    """Has bitsandbytes behave as on `cpu` from its import on.

    Raises:
        ValueError: `cpu` is none of `CPUS`.
    """
    if cpu not in CPUS:
        raise ValueError(f"BITSANDBYTES_AS_ON={cpu!r} must be one of {CPUS}")
    sys.meta_path.insert(0, Finder(cpu))


if "BITSANDBYTES_AS_ON" in os.environ:
    try:
        install(os.environ["BITSANDBYTES_AS_ON"])
    except ValueError as error:
        sys.exit(str(error))  # an error alone would be printed, and Python go on
