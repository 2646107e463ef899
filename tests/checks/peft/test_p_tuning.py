"""Wrong answers to the exercises of 04-peft/03-p-tuning, each with the diagnosis that
it must get.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.peft.p_tuning import check
from tests.checks.rejecting import Wrong, rejects, verdict


def recurrence(h, W, U, squash=torch.tanh):
    states = [torch.zeros(len(U))]
    for row in h:
        states.append(squash(W @ row + U @ states[-1]))
    return torch.stack(states[1:])


def encoder(combine):
    """encode_prompt with another way to make (forward, backward) states of (h, Wf, Uf,
    Wb, Ub).
    """

    def encode_prompt(h, Wf, Uf, Wb, Ub, W):
        return torch.cat(combine(h, Wf, Uf, Wb, Ub), -1) @ W.T

    return encode_prompt


def ahead(h, W, U, squash=torch.tanh):
    return recurrence(h.flip(0), W, U, squash).flip(0)


def same(x):
    return x


def no_join(h, Wf, Uf, Wb, Ub, W):
    return torch.cat([recurrence(h, Wf, Uf), ahead(h, Wb, Ub)], -1)


def transposed(h, Wf, Uf, Wb, Ub, W):
    return (torch.cat([recurrence(h, Wf, Uf), ahead(h, Wb, Ub)], -1) @ W.T).T


def last_states(h, Wf, Uf, Wb, Ub):
    s, t = recurrence(h, Wf, Uf), ahead(h, Wb, Ub)
    return s[-1].expand_as(s), t[0].expand_as(t)


ENCODE = [
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (
                recurrence(h, Wf, Uf),
                recurrence(h.flip(0), Wb, Ub),
            )
        ),
        "not turned round",
    ),
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (recurrence(h, Wf, Uf), recurrence(h, Wb, Ub))
        ),
        "from left to right",
    ),
    Wrong(
        "encode_prompt",
        encoder(lambda h, Wf, Uf, Wb, Ub: (recurrence(h, Wf, Uf), ahead(h, Wf, Uf))),
        "forward weights",
    ),
    Wrong(
        "encode_prompt",
        encoder(lambda h, Wf, Uf, Wb, Ub: (ahead(h, Wb, Ub), recurrence(h, Wf, Uf))),
        "wrong way round",
    ),
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (recurrence(h, Wf, 0 * Uf), ahead(h, Wb, 0 * Ub))
        ),
        "do not remember",
    ),
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (
                recurrence(h, Wf, Uf, same),
                ahead(h, Wb, Ub, same),
            )
        ),
        "tanh is missing",
    ),
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (
                recurrence(h, Wf, Uf, F.relu),
                ahead(h, Wb, Ub, F.relu),
            )
        ),
        "that is ReLU",
    ),
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (recurrence(h, Wf, Uf.T), ahead(h, Wb, Ub.T))
        ),
        "transposed",
    ),
    Wrong("encode_prompt", encoder(last_states), "two last states"),
    Wrong(
        "encode_prompt",
        encoder(
            lambda h, Wf, Uf, Wb, Ub: (recurrence(h, Wf, Uf), 0 * ahead(h, Wb, Ub))
        ),
        "backward half is missing",
    ),
    Wrong("encode_prompt", no_join, "shape"),
    Wrong("encode_prompt", transposed, "dimensions 0 and 1 are swapped"),
]


def shifted(scores, labels):
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def shifted_back(scores, labels):
    return F.cross_entropy(scores[:, 1:].flatten(0, 1), labels[:, :-1].flatten())


def each(scores, labels):
    return F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")


def over_all_tokens(scores, labels):
    return each(scores, labels).mean()


def summed(scores, labels):
    return each(scores, labels).sum()


def by_row(scores, labels):
    return torch.stack(
        [F.cross_entropy(s, y) for s, y in zip(scores, labels, strict=True)]
    ).mean()


def as_label_zero(scores, labels):
    return F.cross_entropy(scores.flatten(0, 1), labels.clamp(min=0).flatten())


def wrong_sign(scores, labels):
    kept = labels != -100
    return scores.log_softmax(-1)[kept].gather(-1, labels[kept][:, None]).mean()


def over_the_tokens(scores, labels):
    kept = labels != -100
    return F.nll_loss(scores.log_softmax(1)[kept], labels[kept])


def without_softmax(scores, labels):
    kept = labels != -100
    return F.nll_loss(scores[kept], labels[kept])


def twice(scores, labels):
    kept = labels != -100
    return F.cross_entropy(scores.softmax(-1)[kept], labels[kept])


def unstable(scores, labels):
    kept = labels != -100
    e = scores[kept].exp()
    return -(e / e.sum(-1, keepdim=True)).gather(-1, labels[kept][:, None]).log().mean()


def logarithm_of_softmax(scores, labels):
    kept = labels != -100
    return -scores.softmax(-1)[kept].gather(-1, labels[kept][:, None]).log().mean()


def minus_100_as_index(scores, labels):
    return -scores.log_softmax(-1).gather(-1, labels[..., None]).mean()


LOSS = [
    Wrong("labelling_loss", shifted, "shifted the labels as a language model"),
    Wrong("labelling_loss", shifted_back, "other way"),
    Wrong("labelling_loss", over_all_tokens, "divided by all tokens"),
    Wrong("labelling_loss", summed, "took the sum"),
    Wrong("labelling_loss", by_row, "averaged each row"),
    Wrong("labelling_loss", as_label_zero, "counted as label 0"),
    Wrong("labelling_loss", wrong_sign, "sign is wrong"),
    Wrong("labelling_loss", over_the_tokens, "over the tokens"),
    Wrong("labelling_loss", without_softmax, "softmax is missing"),
    Wrong("labelling_loss", twice, "applied twice"),
    Wrong("labelling_loss", unstable, "wrong for large scores"),
    Wrong("labelling_loss", logarithm_of_softmax, "is it `log_softmax`"),
    Wrong("labelling_loss", minus_100_as_index, "index"),
]


def at(place):
    """last_token with another place for each row, given the mask."""

    def last_token(scores, mask):
        return scores[torch.arange(len(scores)), place(mask)]

    return last_token


def last(mask):
    return (torch.arange(mask.shape[1]) * mask).argmax(-1)


def mean_of_tokens(scores, mask):
    return (scores * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def mean_of_all(scores, mask):
    return scores.mean(1)


def largest(scores, mask):
    return scores.amax(1)


def kept_dimension(scores, mask):
    return scores[torch.arange(len(scores)), last(mask)][:, None]


def labels_instead(scores, mask):
    return at(last)(scores, mask).argmax(-1)


LAST = [
    Wrong("last_token", lambda scores, mask: scores[:, -1], "last place of each row"),
    Wrong("last_token", at(lambda m: m.sum(-1) - 1), "counted the tokens"),
    Wrong(
        "last_token",
        at(lambda m: (last(m) + 1).clamp(max=m.shape[1] - 1)),
        "one too far",
    ),
    Wrong(
        "last_token", at(lambda m: m.sum(-1).clamp(max=m.shape[1] - 1)), "one too far"
    ),
    Wrong("last_token", at(lambda m: m.argmax(-1)), "first real token"),
    Wrong("last_token", lambda scores, mask: scores[:, 0], "first place"),
    Wrong("last_token", at(lambda m: last(m) - 1), "before the last"),
    Wrong("last_token", mean_of_tokens, "mean over the tokens"),
    Wrong("last_token", mean_of_all, "mean over padding"),
    Wrong("last_token", largest, "largest score"),
    Wrong("last_token", kept_dimension, "dimension of size 1 too many"),
    Wrong("last_token", labels_instead, "shape"),
]

# Kinds of mistake that once had no sentence.


def encoded_by(
    step=lambda Wh, Us: torch.tanh(Wh + Us), first=torch.zeros, turn=lambda s, t: (s, t)
):
    """encode_prompt with one thing changed."""

    def run(h, W, U):
        state = first(len(U))
        states = []
        for row in h:
            state = step(W @ row, U @ state)
            states.append(state)
        return torch.stack(states)

    def encode_prompt(h, Wf, Uf, Wb, Ub, W):
        s, t = run(h, Wf, Uf), run(h.flip(0), Wb, Ub).flip(0)
        return torch.cat(turn(s, t), 1) @ W.T

    return encode_prompt


def before(s, t):
    zero = torch.zeros_like(s[:1])
    return torch.cat([zero, s[:-1]]), torch.cat([t[1:], zero])


def without_the_first(s, t):
    return s, torch.cat([torch.zeros_like(t[:1]), t[1:]])


def of_labels(change):
    """labelling_loss from the scores and the labels that count."""

    def labelling_loss(scores, labels):
        kept = labels != -100
        return change(scores[kept], labels[kept])

    return labelling_loss


def place(find):
    def last_token(scores, mask):
        return scores[torch.arange(len(scores)), find(mask)]

    return last_token


def every_place(scores, mask):
    return scores[:, (mask * torch.arange(mask.shape[1])).argmax(1)]


MORE = [
    Wrong(
        "encode_prompt",
        encoded_by(lambda Wh, Us: torch.sigmoid(Wh + Us)),
        "that is a sigmoid",
    ),
    Wrong(
        "encode_prompt",
        encoded_by(lambda Wh, Us: torch.tanh(Wh) + Us),
        "comes in after tanh",
    ),
    Wrong("encode_prompt", encoded_by(first=torch.ones), "do not begin at zero"),
    Wrong("encode_prompt", encoded_by(turn=before), "the states before it"),
    Wrong("encode_prompt", encoded_by(turn=without_the_first), "ends too early"),
    Wrong(
        "labelling_loss",
        of_labels(lambda s, y: torch.nn.functional.cross_entropy(s[y > 0], y[y > 0])),
        "label 0 is a label",
    ),
    Wrong(
        "labelling_loss",
        of_labels(lambda s, y: -s.softmax(-1).gather(1, y[:, None]).mean()),
        "the logarithm is missing",
    ),
    Wrong("last_token", every_place, "the places of all rows"),
    Wrong("last_token", place(lambda m: m.argmin(1) - 1), "before the first padding"),
    Wrong("last_token", place(lambda m: m.flip(1).argmax(1)), "counted from the end"),
]


def by_logsumexp(scores, labels):
    kept = labels != -100
    own = scores[kept].gather(1, labels[kept][:, None])[:, 0]
    return (scores[kept].logsumexp(-1) - own).mean()


def last_rise(scores, mask):
    places = mask.cumsum(1).argmax(1)
    return torch.take_along_dim(scores, places[:, None, None], 1).squeeze(1)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("encode_prompt", encoded_by()),
        ("labelling_loss", by_logsumexp),
        ("last_token", last_rise),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects("04-peft/03-p-tuning", ENCODE + LOSS + LAST + MORE)
