"""Writes tests/compression/golden/smoothquant.safetensors.

It holds what llmcompressor's SmoothQuantModifier makes of a small Llama. The library
needs an older transformers, so it has an environment of its own:

    python -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    golden-env/bin/python scripts/golden/smoothquant_goldens.py

`base/<name>` is the Llama, `tokens` what it is calibrated on, a row a sample,
`base_logits` its logits, and for each α `<α>/<name>` are the weights that changed and
`<α>/logits` the logits after it. One channel of the first norm is dead, and no weight
reads another. `<observer>/<linear>` is the static step of that linear's inputs, with
the observer of llmcompressor's default and with the one that takes the largest.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[2] / "tests" / "compression" / "golden"
OUT = GOLDEN / "smoothquant.safetensors"
SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
    tie_word_embeddings=False,
)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn_like(p))
        block = model.model.layers[0]
        block.input_layernorm.weight[3] = 0  # a dead channel
        block.post_attention_layernorm.weight[7] *= 40  # an outlier
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight[:, 5] = 0  # a channel that nothing reads
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", pad_token="w0"
    )


def run(folder: str, tokens: torch.Tensor, recipe) -> LlamaForCausalLM:
    data = Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
        }
    )
    return oneshot(
        model=folder,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        precision="float32",
    )


def main() -> None:
    model = base()
    tokens = torch.randint(
        SHAPE["vocab_size"], (6, 16), generator=torch.Generator().manual_seed(1)
    )
    stored = {f"base/{name}": t.clone() for name, t in model.state_dict().items()}
    stored["tokens"] = tokens
    with torch.no_grad():
        stored["base_logits"] = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        for alpha in (0.5, 0.8):
            found = run(folder, tokens, SmoothQuantModifier(smoothing_strength=alpha))
            for name, t in found.state_dict().items():
                if not torch.equal(t, stored[f"base/{name}"]):
                    stored[f"{alpha}/{name}"] = t.clone()
            with torch.no_grad():
                stored[f"{alpha}/logits"] = found(tokens).logits
        for observer in ("minmax", "static_minmax"):
            inputs = QuantizationArgs(
                num_bits=8, strategy="tensor", dynamic=False, observer=observer
            )
            scheme = QuantizationScheme(
                targets=["Linear"],
                weights=QuantizationArgs(num_bits=8, strategy="channel"),
                input_activations=inputs,
            )
            recipe = QuantizationModifier(
                config_groups={"all": scheme}, ignore=["lm_head"]
            )
            found = run(folder, tokens, recipe)
            for name, t in found.state_dict().items():
                if name.endswith("input_scale"):
                    linear = name.removesuffix(".input_scale")
                    stored[f"{observer}/{linear}"] = t.clone().reshape(1)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    versions = {name: version(name) for name in packages}
    OUT.parent.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in stored.items()}, OUT, metadata=versions)
    print(OUT.stat().st_size, "bytes", versions, len(stored))


if __name__ == "__main__":
    main()
