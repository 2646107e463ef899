"""What DeepSpeed's compression library computes: golden/zeroquant.safetensors.

DeepSpeed took the library out; 0.18.2 still has it. In an environment of its own:

    pip install torch==2.13.0 deepspeed==0.18.2
    python scripts/golden/zeroquant_goldens.py

A linear of 8 x 6 goes through `init_compression` with a config, as a user's model does.
Stored are its weight as the forward pass sees it, its outputs for five tokens, and the
gradients of Σ y · upstream.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.compression.compress import init_compression, redundancy_clean
from safetensors.torch import save_file
from torch import nn

GOLDEN = Path(__file__).parents[2] / "tests" / "compression" / "golden"
FILE = GOLDEN / "zeroquant.safetensors"
CASES = {  # bits of weights, groups, kind, whether inputs are quantised
    "w8a8, 8 groups": (8, 8, "symmetric", True),
    "w4a8, 8 groups": (4, 8, "symmetric", True),
    "w4a8, 4 groups": (4, 4, "symmetric", True),
    "w4, 16 groups": (4, 16, "symmetric", False),
    "w4, 8 groups, asymmetric": (4, 8, "asymmetric", False),
}


def ds_config(bits: int, groups: int, kind: str, inputs: bool) -> dict:
    """As in DeepSpeedExamples/compression/gpt2/config."""
    weights = {
        "shared_parameters": {
            "enabled": True,
            "quantizer_kernel": False,
            "schedule_offset": 0,
            "quantize_groups": groups,
            "quantize_verbose": False,
            "quantization_type": kind,
            "quantize_weight_in_forward": True,
            "rounding": "nearest",
            "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 1},
        },
        "different_groups": {
            "wq1": {
                "params": {
                    "start_bits": bits,
                    "target_bits": bits,
                    "quantization_period": 0,
                },
                "modules": ["linear"],
            }
        },
    }
    activations = {
        "shared_parameters": {
            "enabled": inputs,
            "quantization_type": "symmetric",
            "range_calibration": "dynamic",
            "schedule_offset": 0,
        },
        "different_groups": {
            "aq1": {"params": {"bits": 8}, "modules": ["linear"]},
        },
    }
    compression = {"weight_quantization": weights}
    if inputs:
        compression["activation_quantization"] = activations
    return {"train_batch_size": 1, "compression_training": compression}


class Model(nn.Module):
    def __init__(self, W: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8, bias=False)
        self.linear.weight.data.copy_(W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def compressed(W: torch.Tensor, case: tuple) -> nn.Module:
    model = init_compression(Model(W), ds_config(*case))
    linear = model.linear
    linear.weight_quantization_enabled = True  # what its scheduler does at step 0
    linear.activation_quantization_enabled = case[3]
    return linear


def main() -> None:
    torch.manual_seed(0)
    W = torch.randn(8, 6)
    W[2] *= 20  # a row with large weights
    x = torch.randn(1, 5, 6)
    x[0, 3] *= 50  # a token with large values
    upstream = torch.randn(1, 5, 8)
    stored = {"W": W, "x": x, "upstream": upstream}
    for name, case in CASES.items():
        linear = compressed(W, case)
        found = linear.weight_quantizer(
            linear.weight, case[0], None, None, linear.weight_quantize_num_groups
        )
        now = x.clone().requires_grad_()
        y = linear(now)
        (y * upstream).sum().backward()
        stored[f"{name}/weight"] = found.detach().clone()
        stored[f"{name}/y"] = y.detach().clone()
        stored[f"{name}/grad W"] = linear.weight.grad.clone()
        stored[f"{name}/grad x"] = now.grad.clone()
    zeros = x.clone()
    zeros[0, 1] = 0  # padding, say
    linear = compressed(W, CASES["w8a8, 8 groups"])
    stored["a token of zeros/y"] = linear(zeros).detach()
    untouched = init_compression(Model(W), ds_config(*CASES["w8a8, 8 groups"]))
    stored["after init_compression/y"] = untouched(x).detach()
    cleaned = redundancy_clean(untouched, ds_config(*CASES["w8a8, 8 groups"]))
    stored["after redundancy_clean/y"] = cleaned(x).detach()
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    save_file(stored, FILE, {**versions, "python": sys.version.split()[0]})
    for name, t in stored.items():
        print(name, tuple(t.shape), "NaN" if t.isnan().any() else "")
    floats = x @ W.T
    for when in ("init_compression", "redundancy_clean"):
        y = stored[f"after {when}/y"]
        print(when, "differs from floats by", (y - floats).abs().max().item())
    print("w8a8 differs by", (stored["w8a8, 8 groups/y"] - floats).abs().max().item())
    print("rows of W:", W.abs().amax(1))
    print("w4a8, 8 groups:", stored["w4a8, 8 groups/weight"].amax(1))


if __name__ == "__main__":
    main()
