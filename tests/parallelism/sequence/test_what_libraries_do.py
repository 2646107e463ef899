"""Where attention in PyTorch and in transformers does what one would not guess: a query
that may see nothing, a mask of booleans, and which corner a causal mask starts from.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

from llmlab.models.attention import attention_mask_for
from llmlab.parallelism.sequence.ring import attend
from tests.libraries import seen_in

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, n, 4, generator=generator) for n in (2, 5, 5)]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize(
    "mask",
    [torch.zeros(2, 5, dtype=torch.bool), torch.full((2, 5), -torch.inf)],
    ids=["False", "-inf"],
)
@seen_in("torch", "2.13.0")
def test_a_query_that_sees_nothing_gets_0_from_torch(qkv, mask, backend):
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    assert torch.equal(out, torch.zeros_like(out))


@seen_in("torch", "2.13.0")
def test_nor_has_it_a_gradient(qkv):
    v = qkv[2].requires_grad_()
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    F.scaled_dot_product_attention(*qkv, attn_mask=nothing).sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("training", [True, False])
@seen_in("torch", "2.13.0")
def test_the_module_gives_nan_when_it_also_returns_weights(qkv, training):
    """And it does by default. Without them it gives the bias of its last linear."""
    q, k, v = (t[0] for t in qkv)
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(4, 1, batch_first=True).train(training)
    torch.nn.init.normal_(module.out_proj.bias)
    hidden = torch.ones(1, 5, dtype=torch.bool)
    out, weights = module(q, k, v, key_padding_mask=hidden)
    assert out.isnan().all() and weights.isnan().all()
    out, _ = module(q, k, v, key_padding_mask=hidden, need_weights=False)
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))


@seen_in("transformers", "5.23.0")
def test_eager_attention_gives_the_mean_of_all_values(qkv):
    """Also of those that are hidden: its mask holds the lowest finite number. PyTorch's
    attention gives the mean, too, when its mask holds that and not −∞.
    """
    q, k, v = qkv
    mask = torch.full((1, 1, 2, 5), LOWEST)
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    out, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.5)
    mean = v.mean(2, keepdim=True).expand(1, 1, 2, 4)
    torch.testing.assert_close(out.transpose(1, 2), mean)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(fused, mean)


def test_ours_gives_0_and_a_log_sum_exp_that_merges(qkv):
    q, k, v = qkv
    out, lse = attend(q, k, v, torch.tensor([0, 1]), torch.arange(2, 7))
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()


def test_in_our_model_a_query_that_is_padding_sees_itself():
    mask = attention_mask_for(3, 0, torch.tensor([[0, 0, 1]]))
    assert mask[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def llama(attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@seen_in("transformers", "5.23.0")
def test_a_mask_of_booleans_is_added_as_0_and_1_by_eager_attention():
    """The logits are off by more than they vary, and nothing says so."""
    ids = torch.randint(64, (1, 6), generator=torch.Generator().manual_seed(1))
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 6, 6).masked_fill(~causal, LOWEST)
    models = {name: llama(name) for name in ("sdpa", "eager")}
    with torch.no_grad():
        right = models["sdpa"](ids).logits
        for model in models.values():
            torch.testing.assert_close(model(ids).logits, right)
            torch.testing.assert_close(model(ids, attention_mask=added).logits, right)
        fused = models["sdpa"](ids, attention_mask=causal).logits
        eager = models["eager"](ids, attention_mask=causal).logits
        as_numbers = models["eager"](ids, attention_mask=causal.float()).logits
    torch.testing.assert_close(fused, right)
    assert (eager - right).abs().max() > right.std()
    assert torch.equal(eager, as_numbers)


@seen_in("torch", "2.13.0")
def test_is_causal_starts_from_the_top_left(qkv):
    """With two new tokens and three in a cache the first new one sees one key, and not
    the four that it should. Our mask starts from the bottom right.
    """
    q, k, _ = qkv
    seen = F.scaled_dot_product_attention(
        q, k, torch.eye(5)[None, None], is_causal=True
    )
    assert (seen[0, 0] > 0).tolist() == [[True] + [False] * 4, [True] * 2 + [False] * 3]
    ours = attention_mask_for(2, 3, None)
    assert ours[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
