"""What the published block of ChatGLM-6B computes: tests/chips/golden/glm.json.

    python scripts/golden/asc_glm_goldens.py MODELING

MODELING is `modeling_chatglm.py` as it was published with the weights, for example
https://github.com/samson-wang/chatglm-6b-huggingface (commit 867860a). It needs a
transformers of early 2023; its block does not, so only that is taken from the file. Its
table of rotary frequencies is kept in 16 bits there, and computed in 32 here.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import torch

from llmlab.chips.ascend_and_other_accelerators import glm

FILE = Path(__file__).resolve().parents[2] / "tests/chips/golden/glm.json"
NEEDED = (
    "gelu_impl",
    "gelu",
    "RotaryEmbedding",
    "rotate_half",
    "apply_rotary_pos_emb_index",
    "attention_fn",
    "SelfAttention",
    "GLU",
    "GLMBlock",
)
CONFIG = glm.GLMConfig(layers=3, hidden=24, heads=3, inner=40, vocab=50)
LENGTH, PROMPT, MASK, LAYER = 7, 4, 3, 1


def published(file: str) -> dict:
    """The names that the block needs, from the published file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    chosen = [node for node in tree.body if getattr(node, "name", "") in NEEDED]
    for node in chosen:
        node.decorator_list = []  # torch.jit.script wants to see a file
    body = ast.Module(chosen, type_ignores=[])
    typing = "from typing import *\nfrom torch.nn import LayerNorm\n"
    typing += "from torch.nn.utils import skip_init\nimport torch.nn.functional as F\n"
    names = {"torch": torch, "math": math}
    exec(typing, names)
    exec(compile(body, file, "exec"), names)
    return names


def main(file: str) -> None:
    """Run the block and keep what it gives."""
    names = published(file)
    block = names["GLMBlock"](
        CONFIG.hidden,
        CONFIG.heads,
        CONFIG.eps,
        LAYER,
        inner_hidden_size=CONFIG.inner,
        num_layers=CONFIG.layers,
    )
    rotary = block.attention.rotary_emb
    width = CONFIG.hidden // CONFIG.heads // 2
    rotary.inv_freq = 1 / 10000 ** (torch.arange(0, width, 2).float() / width)
    rotary.precision = torch.float
    ours = glm.weights(CONFIG)
    state = {}
    for name, _ in block.named_parameters():
        state[name] = ours[name.removeprefix("attention.").removeprefix("mlp.")]
    block.load_state_dict(state, strict=False)
    x = torch.randn(LENGTH, CONFIG.hidden, generator=torch.Generator().manual_seed(5))
    hidden = ~glm.prefix_mask(LENGTH, PROMPT)
    places = glm.positions(LENGTH, PROMPT, MASK)
    with torch.no_grad():
        y = block(x[:, None], places[None], hidden[None, None], LAYER)[0][:, 0]
    made = {"x": x.tolist(), "y": y.tolist(), "prompt": PROMPT, "mask": MASK}
    FILE.write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
