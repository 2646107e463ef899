"""What torch-pruning makes of a small Llama: golden/llm_pruner.safetensors and .json.

    python scripts/golden/llm_pruner_goldens.py

in an environment with torch-pruning 1.6.1 and transformers. The weights are in the
file, so that the test computes on the same ones. The versions stand in the JSON.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parents[2] / "tests" / "compression" / "golden"
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 12,
    "intermediate_size": 17,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "tie_word_embeddings": False,
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE | changes, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def coupled(model, place: str, idxs: list[int]) -> list[list]:
    """[parameter, axis, indices] of each linear, norm and embedding that go along."""
    graph = tp.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": IDS, "use_cache": False},
        forward_fn=lambda m, x: m(**x).logits,
        unwrapped_parameters=[
            (p, 0) for n, p in model.named_parameters() if "norm" in n
        ],
    )
    names = {module: name for name, module in model.named_modules()}
    owner = {id(p): n for n, p in model.named_parameters()}
    layer = model.get_submodule(place)
    group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs)
    found = []
    for dep, its in group:
        module = dep.target.module
        rows = "out" in dep.handler.__name__
        if isinstance(module, torch.nn.Linear):
            found.append([f"{names[module]}.weight", int(not rows), sorted(its)])
        elif isinstance(module, torch.nn.Parameter):
            found.append([owner[id(module)], 0, sorted(its)])
        elif isinstance(module, torch.nn.Embedding):
            found.append([f"{names[module]}.weight", 1, sorted(its)])
    return sorted(found)


def scores(model, place: str, scorer) -> torch.Tensor:
    """Of all output channels of a linear."""
    graph = tp.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": IDS, "use_cache": False},
        forward_fn=lambda m, x: m(**x).logits,
    )
    layer = model.get_submodule(place)
    channels = list(range(layer.out_features))
    return scorer(
        graph.get_pruning_group(layer, tp.prune_linear_out_channels, channels)
    )


def main() -> None:
    model = llama()
    tensors = {f"model/{n}": p.detach().clone() for n, p in model.named_parameters()}
    block = "model.layers.0"
    table = {
        "versions": {p: version(p) for p in ("torch-pruning", "torch", "transformers")},
        "shape": SHAPE,
        "coupled": {
            "mlp": coupled(model, f"{block}.mlp.gate_proj", [5]),
            "self_attn": coupled(model, f"{block}.self_attn.q_proj", [4, 5, 6, 7]),
        },
    }
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    for part, place in {
        "mlp": "mlp.gate_proj",
        "self_attn": "self_attn.q_proj",
    }.items():
        for how in ("sum", "prod", "max"):
            scorer = tp.importance.GroupMagnitudeImportance(2, how, None)
            key = f"{part}/magnitude/{how}"
            tensors[key] = scores(model, f"{block}.{place}", scorer)
        for kind, together in {"first": False, "vector": True}.items():
            scorer = tp.importance.GroupTaylorImportance("sum", None, together)
            key = f"{part}/{kind}/sum"
            tensors[key] = scores(model, f"{block}.{place}", scorer)
    save_file(tensors, GOLDEN / "llm_pruner.safetensors")
    text = json.dumps(table, indent=1)
    (GOLDEN / "llm_pruner.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
