"""Four small kernels, lowered for an Ascend 910B3 and for an H100, without a card.

Their texts are kept in llmlab/chips/ascend_and_other_accelerators/data/triton.json.

Two steps, each in its own environment, from the repository's root:

    python -m venv AT; AT/bin/pip install pybind11 "numpy<2"
    AT/bin/pip download --no-deps -d AT triton-ascend==3.2.0
    unzip AT/triton_ascend-*.whl -d AT/package     # it is called triton, too
    PYTHONPATH=AT/package AT/bin/python scripts/golden/port_triton_goldens.py ascend
    python scripts/golden/port_triton_goldens.py nvidia         # triton 3.7.1

Ascend's stage after Linalg, `npubin`, wants CANN's compiler: what it says is kept.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "llmlab/chips/ascend_and_other_accelerators/data/triton.json"


@triton.jit
def add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, m) + tl.load(y + i, m), m)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    k = tl.arange(0, K)
    x = tl.load(a + i * K + k[None, :])
    y = tl.load(b + k[:, None] * N + j)
    tl.store(c + i * N + j, tl.dot(x, y))


@triton.jit
def second(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + 2 * i))


@triton.jit
def gather(x, which, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + tl.load(which + i)))


KERNELS = [
    (add, {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 128}),
    (
        product,
        {"a": "*fp16", "b": "*fp16", "c": "*fp32"},
        {"M": 32, "N": 16, "K": 64},
    ),
    (second, {"x": "*fp32", "o": "*fp32"}, {"B": 128}),
    (gather, {"x": "*fp32", "which": "*i32", "o": "*fp32"}, {"B": 128}),
]
KEPT = ("mix_mode", "parallel_mode", "tensor_kinds")
# where a line of the kernel stood in the file
PLACE = re.compile(r' loc\((#loc\d*|"[^"]*"(:\d+:\d+)?|unknown)\)')


def lines(text: str) -> list[str]:
    """A module's text without the places of its lines."""
    every = text.strip().splitlines()
    return [PLACE.sub("", line) for line in every if not line.startswith("#loc")]


def ascend(source: ASTSource) -> dict:
    """TTIR, Linalg, and why it ends there."""
    from triton._C.libtriton import ir

    target = GPUTarget("npu", "Ascend910B3", 0)
    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(), backend.get_module_map()
    module = source.make_ir(options, *helpers, context)
    stages = {}
    backend.add_stages(stages, options)
    about = {"target": target, **vars(options), "hash": "x"}
    found = {}
    for name, stage in stages.items():
        try:
            module = stage(module, about)
        except OSError as error:
            found[f"{name} refused"] = str(error)
            break
        found[name] = lines(str(module))
    return found | {name: about[name] for name in KEPT if name in about}


def nvidia(source: ASTSource) -> dict:
    """TTIR and TTGIR for sm_90."""
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return {stage: lines(made.asm[stage]) for stage in ("ttir", "ttgir")}


def main(whose: str) -> None:
    """Add one compiler's texts to the file."""
    stored = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    texts = {}
    for kernel, signature, constants in KERNELS:
        for name in constants:
            if whose == "nvidia":
                signature = signature | {name: "constexpr"}
        source = ASTSource(kernel, signature, constants)
        texts[kernel.__name__] = {"ascend": ascend, "nvidia": nvidia}[whose](source)
    stored[whose] = {"triton": triton.__version__, "kernels": texts}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
