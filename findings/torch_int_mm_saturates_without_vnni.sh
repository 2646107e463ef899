#!/usr/bin/env bash
# torch 2.13.0 on a CPU: _int_mm multiplies int8 and adds up in int32, as its result's type
# says. Where oneDNN may not use VNNI instructions (here it is told so by its own setting
# ONEDNN_MAX_CPU_ISA=AVX2), two products are added in 16 bits and stay at the largest
# number: sums of large codes are wrong by a factor of a hundred, without a word.
#
# Seen, 64 products of 127 · 127: AVX2 8160 in the place of 1032256. (With VNNI it is
# right; a CPU without it shows the wrong number in both runs.)
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
[ "$(uname -m)" = x86_64 ] || { echo "not an x86-64 CPU: nothing to see"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 torch==2.13.0

cat > "$work/sum.py" <<'PYTHON'
import torch

codes = torch.full((32, 64), 127, dtype=torch.int8)
found = torch._int_mm(codes[:4], codes.t())
print(torch.__version__, found.unique().tolist(), "wanted", 64 * 127 * 127)
PYTHON
"$work/venv/bin/python" "$work/sum.py"
found=$(ONEDNN_MAX_CPU_ISA=AVX2 "$work/venv/bin/python" "$work/sum.py")
echo "AVX2: $found"
[[ "$found" == *"[8160] wanted 1032256" ]]
