#!/usr/bin/env bash
# transformers 5.23.0: one would expect from_pretrained(gguf_file=...) to give the model
# that the file holds, or to refuse. For a Llama it leaves out, without a warning,
#   - the tensor rope_freqs.weight, a factor for each of RoPE's frequencies (in every
#     Llama 3.1 and 3.2 that llama.cpp's converter writes);
#   - the keys rope.scaling.type and rope.scaling.factor;
#   - the biases of attention (attention_bias) and of the MLP.
# Without attention.head_count_kv, which GGUF lets a file without grouped queries leave
# out, W_q and W_k stay in llama.cpp's order of rows. Each time the text read is another
# one; the same file without the case, or with the key, opens exactly.
#
# Seen, logits (their spread is 1.6) against those of the model that was written:
#   plain, and without grouped queries with the key: 0.00
#   rope_freqs 8.20, rope.scaling 6.82, biases of attention 9.40, of the MLP 6.78
#   no head_count_kv 7.37
#   warnings: 0; RoPE as opened: default
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0

WORK="$work" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import logging
import os
import sys
import warnings
from importlib.metadata import version

import numpy as np
import torch
import transformers
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print(f"transformers {version('transformers')}, gguf {version('gguf')}")
transformers.utils.logging.disable_progress_bar()
said = []  # what the library warns of
listener = logging.Handler(logging.WARNING)
listener.emit = said.append
logging.getLogger("transformers").addHandler(listener)
warnings.showwarning = lambda message, *_: said.append(message)

PARTS = {
    "model.embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
THETA = 10000.0


def build(kv=2, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        **more,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # they start at 0
                p.normal_()
    return model


def rope(kind, **more):
    return build(rope_parameters={"rope_type": kind, "rope_theta": THETA, **more})


def write(model, file, kv=True, linear=None, factors=None):
    """As llama.cpp's convert_hf_to_gguf.py does, without a vocabulary."""
    c = model.config
    w = GGUFWriter(file, "llama")
    w.add_tokenizer_model("none")
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(THETA)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_head_count(c.num_attention_heads)
    if kv:
        w.add_head_count_kv(c.num_key_value_heads)
    if linear:
        w.add_rope_scaling_type(RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(linear)
    if factors is not None:
        w.add_tensor("rope_freqs.weight", factors.numpy())
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for name, p in model.named_parameters():
        place, _, kind = name.rpartition(".")
        block = ""
        if place.startswith("model.layers."):
            _, _, i, place = place.split(".", 3)
            block = f"blk.{i}."
        part, a = PARTS[place], p.detach().numpy()
        if part in heads:  # llama.cpp turns neighbours, transformers halves
            halves = a.reshape(heads[part], 2, -1, *a.shape[1:])
            a = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(a.shape))
        w.add_tensor(f"{block}{part}.{kind}", a)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def gap(label, model, **how):
    folder, name = os.environ["WORK"], f"{label.replace(' ', '-')}.gguf"
    write(model, f"{folder}/{name}", **how)
    opened = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()
    ids = torch.arange(32)[None] * 3 % 97
    with torch.no_grad():
        off = (opened(ids).logits - model(ids).logits).abs().max().item()
    kinds.add(opened.config.rope_parameters["rope_type"])
    print(f"{label}: off by {off:.2f}")
    return off


kinds = set()
llama31 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
factors = build().model.rotary_emb.inv_freq / llama31.model.rotary_emb.inv_freq
right = [
    gap("plain", build()),
    gap("no grouped queries", build(kv=4)),
]
wrong = [
    gap("rope_freqs", llama31, factors=factors),
    gap("rope.scaling", rope("linear", factor=4.0), linear=4.0),
    gap("biases of attention", build(attention_bias=True)),
    gap("biases of the MLP", build(mlp_bias=True)),
    gap("no grouped queries and no head_count_kv", build(kv=4), kv=False),
]
print(f"warnings: {len(said)}; RoPE as opened: {', '.join(sorted(kinds))}")
for each in said:
    print("  ", each if isinstance(each, Warning) else each.getMessage())
as_stated = max(right) < 1e-4 and min(wrong) > 1 and not said and kinds == {"default"}
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
