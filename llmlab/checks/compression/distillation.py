"""Checks of 06-compression/12-distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression.distillation import divergences, gkd, hinton, kl, minillm
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/12-distillation")


def logits(*shape: int) -> Tensor:
    """Logits of a spread at which no two formulas come out alike."""
    return 2 * torch.randn(*shape)


def not_finite(got: object) -> bool:
    """Whether a tensor holds NaN or ∞."""
    return isinstance(got, Tensor) and not bool(torch.isfinite(got).all())


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    grads={"student_logits": 1},
    hints=(
        "Divide both logits by the temperature first. Everything else is KL(p‖q).",
        (
            "KL(p‖q) = Σ p (log p − log q), from two `log_softmax(-1)`. Sum over the"
            " vocabulary, then the mean over the rows."
        ),
        "`temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()`",
    ),
)
def soft_loss(answer):
    """Hinton's soft labels: T² times the forward KL at temperature T."""
    v, z, T = telling(lambda: (logits(5, 7), logits(5, 7), 3.0), soft, wrong_soft)
    what = f"soft_loss(teacher_logits, student_logits, {T})"
    got = expect(answer(v, z, T), shape=(), dtype=torch.float32, what=what)
    diagnose(got, right=soft(v, z, T), mistakes=wrong_soft(v, z, T), what=what)
    for rows, vocabulary, T in ((1, 4, 1.0), (8, 3, 0.5), (2, 11, 10.0)):
        v, z = logits(rows, vocabulary), logits(rows, vocabulary)
        got = expect(answer(v, z, T), shape=(), what="the loss")
        if not close(got, soft(v, z, T), tol=1e-4):
            raise Mistake(
                f"right for (5, 7) logits and T = 3, wrong for ({rows}, {vocabulary})"
                f" and T = {T}: take the sizes and the temperature from the arguments"
            )


def soft(v: Tensor, z: Tensor, T: float) -> Tensor:
    """The right value, by the package."""
    return hinton.soft_loss(v[None], z[None], torch.ones(1, len(v)), T)


