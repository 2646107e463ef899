"""LoRC: on one matrix, on our model and transformers', to disk and back."""

from __future__ import annotations

import csv
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from llmlab.compression import calibration
from llmlab.compression import quantization_basics as qb
from llmlab.compression.low_rank import (
    E4M3,
    FILE,
    FP4,
    MXFP4,
    MXFP8,
    NVFP4,
    LowRankConfig,
    LowRankLinear,
    apply,
    bits_per_weight,
    load,
    lorc,
    save,
)
from llmlab.compression.quantization_basics import QuantConfig
from tests.compression.broken import no_input, not_finite, with_adapter
from tests.models.hugging_face import make, named, theirs

ROWS = QuantConfig(4, per="row")
GROUPS = QuantConfig(4, False, group_size=16)
SMALL_BLOCKS = replace(FP4, size=16)
GRIDS = [ROWS, GROUPS, SMALL_BLOCKS, replace(MXFP4, size=16), NVFP4, MXFP8, None]


def problem(out=24, columns=32, tokens=200, seed=0):
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(out, columns, generator=random)
    X = torch.randn(columns, columns, generator=random)
    X = X @ torch.randn(columns, tokens, generator=random)
    X *= torch.logspace(0, 1.5, columns)[:, None]
    return W, X


def text(seed=0, rows=2, length=24):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (rows, length), generator=random) for _ in range(2)]


# One matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS[:-1], ids=str)
def test_the_error_left_is_that_of_the_singular_values_left_out(grid):
    W, _ = problem()
    base = lorc.rounded(W, grid).weight
    sigma = torch.linalg.svdvals((W - base).double())
    for rank in (1, 8, 24):
        config = LowRankConfig(grid, rank, factor_bits=16)
        found = lorc.lorc(W, config)
        assert torch.equal(found.base.weight, base)
        left = (W - found.weight).double().square().sum()
        expected = sigma[rank:].square().sum()
        slack = 1e-5 * float(W.square().sum())  # float16 factors
        torch.testing.assert_close(left, expected, rtol=0.01, atol=slack)


@pytest.mark.parametrize("grid", [ROWS, NVFP4], ids=str)
def test_aware_factors_are_the_best_for_the_outputs(grid):
    W, X = problem()
    base = lorc.rounded(W, grid).weight
    gram = X @ X.T
    sigma = torch.linalg.svdvals(((W - base) @ X).double())
    config = LowRankConfig(grid, 4, factor_bits=16, aware=True, damping=1e-6)
    left = ((W - lorc.lorc(W, config, gram).weight) @ X).double().square().sum()
    torch.testing.assert_close(left, sigma[4:].square().sum(), rtol=0.01, atol=0)
    plain = lorc.lorc(W, replace(config, aware=False))
    assert left < 0.9 * ((W - plain.weight) @ X).square().sum()


def test_a_full_rank_repairs_all_and_rank_zero_nothing():
    W, _ = problem()
    whole = lorc.lorc(W, LowRankConfig(ROWS, 24, factor_bits=16)).weight
    torch.testing.assert_close(whole, W, atol=2e-3, rtol=0)
    none = lorc.lorc(W, LowRankConfig(ROWS, 0))
    assert none.factors is None
    assert torch.equal(none.weight, qb.decode(*qb.encode(W, ROWS), ROWS))


def test_eight_bits_are_enough_for_factors():
    """Against 16 bits: the error that is left grows by less than 2%."""
    W, _ = problem(96, 64)
    left = {}
    for bits in (8, 16):
        found = lorc.lorc(W, LowRankConfig(ROWS, 8, factor_bits=bits)).weight
        left[bits] = (W - found).norm()
    assert left[8] < 1.02 * left[16]
    assert left[8] < 0.95 * (W - lorc.rounded(W, ROWS).weight).norm()


def test_a_weight_that_loses_nothing_gets_factors_of_zero():
    W = torch.ones(4, 32)
    found = lorc.lorc(W, LowRankConfig(MXFP4, 2))
    assert torch.equal(found.weight, W)
    assert not found.factors[0].any() and not found.factors[1].any()


