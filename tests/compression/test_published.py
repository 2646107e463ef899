"""The rules of counting behind the book's page "Published numbers"."""

from __future__ import annotations

import torch
from torch import nn

from llmlab.compression import published
from llmlab.compression import quantization_basics as qb


def test_linears_of_a_block_are_counted_as_they_are():
    """A block as GPT-3 has it, counted on modules."""
    d, L, vocabulary = 8, 3, 50
    with torch.device("meta"):
        block = [nn.Linear(d, d) for _ in range(4)]
        block += [nn.Linear(d, 4 * d), nn.Linear(4 * d, d)]
    weights = sum(linear.weight.numel() for linear in block)
    assert published.linear_weights(L, d) == L * weights
    assert published.pruned_weights(L, d, 25) == L * weights / 4

    rows = sum(linear.out_features for linear in block)
    expected = L * (weights * 3 / 8 + rows * 4) + 4 * vocabulary * d
    assert published.quantised_bytes(L, d, vocabulary, 3) == expected


def test_bits_of_a_row_are_those_of_the_package():
    """16-bit scales; the zero point of a row is stored in 16 bits here, in 3 there."""
    d = 64
    config = qb.QuantConfig(3, symmetric=False, per="row")
    ours = qb.bits_per_weight(config, d)
    counted = (3 * d * d + 8 * d * 4) / d / d
    assert abs(counted - ours - (16 - 3) / d) < 1e-9


def test_caches_and_devices():
    keys = torch.zeros(3, 8, 5, dtype=torch.float16)  # layers, width, tokens
    assert published.cache_bytes(3, 8, 5) == 2 * keys.nbytes
    assert published.devices(10e9, 8, 5) == 2
    assert published.devices(10e9, 8, 4.9) == 3
