"""FP8 and FP4: bit for bit torch's casts, and the definition by enumeration."""

from __future__ import annotations

import pytest
import torch

from llmlab.compression.low_rank import E2M1, E4M3, E5M2, FloatFormat
from llmlab.compression.low_rank import float_formats as ff

TORCH = {"E4M3": (E4M3, torch.float8_e4m3fn), "E5M2": (E5M2, torch.float8_e5m2)}
E3M2 = FloatFormat(3, 2)  # FP6 of the MX specification: all codes are numbers
E4M2 = FloatFormat(4, 2, "ieee")


def values(kind, seed=0):
    """Of all sizes that a format knows, every level, every tie, and both borders."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(5000, generator=random)
    x *= 2.0 ** torch.randint(kind.e_min - 6, kind.e_max + 1, (5000,), generator=random)
    finite = ff.levels(kind)
    finite = finite[finite.isfinite()]
    ascending = finite.unique()
    ties = (ascending[1:] + ascending[:-1]) / 2
    nearly = torch.cat([ties * (1 + 2**-20), ties * (1 - 2**-20)])
    x = torch.cat([x, finite, ties, nearly, torch.tensor([0.0, -0.0])])
    return x.clamp(-kind.top, kind.top)


@pytest.mark.parametrize("name", TORCH)
def test_every_code_is_torchs(name):
    kind, dtype = TORCH[name]
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    torch.testing.assert_close(ff.levels(kind), theirs, rtol=0, atol=0, equal_nan=True)
    assert kind.top == torch.finfo(dtype).max
    assert 2.0**kind.e_min == torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("name", TORCH)
def test_casts_are_torchs_bit_for_bit_up_to_the_largest_value(name):
    kind, dtype = TORCH[name]
    x = values(kind)
    cast = x.to(dtype)
    assert torch.equal(ff.encode(x, kind), cast.view(torch.uint8))
    rounded = ff.round_to(x, kind)
    assert torch.equal(rounded, cast.float())
    assert torch.equal(rounded.signbit(), cast.float().signbit())


@pytest.mark.parametrize("kind", [E4M3, E5M2, E2M1], ids=str)
def test_beyond_the_largest_value_ours_saturates(kind):
    """torch's cast to E5M2 gives ∞ there."""
    far = torch.tensor([2 * kind.top, -torch.inf])
    assert ff.round_to(far, kind).tolist() == [kind.top, -kind.top]
    if kind == E5M2:
        assert far.to(torch.float8_e5m2).float().tolist() == [torch.inf, -torch.inf]
    decoded = ff.decode(ff.encode(far, kind), kind)
    assert decoded.tolist() == [kind.top, -kind.top]


@pytest.mark.parametrize("kind", [E2M1, E3M2, E4M2, E4M3, E5M2], ids=str)
def test_rounding_is_to_the_nearest_level_and_ties_to_the_even_code(kind):
    """By enumeration of all levels; nothing is assumed of how they lie."""
    x = values(kind, seed=1).double()
    levels = ff.levels(kind)[: kind.top_code + 1].double()
    distance = (x.abs()[:, None] - levels).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    assert nearest.sum(1).max() == 2  # ties are among them
    codes = torch.arange(len(levels)).expand_as(nearest)
    even = nearest & (codes % 2 == 0)
    take = torch.where((nearest.sum(1) > 1)[:, None], even, nearest)
    expected = take.int().argmax(1) + x.signbit() * 2 ** (kind.bits - 1)
    found = ff.encode(x.float(), kind)
    assert torch.equal(found.int(), expected.int())
    assert torch.equal(ff.decode(found, kind), ff.round_to(x.float(), kind))


def test_e2m1_has_these_levels_and_ties():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ff.levels(E2M1)[:8].tolist() == positive
    assert ff.levels(E2M1)[8:].tolist() == [-v for v in positive]
    assert (E2M1.top, E2M1.e_max, E2M1.e_min, E2M1.bias) == (6, 2, 0, 1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, 100, -0.1])
    to = [0, 1, 1, 2, 2, 4, 4, 6, 6, -0.0]
    assert ff.round_to(ties, E2M1).tolist() == to
    assert ff.encode(ties, E2M1).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 8]
    assert (E4M3.e_max, E5M2.e_max) == (8, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_to_the_same_values(dtype):
    x = values(E4M3).to(dtype)
    found = ff.round_to(x, E4M3)
    assert found.dtype == dtype
    assert torch.equal(found.float(), ff.round_to(x.float(), E4M3))


def test_fp4_of_bitsandbytes_is_not_e2m1():
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.linspace(-1, 1, 64)
    packed, state = functional.quantize_4bit(x, quant_type="fp4", blocksize=64)
    theirs = functional.dequantize_4bit(packed, state).unique()
    e2m1 = ff.levels(E2M1).unique() / 6
    positive = theirs[theirs > 0]
    assert torch.isclose(positive[0], torch.tensor(0.0052), atol=1e-4)
    assert torch.isclose(e2m1[e2m1 > 0][0], torch.tensor(1 / 12))
    torch.testing.assert_close(positive[1:], e2m1[e2m1 > 0][1:], atol=1e-3, rtol=0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="specials='inf'"):
        FloatFormat(4, 3, "inf")
    for exponent, mantissa in ((1, 2), (2, 0), (5, 3)):
        with pytest.raises(ValueError, match=f"exponent={exponent}"):
            FloatFormat(exponent, mantissa)
    with pytest.raises(ValueError, match="x holds NaN"):
        ff.encode(torch.tensor([1.0, torch.nan]), E2M1)
    assert ff.round_to(torch.tensor([torch.nan]), E4M3).isnan().all()