@pytest.mark.parametrize("factor_bits", [8, 16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bits_are_those_of_what_is_stored(grid, factor_bits):
    W, _ = problem()
    for rank in (1, 8):
        config = LowRankConfig(grid, rank, factor_bits)
        linear = LowRankLinear(lorc.lorc(W, config), config)
        stored = 8 * sum(t.nbytes for t in linear.state_dict().values())
        assert stored / W.numel() == pytest.approx(bits_per_weight(config, *W.shape))


def test_a_budget_of_bits_gives_the_rank():
    W, _ = problem(96, 64)
    config = LowRankConfig(None, bits=4.25)
    rank = config.rank_of(96, 64)
    found = lorc.lorc(W, config)
    assert found.base is None and found.factors[0].shape == (96, rank)
    assert bits_per_weight(config, 96, 64) <= 4.25
    more = LowRankConfig(None, rank + 1)
    assert bits_per_weight(more, 96, 64) > 4.25
    left = (W - found.weight).square().sum()
    sigma = torch.linalg.svdvals(W)
    torch.testing.assert_close(left, sigma[rank:].square().sum(), rtol=0.02, atol=0)


# Stored linears -----------------------------------------------------------------------


@pytest.mark.parametrize("factor_bits", [8, 16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_linear_computes_with_the_weight_that_was_found(grid, factor_bits):
    W, X = problem()
    config = LowRankConfig(grid, 8, factor_bits)
    found = lorc.lorc(W, config)
    bias = nn.Parameter(torch.linspace(-1, 1, 24))
    linear = LowRankLinear(found, config, bias)
    torch.testing.assert_close(linear.weight, found.weight, atol=1e-5, rtol=0)
    x = X.T.reshape(4, 50, 32)
    expected = x @ found.weight.T + bias
    torch.testing.assert_close(linear(x), expected, atol=1e-3, rtol=1e-4)
    half = linear(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.02 * expected.norm()


def test_fp8_inputs_are_rounded_per_token():
    W, X = problem()
    config = LowRankConfig(ROWS, 4, fp8_inputs=True)
    linear = LowRankLinear(lorc.lorc(W, config), config)
    x = X.T.clone()  # (tokens, in)
    x[3] = 0
    x[4] *= 1e-4
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(lorc.round_tokens(x, E4M3), rounded)
    torch.testing.assert_close(
        linear(x), rounded @ linear.weight.T, atol=1e-3, rtol=1e-4
    )
    assert not torch.allclose(linear(x), x @ linear.weight.T, atol=1e-3, rtol=1e-4)


# On models ----------------------------------------------------------------------------

CONFIG = LowRankConfig(GROUPS, 4)
VARIANTS = [
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 24, "intermediate_size": 80},
]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_ours_and_transformers_get_the_same_weights(changes, aware):
    model = make(**changes)
    library = theirs(model)
    config = replace(CONFIG, aware=aware)
    head = model.lm_head.weight.clone()
    before = {name: p.clone() for name, p in model.named_parameters()}
    apply(model, config, text())
    apply(library, config, text())
    for name, weight in library.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=2e-3, rtol=0)
    assert torch.equal(model.lm_head.weight, head)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in qb.linears(model)}


def test_each_linear_is_whitened_by_its_own_inputs():
    model = make(num_key_value_heads=2)
    config = LowRankConfig(ROWS, 3, aware=True)
    linears = qb.linears(model)
    seen = calibration.inputs(model, linears, text())
    expected = {
        name: lorc.lorc(linear.weight, config, seen[name].gram).weight
        for name, linear in linears.items()
    }
    apply(model, config, text())
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@pytest.mark.parametrize("grid", [ROWS, NVFP4, None], ids=str)
def test_stored_linears_stand_for_the_same_model(grid):
    model = make(num_key_value_heads=2, attention_bias=True)
    config = LowRankConfig(grid, 4)
    floats = apply(deepcopy(model), config)
    packed = apply(model, config, store=True)
    for name, linear in qb.linears(floats).items():
        found = packed.get_submodule(name)
        torch.testing.assert_close(found.weight, linear.weight, atol=1e-5, rtol=0)
        assert found.bias is None or torch.equal(found.bias, linear.bias)
    ids = torch.cat(text())
    torch.testing.assert_close(packed(ids), floats(ids), atol=2e-3, rtol=0)


FILES = [
    CONFIG,
    LowRankConfig(ROWS, 0),
    LowRankConfig(NVFP4, 3, 16, fp8_inputs=True),
    LowRankConfig(replace(MXFP8, size=16), 2),
    LowRankConfig(None, bits=5.0),
]


@pytest.mark.parametrize("config", FILES, ids=str)
@pytest.mark.parametrize("library", [False, True])
def test_to_disk_and_back(config, library, tmp_path):
    model = make(attention_bias=True)
    model = theirs(model) if library else model
    fresh = deepcopy(model)
    apply(model, config, store=True)
    file = tmp_path / "low_rank.safetensors"
    save(model, file)
    load(fresh, file)
    ids = torch.cat(text())
    one, other = (m(ids) for m in (model, fresh))
    if library:
        one, other = one.logits, other.logits
    assert torch.equal(one, other)
    linear = fresh.get_submodule("model.layers.1.mlp.down_proj")
    assert linear.config == config and not linear.training
    again = tmp_path / "again.safetensors"
    save(fresh, again)
    assert again.read_bytes() == file.read_bytes()


def test_a_file_of_another_model_is_refused(tmp_path):
    file = tmp_path / "low_rank.safetensors"
    save(apply(make(), CONFIG, store=True), file)
    wide = make(intermediate_size=64)
    before = deepcopy(wide.state_dict())
    with pytest.raises(ValueError, match=r"mlp\.\w+\.\S+ has shape"):
        load(wide, file)
    with pytest.raises(ValueError, match=r"layers\.1\.\S+, no linear of the model"):
        load(make(num_hidden_layers=1), file)
    assert wide.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="has no LowRankLinear"):
        save(make(), file)


def test_half_precision_in_and_out():
    model = make().to(torch.bfloat16)
    apply(model, replace(CONFIG, aware=True), text())
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model(text()[0]).isfinite().all()
    model = apply(make().to(torch.bfloat16), CONFIG, store=True)
    assert model(text()[0]).dtype == torch.bfloat16


def quantised(model):
    return apply(model, CONFIG, store=True)


BAD_MODELS = [
    (with_adapter, "carries an adapter: merge it"),
    (not_finite, r"layers\.1\.mlp\.down_proj\.weight holds 1 values"),
    (no_input, r"layers\.1\.mlp\.gate_proj: gram is all zeros"),
    (quantised, "is compressed already"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_MODELS, ids=named)
def test_a_model_that_cannot_be_compressed_stays_as_it_was(spoil, message):
    model = spoil(make()).train()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply(model, replace(CONFIG, aware=True), text())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_bad_arguments_are_named():
    for bad in (
        {"factor_bits": 4},
        {"rank": -1},
        {"damping": -0.1},
        {"damping": float("nan")},
        {"bits": 4.0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LowRankConfig(**bad)
    with pytest.raises(ValueError, match="leaves nothing"):
        LowRankConfig(None, 0)
    W, _ = problem()
    with pytest.raises(ValueError, match="gram=None"):
        lorc.lorc(W, LowRankConfig(ROWS, aware=True))
    with pytest.raises(ValueError, match="rank=25 must be from 1 to 24"):
        lorc.lorc(W, LowRankConfig(ROWS, 25))
    model = make()
    with pytest.raises(ValueError, match="batches=None"):
        apply(model, replace(CONFIG, aware=True))
    with pytest.raises(ValueError, match="batches is empty"):
        apply(model, replace(CONFIG, aware=True), [])
    with pytest.raises(ValueError, match="fp8_inputs=True needs store"):
        apply(model, replace(CONFIG, fp8_inputs=True))
    with pytest.raises(ValueError, match=r"q_proj: size=64 must divide .* 32"):
        apply(model, LowRankConfig(FP4))
    with pytest.raises(ValueError, match=r"rank=40 must be from 1"):
        apply(model, LowRankConfig(ROWS, 40))


# What the sweep measured --------------------------------------------------------------


def test_what_the_sweep_measured_is_told_apart_from_noise():
    with FILE.open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    keys = ("format", "method", "rank", "seed", "inputs")
    assert len({tuple(run[k] for k in keys) for run in runs}) == len(runs)
    for run in runs:
        if run["format"] == "int4 row" and run["rank"] != "0":
            assert float(run["gained"]) > 5 * float(run["gained_error"])
