"""The C kernels: products of decoded weights, and a model that decodes with them."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn

from llmlab.compression import kernels
from llmlab.compression import quantization_basics as qb
from llmlab.compression.kernels import compiling, linears
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models import c_library, generation
from tests.models.hugging_face import make

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="there is no C compiler here"
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(rows=13, columns=48, bias=False, **settings):
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(random(rows, columns))
    settings = {"group_size": 16} | settings
    return QuantLinear(linear, QuantConfig(4, **settings))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["group", "row"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_four_bits_multiply_as_the_decoded_weight(symmetric, per, bias, tokens):
    quant = layer(symmetric=symmetric, per=per, bias=bias)
    packed = kernels.Int4Linear(quant)
    assert torch.equal(packed.weight, quant.weight)
    assert packed.scale.dtype == torch.float16
    x = random(2, tokens, 48, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), quant(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-8, 3e-4, 1.0, 3e5])
def test_scales_are_those_of_the_linear(dtype, size):
    """From subnormal in float16 to its largest; bfloat16 and float32 go further."""
    if dtype != torch.float16:
        size **= 3
    linear = nn.Linear(48, 13, bias=False)
    with torch.no_grad():
        linear.weight.copy_(size * random(13, 48))
    quant = QuantLinear(linear, QuantConfig(4, group_size=16, scale_dtype=dtype))
    packed = kernels.Int4Linear(quant)
    assert torch.equal(packed.weight, quant.weight)
    x = random(1, 48, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(
            packed(x) / size, quant(x) / size, rtol=1e-4, atol=1e-4
        )


def test_rows_and_columns_that_fill_no_vector_register():
    for rows, columns, group in (
        (1, 2, 2),
        (5, 6, 2),
        (3, 70, 14),
        (7, 96, 96),
        (4, 150, 50),
    ):
        quant = layer(rows, columns, group_size=group)
        x = random(1, columns, seed=2)
        with torch.no_grad():
            found = kernels.Int4Linear(quant)(x)
        torch.testing.assert_close(found, x @ quant.weight.T, rtol=1e-4, atol=1e-4)


def test_a_step_of_x_that_is_not_contiguous():
    quant = layer()
    x = random(48, 3, seed=3).T
    with torch.no_grad():
        found = kernels.Int4Linear(quant)(x)
    torch.testing.assert_close(found, x @ quant.weight.T, rtol=1e-4, atol=1e-4)


def test_gradients_reach_what_came_in():
    quant = layer()
    x = random(2, 48, seed=4).requires_grad_()
    kernels.Int4Linear(quant)(x).square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    quant(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_half_precision_stays_half():
    quant = layer()
    x = random(1, 48).bfloat16()
    with torch.no_grad():
        found = kernels.Int4Linear(quant)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, quant(x))


def test_the_table_is_embedding_and_head():
    weight = random(11, 10)
    weight[4] = 0  # a token that was never seen
    table = kernels.Int8Table(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((table.weight - weight).abs() <= step / 2 + 1e-6).all()
    ids = torch.tensor([[3, 4], [0, 10]])
    assert torch.equal(table.embed(ids), table.weight[ids])
    for tokens in (1, 6):
        x = random(tokens, 10, seed=5)
        with torch.no_grad():
            torch.testing.assert_close(table.logits(x), x @ table.weight.T)


@pytest.mark.parametrize(
    "shape", [{"num_key_value_heads": 2}, {"tie_word_embeddings": True}]
)
def test_a_model_decodes_as_its_decoded_weights_do(shape):
    model = qb.apply(make(**shape), QuantConfig(4, group_size=16))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = kernels.fast(model)
    # the same 8-bit embedding and head in floats
    plain = make(**shape)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                plain.get_submodule(name).weight.copy_(module.weight)
        for name in ("model.embed_tokens", "lm_head"):
            weight = plain.get_submodule(name).weight
            weight.copy_(kernels.Int8Table(weight).weight)
    ids = torch.arange(6)[None]
    torch.testing.assert_close(fast(ids), plain(ids), rtol=1e-4, atol=1e-4)
    new = generation.generate(fast, ids, 8)
    assert torch.equal(new, generation.generate(plain, ids, 8))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_what_does_not_fit_is_named():
    eight = QuantLinear(nn.Linear(48, 4), QuantConfig(8, group_size=16))
    with pytest.raises(ValueError, match="must have 4 bits"):
        kernels.Int4Linear(eight)
    with pytest.raises(ValueError, match="groups of an even size"):
        kernels.Int4Linear(layer(4, 45, group_size=15))
    with pytest.raises(ValueError, match="no QuantLinear"):
        kernels.fast(make())


def test_tiny_numbers_stay_after_the_library_is_loaded():
    """-ffast-math would set the processor to flush them to 0."""
    kernels.library()
    assert (torch.tensor([1e-40]) * 0.5).item() > 0
    assert 1e-310 * 0.5 > 0


def test_halves_share_a_byte():
    codes = torch.tensor([[1, 2, 3, 4]])
    assert linears.pack_halves(codes).tolist() == [[1 | 3 << 4, 2 | 4 << 4]]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86 are tried")
@pytest.mark.parametrize("kind", ["-march=x86-64", "-march=haswell"])
def test_the_same_without_the_widest_registers(kind, monkeypatch):
    """As on a processor without AVX-512, and on one without AVX2."""
    quant = layer(7, 216, group_size=72, symmetric=False)
    x = random(1, 216, seed=6)
    best = kernels.Int4Linear(quant)
    flags = [kind if flag == "-march=native" else flag for flag in c_library.FLAGS]
    monkeypatch.setattr(c_library, "FLAGS", tuple(flags))
    compiling.library.cache_clear()
    try:
        other = kernels.Int4Linear(quant)
        assert other.kernel is not best.kernel
        assert torch.equal(other.weight, best.weight)
        with torch.no_grad():
            torch.testing.assert_close(other(x), best(x), rtol=1e-5, atol=1e-5)
    finally:
        compiling.library.cache_clear()


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(c_library, "compiler", lambda: None)
    compiling.library.cache_clear()
    try:
        with pytest.raises(kernels.NoCompiler, match="no C compiler was found"):
            compiling.library()
        assert not kernels.available()
    finally:
        compiling.library.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "products.c"
    broken.write_text("this is no C")
    monkeypatch.setattr(compiling, "SOURCE", broken)
    compiling.library.cache_clear()
    try:
        with pytest.raises(kernels.NoCompiler, match=r"could not compile products\.c"):
            compiling.library()
    finally:
        compiling.library.cache_clear()
