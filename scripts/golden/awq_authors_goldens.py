"""What the authors' own code finds: tests/compression/golden/awq_authors.safetensors.

    git clone https://github.com/mit-han-lab/llm-awq
    git -C llm-awq checkout d6e797a42b9ef7778de8ee2352116e0f48a78d61
    python scripts/golden/awq_authors_goldens.py llm-awq

One small Llama without GQA, calibrated on 3 rows of 200 tokens, 4 bits with a zero
point and groups of 32: the scale of every seam, and the limits of the clipping search.
Kernels of the repository, which need a GPU, are replaced by nothing: they take no part
in the searches. Below 512 tokens their clipping search stops at "slice step cannot be
zero", and it asks for groups and for rows in multiples of 64.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

FILE = (
    Path(__file__).parents[2]
    / "tests"
    / "compression"
    / "golden"
    / "awq_authors.safetensors"
)
QUANTIZER = {"zero_point": True, "q_group_size": 32}


def authors(clone: str) -> tuple:
    """Their two searches, and the list of errors that the first one fills."""
    sys.path.insert(0, clone)
    kernels = types.ModuleType("awq.quantize.qmodule")
    kernels.ScaledActivation = type("ScaledActivation", (nn.Module,), {})
    sys.modules["awq.quantize.qmodule"] = kernels
    # their searches move things to a GPU
    for kind in (nn.Module, torch.Tensor):
        kind.cuda = lambda self: self
    torch.cuda.empty_cache = lambda: None
    scale = importlib.import_module("awq.quantize.auto_scale")
    clip = importlib.import_module("awq.quantize.auto_clip")
    return scale.auto_scale_block, clip.auto_clip_block, scale.apply_scale


def make() -> LlamaForCausalLM:
    """A random Llama whose norms make some channels much larger than others."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=1, **shape))
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
            p.data.exp_()
        else:
            nn.init.normal_(p, std=0.2)
        p.data = p.data.half().float()  # so that half the bytes hold them
    return model.eval()


@torch.no_grad()
def main(clone: str) -> None:
    auto_scale_block, auto_clip_block, apply_scale = authors(clone)
    model = make()
    out = {f"base/{name}": t.half() for name, t in model.state_dict().items()}
    torch.manual_seed(1)
    out["tokens"] = torch.randint(61, (3, 200))
    block = model.model.layers[0]
    inputs: dict[str, torch.Tensor] = {}
    options: dict = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: options.update(kwargs), with_kwargs=True
        )
    ]
    for name, linear in block.named_modules():
        if isinstance(linear, nn.Linear):

            def keep(module, args, name=name):
                inputs[name] = args[0].clone()

            hooks.append(linear.register_forward_pre_hook(keep))
    model(out["tokens"], use_cache=False)
    for hook in hooks:
        hook.remove()
    found = auto_scale_block(block, options, 4, QUANTIZER, inputs)
    for before, _, scale in found:
        out[f"scale/{before}"] = scale.clone()
    apply_scale(block, found, input_feat_dict=inputs)
    for name, limits in auto_clip_block(block, 4, QUANTIZER, inputs):
        out[f"limits/{name}"] = limits.clone()
    versions = {name: importlib.metadata.version(name) for name in ("torch",)}
    versions["llm-awq"] = "d6e797a42b9ef7778de8ee2352116e0f48a78d61"
    save_file(out, FILE, metadata=versions)
    print(FILE.stat().st_size, sorted(name for name in out if "base" not in name))


if __name__ == "__main__":
    main(sys.argv[1])
