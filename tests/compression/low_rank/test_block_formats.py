"""Blocks with shared scales: the specification's own rule, compressed-tensors, gguf."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlab.compression import quantization_basics as qb
from llmlab.compression.low_rank import (
    E2M1,
    E4M3,
    E5M2,
    FP4,
    MXFP4,
    MXFP8,
    NVFP4,
    BlockFormat,
    FloatFormat,
)
from llmlab.compression.low_rank import block_formats as bf
from llmlab.compression.low_rank import float_formats as ff

GOLDEN = Path(__file__).parents[1] / "golden" / "low_rank.json"
KINDS = {
    "mxfp8": MXFP8,
    "mxfp8 e5m2": BlockFormat(E5M2),
    "mxfp4": MXFP4,
    "mxfp4 carry": bf.with_rule(MXFP4, "carry"),
    "mxfp4 ceil": bf.with_rule(MXFP4, "ceil"),
    "nvfp4": NVFP4,
    "fp4": FP4,
}


def golden(name):
    """A format as compressed-tensors stores it, and the weight."""
    data = json.loads(GOLDEN.read_text())
    stored = {key: torch.tensor(value) for key, value in data[name].items()}
    return torch.tensor(data["weight"]), stored


def weight(rows=5, columns=128, seed=0):
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=random)
    return W * torch.logspace(-2, 1, rows)[:, None]


# The specification --------------------------------------------------------------------


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2], ids=str)
def test_the_scale_is_that_of_the_specification(element):
    """X is the largest power of two not above max|V|, less e_max; found by search."""
    kind = BlockFormat(element)
    V = weight(40, 32)
    V[7] *= 2.0**-120
    V[8] *= 2.0**110
    V[9, 3] = 4.0
    V[9, 4:] = 0
    stored = bf.encode(V, kind)
    e_max = {2: 2, 4: 8, 5: 15}[element.exponent]
    for row, code in zip(V.double(), stored.scale[:, 0].tolist(), strict=True):
        largest = row.abs().max()
        power = max(p for p in range(-160, 160) if 2.0**p <= largest)
        assert code == min(max(power - e_max + 127, 0), 254)
    X = 2.0 ** (stored.scale.double() - 127)
    expected = ff.round_to((V.double() / X).float(), element).double() * X
    assert torch.equal(bf.decode(stored, kind).double(), expected)


def test_maxima_between_the_largest_element_and_the_next_power_are_clipped():
    tops = torch.tensor([4.0, 6.0, 6.5, 7.0, 7.9, 8.0])
    V = torch.zeros(6, 32)
    V[:, 3] = tops
    V[:, 4] = 1.0
    found = {
        rule: bf.encode(V, bf.with_rule(MXFP4, rule)).scale[:, 0].int() - 127
        for rule in bf.RULES
    }
    assert found["floor"].tolist() == [0, 0, 0, 0, 0, 1]
    assert found["carry"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["ceil"].tolist() == [0, 0, 1, 1, 1, 1]
    decoded = bf.round_to(V, MXFP4)[:, 3]
    assert decoded.tolist() == [4, 6, 6, 6, 6, 8]
    W = weight(200, 64)
    ceil = bf.encode(W, bf.with_rule(MXFP4, "ceil"))
    top = bf.to_blocks(W, 32).abs().amax(-1) / bf.e8m0_values(ceil.scale)
    assert top.max() <= 6 and top.min() > 3


def test_e8m0_has_these_values():
    codes = torch.tensor([0, 1, 126, 127, 128, 254, 255], dtype=torch.uint8)
    expected = [2.0**-127, 2.0**-126, 0.5, 1, 2, 2.0**127]
    values = bf.e8m0_values(codes)
    assert values[:-1].tolist() == expected and values[-1].isnan()
    theirs = codes.view(torch.float8_e8m0fnu).float()
    torch.testing.assert_close(values, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_block_of_zeros_and_the_ends_of_the_range():
    V = torch.zeros(4, 32)
    V[1, 0] = 1e-45  # below the smallest scale
    V[2, 0] = torch.finfo(torch.float32).max
    V[3, 0] = -3.0
    for name, kind in KINDS.items():
        if kind.scale != "e8m0":
            continue
        stored = bf.encode(V, kind)
        assert stored.scale[0, 0] == 0 and not bf.decode(stored, kind)[0].any(), name
        decoded = bf.decode(stored, kind)
        assert decoded.isfinite().all() and decoded[3, 0] == -3


# The formats --------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_what_was_rounded_once_is_stored_exactly(name):
    kind = KINDS[name]
    once = bf.round_to(weight(), kind)
    stored = bf.encode(once, kind)
    if kind.has_global:  # its divisor comes from the rounded maximum
        torch.testing.assert_close(bf.decode(stored, kind), once, rtol=0.15, atol=1e-3)
    else:
        assert torch.equal(bf.decode(stored, kind), once)
    scaled = once * 2.0**-3  # a power of two moves into the scale
    if kind.scale == "e8m0":
        assert torch.equal(bf.encode(scaled, kind).codes, stored.codes)
        assert torch.equal(bf.encode(scaled, kind).scale, stored.scale - 3)


@pytest.mark.parametrize("name", KINDS)
def test_the_error_of_each_element_is_bounded(name):
    """Half a step of its element, or the clipping that its rule allows."""
    kind = KINDS[name]
    W = weight(seed=2)
    stored = bf.encode(W, kind)
    scale = bf.scale_values(stored.scale, kind, stored.global_scale)[..., None]
    elements = bf.to_blocks(W, kind.size) / scale
    # E4M3 and float16 scales are rounded: the largest may be just above the last level
    reach = {"floor": 2 * 2.0**kind.element.e_max, "carry": 7, "ceil": kind.element.top}
    limit = reach[kind.rule] if kind.scale == "e8m0" else kind.element.top * 1.07
    assert elements.abs().max() <= limit * (1 + 1e-5)
    error = (bf.to_blocks(bf.decode(stored, kind), kind.size) - elements * scale).abs()
    inside = elements.abs() <= kind.element.top
    step = elements.abs() * 2.0**-kind.element.mantissa
    step = step.clamp(min=2.0 ** (kind.element.e_min - kind.element.mantissa))
    assert (error <= (step / 2 + 1e-5) * scale)[inside].all()


def test_bits_are_counted_to_the_last():
    assert bf.bits_per_weight(MXFP4) == 4.25
    assert bf.bits_per_weight(MXFP8) == 8.25
    assert bf.bits_per_weight(NVFP4) == 4.5
    assert bf.bits_per_weight(NVFP4, weights=64) == 5.0
    assert bf.bits_per_weight(FP4) == 4.25
    W = weight()
    for kind in KINDS.values():
        stored = bf.encode(W, kind)
        bits = stored.codes.numel() * kind.element.bits
        bits += 8 * stored.scale.nbytes
        if stored.global_scale is not None:
            bits += 8 * stored.global_scale.nbytes
        assert bits / W.numel() == bf.bits_per_weight(kind, W.numel())


def test_nibbles_go_low_first_and_come_back():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    codes[1] = codes[1].flip(0)
    packed = bf.pack_nibbles(codes)
    assert packed.shape == (3, 16) and packed[0, :2].tolist() == [0x10, 0x32]
    assert torch.equal(bf.unpack_nibbles(packed), codes)
    assert torch.equal(packed.flatten(), qb.pack(codes, 4))


# The libraries ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_compressed_tensors_has_the_same_bytes_with_its_rule(name):
    W, theirs = golden(name)
    kind = bf.with_rule(KINDS[name], "carry")
    stored = bf.encode(W, kind)
    assert torch.equal(stored.scale.int(), theirs["weight_scale"].int())
    codes = stored.codes
    if name == "mxfp4":
        assert torch.equal(bf.pack_nibbles(codes).int(), theirs["weight_packed"].int())
    else:
        assert torch.equal(codes.int(), theirs["weight"].int())
    assert torch.equal(bf.decode(stored, kind), theirs["decoded"])
    by_spec = bf.encode(W, KINDS[name])
    assert not torch.equal(by_spec.scale, stored.scale)


def test_nvfp4_of_compressed_tensors_has_the_same_bytes():
    """But for blocks of zeros: they write 0.125 there, we the smallest scale."""
    W, theirs = golden("nvfp4")
    stored = bf.encode(W, NVFP4)
    torch.testing.assert_close(stored.global_scale, theirs["weight_global_scale"])
    assert torch.equal(
        bf.pack_nibbles(stored.codes).int(), theirs["weight_packed"].int()
    )
    empty = bf.to_blocks(W, 16).abs().amax(-1) == 0
    assert empty.any()
    same = stored.scale.int() == theirs["weight_scale"].int()
    assert torch.equal(same, ~empty)
    assert (theirs["weight_scale"][empty] == ff.encode(torch.tensor(0.125), E4M3)).all()
    # they decode in bfloat16
    decoded = bf.decode(stored, NVFP4)
    torch.testing.assert_close(decoded, theirs["decoded"], rtol=0.01, atol=0)


def test_gguf_reads_our_blocks_and_breaks_ties_to_the_smaller():
    """Byte i holds elements i and i + 16 there, behind the scale's byte."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    W, _ = golden("mxfp4")
    stored = bf.encode(W, MXFP4)
    halves = stored.codes.reshape(-1, 2, 16)
    packed = halves[:, 0] | halves[:, 1] << 4  # (blocks, 16)
    blocks = torch.cat([stored.scale.reshape(-1, 1), packed], 1).numpy()
    read = quants.dequantize(blocks.reshape(len(W), -1), GGMLQuantizationType.MXFP4)
    assert np.array_equal(read, bf.decode(stored, MXFP4).numpy())
    theirs = quants.quantize(W.numpy(), GGMLQuantizationType.MXFP4).reshape(-1, 17)
    assert np.array_equal(theirs[:, 0], stored.scale.flatten().numpy())
    back = quants.dequantize(theirs.reshape(len(W), -1), GGMLQuantizationType.MXFP4)
    differ = torch.tensor(back) != bf.decode(stored, MXFP4)
    assert W[differ].tolist() == [0.75, 1.75, 3.5]
    assert torch.tensor(back)[differ].tolist() == [0.5, 1.5, 3.0]


def test_torchs_e8m0_is_another_rounding():
    """Nearest with ties up, and the sign is lost; so scales are not cast with it."""
    x = torch.tensor([1.5, 3.0, 5.0, 6.0, -1.0])
    assert x.to(torch.float8_e8m0fnu).float().tolist() == [2, 4, 4, 8, 1]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scale='fp8'"):
        BlockFormat(scale="fp8")
    with pytest.raises(ValueError, match="rule='round'"):
        BlockFormat(rule="round")
    for size in (0, 1, 15):
        with pytest.raises(ValueError, match=f"size={size} must be even"):
            BlockFormat(size=size)
    with pytest.raises(ValueError, match="has 6 bits"):
        BlockFormat(FloatFormat(3, 2))
    with pytest.raises(ValueError, match="size=32 must divide the last dimension, 40"):
        bf.encode(torch.ones(2, 40), MXFP4)
    for bad in (torch.nan, torch.inf):
        W = weight()
        W[0, 0] = bad
        with pytest.raises(ValueError, match="x holds 1 values"):
            bf.encode(W, NVFP4)
    assert replace(MXFP4, size=16).size == 16
