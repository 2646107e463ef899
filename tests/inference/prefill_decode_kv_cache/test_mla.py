"""Multi-head latent attention: both forms, the cache, and transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from llmlab.inference.prefill_decode_kv_cache import (
    LatentAttention,
    LatentConfig,
    absorbed,
    expanded,
)
from llmlab.inference.prefill_decode_kv_cache.mla import turn_pairs
from llmlab.models.cache import KVCache

# every size another; transformers needs even strides for its complex numbers
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}


def inputs(T: int = 2, S: int = 5, dtype=torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    B, H, d_n, d_r, d_c, d_v = 2, 3, 5, 4, 7, 6
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    return {
        "q": torch.randn(B, H, T, d_n, dtype=dtype),
        "q_rope": torch.randn(B, H, T, d_r, dtype=dtype),
        "c": torch.randn(B, S, d_c, dtype=dtype),
        "k_rope": torch.randn(B, S, d_r, dtype=dtype),
        "W_UK": torch.randn(H, d_n, d_c, dtype=dtype),
        "W_UV": torch.randn(H, d_v, d_c, dtype=dtype),
        "mask": mask,
    }


def test_both_forms_are_equal_forward_and_backward():
    gradients = []
    for form in (expanded, absorbed):
        given = inputs()
        leaves = [x.requires_grad_() for name, x in given.items() if name != "mask"]
        out = form(**given)
        weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape)
        gradients.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_one_head_by_hand():
    """Two tokens, a score of 0 each: the mean of both values."""
    given = inputs(T=1, S=2)
    given["q"].zero_()
    given["q_rope"].zero_()
    mean = given["c"].mean(1)  # (B, d_c)
    right = torch.einsum("hvc,bc->bhv", given["W_UV"], mean)[:, :, None]
    torch.testing.assert_close(absorbed(**given), right)


def test_absorbed_makes_no_key_for_each_head():
    """With many tokens in the cache nothing as large as all heads' keys appears."""
    given = inputs(T=1, S=400)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                largest = max(largest, out.numel())
            return out

    B, H, S, d_n = 2, 3, 400, 5
    for form, makes_keys in ((absorbed, False), (expanded, True)):
        largest = 0
        with Watch():
            form(**given)
        assert (largest >= B * H * S * d_n) == makes_keys


def test_pairs_turn_as_complex_numbers():
    x = torch.randn(2, 3, 4, 6)
    positions = torch.arange(5, 9)[None]
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = positions[0, :, None] * 100.0 ** (-torch.arange(3) / 3)
    right = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle))
    torch.testing.assert_close(turn_pairs(x, positions, 100.0), right.flatten(-2))


@pytest.mark.parametrize("rank", [10, None])
@pytest.mark.parametrize("absorb", [True, False])
def test_with_a_cache_as_without(rank, absorb):
    torch.manual_seed(0)
    layer = LatentAttention(LatentConfig(**SIZES | {"q_lora_rank": rank}))
    x = torch.randn(2, 6, 24)
    cache = KVCache(1)
    pieces = [
        layer(x[:, a:b], cache, absorb=absorb) for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), atol=1e-5, rtol=1e-4)
    assert cache.nbytes == 2 * 6 * (8 + 4) * 4  # B · S · (d_c + d_r) · fp32


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("rank", [10, None])
def test_as_transformers_with_its_cache(version, rank):
    sizes = SIZES | {"q_lora_rank": rank}
    Config, Attention, Rotary = {
        2: (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
        3: (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
    }[version]
    config = Config(**sizes, num_key_value_heads=3, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = Attention(config, 0).eval()
    ours = LatentAttention(LatentConfig(**sizes))
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    rotary = Rotary(config)
    x = torch.randn(2, 5, 24)
    cache, their_cache = KVCache(1), DynamicCache()
    for start, stop in ((0, 4), (4, 5)):
        positions = torch.arange(start, stop)[None]
        T = stop - start
        mask = torch.full((T, stop), -torch.inf).triu(start + 1)[None, None]
        piece = x[:, start:stop]
        right, _ = theirs(
            piece,
            position_embeddings=rotary(piece, positions),
            attention_mask=mask,
            past_key_values=their_cache,
        )
        for absorb in (True, False):
            cache_here = KVCache(1) if absorb else cache
            if absorb and start:
                ours(x[:, :start], cache_here)
            found = ours(piece, cache_here, absorb=absorb)
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert cache.keys[0][:, :, :5].shape == their_cache.layers[0].keys.shape
    torch.testing.assert_close(cache.keys[0][:, :, :5], their_cache.layers[0].keys)


def test_half_precision_stays():
    layer = LatentAttention(LatentConfig(**SIZES)).bfloat16()
    x = torch.randn(1, 4, 24, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), layer(x, absorb=False), atol=0.03, rtol=0.1)


def test_refusals():
    with pytest.raises(ValueError, match="qk_rope_head_dim=3 must be even"):
        LatentConfig(qk_rope_head_dim=3)
    with pytest.raises(ValueError, match="kv_lora_rank=0"):
        LatentConfig(kv_lora_rank=0)
    with pytest.raises(ValueError, match="q_lora_rank=0"):
        LatentConfig(q_lora_rank=0)
