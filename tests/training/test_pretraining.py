"""The training loop: schedule, batches, update, and a run that stops and resumes.

The update is held against plain PyTorch.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.training.pretraining import (
    Recipe,
    evaluate,
    learning_rate,
    make_optimizer,
    sample_batch,
    train,
    training_step,
)

RECIPE = Recipe(steps=12, batch=4, context=8, peak_lr=1e-2, warmup=3, evaluate_every=4)


def make_model() -> Llama:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
    }
    return Llama(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.arange(400) * 7 % 11  # each token tells the next


def test_learning_rate_at_its_corners():
    recipe = Recipe(steps=1000, peak_lr=2.0, warmup=100, final_lr=0.1)
    lr = [learning_rate(s, recipe) for s in range(1000)]
    assert (
        lr[0] == pytest.approx(0.02)
        and lr[99] == pytest.approx(2.0)
        and lr[100] == pytest.approx(2.0)
    )
    assert lr[-1] == pytest.approx(0.2)
    assert lr[100] >= max(lr) and lr[100:] == sorted(lr[100:], reverse=True)
    half_way = 100 + (999 - 100) / 2
    assert learning_rate(int(half_way), recipe) == pytest.approx(
        2.0 * (0.1 + 0.9 / 2), abs=2e-3
    )


@given(st.integers(1, 50), st.data())
def test_learning_rate_is_positive_and_at_most_the_peak(steps, data):
    recipe = Recipe(steps=steps, warmup=data.draw(st.integers(0, steps)))
    assert all(
        0 < learning_rate(s, recipe) <= recipe.peak_lr * (1 + 1e-12)
        for s in range(steps)
    )


def test_batches_are_windows_of_the_stream_and_depend_on_seed_and_step_alone(stream):
    place = torch.arange(400)
    batch = sample_batch(place, RECIPE, 5)
    assert batch.shape == (4, 9) and (batch.diff(dim=1) == 1).all()
    torch.manual_seed(99)
    assert torch.equal(batch, sample_batch(place, RECIPE, 5))
    assert not torch.equal(batch, sample_batch(place, RECIPE, 6))
    assert not torch.equal(batch, sample_batch(place, replace(RECIPE, seed=1), 5))
    ends = torch.stack([sample_batch(torch.arange(10), RECIPE, s) for s in range(50)])
    # the first and the last token are both reached
    assert ends.min() == 0 and ends.max() == 9
    with pytest.raises(ValueError, match="8 tokens"):
        sample_batch(place[:8], RECIPE, 0)


def test_weight_decay_takes_matrices_only_and_a_tied_matrix_once():
    model = make_model()
    decayed, spared = make_optimizer(model, RECIPE).param_groups
    assert decayed["weight_decay"] == 0.1 and all(
        p.dim() == 2 for p in decayed["params"]
    )
    assert spared["weight_decay"] == 0.0 and all(p.dim() == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(
        list(model.parameters())
    )


def test_a_step_is_clipped_adamw_by_the_formula(stream):
    """The first update of AdamW: θ(1 − lr·λ) − lr·g/(|g| + ε).

    g is the clipped gradient (Loshchilov & Hutter, algorithm 2).
    """
    model, clip = make_model(), 0.05
    batch = sample_batch(stream, RECIPE, 0)
    logits = model(batch[:, :-1])  # the same loss, its shift done on the tokens
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 11), batch[:, 1:].reshape(-1)
    )
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norm > clip
    wanted = []
    for p, g in zip(model.parameters(), gradients, strict=True):
        g, decay = g * clip / norm, 0.1 if p.dim() == 2 else 0.0
        wanted.append(p.detach() * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8))
    assert training_step(
        model, make_optimizer(model, RECIPE), batch, clip
    ) == pytest.approx(loss.item(), rel=1e-5)
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-3, atol=2e-5)


def test_it_learns_what_can_be_learned(stream):
    model = make_model()
    records = list(
        train(model, stream, stream, replace(RECIPE, steps=60, evaluate_every=30))
    )
    assert [r.step for r in records] == [30, 60] and [r.tokens for r in records] == [
        30 * 32,
        60 * 32,
    ]
    assert records[-1].valid_loss < 0.5 < records[0].train_loss < math.log(11) + 0.2


def test_a_run_that_stops_and_resumes_equals_an_unbroken_one(stream, tmp_path):
    whole, broken, file = make_model(), make_model(), tmp_path / "run.pt"
    unbroken = list(train(whole, stream, stream, RECIPE))
    first = train(broken, stream, stream, RECIPE, file)
    assert next(first).step == 4
    first.close()
    resumed = make_model()
    rest = list(train(resumed, stream, stream, RECIPE, file))
    assert [r.step for r in rest] == [8, 12]
    for a, b in zip(rest, unbroken[1:], strict=True):
        assert (a.step, a.tokens, a.train_loss, a.valid_loss, a.lr) == (
            b.step,
            b.tokens,
            b.train_loss,
            b.valid_loss,
            b.lr,
        )
    for (name, p), q in zip(
        resumed.named_parameters(), whole.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    assert list(train(resumed, stream, stream, RECIPE, file)) == []  # all done


def test_evaluate_is_the_mean_over_its_windows(stream):
    model = make_model()
    got = evaluate(model, stream, context=8, windows=5, batch=2)
    starts = [0, 97, 195, 293, 391]
    each = [
        next_token_loss(model(stream[None, s : s + 9]), stream[None, s : s + 9]).item()
        for s in starts
    ]
    assert got == pytest.approx(sum(each) / 5, rel=1e-5)
    with pytest.raises(ValueError, match="8 tokens"):
        evaluate(model, stream[:8], context=8)


@pytest.mark.parametrize(
    "field, value",
    [("steps", 0), ("batch", 0), ("evaluate_every", 0), ("warmup", 13), ("warmup", -1)],
)
def test_recipe_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        replace(RECIPE, **{field: value})