def wrong_soft(v: Tensor, z: Tensor, T: float) -> dict[str, Tensor]:
    """What usual mistakes make of the loss."""
    log_p, log_q = (v / T).log_softmax(-1), (z / T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    forward = (p * (log_p - log_q)).sum(-1).mean()
    cold_p, cold_q = v.log_softmax(-1), z.log_softmax(-1)
    right = T**2 * forward
    by_rows = [(x / T).log_softmax(0) for x in (v, z)]
    hot_p, hot_q = (v * T).log_softmax(-1), (z * T).log_softmax(-1)
    return {
        "the factor T² is missing": forward,
        "the factor is T: it is T²": T * forward,
        "you divided by T²: multiply by it": forward / T**2,
        "this is KL(q‖p): the soft labels ask for KL(p‖q), where the teacher's"
        " probabilities are the weights": T**2 * kl(log_q, log_p).mean(),
        "the temperature is missing in both softmaxes": T**2
        * kl(cold_p, cold_q).mean(),
        "only the student is softened: divide the teacher's logits by T, too": (
            T**2 * kl(cold_p, log_q).mean()
        ),
        "only the teacher is softened: divide the student's logits by T, too": (
            T**2 * kl(log_p, cold_q).mean()
        ),
        "the logits are multiplied by T: divide them by it": (
            T**2 * kl(hot_p, hot_q).mean()
        ),
        "the probabilities are divided by T: divide the logits, before the softmax": (
            T * kl(cold_p, cold_q).mean()
        ),
        "this is the mean of both directions: KL(p‖q) alone is asked": (
            T**2 * (kl(log_p, log_q) + kl(log_q, log_p)).mean() / 2
        ),
        "the weights p are not softened: they are at temperature T, too": (
            T**2 * (cold_p.exp() * (log_p - log_q)).sum(-1).mean()
        ),
        "this is the sum over the rows: their mean is asked": right * len(v),
        "this is the mean over the vocabulary, too: sum over it, as `batchmean` does": (
            right / v.shape[-1]
        ),
        "this is the cross-entropy −Σ p log q: subtract the entropy of p, which makes"
        " it a KL": -(T**2) * (p * log_q).sum(-1).mean(),
        "this is −Σ p log p, the teacher's entropy: where is the student?": (
            -(T**2) * (p * log_p).sum(-1).mean()
        ),
        "the sign is wrong: a KL is never negative": -right,
        "the softmax is over the rows: it belongs over the vocabulary": (
            T**2 * (by_rows[0].exp() * (by_rows[0] - by_rows[1])).sum(-1).mean()
        ),
        "`kl_div` was given probabilities of the student: its first argument is a"
        " log-probability": T**2 * F.kl_div(q, p, reduction="batchmean"),
        "this is the squared difference of the logits: that is the limit of high T": (
            (v - z).square().mean()
        ),
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=10,
    difficulty=3,
    importance=5,
    grads={"student_logits": 1},
    hints=(
        (
            "Both ends first: at β = 0 return KL(p‖q), at β = 1 KL(q‖p). A small"
            " function of two log-probabilities serves all four KLs."
        ),
        (
            "Between them: m = β p + (1 − β) q, a mixture of probabilities, not of"
            " logits; take its log."
        ),
        "`beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)`",
    ),
)
def jsd(answer):
    """The generalised Jensen–Shannon divergence, with the two KLs at its ends."""
    for end in (0, 1):
        v, z, _ = telling(
            lambda e=end: (logits(4, 6), logits(4, 6), e), right_jsd, ends
        )
        what = f"jsd(teacher_logits, student_logits, {end})"
        got = answer(v, z, end)
        if not_finite(got):
            raise Mistake(
                f"β = {end} gives a NaN or an ∞: the divergence is a KL there by"
                " agreement; treat the ends apart"
            )
        got = expect(got, shape=(4,), dtype=torch.float32, what=what)
        right = divergences.jsd(v, z, end)
        diagnose(got, right=right, mistakes=ends(v, z, end), what=what)
    v, z, beta = telling(
        lambda: (logits(4, 6), logits(4, 6), 0.3), right_jsd, wrong_jsd
    )
    what = f"jsd(teacher_logits, student_logits, {beta})"
    got = expect(answer(v, z, beta), shape=(4,), dtype=torch.float32, what=what)
    mistakes = wrong_jsd(v, z, beta)
    diagnose(got, right=right_jsd(v, z, beta), mistakes=mistakes, what=what)
    gradient_of_jsd(answer, v, z, beta)
    for rows, vocabulary, beta in ((1, 9, 0.5), (7, 3, 0.9), (2, 5, 0.05)):
        v, z = logits(rows, vocabulary), logits(rows, vocabulary)
        got = expect(answer(v, z, beta), shape=(rows,), what="jsd")
        if not close(got, divergences.jsd(v, z, beta), tol=1e-4):
            raise Mistake(
                f"right for (4, 6) logits and β = 0.3, wrong for ({rows},"
                f" {vocabulary}) and β = {beta}: take β and the sizes from the"
                " arguments"
            )


def gradient_of_jsd(answer: Callable, v: Tensor, z: Tensor, beta: float) -> None:
    """Between the ends, too, a gradient reaches the student.

    Whether it runs through the mixture makes no difference: Σ m is 1 whatever q is, and
    so what comes that way adds up to 0.
    """

    def towards_student(of: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = z.clone().requires_grad_()
        value = of(leaf).sum()
        if not value.requires_grad:
            return torch.zeros_like(z)
        (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return torch.zeros_like(z) if found is None else found

    diagnose(
        towards_student(lambda leaf: answer(v, leaf, beta)),
        right=towards_student(lambda leaf: divergences.jsd(v, leaf, beta)),
        mistakes={
            "no gradient reaches the student's logits: it runs through the weights q"
            " of KL(q‖m), so do not detach them": torch.zeros_like(z),
        },
        what=f"the gradient of student_logits at β = {beta}",
    )


def right_jsd(v: Tensor, z: Tensor, beta: float) -> Tensor:
    """The right value, by the package."""
    return divergences.jsd(v, z, beta)


def ends(v: Tensor, z: Tensor, beta: float) -> dict[str, Tensor]:
    """What usual mistakes give at β = 0 and 1."""
    log_p, log_q = v.log_softmax(-1), z.log_softmax(-1)
    forward, reverse = kl(log_p, log_q), kl(log_q, log_p)
    right, other = (reverse, forward) if beta else (forward, reverse)
    name, weights = ("KL(q‖p)", "student's") if beta else ("KL(p‖q)", "teacher's")
    return {
        f"the ends are swapped: β = {beta} is {name}, where the {weights} probabilities"
        " are the weights": other,
        f"β = {beta} gives 0: the formula does, but the ends are the KLs by agreement;"
        " treat them apart": torch.zeros_like(right),
        "the sign is wrong: a KL is never negative": -right,
        "the logits stand in for log-probabilities: take log_softmax": (
            kl(z, v) if beta else kl(v, z)
        ),
        "this is the mean over the vocabulary: sum over it": right / v.shape[-1],
        "this is the mean over the positions, repeated: each has its own": (
            right.mean().expand(len(right)).clone()
        ),
    }


def wrong_jsd(v: Tensor, z: Tensor, beta: float) -> dict[str, Tensor]:
    """What usual mistakes give between the ends."""
    log_p, log_q = v.log_softmax(-1), z.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    log_swapped = ((1 - beta) * p + beta * q).log()
    log_half = ((p + q) / 2).log()
    geometric = beta * log_p + (1 - beta) * log_q
    of_logits = (beta * v + (1 - beta) * z).log_softmax(-1)
    right = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    def with_m(m: Tensor) -> Tensor:
        return beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)

    return {
        "the mixture has its weights swapped: β belongs to the teacher": with_m(
            log_swapped
        ),
        "β and 1 − β before the two KLs are swapped": (
            (1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)
        ),
        "teacher and student are swapped throughout": (
            beta * kl(log_q, log_swapped) + (1 - beta) * kl(log_p, log_swapped)
        ),
        "the mixture is half and half: it is β p + (1 − β) q": with_m(log_half),
        "the KLs are half and half: they have the weights β and 1 − β": (
            (kl(log_p, log_m) + kl(log_q, log_m)) / 2
        ),
        "the weights before the two KLs are missing": (
            kl(log_p, log_m) + kl(log_q, log_m)
        ),
        "the KLs have m on the left: the weights are p and q, m stands on the right": (
            beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)
        ),
        "you mixed the log-probabilities: mix probabilities, then take the log": with_m(
            geometric
        ),
        "you mixed the logits: mix probabilities": with_m(of_logits),
        "only the teacher's KL to the mixture is there": beta * kl(log_p, log_m),
        "only the student's KL to the mixture is there": (1 - beta) * kl(log_q, log_m),
        "this mixes the two KLs themselves: the divergence goes by way of m": (
            (1 - beta) * kl(log_p, log_q) + beta * kl(log_q, log_p)
        ),
        "this is the mean over the vocabulary: sum over it": right / v.shape[-1],
        "this is divided by β(1 − β): here the divergence is asked as it is": (
            right / beta / (1 - beta)
        ),
        "the sign is wrong: a divergence is never negative": -right,
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    grads={"student_logits": 1},
    hints=(
        (
            "The logits at t predict the token at t + 1. Which logits belong to the"
            " first token of a reply?"
        ),
        (
            "Logits without the last, `[:, :-1]`, beside `reply[:, 1:]`. The teacher is"
            " `.detach()`ed."
        ),
        (
            "KL(q‖p) of each position, `each`, has shape (B, T − 1). Then"
            " `each[reply[:, 1:]].mean()`."
        ),
    ),
)
def on_policy_loss(answer):
    """The reverse KL on the student's own replies: prompt masked, teacher fixed."""
    v, z, reply = telling(draw_replies, right_replies, wrong_replies)
    what = "on_policy_loss(teacher_logits, student_logits, reply)"
    got = expect(answer(v, z, reply), shape=(), dtype=torch.float32, what=what)
    right = right_replies(v, z, reply)
    diagnose(got, right=right, mistakes=wrong_replies(v, z, reply), what=what)
    for B, T, vocabulary in ((1, 4, 3), (5, 6, 4)):
        v, z = logits(B, T, vocabulary), logits(B, T, vocabulary)
        reply = torch.zeros(B, T, dtype=torch.bool)
        for row in range(B):
            reply[row, 1 + row % 3 : T - row % 2] = True
        got = expect(answer(v, z, reply), shape=(), what="the loss")
        if not close(got, right_replies(v, z, reply), tol=1e-4):
            raise Mistake(
                f"right for logits (3, 8, 5), wrong for ({B}, {T}, {vocabulary}): take"
                " the sizes and the mask from the arguments"
            )
    v.requires_grad_()
    z.requires_grad_()
    loss = answer(v, z, reply)
    if v.requires_grad and loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, v, allow_unused=True)
        if grad is not None and grad.abs().sum() > 0:
            raise Mistake(
                "the teacher gets a gradient: it would be trained towards the student;"
                " detach its logits"
            )


