#!/usr/bin/env bash
# peft 0.21.2: one would expect modules_to_save to take names as target_modules does:
# whole parts of a module's name, and an error where none is found. It takes the end of
# the name: "norm", meant for Llama's last norm, trains and stores every input_layernorm
# and post_attention_layernorm as well; "model.norm" takes the one. A name that no
# module ends in passes without a word, and what one meant to train stays frozen.
#
# Seen, what of the base is trained and stored (two layers):
#   modules_to_save=['norm']: model.norm, 2 input_layernorm, 2 post_attention_layernorm
#   modules_to_save=['model.norm']: model.norm
#   modules_to_save=['lm_heads']: nothing
#   warnings that name it: 0, each time
#   target_modules=['proj']: ValueError
#   target_modules=['lm_heads']: ValueError
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 peft==0.21.2 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

print(f"peft {version('peft')}, transformers {version('transformers')}")
LAYER = ["input_layernorm", "post_attention_layernorm"]
NORMS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LAYER] + ["model.norm"]


def wrap(**names):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, **names))


def trained(*to_save):
    """Modules of the base that modules_to_save trains and stores; warnings of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = wrap(target_modules=["q_proj"], modules_to_save=list(to_save))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    names = [n.removeprefix("base_model.model.") for n in names if "lora_" not in n]
    said = [str(w.message) for w in caught if any(s in str(w.message) for s in to_save)]
    found = sorted({n.split(".modules_to_save.")[0] for n in names})
    stored = [n for n in get_peft_model_state_dict(model) if "lora_" not in n]
    stored = [n.removeprefix("base_model.model.").rsplit(".", 1)[0] for n in stored]
    assert sorted(stored) == found, (stored, found)
    print(f"modules_to_save={list(to_save)}: {', '.join(found) or 'nothing'}")
    print(f"  warnings that name it: {len(said)}")
    return found, said


def refused(name):
    try:
        wrap(target_modules=[name])
    except ValueError as error:
        print(f"target_modules={[name]}: ValueError: {error}")
        return True
    return False


as_stated = (
    trained("norm") == (NORMS, [])
    and trained("model.norm") == (["model.norm"], [])
    and trained("lm_heads") == ([], [])
    and refused("proj")
    and refused("lm_heads")
)
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
