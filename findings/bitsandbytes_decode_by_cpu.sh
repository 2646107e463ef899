#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX-512: dequantize_4bit gives wrong weights, without
# a word, where the length of a row is a multiple of 16 and not of the block size. Codes
# and scales are right: decoded by definition they give the right matrix. Its kernel
# takes a row of n to have floor(n / block) scales of its own, while quantize_4bit counts
# blocks over the flat tensor. Without AVX-512 the result is right.
#
# Exit status 0: as stated for this CPU. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 bitsandbytes==0.50.2

"$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from bitsandbytes import functional as F

has_avx512 = torch.cpu.get_capabilities().get("avx512_f", False)
print(f"bitsandbytes {version('bitsandbytes')}, torch {version('torch')}, AVX-512: {has_avx512}")

torch.manual_seed(0)
rows, n = 1536, 576
weight = torch.randn(rows, n)
changed = False
for block in (64, 128, 256):
    packed, state = F.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=False
    )
    flat = packed.flatten().int()
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()
    defined = state.code[codes] * state.absmax.repeat_interleave(block)
    defined = defined.view(rows, n)
    off = (F.dequantize_4bit(packed, state) - defined).abs().max().item()
    lost = (weight - defined).abs().max().item()
    print(f"blocks of {block:3}: off the definition by {off:.3f}; rounding alone {lost:.3f}")
    expected_wrong = has_avx512 and n % block != 0
    changed |= (off > 0.1) != expected_wrong
print("changed" if changed else "as stated for this CPU")
sys.exit(changed)
PYTHON
