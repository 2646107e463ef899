#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU: one would expect AdamW8bit to move weights as AdamW
# does, give or take a few per cent. It keeps the averages of squares of 256 neighbours
# in 8 bits, as shares of the largest, and the smallest share above 0 is 1/64,000;
# anything smaller is rounded up to it. So a weight whose gradient is below 1/250
# (1/sqrt(64,000)) of the block's largest is divided by too much, and moves the less the
# smaller it is. The first step is right (nothing has been rounded), and so are tensors
# of fewer than 4,096 elements, whose state stays in 32 bits.
#
# Seen, 100 steps, the gradient of one weight 1, of all others less: how far the others
# of its block move, against AdamW:
#   gradient 1e-02: 100 %, 1e-03: 25 %, 1e-04: 3 %; other blocks 100 %
#   the same after one step, or of 4,095 elements: 100 %
#   smallest share stored: 1/64000
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
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
from bitsandbytes.optim import AdamW8bit

print(f"bitsandbytes {version('bitsandbytes')}, torch {version('torch')}")


def move(kind, small, steps, n):
    """Weights after steps with the gradients 1, small, small, ... and the optimizer."""
    weight = torch.nn.Parameter(torch.zeros(n))
    optimizer = kind([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.full((n,), small)
        weight.grad[0] = 1.0
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def share(small, steps=100, n=4096):
    """How far the rest of the block, and the other blocks, move against AdamW."""
    moved, state = move(AdamW8bit, small, steps, n)
    if n == 4096:
        assert state["state2"].dtype == torch.uint8
        levels = state["qmap2"][state["state2"].long()]
        floors.add(round(1 / levels[levels > 0].min().item(), -1))
    moved = moved / move(torch.optim.AdamW, small, steps, n)[0]
    block, others = moved[1:256].mean().item(), moved[256:].mean().item()
    print(
        f"gradient {small:.0e}, {n} elements, steps {steps}:"
        f" its block {block:.0%}, others {others:.0%}"
    )
    return block, others


floors = set()
full, held, most = share(1e-2), share(1e-3), share(1e-4)
right = [share(1e-4, steps=1), share(1e-4, n=4095)]
print(f"smallest share stored: 1/{max(floors):.0f}")
exact = [full[0], full[1], held[1], most[1], *right[0], *right[1]]
as_stated = (
    max(abs(x - 1) for x in exact) < 0.05
    and 0.2 < held[0] < 0.3
    and 0.02 < most[0] < 0.04
    and abs(max(floors) - 64000) < 100
)
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
