"""What the prose of 01-start/02-the-course-models says is true of the models."""

import csv

import pytest
import torch

from llmlab.models import course_model, language_model, ngrams
from llmlab.training.pretraining import evaluation_windows


@pytest.fixture(scope="module")
def model():
    return course_model.load()


@pytest.fixture(scope="module")
def counts():
    return {n: ngrams.fit(course_model.tokens("train"), n, 2048) for n in (2, 3, 5)}


def test_the_log_crosses_the_baselines_in_order(counts):
    with (course_model.MODEL / "training_log.csv").open(newline="") as f:
        curve = [float(row["valid_loss"]) for row in csv.DictReader(f)]
    valid = course_model.tokens("valid")
    place = evaluation_windows(torch.arange(len(valid)), 256)[:, 1:]
    losses = {n: m.losses(valid)[place - 1].mean().item() for n, m in counts.items()}
    assert curve[0] > losses[2] > losses[3] > losses[5]
    crossed = [
        next(i for i, loss in enumerate(curve) if loss < losses[n]) for n in (2, 3)
    ]
    assert 0 < crossed[0] < crossed[1] < len(curve)


def test_counting_wins_at_four_tokens_and_reading_at_256(model, counts):
    rows = evaluation_windows(course_model.tokens("valid"), 750, windows=4)

    def read(c):
        losses = [
            language_model.token_losses(model, r, c, max(1, c // 2), 512 // c)
            for r in rows
        ]
        return torch.cat(losses).mean()

    counted = torch.cat([counts[5].losses(r) for r in rows]).mean()
    assert read(4) > counted + 0.1
    assert read(256) < counted - 0.02
    assert read(256) < read(16) < read(4)


@pytest.mark.real_model
def test_perplexity_misranks_what_bits_per_byte_rank_right(model):
    from llmlab.models import real_model

    real_model.fetch(quiet=True)
    texts = [course_model.documents("addresses", "valid")[i][:1500] for i in (0, 5, 10)]
    num_bytes = sum(len(t.encode()) for t in texts)
    found = []
    for m, t, context in [
        (model, course_model.load_tokenizer(), 256),
        (real_model.load(), real_model.load_tokenizer(), 1024),
    ]:
        assert t.id_to_token(0) == "<|endoftext|>"
        rows = [
            torch.tensor([0, *t.encode(x, add_special_tokens=False).ids]) for x in texts
        ]
        losses = torch.cat(
            [language_model.token_losses(m, r, context, context // 2) for r in rows]
        )
        found.append(
            (
                language_model.perplexity(losses),
                language_model.bits_per_byte(losses, num_bytes),
            )
        )
    (toy_ppl, toy_bpb), (real_ppl, real_bpb) = found
    assert real_bpb < 0.8 * toy_bpb  # the real model is far better
    assert toy_ppl < 1.05 * real_ppl  # and perplexity does not show it
