"""Plans for each matrix."""

from __future__ import annotations

import pytest
import torch

from llmlab.compression import compression_compared as compared
from llmlab.compression import quantization_basics as qb
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from tests.models.hugging_face import make

IDS = torch.arange(22).reshape(2, 11)
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
UP = "model.layers.1.mlp.up_proj"
EMBEDDING = "model.embed_tokens"
PLAN = {
    UP: QuantConfig(3, symmetric=False, group_size=32),
    "model.layers.0.self_attn.k_proj": QuantConfig(8, per="row"),
    EMBEDDING: QuantConfig(5, per="row"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_both_models_compute_the_same_and_the_first_is_untouched(tied, bias):
    torch.manual_seed(0)
    model = make(**SHAPE, tie_word_embeddings=tied, attention_bias=bias)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    coded, dense = compared.follow(model, PLAN)
    with torch.no_grad():
        assert torch.equal(coded(IDS), dense(IDS))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert isinstance(coded.get_submodule(UP), QuantLinear)
    assert coded.model.norm is model.model.norm
    for name, grid in PLAN.items():
        want = qb.nearest(before[f"{name}.weight"], grid)
        assert torch.allclose(dense.get_submodule(name).weight, want)
    head = dense.lm_head.weight
    assert torch.equal(head, dense.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_plan(tied):
    model = make(**SHAPE, tie_word_embeddings=tied)
    floats = compared.stored_bytes(model, torch.float16)
    coded, _ = compared.follow(model, PLAN)
    found = compared.stored_bytes(coded, torch.float16)
    assert compared.planned_bytes(model, PLAN, torch.float16) == sum(found.values())
    up, k = 128 * 64, 32 * 64
    saved = 2 * up - up * (3 + 19 / 32) / 8 + 2 * k - (k + 2 * 32)
    assert floats["linears"] - found["linears"] == saved
    assert found["embedding"] == 61 * 64 * 5 // 8 + 2 * 61
    assert found["head"] == floats["head"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "grid",
    [
        QuantConfig(3, symmetric=False, per="tensor"),  # 3 bits of a zero point: a byte
        QuantConfig(5, symmetric=False, per="row", scale_dtype=torch.float32),
        QuantConfig(7, group_size=16, calibration="mse", scale_dtype=torch.bfloat16),
    ],
)
def test_planned_and_rounded_are_what_follow_makes(tied, grid):
    torch.manual_seed(1)
    model = make(**SHAPE, tie_word_embeddings=tied)
    plan = dict.fromkeys([*PLAN, *([] if tied else ["lm_head"])], grid)
    coded, dense = compared.follow(model, plan)
    size = sum(compared.stored_bytes(coded, torch.bfloat16).values())
    assert compared.planned_bytes(model, plan, torch.bfloat16) == size
    rounded = compared.rounded(model, plan)
    assert rounded.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], tensor)
    with torch.no_grad():
        assert torch.equal(coded(IDS), rounded(IDS))


def test_an_empty_plan_is_the_model():
    model = make(**SHAPE)
    coded, dense = compared.follow(model, {})
    assert torch.equal(coded(IDS), model(IDS))
    assert torch.equal(dense(IDS), model(IDS))


@pytest.mark.parametrize(
    ("name", "grid", "said"),
    [
        ("lm_head", QuantConfig(8, per="row"), "lm_head is tied"),
        ("model.norm", QuantConfig(8, per="row"), "'model.norm' is no matrix"),
        (UP, QuantConfig(4, group_size=48), f"{UP}: group_size=48 must divide"),
    ],
)
def test_what_cannot_be_followed_is_named(name, grid, said):
    model = make(**SHAPE, tie_word_embeddings=True)
    for call in (compared.follow, compared.rounded):
        with pytest.raises(ValueError, match=said):
            call(model, {name: grid})
    with pytest.raises(ValueError, match=said):
        compared.planned_bytes(model, {name: grid}, torch.float16)
