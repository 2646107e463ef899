"""Matrices, texts and the golden file that the tests of this room share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

FILE = Path(__file__).parents[1] / "golden" / "magnitude_wanda_sparsegpt.safetensors"


@cache
def golden():
    return load_file(FILE)


def problem(out=5, columns=16, tokens=60, seed=0):
    """W and X (in, tokens) with correlated and unequal inputs, float64."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    X = mix @ torch.randn(columns, tokens, generator=random, dtype=torch.float64)
    X *= torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)[:, None]
    W = torch.randn(out, columns, generator=random, dtype=torch.float64)
    return W, X


def damped(H, share=0.01):
    return H + share * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def text(seed=0, rows=2, length=24):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (rows, length), generator=random) for _ in range(2)]
