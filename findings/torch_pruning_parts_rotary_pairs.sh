#!/usr/bin/env bash
# torch-pruning 1.6.1 on a Llama of transformers 5.24.0, told the number of heads
# (num_heads) and a ratio of 0.5: one would expect whole heads to go, or, with heads made
# narrower, that the two channels that RoPE turns together (i and i + head_dim/2) go
# together. Each head keeps half of its channels, and RoPE's partners are parted: by
# magnitude any can go. head_dim stays 8 and the model still runs, with halves of two
# heads read as one; setting head_dim to 4 afterwards does not bring the pairs back. With
# prune_num_heads=True, prune_head_dims=False and head_pruning_ratio=0.5 whole heads go.
#
# Seen, 4 heads of 8, random weights of seed 0:
#   default       rows 0 2 6 7 of each head are kept: of four pairs one is whole
#   heads asked   rows 8-15 and 24-31: two whole heads
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip torch-pruning==1.6.1 transformers==5.24.0

"$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import torch_pruning as tp
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print(f"torch-pruning {version('torch-pruning')}, torch {torch.__version__},")
print(f"transformers {transformers.__version__}")
HEADS, D = 4, 8


def kept(**asked):
    """The rows of q_proj that stay, and head_dim afterwards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    before = attention.q_proj.weight.detach().clone()
    names = ("q_proj", "k_proj", "v_proj")
    pruner = tp.pruner.BasePruner(
        model,
        torch.arange(6)[None],
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.lm_head, model.model.embed_tokens],
        num_heads={getattr(attention, name): HEADS for name in names},
        forward_fn=lambda model, ids: model(ids, use_cache=False).logits,
        output_transform=lambda logits: logits.sum(),
        **asked,
    )
    pruner.step()
    after = attention.q_proj.weight.detach()
    rows = [int((before == row).all(1).nonzero()[0]) for row in after]
    runs = model(torch.arange(6)[None], use_cache=False).logits.isfinite().all()
    return rows, attention.head_dim, bool(runs)


narrower, head_dim, runs = kept()
print(f"default: rows {narrower}, head_dim {head_dim}, runs: {runs}")
heads = [[row - h * D for row in narrower if row // D == h] for h in range(HEADS)]
whole = [sum((i < D // 2 and i + D // 2 in head) for i in head) for head in heads]
print(f"pairs of RoPE that are whole, per head, of {D // 2}: {whole}")
fewer, _, _ = kept(
    prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5
)
print(f"heads asked: rows {fewer}")

parted = all(len(head) == D // 2 for head in heads) and min(whole) < D // 4
whole_heads = sorted({row // D for row in fewer})
complete = [row for h in whole_heads for row in range(h * D, (h + 1) * D)]
as_stated = parted and head_dim == D and runs and fewer == complete
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
