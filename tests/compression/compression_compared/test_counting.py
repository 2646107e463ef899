"""Bits and bytes: by hand, against the file that is written, and against gguf."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from llmlab.compression import compression_compared as compared
from llmlab.compression import kernels, recipes
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.compression.recipes import Recipe
from tests.models.hugging_face import make

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
BATCH = torch.arange(60).reshape(2, 30) % 61
# 2 layers: q 64 × 64, k and v 32 × 64, o 64 × 64, gate, up, down 64 · 128 each
WEIGHTS = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128)
ROWS = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
EMBEDDING = 61 * 64
NORMS = 5 * 64


def model(tied: bool = True, **changes):
    torch.manual_seed(0)
    return make(**SHAPE, tie_word_embeddings=tied, **changes)


def of(method: str, **numbers):
    return recipes.compress(model(), Recipe(method, **numbers), [BATCH])


def test_the_float_model_by_hand():
    parts = compared.stored_bytes(model(), torch.float16)
    assert parts == {
        "linears": 2 * WEIGHTS,
        "embedding": 2 * EMBEDDING,
        "head": 0,
        "rest": 2 * NORMS,
    }
    assert compared.bits_per_parameter(model(), torch.float16) == 16
    assert compared.bits_per_parameter(model()) == 32
    assert compared.parameters(model().config) == WEIGHTS + EMBEDDING + NORMS


def test_a_head_of_its_own_counts_and_is_read_whole():
    untied = model(tied=False)
    parts = compared.stored_bytes(untied)
    assert parts["head"] == parts["embedding"] == 4 * EMBEDDING
    # of the embedding one row of 64 is looked up
    whole = 4 * (WEIGHTS + EMBEDDING + NORMS)
    assert compared.per_token(untied) == whole + 4 * 64
    assert compared.per_token(model()) == whole


def test_the_cache_is_read_with_the_weights():
    one = compared.per_token(model(), past=1) - compared.per_token(model())
    assert one == 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, head_dim, float32
    half = compared.per_token(model(), 7, torch.bfloat16) - compared.per_token(model())
    assert half == 7 * one / 2
    with pytest.raises(ValueError, match="past=-1 must be at least 0"):
        compared.per_token(model(), -1)


# stored bits per weight of the linears, from the papers' words about each form
BITS = {
    "rtn": 4 + 16 / 64,
    "gptq": 4 + 16 / 64,
    "awq": 4 + 16 / 64,
    "smoothquant": 8 + 32 * ROWS / WEIGHTS,
    "llm-int8": 8 + 32 * ROWS / WEIGHTS,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16 + 32 * 14 / WEIGHTS,
    "magnitude": 16,
    "wanda": 16,
}


@pytest.mark.parametrize("method", BITS)
def test_bits_of_the_linears_by_hand(method):
    found = compared.bits_of_linears(of(method), torch.float16)
    assert found == pytest.approx(BITS[method], rel=1e-12)
    if method not in ("magnitude", "wanda"):
        assert recipes.bits_per_weight(of(method)) == found


def test_zero_points_and_factors_are_counted():
    affine = of("rtn", symmetric=False, group=32)
    assert compared.bits_of_linears(affine) == 4 + (16 + 4) / 32
    rank = 3
    # two 8-bit factors, and a float16 for each of their columns and rows
    factors = sum(
        8 * rank * (m + n) + 2 * rank * 16
        for m, n in (s for _, s in recipes.stored_linears(model()).values())
    )
    found = compared.bits_of_linears(of("lorc", rank=rank))
    assert found == pytest.approx(4.25 + factors / WEIGHTS, rel=1e-12)


def test_two_of_four_are_nine_bits():
    sparse = pruning.pack(of("wanda", pattern="2:4"), "2:4")
    assert compared.bits_of_linears(sparse, torch.float16) == 9


def test_zeroquant_is_the_mean_of_four_and_eight():
    found = compared.bits_of_linears(of("zeroquant"))
    mlp = 2 * 3 * 64 * 128
    assert found == pytest.approx(0.25 + (4 * mlp + 8 * (WEIGHTS - mlp)) / WEIGHTS)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_the_file_has_as_many_bytes_as_are_counted(method, tmp_path):
    made = of(method)
    file = compared.write(made, tmp_path / "model.safetensors")
    counted = sum(compared.stored_bytes(made, torch.float16).values())
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + counted


def test_a_float_that_16_bits_do_not_hold_is_refused(tmp_path):
    large = model()
    large.model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight would not be finite"):
        compared.write(large, tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4.5), ("Q8_0", 8.5)])
def test_gguf_counts_as_we_do(kind, bits):
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert 8 * size / block == bits
    ours = of("rtn", bits=int(bits), group=block)
    assert compared.bits_of_linears(ours) == bits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_in_codes(tied, bits):
    made = model(tied)
    want = made.lm_head.weight.detach().clone()
    compared.embedding_in_codes(made, QuantConfig(bits, per="row"))
    parts = compared.stored_bytes(made)
    assert parts["embedding"] == EMBEDDING * bits // 8 + 61 * 2
    assert parts["head"] == (0 if tied else parts["embedding"])
    step = want.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((made.lm_head.weight - want).abs() <= 0.51 * step).all()
    assert made(BATCH).isfinite().all()
    assert torch.equal(recipes.as_floats(made)(BATCH), made(BATCH))


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
def test_forms_with_kernels_hold_what_is_counted():
    four = kernels.fast(of("rtn"))
    parts = compared.stored_bytes(four)
    # symmetric: a float16 for each group
    assert parts["linears"] == WEIGHTS / 2 + WEIGHTS / 64 * 2
    affine = kernels.fast(of("rtn", symmetric=False))
    found = compared.stored_bytes(affine)["linears"]
    assert found == parts["linears"] + WEIGHTS / 64  # a byte for each zero point
    assert parts["embedding"] == EMBEDDING + 4 * 61
    eight = compared.eight_bits(model())
    parts = compared.stored_bytes(eight)
    assert parts["linears"] == WEIGHTS + 4 * ROWS
    assert parts["head"] == 0
    assert compared.per_token(eight) == sum(parts.values())


def test_nothing_is_changed_by_counting():
    made = of("rtn")
    before = deepcopy(made.state_dict())
    compared.stored_bytes(made, torch.float16)
    compared.per_token(made)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, before[name])
