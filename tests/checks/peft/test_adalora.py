"""Wrong answers to the exercises of 04-peft/06-adalora, each with the diagnosis that it
must get.
"""

import math

import pytest
import torch

from llmlab.checks.peft.adalora import check
from tests.checks.rejecting import Wrong, rejects, verdict


def forward(scale=lambda alpha, r0, r: alpha / r0, lam=lambda lam: lam, base=1, sign=1):
    """svd_forward with another scale or another Λ."""

    def svd_forward(x, W, P, lam_, Q, alpha, r0):
        return (
            base * x @ W.T
            + sign * scale(alpha, r0, len(Q)) * x @ (lam(lam_) * Q).T @ P.T
        )

    return svd_forward


def scaled_everything(x, W, P, lam, Q, alpha, r0):
    return alpha / r0 * (x @ W.T + x @ (lam * Q).T @ P.T)


def lambda_across_columns(x, W, P, lam, Q, alpha, r0):
    return x @ W.T + alpha / r0 * x @ (Q @ lam.T).T @ P.T


def hard_coded(x, W, P, lam, Q, alpha, r0):
    return x @ W.T + 2.5 * x @ (lam * Q).T @ P.T


FORWARD = [
    Wrong("svd_forward", forward(lambda alpha, r0, r: alpha / r), "today's r"),
    Wrong(
        "svd_forward", forward(lambda alpha, r0, r: 1), "scale alpha / r0 is missing"
    ),
    Wrong("svd_forward", forward(lambda alpha, r0, r: alpha), "not by alpha / r0"),
    Wrong("svd_forward", forward(lambda alpha, r0, r: r0 / alpha), "r0 / alpha"),
    Wrong("svd_forward", forward(lam=torch.ones_like), "Λ is missing"),
    Wrong("svd_forward", forward(lam=torch.square), "twice"),
    Wrong("svd_forward", forward(base=0), "W x is missing"),
    Wrong("svd_forward", forward(sign=0), "triplets are missing"),
    Wrong("svd_forward", forward(sign=-1), "not subtracted"),
    Wrong("svd_forward", scaled_everything, "the triplets alone"),
    Wrong("svd_forward", lambda_across_columns, "shape"),
    Wrong("svd_forward", hard_coded, "wrong for alpha = 6"),
]


def averages(
    sense=lambda w, g: (w * g).abs(),
    miss=lambda now, old, new: (now - new).abs(),
    b=lambda b1, b2: (b1, b2),
):
    """importance with another sensitivity, another uncertainty, or other β."""

    def importance(smooth, unsure, w, grad, beta1, beta2):
        first, second = b(beta1, beta2)
        now = sense(w, grad)
        new = first * smooth + (1 - first) * now
        return new, second * unsure + (1 - second) * miss(now, smooth, new)

    return importance


def swapped(smooth, unsure, w, grad, beta1, beta2):
    return averages()(smooth, unsure, w, grad, beta1, beta2)[::-1]


def forgot_unsure(smooth, unsure, w, grad, beta1, beta2):
    return averages()(smooth, unsure, w, grad, beta1, beta2)[0], unsure


def in_place(smooth, unsure, w, grad, beta1, beta2):
    now = (w * grad).abs()
    smooth.mul_(beta1).add_((1 - beta1) * now)
    unsure.mul_(beta2).add_((1 - beta2) * (now - smooth).abs())
    return smooth, unsure


def the_product(smooth, unsure, w, grad, beta1, beta2):
    new, other = averages()(smooth, unsure, w, grad, beta1, beta2)
    return new * other


IMPORTANCE = [
    Wrong(
        "importance", averages(miss=lambda now, old, new: (now - old).abs()), "old Ī"
    ),
    Wrong(
        "importance", averages(b=lambda b1, b2: (b2, b1)), "beta1 and beta2 are swapped"
    ),
    Wrong("importance", averages(b=lambda b1, b2: (1 - b1, 1 - b2)), "1 − β"),
    Wrong("importance", averages(b=lambda b1, b2: (b1, b1)), "uses beta1"),
    Wrong("importance", averages(sense=lambda w, g: w * g), "w · grad is missing"),
    Wrong(
        "importance", averages(miss=lambda now, old, new: now - new), "I − Ī is missing"
    ),
    Wrong(
        "importance", averages(miss=lambda now, old, new: (now - new) ** 2), "square"
    ),
    Wrong("importance", averages(sense=lambda w, g: g.abs()), "gradient alone"),
    Wrong("importance", averages(sense=lambda w, g: w.abs()), "size of w alone"),
    Wrong("importance", swapped, "wrong order"),
    Wrong("importance", forgot_unsure, "as it was"),
    Wrong("importance", in_place, "in place"),
    Wrong("importance", the_product, "tuple or list"),
]


