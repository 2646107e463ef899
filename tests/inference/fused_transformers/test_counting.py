"""What counts as a launch, and the closed forms against what is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from llmlab.inference.fused_transformers import cost, count, fuse, kernels
from llmlab.inference.fused_transformers.layer import BatchAttention
from llmlab.models.attention import sdpa
from llmlab.models.cache import KVCache
from llmlab.models.llama import rope_tables
from tests.models.hugging_face import make, theirs


def names(counter) -> list[str]:
    return [launch.name for launch in counter.launches]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.T.reshape(-1)[2:].unsqueeze(0), [("clone", 96, 96)]),
        (lambda x: x.view(6, 4).transpose(0, 1).expand(3, 4, 6), []),
        (lambda x: x + x[:1], [("add", 96 + 24, 96)]),
        (lambda x: x * 2, [("mul", 96, 96)]),
        (lambda x: x.sum(), [("sum", 96, 4)]),
        (lambda x: x.add_(1), [("add_", 96, 96)]),
        (lambda x: x[0].copy_(x[1]), [("copy_", 24, 24)]),
        (lambda x: x.zero_(), [("zero_", 0, 96)]),
        (lambda x: torch.empty_like(x), []),
        (lambda x: x.float(), []),
        (lambda x: x.double(), [("_to_copy", 96, 192)]),
        (lambda x: x.T @ x, [("mm", 192, 144)]),
        (lambda x: torch.cat([x, x]), [("cat", 192, 192)]),
        (lambda x: F.embedding(torch.tensor([1]), x), [("embedding", 24 + 8, 24)]),
        (lambda x: x.expand(9, 4, 6).exp(), [("exp", 96, 864)]),
    ],
)
def test_launches_and_bytes(function, expected):
    """x has 4 × 6 numbers of 4 bytes."""
    counter = count(function, torch.randn(4, 6))
    found = [(launch.name, launch.read, launch.written) for launch in counter.launches]
    assert found == expected
    assert counter.bytes == sum(a + b for _, a, b in expected)


def test_a_write_by_index_touches_what_it_writes():
    def function(x):
        x[torch.tensor([0, 2])] = torch.ones(2, 6)

    counter = count(function, torch.zeros(4, 6))
    put = counter.launches[-1]
    assert put.name.startswith("index_put")
    assert (put.read, put.written) == (16 + 48, 48)


def test_inference_mode_hides_nothing():
    """There PyTorch shows rms_norm as one operator; it runs as several."""
    x = torch.randn(2, 8)
    plain = names(count(F.rms_norm, x, (8,)))
    with torch.inference_mode():
        assert names(count(F.rms_norm, x, (8,))) == plain
    assert len(plain) > 1


SHAPES = [(1, 1, 5), (3, 1, 7), (2, 6, 0), (1, 9, 0)]


def layer_inputs(model, B, T, past):
    torch.manual_seed(0)
    rope = rope_tables(torch.arange(past, past + T)[None], model.model.theta)
    return torch.randn(B, T, model.config.hidden_size), rope


@torch.no_grad()
@pytest.mark.parametrize(("B", "T", "past"), SHAPES)
@pytest.mark.parametrize("kv", [4, 2])
def test_the_unfused_layer_is_as_predicted(B, T, past, kv):
    model = make(num_key_value_heads=kv, intermediate_size=40)
    cache = KVCache(2, 32)
    if past:
        model(torch.zeros(B, past, dtype=torch.long), cache=cache)
    else:  # room, so that no memory is taken
        model(torch.zeros(B, 1, dtype=torch.long), cache=cache)
        cache.truncate(0)
    h, rope = layer_inputs(model, B, T, past)
    counter = count(model.model.layers[0], h, rope, None, cache, sdpa)
    predicted = cost.unfused(model.config, B, T, past)
    found = [(launch.read, launch.written) for launch in counter.launches]
    assert found == [(4 * kernel.read, 4 * kernel.written) for kernel in predicted]
    assert len(counter) == 36


@pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler here")
@torch.no_grad()
@pytest.mark.parametrize(("B", "T", "past"), SHAPES)
@pytest.mark.parametrize("kv", [4, 2])
def test_the_fused_layer_is_as_predicted(B, T, past, kv):
    model = make(num_key_value_heads=kv, intermediate_size=40)
    fused = fuse(model)
    cache = fused.new_cache(B, 32)
    cache.length = past
    x, r = torch.randn(2, B * T, model.config.hidden_size)
    tables = fused.angles(torch.arange(past, past + T).repeat(B))
    attend = BatchAttention(cache, *tables, None)
    counter = count(fused.layers[0], x, r, 0, attend)
    predicted = cost.fused(model.config, B, T, past)
    found = [(launch.read, launch.written) for launch in counter.launches]
    assert found == [(4 * kernel.read, 4 * kernel.written) for kernel in predicted]
    assert len(counter) == 9


@torch.no_grad()
def test_transformers_launches_as_many():
    hf = theirs(make(num_key_value_heads=2))
    hf.set_attn_implementation("sdpa")
    cache = DynamicCache(config=hf.config)
    hf(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    position = torch.tensor([[5]])
    h = torch.randn(1, 1, 32)
    rope = hf.model.rotary_emb(h, position)
    counter = count(
        hf.model.layers[0],
        h,
        position_ids=position,
        past_key_values=cache,
        position_embeddings=rope,
    )
    assert len(counter) == 36
    assert names(counter).count("mm") == 7


def test_flops_are_those_of_the_accounting():
    from llmlab.models.accounting import forward_flops_by_part

    config = make().config
    for B, T, past in SHAPES:
        parts = forward_flops_by_part(config, B, T, past)
        one = (sum(parts.values()) - parts["lm_head"]) // config.num_hidden_layers
        for way in (cost.unfused, cost.fused):
            assert sum(k.flops for k in way(config, B, T, past)) == one


def test_a_queue_waits_for_the_slower_side():
    assert cost.queued([1.0] * 10, launch=5.0) == 51  # launches: ten, then the last
    assert cost.queued([5.0] * 10, launch=1.0) == 51  # work: one launch, then all
    assert cost.queued([], launch=1.0) == 0
    assert cost.queued([0.0, 0.0, 7.0, 0.0], launch=1.0) == 10


def test_work_is_the_larger_of_both_limits():
    kernel = cost.product(2, 3, 5)
    assert kernel.numbers == 6 + 15 + 10 and kernel.flops == 60
    assert cost.work(kernel, bandwidth=1.0, speed=1e9, bytes_each=2) == 62
    assert cost.work(kernel, bandwidth=1e9, speed=1.0) == 60
