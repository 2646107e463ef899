"""The golden file of the `adapters` library, and our models with its weights on.
`scripts/golden/adapters_goldens.py` makes it.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llmlab.models.llama import rope_frequencies, rope_tables, rotate
from llmlab.peft.prompt_and_prefix_tuning import prefixes
from tests.peft.conftest import make_hf, make_llama

FILE = Path(__file__).parent / "golden" / "adapters.safetensors"
PREFIX = "virtual_tokens.prompt_embeddings"


@cache
def golden():
    return load_file(FILE)


def of(case, kind):
    """{name: tensor} of one case, "weight" or "grad", the prefix as we store it."""
    start = f"{case}/{kind}/"
    found = {
        name.removeprefix(start): t.clone()
        for name, t in golden().items()
        if name.startswith(start)
    }
    return {name: moved(t) if name == PREFIX else t for name, t in found.items()}


def moved(table):
    """The library gives the first token position 0, prefix or not; ours is at p. So our
    stored keys are turned on by p.
    """
    config = make_llama().config
    pairs = prefixes.split(table, config.num_hidden_layers, config.num_key_value_heads)
    cos, sin = rope_tables(
        torch.full((1, len(table)), len(table)), rope_frequencies(config)
    )
    return prefixes.join([(rotate(k, cos, sin), v) for k, v in pairs])


def base(kind):
    """Our Llama or transformers', with the base weights of the golden file."""
    model = make_llama() if kind == "ours" else make_hf()
    state = {
        n.removeprefix("base/"): t for n, t in golden().items() if n.startswith("base/")
    }
    model.load_state_dict(state, strict=False)
    return model


def check(model, case, parts):
    """Logits and every gradient of `model`, whose trained tensors are `parts` by our
    names, against the library's.
    """
    tokens = golden()["tokens"]
    logits = getattr(out := model(tokens), "logits", out)
    torch.testing.assert_close(logits, golden()[f"{case}/logits"], rtol=0, atol=1e-5)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = of(case, "grad")
    assert parts.keys() == grads.keys()
    for name, p in parts.items():
        torch.testing.assert_close(
            p.grad, grads[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    # softmax cancels that one
    felt = [
        g.abs().max() > 1e-5 for n, g in grads.items() if not n.endswith("key.bias")
    ]
    assert all(felt) and {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in parts.values()
    }


def put(parts, weights):
    """Copy the library's weights into ours."""
    assert parts.keys() == weights.keys()
    with torch.no_grad():
        for name, p in parts.items():
            p.copy_(weights[name])
