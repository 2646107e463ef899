"""N:M weights on disk: what is kept, and where in its group it stands.

    values  the N kept weights of each group of M, in order, (out, in / M · N)
    places  for each of them its place in the group, 0 … M − 1, ⌈log2 M⌉ bits

2:4 in 16 bits: a group of 4 takes 2 · 16 + 2 · 2 bits in place of 64, 9/16 of it. GPUs
of NVIDIA since Ampere multiply with this form directly (Mishra et al. 2021,
https://arxiv.org/abs/2104.08378). Simplified: here the weight is laid out again in each
forward pass, and places are in reading order, not in the order of a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression import quantization_basics as qb
from llmlab.compression import walk
from llmlab.compression.magnitude_wanda_sparsegpt.config import n_and_m
from llmlab.compression.magnitude_wanda_sparsegpt.masks import keep_best


def encode(
    W: Float[Tensor, "out in"], n: int, m: int
) -> tuple[Float[Tensor, "out kept"], Int[Tensor, "out kept"]]:
    """Values and places. A group with fewer than N weights keeps some zeros.

    Raises:
        ValueError: M does not divide the columns, or a group has more than N weights.
    """
    if W.shape[-1] % m:
        raise ValueError(f"m={m} must divide the columns, {W.shape[-1]}")
    groups = W.unflatten(-1, (-1, m))  # (out, in / m, m)
    most = int((groups != 0).sum(-1).max())
    if most > n:
        raise ValueError(f"a group of {m} has {most} weights; {n}:{m} keeps {n}")
    keep = keep_best((groups != 0).float(), m - n)
    # N places in each group, in order: (out · in / m · n,) → (out, in / m · n)
    places = keep.nonzero()[:, -1].reshape(len(W), -1)
    return groups[keep].reshape(len(W), -1), places


def decode(
    values: Float[Tensor, "out kept"], places: Int[Tensor, "out kept"], n: int, m: int
) -> Float[Tensor, "out in"]:
    """The weight with its zeros: the inverse of `encode`."""
    values = values.unflatten(-1, (-1, n))  # (out, in / m, n)
    places = places.unflatten(-1, (-1, n))
    W = values.new_zeros(*values.shape[:2], m)
    return W.scatter(-1, places, values).flatten(-2)  # (out, in / m, m) → (out, in)


class SparseLinear(nn.Module):
    """A linear that stores N of M weights, and lays its weight out when it is called.

    It is made empty; `pack` and `load_state_dict` fill it.
    """

    is_compressed = True

    def __init__(self, linear: nn.Linear, pattern: str) -> None:
        super().__init__()
        self.n, self.m = n_and_m(pattern)
        out, columns = linear.weight.shape
        if columns % self.m:
            raise ValueError(f"m={self.m} must divide the columns, {columns}")
        self.kept = columns // self.m * self.n  # weights of a row
        count = out * self.kept
        values = linear.weight.new_zeros(out, self.kept)
        self.register_buffer("values", values)
        size = -(-count * self.bits // 8)
        self.register_buffer("places", torch.zeros(size, dtype=torch.uint8))
        self.bias = linear.bias

    @property
    def bits(self) -> int:
        """Of a place: ⌈log2 M⌉."""
        return (self.m - 1).bit_length()

    def fill(self, W: Float[Tensor, "out in"]) -> None:
        """Store W."""
        values, places = encode(W, self.n, self.m)
        self.values.copy_(values)
        self.places.copy_(qb.pack(places, self.bits))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight with its zeros."""
        places = qb.unpack(self.places, self.bits, self.values.numel())
        places = places.long().reshape(self.values.shape)
        return decode(self.values, places, self.n, self.m)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """F.linear with the laid-out weight."""
        return F.linear(x, self.weight, self.bias)


def with_places(
    model: nn.Module, pattern: str, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """Every linear becomes an empty `SparseLinear`, for `load_state_dict` to fill."""
    found = {}
    for name, linear in walk.linears(model, skip).items():
        found[name] = SparseLinear(linear, pattern)
    return walk.put_modules(model, found)


@torch.no_grad()
def pack(
    model: nn.Module, pattern: str, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """Every linear becomes a `SparseLinear` with its weights, in place.

    Raises:
        ValueError: a linear does not keep to the pattern (named), or cannot be
            compressed; the model is then as it was.
    """
    found = {}
    for name, linear in walk.linears(model, skip).items():
        try:
            found[name] = SparseLinear(linear, pattern)
            found[name].fill(linear.weight)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return walk.put_modules(model, found)
