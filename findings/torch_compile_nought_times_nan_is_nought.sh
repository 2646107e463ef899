#!/usr/bin/env bash
# torch 2.13.0, torch.compile on a CPU. 0 · NaN and 0 · ∞ are NaN, and a compiler must not
# fold x * 0.0 to 0: so one would expect, and so it is. But x * 0, with the integer, is
# folded, and so are 0 / x and x * False. A sum of losses in which one has the weight 0 is
# NaN in eager where that one is; compiled, it depends on how the 0 was written.
#
# Seen, x = 1, NaN, ∞:
#   x * 0     eager 0, NaN, NaN     compiled 0, 0, 0
#   x * 0.0   eager 0, NaN, NaN     compiled 0, NaN, NaN
#   1 + 0 * x.sum()   eager NaN     compiled 1
#
# Wants a C++ compiler and headers of Python, as torch.compile does on a CPU.
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 setuptools

cat > "$work/nought.py" <<'PYTHON'
import math
import sys

import torch

FUNCTIONS = {
    "x * 0": (lambda x: x * 0, "0 0 0"),
    "x * False": (lambda x: x * False, "0 0 0"),
    "0 / x": (lambda x: 0 / x, "0 0 0"),
    "1 + 0 * x.sum()": (lambda x: 1 + 0 * x.sum(), "1"),
    "x * 0.0": (lambda x: x * 0.0, "0 nan nan"),
    "1 + 0.0 * x.sum()": (lambda x: 1 + 0.0 * x.sum(), "nan"),
    "x - x": (lambda x: x - x, "0 nan nan"),
}
x = torch.tensor([1.0, math.nan, math.inf])
as_stated = True
for name, (function, wanted) in FUNCTIONS.items():
    eager, compiled = function(x), torch.compile(function)(x)
    told = [" ".join(f"{n:g}" for n in y.flatten().tolist()) for y in (eager, compiled)]
    print(f"{name:18} eager {told[0]:10} compiled {told[1]}")
    as_stated &= "nan" in told[0] and told[1] == wanted
print("torch", torch.__version__)
sys.exit(0 if as_stated else 1)
PYTHON
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/nought.py"
