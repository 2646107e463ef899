"""Write tests/peft/golden/adapters.safetensors.

It holds what the `adapters` library computes on a small Llama.

The library needs an old transformers, so it has an environment of its own:

    python -m venv golden-env
    golden-env/bin/pip install torch==2.13.0
    golden-env/bin/pip install adapters==1.3.0          # brings transformers 4.57.6
    golden-env/bin/python scripts/golden/adapters_goldens.py

For each case the file holds the trained tensors under the names that our files give
them, `<case>/weight/<name>`, their gradients, `<case>/grad/<name>`, and the logits;
`base/<name>` is the Llama and `tokens` the input. Weights are random, so that nothing
is compared at a start where half of it is zero.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import adapters
import torch
import torch.nn.functional as F
import transformers
from adapters import composition
from safetensors.torch import save_file

OUT = (
    Path(__file__).resolve().parents[2]
    / "tests"
    / "peft"
    / "golden"
    / "adapters.safetensors"
)
SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
PREFIX = adapters.PrefixTuningConfig(flat=True, prefix_length=3)
CASES = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=5),
    "parallel": adapters.ParBnConfig(reduction_factor=2),
    "fusion": adapters.SeqBnConfig(reduction_factor=4),
    "mam": adapters.MAMConfig(PREFIX, adapters.ParBnConfig(reduction_factor=4)),
    "unipelt": adapters.UniPELTConfig(
        PREFIX,
        adapters.SeqBnConfig(reduction_factor=4),
        adapters.LoRAConfig(r=3, alpha=3),
    ),
}
SEAMS = {
    "houlsby": ("after_attention", "after_mlp"),
    "parallel": ("", "beside_mlp_residual"),
}
SEAMS |= {"mam": SEAMS["parallel"]}
NAMES = [  # the library's name → ours
    (r"attention_adapters\.adapters\.(\w+)\.adapter_down\.0", r"{attention}.down"),
    (r"attention_adapters\.adapters\.(\w+)\.adapter_up", r"{attention}.up"),
    (r"output_adapters\.adapters\.(\w+)\.adapter_down\.0", r"{output}.down"),
    (r"output_adapters\.adapters\.(\w+)\.adapter_up", r"{output}.up"),
    (r"output_adapters\.adapters\.(\w+)\.gate", r"{output}.gate"),
    (r"output_adapters\.adapter_fusion_layer\.[\w,]+\.", r"{output}."),
    (r"\.loras\.(\w+)\.gate", r".gate"),
    (r"\.loras\.(\w+)\.(lora_[AB])", r".\2.weight"),
    (r"self_attn\.prefix_tuning\.prefix_gates\.(\w+)", r"prefix_gates"),
    (
        r".*prefix_tunings\.(\w+)\.self_prefix\.control_trans",
        r"virtual_tokens.prompt_embeddings",
    ),
]


def ours(case: str, name: str) -> str:
    """Our name of one of the library's parameters."""
    attention, output = SEAMS.get(case, ("", "after_block"))
    which = re.search(r"adapters\.(\w+)\.adapter_", name)
    for pattern, new in NAMES:
        name = re.sub(
            pattern,
            new.replace("{attention}", attention).replace("{output}", output),
            name,
        )
    return f"{which[1]}:{name}" if case == "fusion" and which else name


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter that is not the base's with N(0, 0.1²), by place.

    Matrices that start as the identity stay near it.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if re.search(r"adapters\.|loras|prefix|fusion", name):
                noise = torch.randn(p.shape, generator=dice) * (
                    1.0 if "control_trans" in name else 0.1
                )
                p.copy_(
                    noise + (torch.eye(len(p)) if name.endswith("value.weight") else 0)
                )


def run(
    case: str, config: object, base: dict, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Weights, gradients and logits of one case."""
    llama = transformers.LlamaConfig(**SHAPE, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(llama)
    model.load_state_dict(base)
    adapters.init(model)
    if case == "fusion":
        both = composition.Fuse("a", "b")
        for name in both:
            model.add_adapter(name, config=config)
        model.add_adapter_fusion(both)
        model.train_adapter_fusion(both)
    else:
        model.add_adapter("a", config=config)
        model.train_adapter("a")
    randomise(model.eval(), seed=len(case))
    logits = model(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = {f"{case}/logits": logits.detach()}
    for name, p in model.named_parameters():
        if name not in base:
            shaped = lambda t: t.view(3, -1) if "control_trans" in name else t  # noqa: B023, E731
            found[f"{case}/weight/{ours(case, name)}"] = shaped(p.detach()).clone()
            if p.grad is not None:
                found[f"{case}/grad/{ours(case, name)}"] = shaped(p.grad).clone()
    return found


def main() -> None:
    """Make the file."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    base = {name: t.clone() for name, t in model.state_dict().items()}
    tokens = torch.randint(
        0, SHAPE["vocab_size"], (3, 7), generator=torch.Generator().manual_seed(3)
    )
    data = {"tokens": tokens} | {f"base/{name}": t for name, t in base.items()}
    for case, config in CASES.items():
        data |= run(case, config, base, tokens)
    versions = {
        "adapters": adapters.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: t.contiguous() for k, t in data.items()},
        OUT,
        metadata={"versions": json.dumps(versions)},
    )


if __name__ == "__main__":
    main()