def schedule(
    fall=lambda s: (1 - s) ** 3,
    last=lambda bT: bT,
    drop=lambda b0, bT: b0 - bT,
    rounding=int,
):
    """budget with another curve between the two ends."""

    def budget(t, b0, bT, T, ti, tf):
        if t <= ti:
            return b0
        if t > T - tf:
            return bT
        return rounding(last(bT) + drop(b0, bT) * fall((t - ti) / (T - ti - tf)))

    return budget


def from_0_to_T(t, b0, bT, T, ti, tf):
    return int(bT + (b0 - bT) * (1 - t / T) ** 3)


def as_printed(t, b0, bT, T, ti, tf):
    if t <= ti:
        return b0
    return (
        bT
        if t > T - tf
        else int(bT + (b0 - bT) * (1 - (t - ti - tf) / (T - ti - tf)) ** 3)
    )


def no_end(t, b0, bT, T, ti, tf):
    return b0 if t <= ti else int(bT + (b0 - bT) * (1 - (t - ti) / (T - ti)) ** 3)


def no_start(t, b0, bT, T, ti, tf):
    return bT if t > T - tf else int(bT + (b0 - bT) * (1 - t / (T - tf)) ** 3)


BUDGET = [
    Wrong("budget", schedule(lambda s: 1 - s), "power 3"),
    Wrong("budget", schedule(lambda s: (1 - s) ** 2), "squared"),
    Wrong("budget", schedule(lambda s: 1 - s**3), "falls fast first"),
    Wrong("budget", schedule(rounding=round), "round down"),
    Wrong("budget", schedule(rounding=float), "int"),
    Wrong("budget", schedule(last=lambda bT: 0), "not added"),
    Wrong("budget", schedule(drop=lambda b0, bT: b0), "whole b0"),
    Wrong("budget", from_0_to_T, "begins at ti"),
    Wrong("budget", as_printed, "starts above b0"),
    Wrong("budget", no_end, "tf is not used"),
    Wrong("budget", no_start, "ti is not used"),
    Wrong("budget", lambda t, b0, bT, T, ti, tf: b0, "never falls"),
]


def cut(keep):
    """allocate with another rule for what is kept, given (scores of the layer, all
    scores, λ, all λ, b).
    """

    def allocate(lam, scores, b):
        every, sizes = torch.cat(scores), torch.cat(lam).flatten().abs()
        return [
            v * keep(s, every, v.flatten().abs(), sizes, b)[:, None]
            for v, s in zip(lam, scores, strict=True)
        ]

    return allocate


def best(s, n):
    return s >= s.sort(descending=True).values[max(0, min(n, len(s)) - 1)]


def at(values, b):
    return values.sort(descending=True).values[min(b, len(values) - 1)]


def in_place_mask(lam, scores, b):
    threshold = at(torch.cat(scores), b)
    for values, s in zip(lam, scores, strict=True):
        values[s <= threshold] = 0
    return lam


def kthvalue(lam, scores, b):
    every = torch.cat(scores)
    threshold = every.kthvalue(len(every) - b).values
    return [v * (s > threshold)[:, None] for v, s in zip(lam, scores, strict=True)]


def one_tensor(lam, scores, b):
    return torch.cat(
        cut(lambda s, every, v, sizes, b: s > at(every, b))(lam, scores, b)
    )


def six(lam, scores, b):
    return cut(lambda s, every, v, sizes, b: s > at(every, 6))(lam, scores, b)


