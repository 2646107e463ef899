"""What the authors' quantiser does: tests/compression/golden/llm_qat.json.

    git clone https://github.com/facebookresearch/LLM-QAT
    python scripts/golden/llm_qat_goldens.py LLM-QAT/models/utils_quant.py

Values at 4 and 8 bits, and the gradient of their sum, for numbers below and above 2.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compression" / "golden" / "llm_qat.json"


def main() -> None:
    spec = importlib.util.spec_from_file_location("utils_quant", sys.argv[1])
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    x = (1.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))).round(
        decimals=3
    )
    data: dict = {"torch": torch.__version__, "x": x.tolist(), "values": {}}
    clip = torch.tensor([-2.0, 2.0])  # as their linears and caches give it
    for bits in (4, 8):
        leaf = x.clone().requires_grad_()
        found = library.SymQuantizer.apply(leaf, clip, bits, False)
        found.sum().backward()
        data["values"][str(bits)] = found.tolist()
        data["gradient"] = leaf.grad.tolist()
    FILE.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
