"""Wrong answers to the exercises of 01-start/02-the-course-models, and the diagnosis
that each must get.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.start.the_course_models import check
from tests.checks.rejecting import Wrong, rejects, verdict


def nll(logits, tokens):
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def no_shift(logits, tokens, mask):
    return (nll(logits, tokens) * mask).sum() / mask.sum()


def shifted_backwards(logits, tokens, mask):
    return (nll(logits[:, 1:], tokens[:, :-1]) * mask[:, :-1]).sum() / mask[
        :, :-1
    ].sum()


def mask_not_shifted(logits, tokens, mask):
    return (nll(logits[:, :-1], tokens[:, 1:]) * mask[:, :-1]).sum() / mask[
        :, :-1
    ].sum()


def mask_ignored(logits, tokens, mask):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def divided_by_all(logits, tokens, mask):
    return (nll(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).mean()


def first_tokens_counted(logits, tokens, mask):
    return (nll(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum() / mask.sum()


def row_means(logits, tokens, mask):
    return (
        (nll(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
    ).mean()


def summed(logits, tokens, mask):
    return (nll(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum()


def as_a_number(logits, tokens, mask):
    return (summed(logits, tokens, mask) / mask[:, 1:].sum()).item()


def without_gradient(logits, tokens, mask):
    return (summed(logits, tokens, mask) / mask[:, 1:].sum()).detach()


def unnormalised(logits, tokens, mask):
    picked = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return -(picked * mask[:, 1:]).sum() / mask[:, 1:].sum()


def log_of_the_mean(logits, tokens, mask):
    p = (-nll(logits[:, :-1], tokens[:, 1:])).exp()
    return -((p * mask[:, 1:]).sum() / mask[:, 1:].sum()).log()


def two_rows_only(logits, tokens, mask):
    return (nll(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum() / 5


def nats(losses, text):
    return losses.sum().item() / len(text.encode())


def characters(losses, text):
    return losses.sum().item() / math.log(2) / len(text)


def bits_per_token(losses, text):
    return losses.mean().item() / math.log(2)


def mean_over_bytes(losses, text):
    return losses.mean().item() / math.log(2) / len(text.encode())


def times_ln2(losses, text):
    return losses.sum().item() * math.log(2) / len(text.encode())


def a_tensor(losses, text):
    return losses.sum() / math.log(2) / len(text.encode())


def table(tokens, V):
    return (
        torch.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V)
        .view(V, V)
        .double()
    )


def bigram(
    tokens, V, D, lower=None, followers=None, clamp=True, backoff=True, first=None
):
    c = table(tokens, V)
    total = c.sum(1, keepdim=True)
    lower = (c > 0).sum(0) / (c > 0).sum() if lower is None else lower
    followers = (c > 0).sum(1, keepdim=True) if followers is None else followers
    first = c - D if first is None else first
    P = (
        (first.clamp(min=0) if clamp else first) + D * followers * lower
    ) / total.clamp(min=1)
    return torch.where(total > 0, P, lower if backoff else torch.zeros(V).double())


def raw_unigram(tokens, vocab_size, discount):
    c = table(tokens, vocab_size)
    return bigram(tokens, vocab_size, discount, lower=c.sum(0) / c.sum())


def raw_unigram_of_all(tokens, vocab_size, discount):
    return bigram(
        tokens,
        vocab_size,
        discount,
        lower=torch.bincount(tokens, minlength=vocab_size) / len(tokens),
    )


def uniform_lower(tokens, vocab_size, discount):
    return bigram(
        tokens,
        vocab_size,
        discount,
        lower=torch.full((vocab_size,), 1 / vocab_size).double(),
    )


def wrong_axis(tokens, vocab_size, discount):
    c = table(tokens, vocab_size)
    return bigram(tokens, vocab_size, discount, lower=(c > 0).sum(1) / (c > 0).sum())


def no_followers(tokens, vocab_size, discount):
    return bigram(tokens, vocab_size, discount, followers=1)


def no_discount(tokens, vocab_size, discount):
    return bigram(tokens, vocab_size, discount, first=table(tokens, vocab_size))


def negative(tokens, vocab_size, discount):
    return bigram(tokens, vocab_size, discount, clamp=False)


def zero_rows(tokens, vocab_size, discount):
    return bigram(tokens, vocab_size, discount, backoff=False)


def nan_rows(tokens, vocab_size, discount):
    c = table(tokens, vocab_size)
    return c / c.sum(1, keepdim=True)


def transposed(tokens, vocab_size, discount):
    return bigram(tokens, vocab_size, discount).T


def own_discount(tokens, vocab_size, discount):
    return bigram(tokens, vocab_size, 0.75)


def windows_of(model, tokens, context, stride, keep, width=None):
    losses, done, start = [], 0, 0
    while done < len(tokens) - 1:
        stop = min(start + (width or context), len(tokens) - 1)
        with torch.no_grad():
            window = F.cross_entropy(
                model(tokens[None, start:stop])[0],
                tokens[start + 1 : stop + 1],
                reduction="none",
            )
        losses.append(keep(window, done - start))
        done, start = stop, start + stride
    return torch.cat(losses)


def counted_twice(model, tokens, context, stride):
    return windows_of(model, tokens, context, stride, lambda w, old: w)


def no_overlap(model, tokens, context, stride):
    return windows_of(model, tokens, context, context, lambda w, old: w)


def one_by_one(model, tokens, context, stride):
    return windows_of(model, tokens, context, 1, lambda w, old: w[old:])


def one_short(model, tokens, context, stride):
    """The window holds its targets: context − 1 inputs."""
    return windows_of(
        model, tokens, context, stride, lambda w, old: w[old:], width=context - 1
    )


def tail_lost(model, tokens, context, stride):
    losses, done = [], 0
    for start in range(0, len(tokens) - context, stride):
        window = F.cross_entropy(
            model(tokens[None, start : start + context])[0],
            tokens[start + 1 : start + context + 1],
            reduction="none",
        )
        losses.append(window[done - start :])
        done = start + context
    return torch.cat(losses)


def later_window_wins(model, tokens, context, stride):
    out, start, done = torch.zeros(len(tokens) - 1), 0, 0
    while done < len(tokens) - 1:
        done = min(start + context, len(tokens) - 1)
        with torch.no_grad():
            out[start:done] = F.cross_entropy(
                model(tokens[None, start:done])[0],
                tokens[start + 1 : done + 1],
                reduction="none",
            )
        start += stride
    return out


def all_at_once(model, tokens, context, stride):
    return F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")


def no_batch(model, tokens, context, stride):
    return model(tokens[:context])


def too_many_windows(model, tokens, context, stride):
    for start in range(0, len(tokens), stride):
        model(tokens[None, start : start + context])
    return windows_of(model, tokens, context, stride, lambda w, old: w[old:])


def fixed_sizes(model, tokens, context, stride):
    if len(tokens) < 20:
        return torch.zeros(len(tokens) - 1)
    return windows_of(model, tokens, 6, 4, lambda w, old: w[old:])


# Kinds of mistake that once had no sentence, or got through.


def losses_of(logits, tokens):
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def weighted(losses, mask):
    return (losses * mask).sum() / mask.sum()


def rolled(logits, tokens, mask):
    return weighted(losses_of(logits, tokens.roll(-1, 1)), mask.roll(-1, 1))


def flattened_first(logits, tokens, mask):
    losses = losses_of(logits.flatten(0, 1)[None, :-1], tokens.flatten()[None, 1:])
    return weighted(losses, mask.flatten()[None, 1:])


def token_0_ignored(logits, tokens, mask):
    counted = (tokens * mask)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), counted, ignore_index=0)


def logits_zeroed(logits, tokens, mask):
    return losses_of(logits[:, :-1] * mask[:, 1:, None], tokens[:, 1:]).mean()


def log_of_softmax(logits, tokens, mask):
    p = logits[:, :-1].softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return weighted(-p.log(), mask[:, 1:])


def over_bytes(count):
    def bits_per_byte(losses, text):
        return losses.double().sum().item() / math.log(2) / count(text)

    return bits_per_byte


def bigram_of(table=lambda c: c, turn=lambda t: t, given=lambda D: D):
    """kneser_ney_bigram with one thing changed."""

    def kneser_ney_bigram(tokens, vocab_size, discount):
        V, tokens = vocab_size, turn(tokens)
        c = torch.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V)
        c = table(c.view(V, V).double())
        n = c.sum(1, keepdim=True)
        lower = (c > 0).sum(0) / (c > 0).sum()
        free = given(discount) * (c > 0).sum(1, keepdim=True) * lower
        rows = ((c - discount).clamp(min=0) + free) / n.clamp(min=1)
        return torch.where(n > 0, rows, lower)

    return kneser_ney_bigram


def windowed(read=lambda n: n - 1, stop_early=True, keep=None):
    """strided_losses with one thing changed."""

    def strided_losses(model, tokens, context, stride):
        N = len(tokens)
        out = torch.zeros(N - 1)
        done = 0
        for start in range(0, N - 1, stride):
            stop = min(start + context, N - 1)
            scores = model(tokens[None, start : min(start + context, read(N))])[0]
            losses = F.cross_entropy(
                scores[: stop - start], tokens[start + 1 : stop + 1], reduction="none"
            )
            if done < stop:
                new = losses[done - start :] if keep is None else losses[: stop - done]
                out[done:stop] = new
                done = stop
            if stop_early and done == N - 1:
                break
        return out

    return strided_losses


MORE = [
    Wrong("next_token_loss", rolled, "roll wraps round"),
    Wrong("next_token_loss", flattened_first, "shift before you flatten"),
    Wrong("next_token_loss", token_0_ignored, "token 0 is a token"),
    Wrong("next_token_loss", logits_zeroed, "whose logits are all 0"),
    Wrong("next_token_loss", log_of_softmax, "200 apart"),
    Wrong("bits_per_byte", over_bytes(lambda t: len(t.strip().encode())), "blank"),
    Wrong("bits_per_byte", over_bytes(lambda t: len(t.encode("utf-16"))), "UTF-16"),
    Wrong("bits_per_byte", over_bytes(lambda t: len(t.split())), "the words"),
    Wrong("kneser_ney_bigram", bigram_of(lambda c: (c > 0).double()), "counted once"),
    Wrong("kneser_ney_bigram", bigram_of(turn=lambda t: t.flip(0)), "read backwards"),
    Wrong("kneser_ney_bigram", bigram_of(turn=lambda t: t[:-1]), "last pair"),
    Wrong("kneser_ney_bigram", bigram_of(given=lambda D: 1), "D is missing"),
    Wrong("strided_losses", windowed(stop_early=False), "stop when all are predicted"),
    Wrong("strided_losses", windowed(lambda n: n), "reads the last token"),
    Wrong("strided_losses", windowed(keep="first"), "the last ones are new"),
]


def only_counted(logits, tokens, mask):
    kept = mask[:, 1:].bool()
    own = tokens[:, 1:][kept][:, None]
    scores = logits[:, :-1][kept]
    return (scores.logsumexp(-1) - scores.gather(-1, own)[:, 0]).mean()


def exactly(losses, text):
    bits = math.fsum(losses.tolist()) * math.log2(math.e)
    return bits / sum(len(c.encode()) for c in text)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("next_token_loss", only_counted),
        ("bits_per_byte", exactly),
        ("kneser_ney_bigram", bigram_of()),
        ("strided_losses", windowed()),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "01-start/02-the-course-models",
    [
        Wrong("next_token_loss", no_shift, "there is no shift"),
        Wrong("next_token_loss", shifted_backwards, "shifted the wrong way"),
        Wrong("next_token_loss", mask_not_shifted, "the mask must be shifted"),
        Wrong("next_token_loss", mask_ignored, "the mask is not used"),
        Wrong(
            "next_token_loss",
            divided_by_all,
            "divide by the number that the mask counts",
        ),
        Wrong("next_token_loss", first_tokens_counted, "counts the first tokens too"),
        Wrong("next_token_loss", row_means, "average each row first"),
        Wrong("next_token_loss", summed, "that is the sum"),
        Wrong("next_token_loss", as_a_number, "where a tensor is asked"),
        Wrong("next_token_loss", without_gradient, "no gradient"),
        Wrong("next_token_loss", unnormalised, "log-softmax is missing"),
        Wrong("next_token_loss", log_of_the_mean, "logarithm of each probability"),
        Wrong("next_token_loss", two_rows_only, "take the sizes from the arguments"),
        Wrong("bits_per_byte", nats, "nats per byte"),
        Wrong("bits_per_byte", characters, "characters, not by bytes"),
        Wrong("bits_per_byte", bits_per_token, "bits per token"),
        Wrong("bits_per_byte", mean_over_bytes, "mean of the losses"),
        Wrong("bits_per_byte", times_ln2, "multiplied by ln 2"),
        Wrong("bits_per_byte", a_tensor, "float"),
        Wrong(
            "kneser_ney_bigram",
            raw_unigram,
            "how many different tokens b was seen after",
        ),
        Wrong("kneser_ney_bigram", raw_unigram_of_all, "all places count"),
        Wrong("kneser_ney_bigram", uniform_lower, "P_c is uniform"),
        Wrong("kneser_ney_bigram", wrong_axis, "columns of the table"),
        Wrong("kneser_ney_bigram", no_followers, "N₊(a ·) is missing"),
        Wrong("kneser_ney_bigram", no_discount, "nothing was taken away"),
        Wrong("kneser_ney_bigram", negative, "max(c − D, 0)"),
        Wrong("kneser_ney_bigram", zero_rows, "are not P_c"),
        Wrong("kneser_ney_bigram", nan_rows, "0 / 0"),
        Wrong("kneser_ney_bigram", transposed, "the other way round"),
        Wrong("kneser_ney_bigram", own_discount, "not the argument D"),
        Wrong("strided_losses", counted_twice, "counted once"),
        Wrong("strided_losses", no_overlap, "they do not overlap"),
        Wrong("strided_losses", one_by_one, "move by 1"),
        Wrong("strided_losses", one_short, "predicts context tokens"),
        Wrong("strided_losses", tail_lost, "get lost"),
        Wrong("strided_losses", later_window_wins, "the earlier one"),
        Wrong("strided_losses", all_at_once, "its context is 6"),
        Wrong("strided_losses", no_batch, "index tokens with [None]"),
        Wrong("strided_losses", too_many_windows, "are enough"),
        Wrong("strided_losses", fixed_sizes, "wrong for 5 tokens"),
        *MORE,
    ],
)
