"""What llmcompressor's AWQModifier finds: tests/compression/golden/awq.safetensors.

    python scripts/golden/awq_goldens.py     in an environment of its own, with
                                                llmcompressor 0.14.0.1

Two small Llamas, without and with GQA, calibrated on 3 rows of 16 tokens. For each,
once with `duo_scaling` (its default) and once without: the scale of every seam and the
error of every trial (a mean of squares); for one, the weights after folding. Without an
accelerator the modifier stops at "Cannot access accelerator device", so pinning of
memory is replaced by nothing at all.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILE = (
    Path(__file__).parents[2] / "tests" / "compression" / "golden" / "awq.safetensors"
)
SHAPES = {
    "mha": {"num_key_value_heads": 4, "num_hidden_layers": 1},
    "gqa": {"num_key_value_heads": 2, "num_hidden_layers": 2},
}
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


class Recording(AWQModifier):
    """Keeps what is found at each seam."""

    def _compute_best_scale(self, mapping, fp16_outputs, orig_layer_weights):
        ERRORS[mapping.smooth_name] = []
        LATEST.append(mapping.smooth_name)
        best = super()._compute_best_scale(mapping, fp16_outputs, orig_layer_weights)
        SCALES[mapping.smooth_name] = best.clone()
        return best

    def _compute_loss(self, fp16_outputs, int_w_outputs):
        loss = super()._compute_loss(fp16_outputs, int_w_outputs)
        ERRORS[LATEST[-1]].append(loss)
        return loss


def make(**changes) -> LlamaForCausalLM:
    """A random Llama whose norms make some channels much larger than others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        tie_word_embeddings=False,
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0, std=1)
            p.data.exp_()
        elif "proj" in name:
            torch.nn.init.normal_(p, std=0.2)
        else:
            torch.nn.init.normal_(p, std=1)
    return model


out: dict[str, torch.Tensor] = {}
torch.manual_seed(1)
tokens = torch.randint(61, (3, 16))
out["tokens"] = tokens
for shape, changes in SHAPES.items():
    for duo in (False, True):
        SCALES: dict[str, torch.Tensor] = {}
        ERRORS: dict[str, list[float]] = {}
        LATEST: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            model = make(**changes)
            before = {n: t.clone() for n, t in model.state_dict().items()}
            model.save_pretrained(folder)
            words = Tokenizer(models.WordLevel({f"{i}": i for i in range(61)}, "0"))
            PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            weights = QuantizationArgs(
                num_bits=4, symmetric=False, strategy="group", group_size=8
            )
            scheme = QuantizationScheme(targets=["Linear"], weights=weights)
            ones = torch.ones_like(tokens)
            data = {"input_ids": tokens.tolist(), "attention_mask": ones.tolist()}
            oneshot(
                model=model,
                processor=folder,
                dataset=Dataset.from_dict(data),
                recipe=[
                    Recording(duo_scaling=duo),
                    QuantizationModifier(
                        config_groups={"group_0": scheme}, ignore=["lm_head"]
                    ),
                ],
                max_seq_length=16,
                num_calibration_samples=3,
                shuffle_calibration_samples=False,
                pad_to_max_length=False,
            )
        key = f"{shape}/{'duo' if duo else 'plain'}"
        for name, t in before.items():
            out[f"{shape}/base/{name}"] = t
        for name, scale in SCALES.items():
            out[f"{key}/scale/{name}"] = scale.float().contiguous()
            out[f"{key}/errors/{name}"] = torch.tensor(ERRORS[name])
        if key == "mha/plain":
            for name, t in model.state_dict().items():
                if name.endswith("weight") and ("proj" in name or "norm" in name):
                    out[f"{key}/after/{name}"] = t.float().clone()
versions = {
    name: importlib.metadata.version(name)
    for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
}
save_file(out, FILE, metadata={"versions": json.dumps(versions)})
print(versions, FILE.stat().st_size)
for name, t in out.items():
    if "/errors/" in name:
        print(name, len(t), int(t.argmin()))
