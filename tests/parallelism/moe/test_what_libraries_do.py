"""Where routers and balance losses of transformers differ from the papers and from each
other. The lesson's folded cell prints the same.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from llmlab.parallelism.moe.moe import balance_loss, route
from tests.libraries import seen_in

E, K = 8, 2


def theirs(*layers: torch.Tensor, k: int = K, **mask) -> float:
    return load_balancing_loss_func(layers, E, k, **mask).item()


def ours(logits: torch.Tensor, k: int = K) -> float:
    routing = route(logits, k)
    return balance_loss(routing.probs, routing.load, len(logits), k).item()


def wanting(expert: int) -> torch.Tensor:
    """Logits of 16 tokens that all want one expert."""
    return 30 * torch.eye(E)[expert].repeat(16, 1)


def routed(router: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Its weights, (T, k), and those of our router without renormalising."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 32, generator=generator) for n in (E, 64))
    weight = weight / 32**0.5
    router.weight.data.copy_(weight)
    return router(x)[1].sort(descending=True).values, route(x @ weight.T, K, False)


@seen_in("transformers", "5.23.0")
def test_an_even_router_has_the_loss_k():
    """Where the Switch paper has 1, and ours."""
    even = torch.eye(E)
    for k in (1, 2, 4):
        assert theirs(even, k=k) == pytest.approx(k)
        assert ours(even, k=k) == pytest.approx(1)
        assert theirs(wanting(0), k=k) == pytest.approx(E)
        assert ours(wanting(0), k=k) == pytest.approx(E / k)


@seen_in("transformers", "5.23.0")
def test_layers_are_added_up_before_they_are_multiplied():
    """Eight layers, each with a favourite of its own, have the loss of even ones."""
    layers = [wanting(e) for e in range(E)]
    assert [theirs(layer, k=1) for layer in layers] == pytest.approx([E] * E)
    assert theirs(*layers, k=1) == pytest.approx(1)
    assert theirs(layers[0], layers[0], k=1) == pytest.approx(E)


@seen_in("transformers", "5.23.0")
def test_padding_counts_unless_it_is_masked():
    tokens = torch.randn(12, E, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([tokens, wanting(0)[:12]])
    mask = torch.tensor([[1] * 12 + [0] * 12])
    assert theirs(rows) > 1.2 * theirs(tokens)
    assert theirs(rows, attention_mask=mask) == pytest.approx(theirs(tokens), rel=1e-5)
    assert ours(rows) == pytest.approx(theirs(rows) / K, rel=1e-5)


@seen_in("transformers", "5.23.0")
def test_the_balance_loss_is_not_in_the_loss_unless_asked_for():
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    ids = torch.arange(10)[None]
    plain, added = (
        model(ids, labels=ids, output_router_logits=asked) for asked in (False, True)
    )
    assert model(ids, labels=ids).loss.item() == plain.loss.item()
    more = added.loss.item() - plain.loss.item()
    assert more == pytest.approx(0.001 * added.aux_loss.item(), abs=1e-6)
    assert added.aux_loss.item() > 1.9


@seen_in("transformers", "5.23.0")
def test_mixtral_divides_by_the_sum_of_the_k_and_qwen_if_told_to():
    config = MixtralConfig(hidden_size=32, num_local_experts=E, num_experts_per_tok=K)
    weights, _ = routed(MixtralTopKRouter(config))
    torch.testing.assert_close(weights.sum(-1), torch.ones(64))

    shape = {"hidden_size": 32, "num_experts": E, "num_experts_per_tok": K}
    weights, plain = routed(Qwen3MoeTopKRouter(Qwen3MoeConfig(**shape)))
    torch.testing.assert_close(weights, plain.weights)
    assert weights.sum(-1).mean() < 0.7
    normed = Qwen3MoeConfig(**shape, norm_topk_prob=True)
    weights, _ = routed(Qwen3MoeTopKRouter(normed))
    torch.testing.assert_close(weights.sum(-1), torch.ones(64))


DEEPSEEK = {
    "hidden_size": 32,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize("norm", [False, True])
@seen_in("transformers", "5.23.0")
def test_deepseek_v2_never_reads_norm_topk_prob(norm):
    config = DeepseekV2Config(**DEEPSEEK, norm_topk_prob=norm)
    weights, plain = routed(DeepseekV2TopkRouter(config))
    torch.testing.assert_close(weights, plain.weights)


@seen_in("transformers", "5.23.0")
def test_deepseek_v3_divides_and_then_multiplies_by_two_and_a_half():
    weights, _ = routed(DeepseekV3TopkRouter(DeepseekV3Config(**DEEPSEEK)))
    torch.testing.assert_close(weights.sum(-1), torch.full((64,), 2.5))
    off = DeepseekV3Config(**DEEPSEEK, norm_topk_prob=False)
    assert routed(DeepseekV3TopkRouter(off))[0].sum(-1).max() > 2.6
