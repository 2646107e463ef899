"""Wrong answers to the exercises of 06-compression/12-distillation, each with the
diagnosis that it must get.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.compression.distillation import check
from tests.checks.rejecting import Wrong, rejects, verdict


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


# 1 ------------------------------------------------------------------------------------


def soft(
    factor=lambda T: T**2,
    teacher=lambda v, T: (v / T).log_softmax(-1),
    student=lambda z, T: (z / T).log_softmax(-1),
    of=kl,
    reduce=torch.mean,
):
    """soft_loss with one thing changed."""

    def answer(teacher_logits, student_logits, temperature):
        log_p = teacher(teacher_logits, temperature)
        log_q = student(student_logits, temperature)
        return factor(temperature) * reduce(of(log_p, log_q))

    return answer


def soft_by_kl_div(teacher_logits, student_logits, temperature):
    p = (teacher_logits / temperature).softmax(-1)
    log_q = F.log_softmax(student_logits / temperature, -1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def soft_by_cross_entropy(teacher_logits, student_logits, temperature):
    """Cross-entropy with soft targets, less what it is when the student is perfect."""
    p = (teacher_logits / temperature).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    return (F.cross_entropy(student_logits / temperature, p) - entropy) * temperature**2


def cold_weights(teacher_logits, student_logits, temperature):
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    each = (teacher_logits.softmax(-1) * (log_p - log_q)).sum(-1)
    return temperature**2 * each.mean()


def cold_probabilities(teacher_logits, student_logits, temperature):
    p = teacher_logits.softmax(-1) / temperature
    q = student_logits.softmax(-1) / temperature
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def mean_reduction(teacher_logits, student_logits, temperature):
    p = (teacher_logits / temperature).softmax(-1)
    log_q = F.log_softmax(student_logits / temperature, -1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").mean()


def swapped_kl_div(teacher_logits, student_logits, temperature):
    log_p = F.log_softmax(teacher_logits / temperature, -1)
    q = (student_logits / temperature).softmax(-1)
    return temperature**2 * F.kl_div(log_p, q, reduction="batchmean")


def no_log(teacher_logits, student_logits, temperature):
    p = (teacher_logits / temperature).softmax(-1)
    q = (student_logits / temperature).softmax(-1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean")


def always_three(teacher_logits, student_logits, temperature):
    return soft()(teacher_logits, student_logits, 3.0)


def no_gradient(teacher_logits, student_logits, temperature):
    return soft()(teacher_logits, student_logits.detach(), temperature)


def soft_in_place(teacher_logits, student_logits, temperature):
    teacher_logits /= temperature
    student_logits = student_logits / temperature
    return (
        temperature**2
        * kl(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)).mean()
    )


# 2 ------------------------------------------------------------------------------------


def generalised(
    zero=lambda p, q: kl(p, q),
    one=lambda p, q: kl(q, p),
    mix=lambda p, q, b: (b * p.exp() + (1 - b) * q.exp()).log(),
    join=lambda p, q, m, b: b * kl(p, m) + (1 - b) * kl(q, m),
):
    """jsd with one thing changed."""

    def answer(teacher_logits, student_logits, beta):
        p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
        if beta == 0:
            return zero(p, q)
        if beta == 1:
            return one(p, q)
        return join(p, q, mix(p, q, beta), beta)

    return answer


def jsd_by_entropies(teacher_logits, student_logits, beta):
    """H(m) − β H(p) − (1 − β) H(q)."""
    p, q = teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)

    def entropy(x):
        return -(x * x.log()).sum(-1)

    if beta in (0, 1):
        a, b = (p, q) if beta == 0 else (q, p)
        return (-(a * b.log()).sum(-1) - entropy(a)).float()
    m = torch.lerp(q, p, beta)
    return (entropy(m) - beta * entropy(p) - (1 - beta) * entropy(q)).float()


def jsd_by_kl_div(teacher_logits, student_logits, beta):
    log_p = F.log_softmax(teacher_logits, -1)
    log_q = F.log_softmax(student_logits, -1)
    of = {"reduction": "none", "log_target": True}
    if beta == 0:
        return F.kl_div(log_q, log_p, **of).sum(-1)
    if beta == 1:
        return F.kl_div(log_p, log_q, **of).sum(-1)
    b = torch.tensor(float(beta))
    log_m = torch.stack([log_q + (1 - b).log(), log_p + b.log()]).logsumexp(0)
    parts = b * F.kl_div(log_m, log_p, **of) + (1 - b) * F.kl_div(log_m, log_q, **of)
    return parts.sum(-1)


def of_logits(teacher_logits, student_logits, beta):
    v, z = teacher_logits, student_logits
    return kl(v, z) if beta == 0 else kl(z, v)


def fixed_mixture(p, q, b):
    """What runs back through the mixture adds up to 0."""
    return (b * p.exp() + (1 - b) * q.exp()).log().detach()


def weights_detached(p, q, m, b):
    return b * kl(p, m) + (1 - b) * (q.exp().detach() * (q - m)).sum(-1)


def student_detached(p, q, m, b):
    return b * kl(p, m) + (1 - b) * kl(q.detach(), m)


def without_ends(teacher_logits, student_logits, beta):
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def divided(teacher_logits, student_logits, beta):
    return without_ends(teacher_logits, student_logits, beta) / beta / (1 - beta)


def half_only(teacher_logits, student_logits, beta):
    return generalised()(
        teacher_logits, student_logits, beta if beta in (0, 1) else 0.3
    )


# 3 ------------------------------------------------------------------------------------


def replies(
    logits=slice(None, -1),
    mask=slice(1, None),
    of=lambda p, q: kl(q, p),
    reduce=lambda each, mask: each[mask].mean(),
    detach=True,
):
    """on_policy_loss with one thing changed."""

    def answer(teacher_logits, student_logits, reply):
        v = teacher_logits.detach() if detach else teacher_logits
        p, q = v.log_softmax(-1), student_logits.log_softmax(-1)
        return reduce(of(p, q)[:, logits], reply[:, mask])

    return answer


def reply_by_reply(teacher_logits, student_logits, reply):
    total, tokens = 0.0, 0
    for v, z, r in zip(teacher_logits, student_logits, reply, strict=True):
        for t in range(1, len(r)):
            if r[t]:
                q = z[t - 1].softmax(-1)
                p = v[t - 1].detach().softmax(-1)
                total = total + (q * (q / p).log()).sum()
                tokens += 1
    return total / tokens


def by_padding_the_mask(teacher_logits, student_logits, reply):
    """The mask moves, the logits stay whole."""
    mask = F.pad(reply[:, 1:], (0, 1)).float()
    with torch.no_grad():
        log_p = teacher_logits.log_softmax(-1)
    log_q = student_logits.log_softmax(-1)
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return (each * mask).sum() / mask.sum()


# 4 ------------------------------------------------------------------------------------


def rewards(
    r_of=lambda p, q: p - q,
    start=1,
    count=lambda after, length: after,
    weight=lambda p, q, m: q - m,
    detach=True,
    outside=0.0,
):
    """weighted_reward_to_go, token by token, with one thing changed."""

    def answer(log_p, log_q, log_mixed, mask):
        r = r_of(log_p, log_q)
        w = weight(log_p, log_q, log_mixed).exp()
        out = torch.full_like(log_p, outside)
        for b in range(len(mask)):
            where = mask[b].nonzero()[:, 0].tolist()
            for i, t in enumerate(where):
                those = where[i + start :]
                n = count(len(those), len(where))
                total = sum((r[b, j] for j in those), torch.zeros(()))
                out[b, t] = w[b, t] * total / max(n, 1)
        return out.detach() if detach else out

    return answer


def by_matrix(log_p, log_q, log_mixed, mask):
    """A strictly upper triangular matrix of ones sums what follows."""
    upper = torch.ones(mask.shape[1], mask.shape[1]).triu(1)
    with torch.no_grad():
        m = mask.float()
        total = ((log_p - log_q) * m) @ upper.T
        count = (m @ upper.T).clamp(min=1)
        return torch.where(mask, (log_q - log_mixed).exp() * total / count, 0.0)


def product_weight(log_p, log_q, log_mixed, mask):
    w = ((log_q - log_mixed) * mask).cumsum(-1).exp()
    plain = rewards(weight=lambda p, q, m: 0 * q)
    return plain(log_p, log_q, log_mixed, mask) * w


def padding_counts(log_p, log_q, log_mixed, mask):
    r = log_p - log_q
    after = r.flip(-1).cumsum(-1).flip(-1) - r
    counts = mask.float()
    left = (counts.flip(-1).cumsum(-1).flip(-1) - counts).clamp(min=1)
    return (log_q - log_mixed).exp() * after / left * mask


def no_clamp(log_p, log_q, log_mixed, mask):
    counts = mask.float()
    r = (log_p - log_q) * counts
    after = r.flip(-1).cumsum(-1).flip(-1) - r
    left = counts.flip(-1).cumsum(-1).flip(-1) - counts
    return (log_q - log_mixed).exp() * after / left * counts


def outside_left(log_p, log_q, log_mixed, mask):
    counts = mask.float()
    r = (log_p - log_q) * counts
    after = r.flip(-1).cumsum(-1).flip(-1) - r
    left = (counts.flip(-1).cumsum(-1).flip(-1) - counts * 1).clamp(min=1)
    kept = torch.where(mask, left, (0 * left + 1))
    prompt = (counts.flip(-1).cumsum(-1).flip(-1) * counts - counts).clamp(min=1)
    return (log_q - log_mixed).exp() * after / torch.where(mask, kept, prompt)


def padding_counts_twice(log_p, log_q, log_mixed, mask):
    r = log_p - log_q
    after = r.flip(-1).cumsum(-1).flip(-1) - r
    left = torch.arange(r.shape[1]).flip(0).clamp(min=1)
    return (log_q - log_mixed).exp() * after / left * mask


def next_alone(log_p, log_q, log_mixed, mask):
    r = (log_p - log_q) * mask
    return (log_q - log_mixed).exp() * F.pad(r[:, 1:], (0, 1)) * mask


def own_at_the_end(log_p, log_q, log_mixed, mask):
    r, w = (log_p - log_q) * mask, (log_q - log_mixed).exp()
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return by_matrix(log_p, log_q, log_mixed, mask) + last * w * r


def mean_before(log_p, log_q, log_mixed, mask):
    counts = mask.float()
    r = (log_p - log_q) * counts
    before = (counts.cumsum(-1) - counts).clamp(min=1)
    return (log_q - log_mixed).exp() * (r.cumsum(-1) - r) / before * counts


def from_the_left(log_p, log_q, log_mixed, mask):
    counts = mask.float()
    r = (log_p - log_q) * counts
    left = (counts.flip(-1).cumsum(-1).flip(-1) - counts).clamp(min=1)
    return (log_q - log_mixed).exp() * (r.cumsum(-1) - r) / left * counts


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("soft_loss", soft_by_kl_div),
        ("soft_loss", soft_by_cross_entropy),
        ("jsd", jsd_by_entropies),
        ("jsd", jsd_by_kl_div),
        ("jsd", generalised(mix=fixed_mixture)),
        ("on_policy_loss", reply_by_reply),
        ("on_policy_loss", by_padding_the_mask),
        ("weighted_reward_to_go", by_matrix),
        ("weighted_reward_to_go", rewards()),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


S, J, P, W = "soft_loss", "jsd", "on_policy_loss", "weighted_reward_to_go"
test_wrong_answers = rejects(
    "06-compression/12-distillation",
    [
        Wrong(S, soft(lambda T: 1), "T² is missing"),
        Wrong(S, soft(lambda T: T), "it is T²"),
        Wrong(S, soft(lambda T: T**-2), "multiply by it"),
        Wrong(S, soft(of=lambda p, q: kl(q, p)), "this is KL(q‖p)"),
        Wrong(S, swapped_kl_div, "this is KL(q‖p)"),
        Wrong(S, soft(teacher=lambda v, T: v.log_softmax(-1)), "only the student"),
        Wrong(S, soft(student=lambda z, T: z.log_softmax(-1)), "only the teacher"),
        Wrong(S, soft(reduce=torch.sum), "sum over the rows"),
        Wrong(S, soft(of=lambda p, q: (kl(p, q) + kl(q, p)) / 2), "both directions"),
        Wrong(S, cold_weights, "the weights p are not softened"),
        Wrong(S, cold_probabilities, "the probabilities are divided by T"),
        Wrong(S, mean_reduction, "mean over the vocabulary"),
        Wrong(S, no_log, "a log-probability"),
        Wrong(S, soft(of=lambda p, q: -(p.exp() * q).sum(-1)), "cross-entropy"),
        Wrong(S, soft(of=lambda p, q: -kl(p, q)), "the sign is wrong"),
        Wrong(S, always_three, "from the arguments"),
        Wrong(S, no_gradient, "gradient"),
        Wrong(S, soft_in_place, "in place"),
        Wrong(J, without_ends, "the formula does"),
        Wrong(J, divided, "by agreement"),
        Wrong(
            J,
            generalised(zero=lambda p, q: kl(q, p), one=lambda p, q: kl(p, q)),
            "the ends are swapped",
        ),
        Wrong(J, generalised(one=lambda p, q: kl(p, q)), "the ends are swapped"),
        Wrong(
            J,
            generalised(mix=lambda p, q, b: ((1 - b) * p.exp() + b * q.exp()).log()),
            "β belongs to the teacher",
        ),
        Wrong(
            J,
            generalised(join=lambda p, q, m, b: (1 - b) * kl(p, m) + b * kl(q, m)),
            "before the two KLs are swapped",
        ),
        Wrong(
            J,
            generalised(join=lambda p, q, m, b: b * kl(m, p) + (1 - b) * kl(m, q)),
            "m on the left",
        ),
        Wrong(
            J,
            generalised(mix=lambda p, q, b: b * p + (1 - b) * q),
            "mixed the log-probabilities",
        ),
        Wrong(
            J,
            generalised(join=lambda p, q, m, b: kl(p, m) + kl(q, m)),
            "the weights before the two KLs are missing",
        ),
        Wrong(
            J,
            generalised(mix=lambda p, q, b: ((p.exp() + q.exp()) / 2).log()),
            "half and half",
        ),
        Wrong(J, generalised(join=weights_detached), "the weights q of KL(q‖m)"),
        Wrong(
            J,
            generalised(mix=fixed_mixture, join=student_detached),
            "the weights q of KL(q‖m)",
        ),
        Wrong(J, of_logits, "stand in for log-probabilities"),
        Wrong(J, half_only, "from the arguments"),
        Wrong(P, replies(slice(None), slice(None)), "the mask is not shifted"),
        Wrong(P, replies(slice(1, None), slice(None, -1)), "the wrong way"),
        Wrong(P, replies(mask=slice(None, -1)), "the mask loses its first"),
        Wrong(P, replies(logits=slice(1, None)), "the logits' last"),
        Wrong(
            P,
            lambda v, z, reply: replies()(v, z, reply & F.pad(reply, (1, -1))),
            "the first token of each reply",
        ),
        Wrong(
            P,
            replies(
                reduce=lambda e, m: e[m & F.pad(m[:, 1:], (0, 1))].mean(),
            ),
            "the last token of each reply",
        ),
        Wrong(P, replies(of=lambda p, q: -(q.exp() * p).sum(-1)), "cross-entropy"),
        Wrong(P, replies(of=kl), "this is KL(p‖q)"),
        Wrong(P, replies(reduce=lambda e, m: e.mean()), "prompt and padding"),
        Wrong(P, replies(reduce=lambda e, m: (e * m).mean()), "all positions"),
        Wrong(P, replies(reduce=lambda e, m: (e * m).sum()), "their mean is asked"),
        Wrong(
            P,
            replies(reduce=lambda e, m: ((e * m).sum(-1) / m.sum(-1)).mean()),
            "each reply counts the same",
        ),
        Wrong(P, replies(reduce=lambda e, m: e[~m].mean()), "the wrong way round"),
        Wrong(P, replies(detach=False), "the teacher gets a gradient"),
        Wrong(W, rewards(start=0), "start at t + 1"),
        Wrong(W, rewards(count=lambda n, length: 1), "how many there are"),
        Wrong(W, rewards(count=lambda n, length: n + 1), "one too many"),
        Wrong(W, rewards(count=lambda n, length: length), "the whole reply"),
        Wrong(W, padding_counts, "rewards of padding"),
        Wrong(W, padding_counts_twice, "the mask belongs on both"),
        Wrong(W, rewards(r_of=lambda p, q: -q), "add log p"),
        Wrong(W, rewards(start=2), "right after t is left out"),
        Wrong(
            W,
            rewards(weight=lambda p, q, m: (q - m).roll(-1, 1)),
            "that of token t + 1",
        ),
        Wrong(W, next_alone, "the next token alone"),
        Wrong(W, own_at_the_end, "nothing follows, so R is 0"),
        Wrong(W, mean_before, "the mean of what comes before t"),
        Wrong(W, rewards(weight=lambda p, q, m: (q - m).clamp(max=0)), "is cut at 1"),
        Wrong(W, from_the_left, "what comes before t"),
        Wrong(W, rewards(r_of=lambda p, q: q - p), "the wrong sign"),
        Wrong(W, rewards(r_of=lambda p, q: p), "subtract log q"),
        Wrong(W, rewards(weight=lambda p, q, m: 0 * q), "weight is missing"),
        Wrong(W, rewards(weight=lambda p, q, m: m - q), "upside down"),
        Wrong(W, rewards(weight=lambda p, q, m: p - m), "has p in it"),
        Wrong(W, product_weight, "the product up to t"),
        Wrong(W, no_clamp, "0 / 0"),
        Wrong(W, outside_left, "put 0 there"),
        Wrong(W, rewards(detach=False), "a gradient flows"),
    ],
)
