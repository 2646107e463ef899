#!/usr/bin/env bash
# transformers 5.23.0: one would expect the balance loss of a mixture of experts to be
# that of each router, averaged over the layers. load_balancing_loss_func adds up the
# layers' loads and probabilities first and multiplies the sums. Eight layers, each of
# which sends every token to one expert, another in each layer, thus have the loss of
# eight even ones, and no gradient that would part them. Layers that all have the same
# favourite are seen. Mixtral, Qwen MoE and others call this function.
#
# Seen, 8 experts, 1 for each token; the gradient is the largest of one logit:
#   one layer, one favourite: loss 5.93, gradient 1e-01
#   8 layers, the same favourite: loss 5.93, gradient 1e-02
#   2 layers, two favourites: loss 3.11; 4, four: 1.70; 8, eight: 1.00, gradient 7e-10
#   8 even layers: loss 1.00; mean of the eight layers' own losses: 5.93
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

print(f"transformers {version('transformers')}, torch {version('torch')}")
N = 8


def score(name, *layers):
    """The loss, and its largest derivative by any router's logit."""
    layers = tuple(layer.clone().requires_grad_() for layer in layers)
    loss = load_balancing_loss_func(layers, N, 1)
    loss.backward()
    gradient = max(layer.grad.abs().max().item() for layer in layers)
    print(f"{name}: loss {loss.item():.2f}, gradient {gradient:.0e}")
    return loss.item(), gradient


def wanting(expert):
    """Logits of 16 tokens that all want one expert."""
    return 3 * torch.eye(N)[expert].repeat(16, 1)


even = 3 * torch.eye(N).repeat(2, 1)  # 16 tokens, two for each expert
each = [score(f"one layer, favourite {e}", wanting(e)) for e in range(N)]
same = score("8 layers, all with favourite 0", *[wanting(0)] * N)
flat = score("8 layers, even", *[even] * N)
two = score("2 layers, two favourites", wanting(0), wanting(1))
four = score("4 layers, four favourites", *map(wanting, range(4)))
eight = score("8 layers, eight favourites", *map(wanting, range(N)))
mean = sum(loss for loss, _ in each) / N
print(f"mean of the eight layers' own losses: {mean:.2f}")
as_stated = (
    abs(mean - 5.93) < 0.01
    and abs(same[0] - mean) < 1e-3
    and mean > two[0] > four[0] > eight[0]
    and abs(eight[0] - 1) < 1e-4
    and abs(flat[0] - 1) < 1e-4
    and eight[1] < 1e-6 < 1e-4 < each[0][1]
)
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
