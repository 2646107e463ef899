"""Words of other libraries: equal to what they packed, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmlab.compression.formats import packing
from llmlab.compression.formats.packing import Stored

GOLDEN = Path(__file__).parents[1] / "golden" / "packing.json"


def golden(library):
    return json.loads(GOLDEN.read_text())[library]["packed"]


def codes(rows, columns, bits):
    """As in scripts/golden/packing_goldens.py."""
    i = torch.arange(rows)[:, None]
    j = torch.arange(columns)
    return (i * i * 5 + j * 7 + i * j) % 2**bits


def weight(bits=4, symmetric=False, rows=16, columns=64, groups=4):
    """Distinct scales, and zeros from one end to the other."""
    scale = 1 + torch.arange(rows * groups).reshape(rows, groups) / 64
    zero = codes(rows, groups, bits)
    if symmetric:
        zero = torch.full((rows, groups), 2 ** (bits - 1))
    return Stored(codes(rows, columns, bits), scale, zero, bits)


def test_words_are_those_of_compressed_tensors():
    for case, want in golden("compressed-tensors").items():
        bits, rows, columns, dim = map(int, case.split())
        u = codes(rows, columns, bits)
        # along the rows: the transpose's words
        words = packing.pack_words(u.T.contiguous() if dim == 0 else u, bits)
        assert (words.T if dim == 0 else words).tolist() == want, case
        back = packing.unpack_words(words, bits, rows if dim == 0 else columns)
        assert torch.equal(back.T if dim == 0 else back, u)


def test_words_are_those_of_vllm():
    for bits in (4, 8):
        packed = packing.to_gptq(weight(bits))["qweight"]
        assert packed.tolist() == golden("vllm")[f"gptq {bits}"]
    assert packing.to_awq(weight())["qweight"].tolist() == golden("vllm")["awq 4"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("write", "read", "bits"),
    [
        (packing.to_compressed_tensors, packing.from_compressed_tensors, 3),
        (packing.to_compressed_tensors, packing.from_compressed_tensors, 4),
        (packing.to_gptq, packing.from_gptq, 2),
        (packing.to_gptq, packing.from_gptq, 8),
        (packing.to_awq, packing.from_awq, 4),
    ],
)
def test_there_and_back(write, read, bits, symmetric):
    stored = weight(bits, symmetric)
    back = read(write(stored), bits)
    assert torch.equal(back.codes, stored.codes)
    assert torch.equal(back.zero, stored.zero)
    assert torch.equal(back.scale, stored.scale)
    assert torch.equal(back.weight, stored.weight)


def test_a_zero_point_of_gptq_is_one_less_and_goes_around():
    """AutoGPTQ adds 1 when it reads; what is called gptq_v2 does not."""
    stored = weight()
    assert (stored.zero == 0).any()
    tensors = packing.to_gptq(stored)
    first = packing.from_gptq(tensors, 4, v2=True).zero
    assert torch.equal((first + 1) % 16, stored.zero)


def test_the_weight_that_is_meant():
    stored = Stored(
        torch.tensor([[0, 15, 8, 9]]),
        torch.tensor([[2.0, 0.5]]),
        torch.tensor([[8, 7]]),
        bits=4,
    )
    assert stored.weight.tolist() == [[-16.0, 14.0, 0.5, 1.0]]
    assert stored.group_size == 2
    assert not stored.symmetric


def test_groups_whose_columns_lie_apart_are_refused():
    tensors = packing.to_gptq(weight())
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ValueError, match="g_idx puts columns of a group apart"):
        packing.from_gptq(tensors, 4)


def test_what_a_format_cannot_hold_is_named():
    odd = weight(rows=12)
    packing.check_fits("layer", odd, "compressed-tensors")
    with pytest.raises(ValueError, match="layer has 12 rows"):
        packing.check_fits("layer", odd, "gptq")
    with pytest.raises(ValueError, match=r"layer: bits=8 must be one of \(4,\)"):
        packing.check_fits("layer", weight(8), "awq")
