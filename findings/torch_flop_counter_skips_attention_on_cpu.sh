#!/usr/bin/env bash
# torch 2.13.0 on a CPU: FlopCounterMode counts what a model executes, so one would expect
# scaled_dot_product_attention in it, as on a GPU. On a CPU it counts 0 FLOPs, because the
# kernel that is chosen there has no formula; with the kernel in plain operations (MATH)
# it counts all. int8 products (_int_mm) count 0 as well. Nothing is said.
#
# Seen, causal attention of 4 heads × 64 tokens × 32: default 0, FLASH_ATTENTION 0,
# MATH 2097152 (2 products · 2 · 4 · 64 · 64 · 32); _int_mm 64 × 64 × 64: 0
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 torch==2.13.0

"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def attention(backend=None):
    x = torch.randn(1, 4, 64, 32)
    if backend is None:
        return scaled_dot_product_attention(x, x, x, is_causal=True)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(x, x, x, is_causal=True)


codes = torch.ones(64, 64, dtype=torch.int8)
seen = {
    "default": counted(attention),
    "FLASH_ATTENTION": counted(lambda: attention(SDPBackend.FLASH_ATTENTION)),
    "MATH": counted(lambda: attention(SDPBackend.MATH)),
    "_int_mm": counted(lambda: torch._int_mm(codes, codes)),
    "mm": counted(lambda: codes.float() @ codes.float()),
}
print(torch.__version__, seen)
wanted = {
    "default": 0,
    "FLASH_ATTENTION": 0,
    "MATH": 2 * 2 * 4 * 64 * 64 * 32,
    "_int_mm": 0,
    "mm": 2 * 64**3,
}
sys.exit(seen != wanted)
PYTHON
