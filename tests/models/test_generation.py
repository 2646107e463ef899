"""Generation: token for token what transformers generates, filters equal to its
processors, draws from the right law.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models.cache import KVCache
from llmlab.models.generation import (
    generate,
    keep_top_k,
    keep_top_p,
    probabilities,
    sample,
    stream,
)
from tests.models.hugging_face import VARIANTS, make, theirs


def prompt(*shape, seed=5):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["plain", "gqa", "tied", "llama3 rope"])
def test_greedy_is_transformers(name):
    model, ids = make(**VARIANTS[name]), prompt(3, 7)
    expected = theirs(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(generate(model, ids, 20), expected)


def test_greedy_with_left_padding_is_transformers_and_is_row_by_row():
    model, ids = make(num_key_value_heads=2), prompt(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    ids = ids * mask
    hf = theirs(model)
    expected = hf.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=15,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    got = generate(model, ids, 15, attention_mask=mask)
    assert torch.equal(got, expected)
    for row, start in ((0, 5), (1, 0), (2, 2)):
        assert torch.equal(
            generate(model, ids[row : row + 1, start:], 15)[0], got[row, start:]
        )


def test_rows_end_at_eos_and_are_filled():
    model, ids = make(), prompt(2, 5)
    free = generate(model, ids, 12)
    eos = int(free[0, 5 + 3])
    expected = theirs(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=eos,
    )
    assert torch.equal(generate(model, ids, 12, eos=eos, pad=1), expected)
    assert (generate(model, ids, 12, eos=eos)[0, 5 + 4 :] == eos).all(), (
        "without `pad` a row is filled with its end"
    )
    one = generate(model, ids[:1], 12, eos=(eos, 60))
    assert one.shape[1] == 5 + 1 + (free[0, 5:] == eos).nonzero()[0].item(), (
        "generation stops when all rows have ended"
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 40),
    p=st.floats(0.01, 1.0),
    t=st.floats(0.1, 3.0),
)
def test_filters_are_transformers(seed, k, p, t):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 3
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))
    chain = TopPLogitsWarper(p)(
        None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(t)(None, logits))
    )
    assert torch.allclose(probabilities(logits, t, k, p), chain.softmax(-1), atol=1e-7)


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def kept(p):
        return keep_top_p(logits, p).isfinite().sum().item()

    assert [kept(p) for p in (0.1, 0.4, 0.6, 0.8, 0.95)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}]
)
def test_samples_follow_the_distribution(settings):
    from scipy.stats import chisquare

    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    p = probabilities(logits.double()[None], **settings)[0]
    draws = sample(
        logits.expand(20_000, -1),
        **settings,
        generator=torch.Generator().manual_seed(0),
    )
    counts = draws.bincount(minlength=6)
    assert (counts[p == 0] == 0).all()
    assert chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 1e-3
    if settings:  # the test can tell it from plain sampling
        assert chisquare(counts, 20_000 * logits.double().softmax(-1)).pvalue < 1e-6


def test_a_seed_repeats_and_none_draws_from_the_global_generator():
    model, ids = make(), prompt(2, 4)

    def run(seed):
        return generate(model, ids, 12, temperature=1.0, seed=seed)

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))
    torch.manual_seed(9)
    first = run(None)
    torch.manual_seed(9)
    assert torch.equal(run(None), first)


def test_limits_of_sampling_are_greedy():
    model, ids = make(), prompt(2, 4)
    greedy = generate(model, ids, 10)
    assert torch.equal(
        generate(model, ids, 10, temperature=1.0, top_k=1, seed=0), greedy
    )
    assert torch.equal(
        generate(model, ids, 10, temperature=1.0, top_p=1e-9, seed=0), greedy
    )
    assert torch.equal(generate(model, ids, 10, temperature=1e-4, seed=0), greedy)


def test_stream_yields_what_generate_returns_as_it_goes():
    model, ids, calls = make(), prompt(2, 4), []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(model, ids, 6)
    first = next(steps)
    assert len(calls) == 1, "the first token comes before the second is computed"
    rest = list(steps)
    hook.remove()
    assert torch.equal(torch.stack([first, *rest], 1), generate(model, ids, 6)[:, 4:])


def test_each_step_computes_one_token():
    model, ids, widths = make(), prompt(1, 8), []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: widths.append(args[0].shape[1])
    )
    cache = KVCache(2)
    generate(model, ids, 4, cache=cache)
    hook.remove()
    assert widths == [8, 1, 1, 1]
    assert cache.length == 11


def test_its_tokens_can_be_trained_on():
    model = make().train()
    out = generate(model, prompt(1, 3), 3)
    model(out).sum().backward()
    assert not out.is_inference()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "on the left"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        generate(make(), prompt(1, 4), **{"max_new_tokens": 2} | arguments)
    with pytest.raises(ValueError, match="ids has shape"):
        generate(make(), prompt(4), 2)
