#!/usr/bin/env bash
# transformers 5.23.0: one would expect that a model called with position_ids that start
# again at 0 with each packed document keeps the documents apart (or does not), however
# it is called. It keeps them apart with use_cache=False alone. Called without it, in
# train mode too, a model makes a cache first, and the mask finds documents only where
# there is none: tokens of the second see the first. A mask of ones does the same, cache
# or not. Trainer sets use_cache=False itself; a training loop of one's own must.
#
# Seen, logits of two documents in one row against each by itself:
#   sdpa: as called 6.31, use_cache=False under 1e-05, with a mask of ones 6.31
#   eager: as called 6.31, use_cache=False under 1e-05, with a mask of ones 6.31
#   the first document's logits, as called: under 1e-05
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
from transformers import LlamaConfig, LlamaForCausalLM

print(f"transformers {version('transformers')}, torch {version('torch')}")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    initializer_range=0.2,
)
model = LlamaForCausalLM(config).train()  # it has no dropout
one, two = torch.randint(97, (1, 7)), torch.randint(97, (1, 9))
ids = torch.cat([one, two], 1)
positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
changed = False
for kernel in ("sdpa", "eager"):
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        alone = torch.cat([model(one).logits, model(two).logits], 1)

        def off(n=16, **how):
            """How far the first n logits are from those of each document alone."""
            with torch.no_grad():
                logits = model(ids, position_ids=positions, **how).logits
            return (logits - alone)[:, :n].abs().max().item()

        called, uncached, first = off(), off(use_cache=False), off(7)
        ones = torch.ones_like(ids)
        masked = min(off(use_cache=c, attention_mask=ones) for c in (True, False))
    print(
        f"{kernel}: as called {called:.2f}, use_cache=False {uncached:.0e},"
        f" with a mask of ones {masked:.2f}"
    )
    changed |= not (min(called, masked) > 1 and max(uncached, first) < 1e-4)
print(f"the first document's logits, as called: {first:.0e}")
print("changed" if changed else "as stated")
sys.exit(changed)
PYTHON
