#!/usr/bin/env bash
# transformers 5.23.0: a Llama's config has `head_dim`, so one would expect any number of
# heads to be allowed beside any hidden size, as in Mistral, Qwen2, Qwen3, Granite, OLMo2
# and SmolLM3, whose attention is the same. LlamaConfig and Gemma2Config refuse it where
# the heads do not divide the hidden size, although head_dim is given and the model would
# run: so a Llama of 4,096 whose heads were pruned from 32 to 24 cannot be opened.
#
# Seen, hidden_size 64, 3 heads of head_dim 16:
#   LlamaConfig, Gemma2Config: refused, "is not a multiple of the number of attention
#   heads"; the other six make a model with q_proj of (48, 64), which runs
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0

"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "pad_token_id": 0,
}


def outcome(name, **shape):
    """Whether a config is refused, or what its model's q_proj is."""
    try:
        config = getattr(transformers, f"{name}Config")(**SHAPE | shape)
    except Exception as error:  # a class of huggingface_hub's own
        wanted = "is not a multiple of the number of attention heads"
        return "refused" if wanted in str(error) else f"{type(error).__name__}"
    if shape:
        return "accepted"
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return f"runs, q_proj {tuple(model.model.layers[0].self_attn.q_proj.weight.shape)}"


found = {}
for name in (
    *("Llama", "Gemma2", "Mistral", "Qwen2", "Qwen3", "Granite", "Olmo2", "SmolLM3"),
):
    found[name] = outcome(name)
    print(f"{name}: {found[name]}")
pruned = {"hidden_size": 4096, "head_dim": 128}
heads = {"num_attention_heads": 24, "num_key_value_heads": 24}
large = outcome("Llama", **pruned, **heads)
print(f"Llama of 4096 with 24 heads of 128: {large}")
runs = "runs, q_proj (48, 64)"
as_stated = large == "refused" and list(found.values()) == ["refused"] * 2 + [runs] * 6
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
