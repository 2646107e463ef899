"""The pieces against vLLM's own fused kernels (scripts/golden/fused_goldens.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmlab.inference.fused_transformers import kernels, pieces

FILE = Path(__file__).parents[1] / "golden" / "fused.json"
GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
N, d, H, K, D = GOLDEN["sizes"]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def wave(*shape: int, start: float) -> torch.Tensor:
    """As in the script that made the file."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (3 * torch.sin(start + 0.7 * n)).float().view(shape)


@pytest.mark.parametrize("name", TYPES)
def test_add_rms_norm(name):
    dtype = TYPES[name]
    x, residual = wave(N, d, start=0.1).to(dtype), wave(N, d, start=2.0).to(dtype)
    weight = wave(d, start=1.0).to(dtype)
    y, total = pieces.add_rms_norm(x, residual, weight, GOLDEN["eps"])
    expected = GOLDEN["norm"][name]
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.bfloat16:  # vLLM squares the sum before it is rounded
        tolerance = {"rtol": 2**-6, "atol": 1e-3}
    torch.testing.assert_close(y.float(), torch.tensor(expected["normed"]), **tolerance)
    # the stream itself is the same to the last bit
    torch.testing.assert_close(
        total.float(), torch.tensor(expected["residual"]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", TYPES)
def test_swiglu(name):
    dtype = TYPES[name]
    found = pieces.swiglu(wave(N, 2 * d, start=0.5).to(dtype)).float()
    expected = torch.tensor(GOLDEN["swiglu"][name]["out"])
    size = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(found, expected, rtol=size, atol=1e-5)


@torch.no_grad()
def test_rope():
    """vLLM turns q and k where they lie; ours go to their places."""
    positions = torch.tensor(GOLDEN["positions"])
    theta = 10000.0 ** (-torch.arange(0, D, 2) / D)
    angles = positions[:, None] * theta
    keys, values = torch.zeros(2, 1, K, N, D)
    qkv = wave(N, (H + 2 * K) * D, start=0.3)
    q = kernels.rope_and_store(qkv, angles.cos(), angles.sin(), keys, values, 0)
    expected = torch.tensor(GOLDEN["rope"]["qkv"]).view(N, H + 2 * K, D)
    found = torch.cat([q[0], keys[0], values[0]]).transpose(0, 1)  # (N, H + 2K, D)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