ALLOCATE = [
    Wrong(
        "allocate",
        cut(lambda s, every, v, sizes, b: s >= at(every, b)),
        "one triplet too many",
    ),
    Wrong(
        "allocate",
        cut(lambda s, every, v, sizes, b: s > at(every, b - 1)),
        "one triplet too few",
    ),
    Wrong(
        "allocate", cut(lambda s, every, v, sizes, b: s <= at(every, b)), "others kept"
    ),
    Wrong(
        "allocate",
        cut(lambda s, every, v, sizes, b: s <= every.sort().values[min(b, 22) - 1]),
        "b worst",
    ),
    Wrong("allocate", cut(lambda s, every, v, sizes, b: best(s, b)), "of each layer"),
    Wrong("allocate", cut(lambda s, every, v, sizes, b: best(s, b // 4)), "same share"),
    Wrong("allocate", cut(lambda s, every, v, sizes, b: v > at(sizes, b)), "size of λ"),
    Wrong("allocate", lambda lam, scores, b: lam, "nothing is masked"),
    Wrong(
        "allocate", cut(lambda s, every, v, sizes, b: s > at(every, b)), "with b = 22"
    ),
    Wrong("allocate", kthvalue, "kthvalue"),
    Wrong("allocate", in_place_mask, "in place"),
    Wrong("allocate", one_tensor, "list"),
    Wrong("allocate", six, "wrong for b = 9"),
]

# Kinds of mistake that once had no sentence, or got through.


def triplets(change):
    def svd_forward(x, W, P, lam, Q, alpha, r0):
        scale, lam = change(alpha, r0, lam)
        return x @ W.T + scale * x @ (lam * Q).T @ P.T

    return svd_forward


def averages_of(sensitivity, first=lambda s: s):
    """importance with another sensitivity, or with something done to Ī."""

    def importance(smooth, unsure, w, grad, b1, b2):
        now = sensitivity(w, grad)
        new = first(b1 * smooth + (1 - b1) * now)
        return new, b2 * unsure + (1 - b2) * (now - new).abs()

    return importance


def scheduled(first=0, last=0, end=lambda x: int(x), frac=lambda a, b: a / b):
    def budget(t, b0, bT, T, ti, tf):
        if t <= ti + first:
            return b0
        if t > T - tf + last:
            return bT
        return end(bT + (b0 - bT) * (1 - frac(t - ti, T - ti - tf)) ** 3)

    return budget


def kept(change):
    """allocate from all scores joined and each layer's λ."""

    def allocate(lam, scores, b):
        every = torch.cat(scores)
        limit = every.sort(descending=True).values[min(b, len(every)) - 1]
        return [change(v, s, limit, b) for v, s in zip(lam, scores, strict=True)]

    return allocate


MORE = [
    Wrong("svd_forward", triplets(lambda a, r, lam: (a / r**0.5, lam)), "√r0"),
    Wrong("svd_forward", triplets(lambda a, r, lam: (a / r, lam.abs())), "signs of λ"),
    Wrong("importance", averages_of(lambda w, g: w.abs() * g), "not of w alone"),
    Wrong(
        "importance", averages_of(lambda w, g: w * g, torch.abs), "before the average"
    ),
    Wrong("budget", scheduled(end=math.ceil), "not up"),
    Wrong("budget", scheduled(first=1), "a step too late: step ti + 1"),
    Wrong("budget", scheduled(last=-2), "a step too early"),
    Wrong("budget", scheduled(last=1000), "the cube turns negative"),
    Wrong("budget", scheduled(first=-1000, last=1000), "these two cases"),
    Wrong("budget", scheduled(frac=lambda a, b: a // b), "// cuts the fraction off"),
    Wrong(
        "allocate", kept(lambda v, s, at, b: (s >= at).float()[:, None]), "the masks"
    ),
    Wrong("allocate", kept(lambda v, s, at, b: v * (s >= at)), "mask[:, None]"),
    Wrong("allocate", kept(lambda v, s, at, b: v[s >= at]), "its place stays"),
    Wrong(
        "allocate",
        kept(lambda v, s, at, b: v * ((s >= at) | (s == s.max()))[:, None]),
        "a layer may lose all",
    ),
]


def of_q_first(x, W, P, lam, Q, alpha, r0):
    low = torch.einsum("...k,rk->...r", x, Q) * lam[:, 0] * (alpha / r0)
    return torch.einsum("...k,dk->...d", x, W) + low @ P.T


def by_lerp(smooth, unsure, w, grad, b1, b2):
    now = w.abs() * grad.abs()
    new = torch.lerp(now, smooth, b1)
    return new, torch.lerp((now - new).abs(), unsure, b2)


def in_integers(t, b0, bT, T, ti, tf):
    n = T - ti - tf
    left = n - min(t - ti, n)
    if t <= ti:
        return b0
    return bT + (b0 - bT) * left**3 // max(n, 1) ** 3


def by_python(lam, scores, b):
    places = [(s, i, j) for i, row in enumerate(scores) for j, s in enumerate(row)]
    out = [torch.zeros_like(values) for values in lam]
    for _, i, j in sorted(places, reverse=True)[:b]:
        out[i][j] = lam[i][j]
    return out


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("svd_forward", of_q_first),
        ("importance", by_lerp),
        ("budget", in_integers),
        ("allocate", by_python),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/06-adalora", FORWARD + IMPORTANCE + BUDGET + ALLOCATE + MORE
)
