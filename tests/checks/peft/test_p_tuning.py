"""Wrong answers to the exercises of 04-peft/03-p-tuning, each with the diagnosis that
it must get.
"""

import torch
import torch.nn.functional as F

from tests.checks.rejecting import Wrong, rejects


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

test_wrong_answers = rejects("04-peft/03-p-tuning", ENCODE + LOSS + LAST)
