"""The losses against hand computation, brute force, and transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models.language_model import (
    bits_per_byte,
    next_token_loss,
    perplexity,
    token_losses,
    windows,
)
from llmlab.models.llama import Llama, LlamaConfig


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    }
    return Llama(
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    ).eval()


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(61, (40,), generator=torch.Generator().manual_seed(1))


def by_hand(logits, tokens, counts):
    """Token by token, in float64: the mean of −log p over the (row, t) in `counts`."""
    p = logits.double().softmax(-1)
    return sum(-p[b, t - 1, tokens[b, t]].log() for b, t in counts) / len(counts)


def test_next_token_loss_by_hand():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    everything = [(b, t) for b in range(2) for t in range(1, 5)]
    torch.testing.assert_close(
        next_token_loss(logits, tokens).double(),
        by_hand(logits, tokens, everything),
        rtol=1e-6,
        atol=0,
    )
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    # weighted by token, not by row
    some = by_hand(logits, tokens, [(0, 2), (0, 3), (1, 4)])
    torch.testing.assert_close(
        next_token_loss(logits, tokens, mask).double(), some, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        next_token_loss(logits, tokens, mask.bool()).double(), some, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        next_token_loss(logits, tokens.masked_fill(mask == 0, -100)).double(),
        some,
        rtol=1e-6,
        atol=0,
    )


def test_next_token_loss_and_gradients_equal_transformers(model):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    shape = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
    }
    theirs = LlamaForCausalLM(
        HFConfig(
            **shape, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6
        )
    )
    theirs.load_state_dict(model.state_dict(), strict=False)
    tokens = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) > 0.4
    loss = next_token_loss(model(tokens), tokens, mask)
    expected = theirs(tokens, labels=tokens.masked_fill(~mask, -100)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    loss.backward()
    expected.backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, their_grads[name], rtol=1e-4, atol=1e-6, msg=name
        )
    model.zero_grad()


def test_a_masked_token_gives_no_gradient():
    logits, tokens = (
        torch.randn(1, 4, 5, requires_grad=True),
        torch.tensor([[0, 1, 2, 3]]),
    )
    next_token_loss(logits, tokens, torch.tensor([[1, 1, 0, 1]])).backward()
    assert logits.grad[0].abs().sum(-1).ne(0).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "logits, tokens, mask, named",
    [
        ((1, 3, 5), (1, 4), None, "logits"),
        ((1, 4, 5), (1, 4), (1, 3), "mask"),
        ((2, 1, 5), (2, 1), None, "no token to predict"),
        ((1, 4, 5), (1, 4), (1, 4), "no token to predict"),
    ],
)
def test_next_token_loss_refuses(logits, tokens, mask, named):
    mask = None if mask is None else torch.zeros(mask)
    with pytest.raises(ValueError, match=named):
        next_token_loss(
            torch.zeros(logits), torch.zeros(tokens, dtype=torch.long), mask
        )


@given(st.integers(2, 80), st.integers(1, 20), st.data())
def test_windows_predict_each_token_once_with_enough_before_it(length, context, data):
    stride = data.draw(st.integers(1, context))
    cut = windows(length, context, stride)
    predicted = [t for _, stop, first in cut for t in range(first, stop + 1)]
    assert predicted == list(range(1, length))
    for k, (start, stop, first) in enumerate(cut):
        assert start == k * stride and 0 < stop - start <= context
        assert k == 0 or first - start >= context - stride + 1


@pytest.mark.parametrize(
    "length, context, stride", [(1, 4, 2), (9, 4, 0), (9, 4, 5), (9, 0, None)]
)
def test_windows_refuse(length, context, stride):
    with pytest.raises(ValueError, match=r"length=1|stride="):
        windows(length, context, stride)


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.data())
def test_token_losses_equal_brute_force(model, text, length, context, data):
    """Each token alone: a forward pass over just the tokens that its window lets the
    model see.
    """
    stride, batch = data.draw(st.integers(1, context)), data.draw(st.integers(1, 3))
    text = text[:length]
    seen_from = {
        t: start
        for start, stop, first in windows(length, context, stride)
        for t in range(first, stop + 1)
    }
    with torch.no_grad():
        brute = [
            -model(text[None, seen_from[t] : t])[0, -1].log_softmax(-1)[text[t]]
            for t in range(1, length)
        ]
    torch.testing.assert_close(
        token_losses(model, text, context, stride, batch),
        torch.stack(brute),
        rtol=1e-4,
        atol=1e-5,
    )


def test_stride_one_gives_every_token_all_the_context_there_is(model, text):
    with torch.no_grad():
        brute = [
            -model(text[None, max(0, t - 8) : t])[0, -1].log_softmax(-1)[text[t]]
            for t in range(1, 40)
        ]
    torch.testing.assert_close(
        token_losses(model, text, 8, stride=1), torch.stack(brute), rtol=1e-4, atol=1e-5
    )


def test_one_window_is_one_forward_pass(model, text):
    losses = token_losses(model, text, context=64)
    torch.testing.assert_close(
        losses.mean(),
        next_token_loss(model(text[None]), text[None]).detach(),
        rtol=1e-5,
        atol=0,
    )


def test_token_losses_on_a_transformers_model(text):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        HFConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    ).eval()
    with torch.no_grad():
        expected = theirs(text[None], labels=text[None]).loss
    torch.testing.assert_close(
        token_losses(theirs, text, 64).mean(), expected, rtol=1e-5, atol=0
    )


def test_token_losses_refuses_a_batch(model):
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 4\)"):
        token_losses(model, torch.zeros(1, 4, dtype=torch.long), 4)


def test_perplexity_and_bits_per_byte_of_a_fair_draw():
    def uniform(ids):
        return torch.zeros(*ids.shape, 256)

    losses = token_losses(uniform, torch.randint(256, (101,)), context=16)
    assert perplexity(losses) == pytest.approx(256)
    # a byte per token: eight bits
    assert bits_per_byte(losses, num_bytes=100) == pytest.approx(8)
    assert bits_per_byte(losses, num_bytes=400) == pytest.approx(2)
    # the geometric mean
    assert perplexity(torch.tensor([math.log(2), math.log(8)])) == pytest.approx(4)
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(losses, 0)