def draw_replies() -> tuple[Tensor, Tensor, Tensor]:
    """Three replies of unequal length; prompts of unequal length, padding behind."""
    reply = torch.zeros(3, 8, dtype=torch.bool)
    for row, (start, stop) in enumerate(((2, 8), (3, 5), (1, 4))):
        reply[row, start:stop] = True
    return logits(3, 8, 5), logits(3, 8, 5), reply


def right_replies(v: Tensor, z: Tensor, reply: Tensor) -> Tensor:
    """The right value, by the package."""
    return gkd.loss(v[:, :-1], z[:, :-1], reply[:, 1:], beta=1)


def wrong_replies(v: Tensor, z: Tensor, reply: Tensor) -> dict[str, Tensor]:
    """What usual mistakes make of the loss."""
    log_p, log_q = v.log_softmax(-1), z.log_softmax(-1)
    each = kl(log_q, log_p)  # (B, T)
    forward = kl(log_p, log_q)
    mask = reply[:, 1:]
    kept = each[:, :-1] * mask
    right = kept.sum() / mask.sum()
    by_reply = (kept.sum(-1) / mask.sum(-1)).mean()
    return {
        "the mask is not shifted against the logits: those at t predict the token at"
        " t + 1, so drop the logits' last and the mask's first": each[reply].mean(),
        "the mask is shifted the wrong way": each[:, 1:][reply[:, :-1]].mean(),
        "logits and mask lost their last column both: the mask loses its first": (
            each[:, :-1][reply[:, :-1]].mean()
        ),
        "the first token of each reply is left out: the prompt's last logits predict"
        " it": each[:, :-1][mask & reply[:, :-1]].mean(),
        "the last token of each reply is left out": each[:, :-1][
            mask & F.pad(reply[:, 2:], (0, 1))
        ].mean(),
        "this is the cross-entropy −Σ q log p: subtract the entropy of q": (
            -(log_q.exp() * log_p).sum(-1)[:, :-1][mask].mean()
        ),
        "this is KL(p‖q): on its own texts the student is asked for KL(q‖p)": (
            forward[:, :-1][mask].mean()
        ),
        "prompt and padding are learnt, too: use the mask": each[:, :-1].mean(),
        "the sum is divided by all positions: divide by the reply's tokens alone": (
            kept.mean()
        ),
        "the sum is divided by all B · T tokens: divide by the reply's tokens alone": (
            kept.sum() / reply.numel()
        ),
        "each reply counts the same here: the mean is over all reply tokens": by_reply,
        "this is the sum over the tokens: their mean is asked": kept.sum(),
        "the sum is divided by the replies: divide by their tokens": (
            kept.sum() / len(reply)
        ),
        "this is the mean over the vocabulary, too: sum over it": right / v.shape[-1],
        "the mask is the wrong way round: 1 is a token of the reply": (
            each[:, :-1][~mask].mean()
        ),
        "the sign is wrong: a KL is never negative": -right,
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=15,
    difficulty=4,
    importance=3,
    hints=(
        (
            "Three things in turn: the rewards r, 0 outside the mask; the sum of those"
            " after t; how many these are."
        ),
        (
            "`r.flip(-1).cumsum(-1).flip(-1)` sums from t on; subtract r. The same of"
            " the mask counts. At the last token the count is 0: `.clamp(min=1)`."
        ),
        (
            "The weight is `(log_q - log_mixed).exp()` of token t alone. Weights and"
            " rewards are constants: `.detach()`."
        ),
    ),
)
def weighted_reward_to_go(answer):
    """MiniLLM: the importance weight times the mean reward of what follows."""
    case = telling(draw_rewards, right_rewards, wrong_rewards)
    what = "weighted_reward_to_go(log_p, log_q, log_mixed, mask)"
    got = answer(*case)
    if not_finite(got):
        raise Mistake(
            "there is a NaN or an ∞: nothing follows the last token, and 0 / 0 is not 0"
        )
    got = expect(got, shape=(3, 8), dtype=torch.float32, what=what)
    diagnose(got, right=right_rewards(*case), mistakes=wrong_rewards(*case), what=what)
    log_p, log_q, log_mixed, mask = draw_rewards()
    short = (log_p[:2, :5], log_q[:2, :5], log_mixed[:2, :5], mask[:2, :5])
    got = expect(answer(*short), shape=(2, 5), what="w R")
    if not close(got, right_rewards(*short), tol=1e-4):
        raise Mistake(
            "right for 3 replies of 8 places, wrong for 2 of 5: take the sizes from"
            " the arguments"
        )
    if answer(log_p, log_q.requires_grad_(), log_mixed, mask).requires_grad:
        raise Mistake(
            "a gradient flows through weight and reward: both are constants in a"
            " policy gradient; detach them"
        )


