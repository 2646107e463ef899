#!/usr/bin/env bash
# llmcompressor 0.14.0.1, SparseGPT without a pattern, sparsity 0.5: one would expect half
# of the weights to go. In each block it looks up the score of rank n · s and prunes every
# weight whose score is not above it: that one too, and all that are equal to it. So a
# block of 128 columns loses one weight too many, and where many weights are equal, as on
# the levels of a quantised model, many too many: of equal weights with equal inputs none
# is left. With mask_structure "2:4" exactly half go.
#
# Seen, identity for H, sparsity 0.5: pruned of
#   4 x 256 random weights:      514 of 1024
#   the same in 3 bits:          740 of 1024 (the count depends on the draw)
#   8 x 128 equal weights:       1024 of 1024
#   8 x 128 equal weights, 2:4:  512 of 1024
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip llmcompressor==0.14.0.1

"$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

print(f"llmcompressor {version('llmcompressor')}, torch {torch.__version__}")


@torch.no_grad()
def pruned(weight, n=0, m=0):
    """How many weights become 0 at sparsity 0.5, or with n of m pruned."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.copy_(weight)
    hessian = torch.eye(weight.shape[1])
    _, found = sparsify_weight(linear, {linear: hessian}, 0.5, n, m, 128, 0.01, False)
    return int((found == 0).sum())


torch.manual_seed(0)
random = torch.randn(4, 256)
scale = random.abs().max() / 3
levels = (torch.round(random / scale).clamp(-3, 3) + 0.5) * scale  # none of them is 0
equal = torch.ones(8, 128)
found = {
    "4 x 256 random weights": pruned(random),
    "the same in 3 bits": pruned(levels),
    "8 x 128 equal weights": pruned(equal),
    "8 x 128 equal weights, 2:4": pruned(equal, 2, 4),
}
for what, count in found.items():
    print(f"{what}: {count} of 1024")
counts = list(found.values())
as_stated = (
    counts[0] == 514 and counts[1] > 530 and counts[2] == 1024 and counts[3] == 512
)
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
