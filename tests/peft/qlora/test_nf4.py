"""4-bit codes and scales bit for bit against bitsandbytes; codebooks and decoding
against mathematics; what bitsandbytes decodes otherwise, by CPU; bytes counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.peft.qlora import nf4

SHAPES = [
    (1,),
    (2,),
    (64,),
    (66,),
    (128, 128),
    (24, 40),
    (40, 24),
    (8, 24),
    (300, 1000),
    (33, 130),
]
ODD = [(7,), (65,), (129, 33)]  # the last byte is half empty


def values(shape, kind, dtype, seed=0):
    dice = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=dice) * 0.3
    if kind == "zeros within":
        w[torch.rand(shape, generator=dice) < 0.3] = 0
    if kind == "all zero":
        w.zero_()
    if kind == "one outlier":
        w.flatten()[0] = 40
    if kind == "equal scales":
        w.flatten()[::32] = 2.0
        w.clamp_(max=2)
    return w.to(dtype)


def by_definition(packed, scales, levels, block, shape, dtype):
    """ŵᵢ = level[qᵢ] · c of block ⌊i / block⌋, in fp32, then rounded to `dtype`."""
    flat = packed.flatten().int()
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()
    n = torch.Size(shape).numel()
    owner = torch.arange(n) // block
    return (levels[codes[:n]] * scales[owner]).view(shape).to(dtype)


def with_scales_of_its_own(packed, scales, levels, block, shape, dtype):
    """The same, but a row of n is taken to have ⌊n / block⌋ scales of its own."""
    rows, n = shape
    place = torch.arange(rows * n)
    owner = place // n * (n // block) + place % n // block
    return by_definition(packed, scales[owner], levels, 1, shape, dtype)


def has_avx512f():
    """Whether bitsandbytes' own library takes its AVX-512 path on this machine."""
    from bitsandbytes.cextension import lib

    try:
        return bool(lib.has_avx512f_cpu())
    except AttributeError:  # a build for another kind of CPU
        return False


KINDS = ["normal", "zeros within", "all zero", "one outlier", "equal scales"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(code, kind, dtype):
    import bitsandbytes.functional as bnb

    for shape in SHAPES + ODD:
        w = values(shape, kind, dtype)
        for block, double in ((64, True), (64, False), (32, True), (256, False)):
            packed, state = bnb.quantize_4bit(
                w, blocksize=block, quant_type=code, compress_statistics=double
            )
            q = nf4.quantize(w, code, block, double)
            assert torch.equal(q.packed, packed) and torch.equal(
                q.scales, state.absmax
            ), (shape, block, double)
            scales = state.absmax
            if double:
                assert torch.equal(q.scales2, state.state2.absmax) and torch.equal(
                    q.offset, state.offset
                )
                scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
            # Not against their dequantize_4bit, which errs on some CPUs: see the next
            # test.
            back = by_definition(packed, scales, state.code, block, shape, dtype)
            assert torch.equal(nf4.dequantize(q), back), (shape, block, double)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_bitsandbytes_decodes_by_definition_but_for_cut_rows_on_avx512(code, dtype):
    """bitsandbytes 0.50.2 on a CPU with AVX-512: where a row's length n is a multiple
    of 16 and not of the block, blocks run over the end of a row, and its kernel does
    not expect that. If this fails on such a CPU, a release has mended it: say so where
    the lesson on QLoRA, findings/ and `in_bitsandbytes` speak of it.
    """
    import bitsandbytes.functional as bnb

    deviating = 0
    for shape in ((128, 128), (64, 576), (24, 48), (24, 40), (8, 24), (33, 130)):
        for block in (32, 64, 128, 256):
            w = values(shape, "normal", dtype)
            packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type=code)
            back = bnb.dequantize_4bit(packed, state)
            given = (packed, state.absmax, state.code, block, shape, dtype)
            right = by_definition(*given)
            if has_avx512f() and shape[1] % 16 == 0 and shape[1] % block:
                assert torch.equal(back, with_scales_of_its_own(*given)), (shape, block)
                assert (back - right).abs().max() > 0.1
                deviating += 1
            else:
                assert torch.equal(back, right), (shape, block)
    assert deviating == (7 if has_avx512f() else 0)