def draw_rewards() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p, log q and log p̃ of tokens; the share of the teacher is 0.3."""
    log_p, log_q = -2 * torch.rand(3, 8) - 0.2, -2 * torch.rand(3, 8) - 0.2
    log_mixed = divergences.mixture(log_p, log_q, 0.3)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for row, (start, stop) in enumerate(((1, 8), (2, 6), (3, 7))):
        mask[row, start:stop] = True
    return log_p, log_q, log_mixed, mask


def right_rewards(
    log_p: Tensor, log_q: Tensor, log_mixed: Tensor, mask: Tensor
) -> Tensor:
    """The right value, by the package."""
    w = minillm.importance_weights(log_q, log_mixed, mask)
    return w * minillm.reward_to_go(log_p - log_q, mask) * mask


def wrong_rewards(
    log_p: Tensor, log_q: Tensor, log_mixed: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """What usual mistakes make of w R."""
    ones = mask.float()
    r = (log_p - log_q) * ones
    w = (log_q - log_mixed).exp() * ones
    from_t = r.flip(-1).cumsum(-1).flip(-1)
    after = from_t - r
    count_from_t = ones.flip(-1).cumsum(-1).flip(-1) * ones
    left = (count_from_t - ones).clamp(min=1)
    R = after / left
    unmasked = log_p - log_q
    all_after = unmasked.flip(-1).cumsum(-1).flip(-1) - unmasked
    to_the_end = torch.arange(7, -1, -1).float().clamp(min=1)
    next_one = F.pad(r[:, 1:], (0, 1))
    last = (count_from_t == 1) * ones
    before = (ones.cumsum(-1) - ones).clamp(min=1)
    return {
        "the token's own reward is in the sum: that is the single-step part; start at"
        " t + 1": w * from_t / count_from_t.clamp(min=1),
        "the token's own reward is in the sum, and the count is that of what follows": (
            w * from_t / left
        ),
        "this is the sum of the rewards: divide it by how many there are": w * after,
        "you divided by one too many: t itself is not in the sum": (
            w * after / count_from_t.clamp(min=1)
        ),
        "you divided by the length of the whole reply: by what follows t": (
            w * after / ones.sum(-1, keepdim=True)
        ),
        "you divided by all places up to the end: padding does not count": (
            w * after / to_the_end
        ),
        "rewards of padding are in the sum: the mask belongs on r": (
            w * all_after / left
        ),
        "the sum runs over what comes before t: it runs over what follows": (
            w * (r.cumsum(-1) - r) / left
        ),
        "this is the mean of what comes before t: what follows is asked": (
            w * (r.cumsum(-1) - r) / before
        ),
        "rewards of padding are in the mean, and it is divided by all places up to the"
        " end: the mask belongs on both": w * all_after / to_the_end,
        "this is the reward of the next token alone: the mean of all that follow is"
        " asked": w * next_one,
        "the last token has its own reward: nothing follows, so R is 0": (
            w * (R + last * r)
        ),
        "the reward has the wrong sign: log p − log q is large where the teacher likes"
        " the token": -w * R,
        "the reward is log p alone: subtract log q": (
            w * ((log_p * ones).flip(-1).cumsum(-1).flip(-1) - log_p * ones) / left
        ),
        "the reward is −log q alone: add log p": (
            w * (-(log_q * ones).flip(-1).cumsum(-1).flip(-1) + log_q * ones) / left
        ),
        "the token right after t is left out of the mean": (
            w * (after - next_one) / (left - 1).clamp(min=1)
        ),
        "outside the mask there are numbers: put 0 there": (
            (log_q - log_mixed).exp() * after / left
        ),
        "this is w R of each *following* token, summed: the weight is that of t": (
            ((w * r).flip(-1).cumsum(-1).flip(-1) - w * r) / left * ones
        ),
    } | wrong_weights(log_p, log_q, log_mixed, mask, R)


def wrong_weights(
    log_p: Tensor, log_q: Tensor, log_mixed: Tensor, mask: Tensor, R: Tensor
) -> dict[str, Tensor]:
    """The same for the importance weight alone, before a right R."""
    ones = mask.float()
    w = (log_q - log_mixed).exp() * ones
    products = ((log_q - log_mixed) * ones).cumsum(-1).exp() * ones
    return {
        "the weight is cut at 1: it is q over the mixture as it is": w.clamp(max=1) * R,
        "the weight is that of token t + 1: token t is meant": (
            F.pad((log_q - log_mixed).exp()[:, 1:], (0, 1)) * R * ones
        ),
        "the importance weight is missing": R * ones,
        "the weight is upside down: q over the mixture": (
            (log_mixed - log_q).exp() * ones * R
        ),
        "the weight has p in it: q over the mixture": (
            (log_p - log_mixed).exp() * ones * R
        ),
        "the weight is q / p: the tokens were drawn from the mixture": (
            (log_q - log_p).exp() * ones * R
        ),
        "the weight is the product up to t: here its last factor is asked": (
            products * R
        ),
        "the weight is a logarithm: take exp": (log_q - log_mixed) * ones * R,
    }
