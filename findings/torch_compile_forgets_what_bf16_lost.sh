#!/usr/bin/env bash
# torch 2.13.0, torch.compile on a CPU. x.bfloat16().float() rounds, whoever compiles it:
# so one would expect. Inductor carries a narrow number on in float32 and rounds only what
# it stores, so that a cast to bf16 or fp16 and back is nothing. What a rounding lost,
# x − x.bfloat16().float(), is 0; a sum that carries it on (bf16 weights with a
# compensation) loses it without a word, and a weight that should double stands still.
# A cast to fp8 and back is kept. The option emulate_precision_casts=True gives
# eager's numbers.
#
# Seen:
#   x = 0.1 and 1e5: to fp16 and back 0.09998 and inf, compiled 0.1 and 1e5
#   a bf16 weight of 1, 1,000 updates of 1e-3, what was lost is carried on:
#   eager 2, compiled 1, compiled with emulate_precision_casts 2
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

cat > "$work/cast.py" <<'PYTHON'
import sys

import torch


def there_and_back(x):
    half = x.half().float()
    return half, x - x.bfloat16().float(), x.to(torch.float8_e4m3fn).float()


def update(weight, lost, step):
    """One step of a compensated sum: a bf16 weight, and what its rounding lost."""
    wanted = weight.float() + (step + lost)
    rounded = wanted.bfloat16()
    return rounded, wanted - rounded.float()


def trained(update):
    weight, lost = torch.ones(16, dtype=torch.bfloat16), torch.zeros(16)
    step = torch.full((16,), 1e-3)
    for _ in range(1000):
        weight, lost = update(weight, lost, step)
    return weight[0].item()


x = torch.tensor([0.1, 1e5])
eager, compiled = there_and_back(x), torch.compile(there_and_back)(x)
for name, here, there in zip(("fp16", "bf16 lost", "fp8"), eager, compiled):
    print(f"{name}: eager {here.tolist()}, compiled {there.tolist()}")
casts = torch.compile(update, options={"emulate_precision_casts": True})
weights = [trained(each) for each in (update, torch.compile(update), casts)]
print("torch", torch.__version__, "eager, compiled, compiled with casts:", *weights)
as_stated = (
    compiled[0].equal(x)
    and eager[0][1].isinf()
    and compiled[1].eq(0).all()
    and eager[1].ne(0).all()
    and compiled[2].equal(eager[2])
    and weights[0] == weights[2] == 2.0
    and weights[1] == 1.0
)
sys.exit(0 if as_stated else 1)
PYTHON
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/cast.py"
