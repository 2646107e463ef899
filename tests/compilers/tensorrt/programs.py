"""Small networks and histograms, the same wherever they are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def numbers(*shape: int, salt: int = 1, scale: float = 1.0) -> Tensor:
    """Numbers between −1 and 1 that need no generator."""
    count = 1
    for size in shape:
        count *= size
    i = torch.arange(count, dtype=torch.int64)
    mixed = (i * i * 7 + i * (31 + salt) + salt * 101) % 2039
    return ((mixed - 1019) / 1019 * scale).float().reshape(shape)


def rms_norm(x, gain):
    return x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + 1e-5) * gain


def block(h, gain, gate, up, down):
    """Half of a decoder block: norm, SwiGLU, residual."""
    x = rms_norm(h, gain)
    return h + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def two_layers(x, w1, w2):
    """GELU between two products, and no bias."""
    return F.gelu(x @ w1, approximate="tanh") @ w2


def with_bias(x, w1, b1, w2):
    """ReLU, a bias, and a residual."""
    return torch.relu(x @ w1 + b1) @ w2 + x


def block_case(T: int = 16, d: int = 32, f: int = 48) -> tuple[Tensor, dict]:
    """The input of `block`, one number far out, and its weights."""
    h = numbers(T, d, salt=5)
    h[3, 4] = 9.0
    return h, {
        "gain": 1 + numbers(d, salt=2, scale=0.5),
        "gate": numbers(f, d, salt=3, scale=0.3),
        "up": numbers(f, d, salt=4, scale=0.3),
        "down": numbers(d, f, salt=6, scale=0.3),
    }


def two_case(T: int = 12, d: int = 24, f: int = 40) -> tuple[Tensor, dict]:
    """The input of `two_layers`, and its weights."""
    weights = {
        "w1": numbers(d, f, salt=7, scale=0.3),
        "w2": numbers(f, d, salt=8, scale=0.3),
    }
    return numbers(T, d, salt=9), weights


def bias_case(T: int = 12, d: int = 24, f: int = 40) -> tuple[Tensor, dict]:
    """The input of `with_bias`, and its weights."""
    x, weights = two_case(T, d, f)
    bias = numbers(f, salt=10, scale=0.5)
    return x, {"w1": weights["w1"], "b1": bias, "w2": weights["w2"]}


def histograms(bins: int = 2048) -> dict[str, Tensor]:
    """Counts of |x|: smooth, with a far outlier, with gaps, with many zeros."""
    j = torch.arange(bins, dtype=torch.float64)
    smooth = (1e5 * torch.exp(-((j / 500) ** 2))).long() + (j.long() * 7919) % 3
    outlier = (1e6 * torch.exp(-j / 9)).long()
    outlier[-1] = 2
    gaps = ((j.long() * 131) % 7 == 0) * (1 + (2000 / (1 + j)).long())
    zeros = (5e3 * torch.exp(-j / 300)).long() + 1
    zeros[0] = 1_000_000
    return {"smooth": smooth, "outlier": outlier, "gaps": gaps.long(), "zeros": zeros}


def rows_agree(found: Tensor, wanted: Tensor, share: float = 0.7) -> bool:
    """Whether most rows are the same.

    Sums of floats differ in the last bit from CPU to CPU. Where that moves one code by
    one, its row is another; all others are not.
    """
    close = (found - wanted).abs().amax(-1) < 1e-4 * (1 + wanted.abs().amax())
    return float(close.float().mean()) >= share