@pytest.mark.parametrize("seed", range(3))
def test_scales_in_8_bits_are_those_of_bitsandbytes_on_many_values(seed):
    import bitsandbytes.functional as bnb

    x = (
        torch.randn(100_003, generator=torch.Generator().manual_seed(seed))
        * 10.0**-seed
    )
    codes, c2 = nf4.encode_8bit(x)
    expected, state = bnb.quantize_blockwise(x, blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(c2, state.absmax)


def test_the_codebooks_are_those_of_bitsandbytes():
    import bitsandbytes.functional as bnb

    assert torch.equal(nf4.levels_of("nf4"), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.levels_of("fp4"), bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


def test_nf4_is_derived_from_quantiles_of_the_normal_distribution():
    torch.testing.assert_close(
        nf4.normal_float(), torch.tensor(nf4.NF4), rtol=0, atol=2e-7
    )
    negative, zero, positive = (
        (nf4.normal_float().sign() == s).sum() for s in (-1, 0, 1)
    )
    assert (negative, zero, positive) == (7, 1, 8)
    p = torch.special.ndtr(
        nf4.normal_float().double()
        * torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.double))
    )
    torch.testing.assert_close(
        p[7:].diff(),
        torch.full((8,), (0.9677083 - 0.5) / 8).double(),
        rtol=0,
        atol=1e-6,
    )
    torch.testing.assert_close(
        p[:8].diff(),
        torch.full((7,), (0.9677083 - 0.5) / 7).double(),
        rtol=0,
        atol=1e-6,
    )
    assert len(nf4.normal_float(3)) == 8


@given(
    code=st.sampled_from(sorted(nf4.CODEBOOKS)),
    n=st.integers(1, 300),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_each_weight_gets_the_nearest_level_of_its_block(code, n, seed):
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    q = nf4.quantize(w, code, double=False)
    blocks = w.split(64)
    c = torch.stack([b.abs().max() for b in blocks])
    assert torch.equal(q.scales, c)
    levels = nf4.levels_of(code)
    for block, scale, back in zip(blocks, c, nf4.dequantize(q).split(64), strict=True):
        best = (block[:, None] - scale * levels).abs().amin(1)
        torch.testing.assert_close((block - back).abs(), best, rtol=0, atol=1e-6)


@given(n=st.integers(1, 400))
def test_what_is_packed_comes_out_again(n):
    codes = torch.randint(0, 16, (2 * n,), generator=torch.Generator().manual_seed(n))
    levels = torch.arange(16.0)
    assert torch.equal(nf4.unpacked_levels(nf4.pack(codes), levels), codes.float())


def test_double_quantisation_subtracts_the_mean_and_keeps_scales_to_a_percent():
    c = torch.rand(5000) * 0.2 + 0.9
    codes, c2, offset = nf4.quantize_scales(c)
    # of what the mean leaves, not of c
    assert torch.equal(offset, c.mean()) and c2.max() <= 0.11
    q = nf4.Quantized(codes[:, None], codes, c2, offset, (1,), torch.float32, "nf4", 64)
    assert ((nf4.scales_of(q) - c).abs() / c).max() < 0.01


@pytest.mark.parametrize("n", [1, 63, 64, 65, 16_384, 16_385, 100_000])
@pytest.mark.parametrize("double", [True, False])
def test_bytes_are_counted_to_the_last(n, double):
    q = nf4.quantize(torch.randn(n), double=double)
    stored = nf4.stored_bytes(n, double=double)
    assert q.packed.nbytes == stored["codes"] and q.nbytes == sum(stored.values())


def test_bits_a_weight_are_the_paper_s():
    assert nf4.bits_per_weight(64, double=False) == 4.5
    assert round(nf4.bits_per_weight(64, double=True), 3) == 4.127
    n = 64 * 256 * 100
    assert abs(8 * sum(nf4.stored_bytes(n).values()) / n - nf4.bits_per_weight()) < 1e-4


def test_without_the_grid_the_nearest_of_256_is_taken():
    x = torch.randn(2560, generator=torch.Generator().manual_seed(0))
    codes, c2 = nf4.encode_8bit(x, grid=None)
    levels = nf4.dynamic_map()
    scaled = x / c2.repeat_interleave(256)
    best = (scaled[:, None] - levels).abs().amin(1)
    torch.testing.assert_close(
        (scaled - levels[codes.int()]).abs(), best, rtol=0, atol=1e-6
    )
    assert not torch.equal(codes, nf4.encode_8bit(x)[0])


@pytest.mark.parametrize(
    ("w", "other", "message"),
    [
        (torch.ones(4), {"kind": "nf3"}, "kind='nf3' must be one of"),
        (torch.ones(4), {"block": 48}, "block=48 must be one of"),
        (
            torch.ones(4, dtype=torch.int8),
            {},
            "floating-point values, not 4 of torch.int8",
        ),
        (torch.ones(0), {}, "not 0 of"),
    ],
)
def test_misuse_is_named(w, other, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(w, **other)
