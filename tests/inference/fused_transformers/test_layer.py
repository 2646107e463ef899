"""A fused model against the one that it was made from, ours and transformers'."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from llmlab.inference import fused_transformers
from llmlab.inference.fused_transformers import fuse, kernels
from llmlab.models.cache import KVCache
from tests.models.hugging_face import VARIANTS, make, theirs

IDS = torch.tensor([[5, 7, 11, 2, 9, 1, 3], [8, 8, 60, 4, 0, 12, 33]])


@pytest.fixture(params=["c", "torch"], autouse=True)
def way(request, monkeypatch):
    """Everything with the kernels in C and without them."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("there is no C compiler here")


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_logits(variant):
    model = make(**VARIANTS[variant])
    expected = model(IDS)
    torch.testing.assert_close(fuse(model)(IDS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fuse(theirs(model))(IDS), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa", "biases", "head_dim"])
def test_token_by_token_and_in_chunks(variant):
    model = make(**VARIANTS[variant])
    fused = fuse(model)
    expected = model(IDS)
    for cuts in ((0, 1, 2, 3, 4, 5, 6, 7), (0, 3, 7), (0, 4, 5, 7)):
        cache = fused.new_cache(2, 7)
        out = [fused(IDS[:, a:b], cache) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(out, 1), expected, rtol=1e-4, atol=1e-4)
        assert cache.length == 7
        plain = KVCache(2)
        model(IDS, cache=plain)
        for layer in range(2):
            torch.testing.assert_close(
                cache.keys[layer], plain.keys[layer][:, :, :7], rtol=1e-4, atol=1e-4
            )


@torch.no_grad()
def test_only_the_last_logits():
    model = make()
    for kept in (1, 3):
        torch.testing.assert_close(
            fuse(model)(IDS, logits_to_keep=kept), model(IDS)[:, -kept:]
        )


@torch.no_grad()
def test_a_full_cache_is_refused():
    fused = fuse(make())
    cache = fused.new_cache(2, 6)
    with pytest.raises(ValueError, match="the cache has 6"):
        fused(IDS, cache)
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        fused.new_cache(1, 0)


def test_the_gradients_are_the_unfused_ones():
    model = make(num_key_value_heads=2, attention_bias=True)
    fused = fuse(model)
    model(IDS).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fused(IDS).square().mean().backward()
    for i, layer in enumerate(fused.layers):
        at = f"model.layers.{i}."
        for kind in ("weight", "bias"):
            rows = [expected[f"{at}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            torch.testing.assert_close(
                getattr(layer.qkv, kind).grad, torch.cat(rows), rtol=1e-3, atol=1e-6
            )
        gate_up = [expected[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        torch.testing.assert_close(
            layer.gate_up.weight.grad, torch.cat(gate_up), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            layer.norm_1.grad,
            expected[at + "input_layernorm.weight"],
            rtol=1e-3,
            atol=1e-6,
        )
    torch.testing.assert_close(
        fused.embedding.grad,
        expected["model.embed_tokens.weight"],
        rtol=1e-3,
        atol=1e-6,
    )


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = make(tie_word_embeddings=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fused = fuse(model)
    fused(IDS)
    fused.to_8bit()
    fused(IDS)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert fused.head is fused.embedding is model.lm_head.weight  # tied, and shared
    assert not fused.training


@torch.no_grad()
def test_bfloat16():
    model = make(num_key_value_heads=2).to(torch.bfloat16)
    torch.testing.assert_close(fuse(model)(IDS), model(IDS), rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7])
def test_weights_of_8_bits(tokens):
    """As the model whose weights are what the codes say."""
    model = make(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    fused = fuse(model).to_8bit()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            codes, scale = kernels.to_8bit(module.weight)
            module.weight.copy_(codes * scale[:, None])
    ids = IDS[:, :tokens]
    torch.testing.assert_close(fused(ids), model(ids), rtol=1e-3, atol=1e-3)
    assert fused.to_8bit() is fused  # a second time changes nothing
    assert fused.layers[0].qkv.codes.dtype == torch.int8


def one_bias(model):
    model.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.randn(32))
    return model


@torch.no_grad()
def test_a_bias_that_only_one_of_three_has():
    model = one_bias(make())
    torch.testing.assert_close(fuse(model)(IDS), model(IDS), rtol=1e-4, atol=1e-4)


# Refusals -----------------------------------------------------------------------------


def with_adapter():
    model = make()
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    return model


def with_another_norm():
    class Shifted(nn.Module):
        eps = 1e-6
        weight = nn.Parameter(torch.randn(32))

        def forward(self, x):
            return (1 + self.weight) * nn.functional.rms_norm(x, (32,))

    model = make()
    model.model.layers[1].input_layernorm = Shifted()
    return model


def with_a_query_norm():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=61, **sizes, **heads))


def with_another_activation():
    model = theirs(make())
    model.config.hidden_act = "gelu"
    return model


def with_a_window():
    model = theirs(make())
    model.config.sliding_window = 4
    return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (with_adapter, r"layers\.1\.self_attn\.q_proj is a Sequential"),
        (with_another_norm, r"layers\.1 has a Shifted that is no RMSNorm"),
        (with_a_query_norm, r"layers\.0 has parts .*k_norm, q_norm"),
        (with_another_activation, "hidden_act='gelu'"),
        (with_a_window, "sliding_window=4"),
    ],
)
def test_what_is_no_plain_llama_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        fuse(broken())


# Without padding ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7, 3), (1, 1), (7, 0, 4), (2, 5, 7)])
def test_texts_without_padding(lengths):
    """Each as if it were alone."""
    model = make(num_key_value_heads=2)
    torch.manual_seed(0)
    texts = [torch.randint(61, (length,)) for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    out = fuse(model).packed(torch.cat(texts), starts)
    for text, a, b in zip(texts, starts[:-1], starts[1:], strict=True):
        if len(text):
            torch.testing.assert_close(
                out[a:b], model(text[None])[0], rtol=1e-4, atol=1e-4
            )


@torch.no_grad()
@pytest.mark.parametrize("starts", [[1, 3], [0, 2], [0, 3, 2, 3]])
def test_starts_that_do_not_rise_are_refused(starts):
    with pytest.raises(ValueError, match=r"must rise from 0 to 3 tokens"):
        fuse(make()).packed(torch.zeros(3, dtype=torch.long), torch.tensor(starts))


def test_the_front_of_the_room():
    assert set(fused_transformers.__all__) <= set(dir(fused_transformers))
