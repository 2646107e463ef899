"""How compressed-tensors rounds, scales and packs small floats.

Makes tests/compression/golden/low_rank.json. It does not fit beside the course:

    python scripts/golden/low_rank_goldens.py    (compressed-tensors 0.19.0, torch 2.13)
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compression" / "golden" / "low_rank.json"
SCHEMES = {"mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16", "mxfp8": "MXFP8A16"}


def weight() -> torch.Tensor:
    """Rows of unequal size, a block of zeros, ties, and maxima at every border."""
    random = torch.Generator().manual_seed(14)
    W = torch.randn(12, 64, generator=random)
    W *= torch.logspace(-3, 2, 12)[:, None]
    W[1, :32] = 0
    W[2, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])
    W[2, 8:] = 0
    W[2, 9] = 6.0
    for row, top in ((3, 4.0), (4, 5.99), (5, 6.5), (6, 6.999), (7, 7.0), (8, 7.9)):
        W[row, :32] = W[row, :32] / W[row, :32].abs().max() * 3
        W[row, 5] = top
    return W


def of_scheme(name: str) -> dict:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
    )

    W = weight()
    scheme = preset_name_to_scheme(SCHEMES[name], ["Linear"])
    args = scheme.weights
    blocks = W.unflatten(1, (-1, args.group_size))
    low, high = blocks.amin(-1), blocks.amax(-1)
    state = {"weight": W}
    divisor = None
    if name == "nvfp4":
        divisor = generate_gparam(low.min(), high.max())
        state["weight_global_scale"] = divisor
    scale, _ = calculate_qparams(low, high, args, global_scale=divisor)
    state["weight_scale"] = scale
    formats = {
        "mxfp4": CompressionFormat.mxfp4_pack_quantized,
        "nvfp4": CompressionFormat.nvfp4_pack_quantized,
        "mxfp8": CompressionFormat.mxfp8_quantized,
    }
    compressor = BaseCompressor.get_value_from_registry(formats[name].value)
    packed = compressor.compress(state, scheme)
    back = compressor.decompress(packed, scheme)["weight"]
    found = {"decoded": back.float().tolist()}
    for key, value in packed.items():
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
            value = value.view(torch.uint8)
        found[key] = value.tolist()
    return found


def main() -> None:
    version = importlib.metadata.version("compressed-tensors")
    data = {"version": version, "torch": torch.__version__, "weight": weight().tolist()}
    for name in SCHEMES:
        data[name] = of_scheme(name)
    FILE.write_text(json.dumps(data) + "\n")
    print(FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
