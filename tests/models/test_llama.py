"""Llama against transformers: logits, gradients, masks, caches; and against mathematics
where that is simpler.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models.cache import KVCache
from llmlab.models.llama import (
    Llama,
    LlamaConfig,
    rope_frequencies,
    rope_tables,
    rotate,
)
from tests.models.hugging_face import SMALL, VARIANTS, make, theirs


def near(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request):
    model = make(**VARIANTS[request.param])
    return model, theirs(model)


def tokens(*shape, seed=1):
    return torch.randint(
        0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed)
    )


def test_logits(pair):
    ours, hf = pair
    ids = tokens(3, 23)
    with torch.no_grad():
        near(ours(ids), hf(ids).logits)


def test_gradients(pair):
    ours, hf = pair
    ids = tokens(2, 9)
    for model, logits in ((ours, ours(ids)), (hf, hf(ids).logits)):
        model.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        near(p.grad, expected[name].grad)


@torch.no_grad()
def test_left_padding(pair):
    ours, hf = pair
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = ours(ids, attention_mask=mask, position_ids=positions)
    near(
        got[mask.bool()],
        hf(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()],
    )
    near(got[0, 4:], ours(ids[:1, 4:])[0])  # as if the padding were not there
    assert got.isfinite().all()


@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole(pair):
    ours, _ = pair
    ids, cache = tokens(2, 12), KVCache(2, capacity=4)
    pieces = [
        ours(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 11), (11, 12))
    ]
    near(torch.cat(pieces, 1), ours(ids))
    assert cache.length == 12


@torch.no_grad()
def test_cache_with_left_padding():
    model, ids, cache = make(num_key_value_heads=2), tokens(2, 8), KVCache(2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    first = model(
        ids[:, :6],
        attention_mask=mask[:, :6],
        position_ids=positions[:, :6],
        cache=cache,
    )
    second = model(
        ids[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], cache=cache
    )
    near(torch.cat([first, second], 1)[1, 3:], model(ids[1:, 3:])[0])


@torch.no_grad()
def test_embeddings_as_input(pair):
    ours, hf = pair
    h = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    near(ours(inputs_embeds=h), hf(inputs_embeds=h).logits)
    ids = tokens(2, 7)
    assert torch.equal(ours(inputs_embeds=ours.model.embed_tokens(ids)), ours(ids))


@torch.no_grad()
def test_last_logits_only(pair):
    ours, _ = pair
    ids = tokens(2, 7)
    near(ours(ids, logits_to_keep=2), ours(ids)[:, -2:], 1e-6)


@settings(max_examples=15, deadline=None)
@given(
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 5),
    layers=st.integers(1, 2),
    vocab=st.integers(3, 40),
    batch=st.integers(1, 3),
    seq=st.integers(2, 12),
)
def test_any_shape(kv, group, half, layers, vocab, batch, seq):
    """Logits equal transformers', and no later token changes an earlier logit."""
    shape = {
        "vocab_size": vocab,
        "hidden_size": 6 * kv * group,
        "num_hidden_layers": layers,
        "head_dim": 2 * half,
    }
    model = make(**shape, num_attention_heads=kv * group, num_key_value_heads=kv)
    ids = torch.randint(0, vocab, (batch, seq))
    with torch.no_grad():
        logits = model(ids)
        near(logits, theirs(model)(ids).logits)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % vocab
        near(model(changed)[:, :-1], logits[:, :-1], 1e-6)


@pytest.mark.parametrize("name", ["linear rope", "llama3 rope"])
def test_rope_frequencies(name):
    model = make(**VARIANTS[name])
    near(rope_frequencies(model.config), theirs(model).model.rotary_emb.inv_freq, 1e-7)


def test_rope_turns_by_relative_position_and_keeps_lengths():
    theta = rope_frequencies(LlamaConfig(**SMALL))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def turn(x, p):
        return rotate(x, *rope_tables(torch.tensor([[p]]), theta))

    near((turn(q, 9) * turn(k, 5)).sum(), (turn(q, 104) * turn(k, 100)).sum(), 1e-4)
    near(turn(q, 77).norm(), q.norm())


def test_another_attention_function_is_used():
    def matmul(q, k, v, mask):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(
            scores.shape[-1] - scores.shape[-2]
        )
        return (
            scores.masked_fill(~(causal if mask is None else mask), -torch.inf).softmax(
                -1
            )
            @ v
        )

    model, ids = make(num_key_value_heads=2), tokens(2, 9)
    near(model(ids, attention=matmul), model(ids))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 2.5}, "vocab_size"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ],
)
def test_wrong_shapes_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        LlamaConfig(**SMALL | changes)


def test_wrong_calls_are_named():
    model, ids = make(), tokens(1, 4)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="attention_mask covers 3"):
        model(ids, attention_mask=torch.ones(1, 3))


def test_initialisation_is_hugging_faces():
    model = Llama(LlamaConfig(**SMALL | {"vocab_size": 4000, "hidden_size": 64}))
    assert abs(model.lm_head.weight.std() - 0.02) < 1e-3
    assert (model.model.norm.weight == 1).all()
