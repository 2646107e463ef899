"""Wrong answers to the exercises of 06-compression/07-llm-qat, each with the diagnosis
that it must get.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.compression.llm_qat import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def rounding(
    top=lambda bits: 2 ** (bits - 1) - 1,
    dims=(-1,),
    size=torch.abs,
    clip=1.0,
    to_whole=torch.round,
    low=None,
):
    """fake_quantize with one thing changed."""

    def answer(x, bits):
        t = top(bits)
        alpha = size(x.detach()).amax(dims, keepdim=True) * clip / t
        alpha = torch.where(alpha == 0, 1.0, alpha)
        codes = to_whole(x / alpha).clamp(low(t) if low else -t, t)
        return x + (codes * alpha - x).detach()

    return answer


right_rounding = rounding()


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits):
        alpha = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return torch.where(alpha > 0, (x / alpha).round() * alpha, 0.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def by_a_function(x, bits):
    return Through.apply(x, bits)


def row_by_row(x, bits):
    top = 2 ** (bits - 1) - 1
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        largest = row.detach().abs().max()
        if largest == 0:
            rows.append(row)
            continue
        codes = row / (largest / top)
        whole = codes + (codes.round() - codes).detach()
        rows.append(whole * (largest / top))
    return torch.stack(rows).reshape(x.shape)


def no_gradient(x, bits):
    return right_rounding(x, bits).detach() + 0 * x


def detached(x, bits):
    return right_rounding(x, bits).detach()


def alpha_alone(x, bits):
    alpha = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    alpha = torch.where(alpha == 0, 1.0, alpha)
    return torch.round(x / alpha) * alpha


def alpha_too(x, bits):
    alpha = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    alpha = torch.where(alpha == 0, 1.0, alpha)
    y = x / alpha
    return (y + (y.round() - y).detach()) * alpha


def of_the_mean(x, bits):
    alpha = x.detach().abs().mean(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return x + ((x / alpha).round() * alpha - x).detach()


def largest_unclipped(x, bits):
    alpha = x.detach().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return x + ((x / alpha).round() * alpha - x).detach()


def alpha_after(x, bits):
    alpha = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    alpha = torch.where(alpha == 0, 1.0, alpha)
    y = x / alpha.detach()
    return (y + (y.round() - y).detach()) * alpha


def last_codes_cut(x, bits):
    top = 2 ** (bits - 1) - 1
    alpha = x.detach().abs().amax(-1, keepdim=True) / top
    inside = (x.detach() / alpha).round().abs() < top
    x_hat = right_rounding(x, bits).detach()
    return x_hat + inside * (x - x.detach())


def clipped_gradient(x, bits):
    inside = (x.abs() < x.abs().amax(-1, keepdim=True)).float().detach()
    x_hat = right_rounding(x, bits).detach()
    return x_hat + inside * (x - x.detach())


def twice(x, bits):
    return right_rounding(x, bits) + x - x.detach()


def the_codes(x, bits):
    alpha = x.detach().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return x + ((x / alpha).round() - x).detach()


def nothing(x, bits):
    return x * 1.0


def zeros_are_nan(x, bits):
    alpha = x.detach().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return x + ((x / alpha).round() * alpha - x).detach()


def three_bits(x, bits):
    return right_rounding(x, 3)


# 2 ------------------------------------------------------------------------------------


def writing(
    is_greedy=lambda made, greedy: made < greedy,
    reads=lambda ids: ids,
    place=-1,
    weights=lambda logits: logits.softmax(-1),
    use=lambda generator: generator,
    tokens=lambda length: length - 1,
    keep=torch.no_grad,
    likeliest=torch.argmax,
):
    """write_text with one thing changed."""

    def answer(model, first, greedy, length, generator):
        ids = first[:, None]
        with keep():
            for made in range(tokens(length)):
                said = model(reads(ids))[:, place]
                if is_greedy(made, greedy):
                    new = likeliest(said, -1, keepdim=True)
                else:
                    new = torch.multinomial(weights(said), 1, generator=use(generator))
                ids = torch.cat([ids, new], dim=1)
        return ids

    return answer


def without_the_first(model, first, greedy, length, generator):
    return writing(tokens=lambda n: n)(model, first, greedy, length, generator)[:, 1:]


def draws_in_every_step(model, first, greedy, length, generator):
    ids = first[:, None]
    for made in range(length - 1):
        with torch.no_grad():
            p = model(ids)[:, -1].softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        new = p.argmax(-1, keepdim=True) if made < greedy else drawn
        ids = torch.cat([ids, new], 1)
    return ids


def into_a_buffer(model, first, greedy, length, generator):
    text = torch.zeros(len(first), length, dtype=torch.long)
    text[:, 0] = first
    for t in range(1, length):
        with torch.inference_mode():
            p = F.softmax(model(text[:, :t])[:, t - 1], dim=-1)
        if t <= greedy:
            text[:, t] = p.max(-1).indices
        else:
            text[:, t] = p.multinomial(1, generator=generator).squeeze(1)
    return text


def two_loops(model, first, greedy, length, generator):
    ids = first.unsqueeze(1)
    greedy = min(greedy, length - 1)
    with torch.no_grad():
        for _ in range(greedy):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        for _ in range(length - 1 - greedy):
            p = torch.exp(model(ids)[:, -1].log_softmax(-1))
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return ids


def four_and_eleven(model, first, greedy, length, generator):
    return writing()(model, first, 4, length, generator)


# 3 ------------------------------------------------------------------------------------


def by_the_library(student, teacher):
    p = teacher.detach().softmax(-1).flatten(0, 1)
    return F.cross_entropy(student.flatten(0, 1), p)


def by_logsumexp(student, teacher):
    p = (teacher - teacher.logsumexp(-1, keepdim=True)).exp().detach()
    return (student.logsumexp(-1) - (p * student).sum(-1)).mean()


def losing(
    reduce=lambda each: each.mean(),
    of_teacher=lambda t: t.detach().softmax(-1),
    of_student=lambda s: s.log_softmax(-1),
    cut=lambda p, q: (p, q),
):
    """soft_label_loss with one thing changed."""

    def answer(student, teacher):
        p, log_q = cut(of_teacher(teacher), of_student(student))
        return reduce(-(p * log_q).sum(-1))

    return answer


def divergence_of_texts(student, teacher):
    p = teacher.detach().softmax(-1)
    return F.kl_div(student.log_softmax(-1), p, reduction="batchmean")


def divergence(student, teacher):
    return F.kl_div(
        student.log_softmax(-1).flatten(0, 1),
        teacher.detach().softmax(-1).flatten(0, 1),
        reduction="batchmean",
    )


def cut_off(student, teacher):
    log_q = (student.softmax(-1) + 1e-9).log()
    return -(teacher.detach().softmax(-1) * log_q).sum(-1).mean()


def reverse_divergence(student, teacher):
    log_q, log_p = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def hard(student, teacher):
    label = teacher.argmax(-1).flatten()
    return F.cross_entropy(student.flatten(0, 1), label)


def swapped(student, teacher):
    return losing()(teacher, student) + 0 * student.sum()


def to_the_teacher(student, teacher):
    return losing(of_teacher=lambda t: t.softmax(-1))(student, teacher)


def over_the_vocabulary(student, teacher):
    return -(teacher.detach().softmax(-1) * student.log_softmax(-1)).mean()


def no_student_gradient(student, teacher):
    return losing()(student.detach(), teacher)


# 4 ------------------------------------------------------------------------------------


def storing(
    top=lambda bits: 2 ** (bits - 1) - 1,
    shared=(1, 3),
    size=torch.abs,
    to_whole=torch.round,
    by=lambda exact, kept: kept.float(),
    give=lambda codes, alpha: codes.float() * alpha.float()[:, None, :, None],
    order=1,
    safe=True,
    dtype=torch.float16,
    zero=1.0,
):
    """append with one thing changed."""

    def answer(codes, alpha, k, bits):
        B, T = k.shape[0], k.shape[2]
        t = top(bits)
        exact = size(k).amax(shared, keepdim=True) / t
        if safe:
            exact = torch.where(exact == 0, zero, exact)
        kept = exact.to(dtype)
        new = to_whole(k / by(exact, kept)).clamp(-128, 127).to(torch.int8)
        kept = kept.expand(B, 1, T, 1)[:, 0, :, 0]
        codes = torch.cat([codes, new][::order], dim=2)
        alpha = torch.cat([alpha.to(dtype), kept][::order], dim=1)
        return codes, alpha, give(codes, alpha)

    return answer


right_storing = storing()


def token_by_token(codes, alpha, k, bits):
    top = 2 ** (bits - 1) - 1
    for t in range(k.shape[2]):
        one = k[:, :, t]
        a = one.flatten(1).abs().max(1).values / top
        a = torch.where(a == 0, torch.ones_like(a), a).half()
        c = torch.round(one / a.float()[:, None, None])
        codes = torch.cat([codes, c.to(torch.int8)[:, :, None]], 2)
        alpha = torch.cat([alpha, a[:, None]], 1)
    return codes, alpha, torch.einsum("bksd,bs->bksd", codes.float(), alpha.float())


def with_arrays(codes, alpha, k, bits):
    B, K, T, D = k.shape
    flat = k.transpose(1, 2).reshape(B, T, K * D)
    a = flat.abs().max(-1, keepdim=True).values / (2 ** (bits - 1) - 1)
    a[a == 0] = 1
    a = a.to(torch.float16)
    c = (flat / a.float()).round().reshape(B, T, K, D).transpose(1, 2)
    codes = torch.cat((codes, c.type(torch.int8)), -2)
    alpha = torch.cat((alpha, a.squeeze(-1)), -1)
    return codes, alpha, codes * alpha.float().unsqueeze(1).unsqueeze(-1)


def per_head(codes, alpha, k, bits):
    top = 2 ** (bits - 1) - 1
    step = k.abs().amax(3, keepdim=True) / top
    step = torch.where(step == 0, 1.0, step).half()
    new = (k / step.float()).round().to(torch.int8)
    old = codes.float() * alpha.float()[:, None, :, None]
    k_hat = torch.cat([old, new.float() * step.float()], 2)
    alpha = torch.cat([alpha, step[:, 0, :, 0]], 1)
    return torch.cat([codes, new], 2), alpha, k_hat


def per_channel(codes, alpha, k, bits):
    top = 2 ** (bits - 1) - 1
    step = (k.abs().amax((1, 2), keepdim=True) / top).half()
    new = (k / step.float()).round().to(torch.int8)
    old = codes.float() * alpha.float()[:, None, :, None]
    k_hat = torch.cat([old, new.float() * step.float()], 2)
    filler = torch.ones(k.shape[0], k.shape[2]).half()
    return torch.cat([codes, new], 2), torch.cat([alpha, filler], 1), k_hat


def unrounded_alpha(codes, alpha, k, bits):
    codes, kept, k_hat = right_storing(codes, alpha, k, bits)
    top = 2 ** (bits - 1) - 1
    S = alpha.shape[1]
    exact = k.abs().amax((1, 3)) / top
    exact = torch.where(exact == 0, 1.0, exact)
    k_hat[:, :, S:] = codes[:, :, S:].float() * exact[:, None, :, None]
    return codes, kept, k_hat


def rounded_last(codes, alpha, k, bits):
    codes, alpha, k_hat = storing(dtype=torch.float32)(codes, alpha.float(), k, bits)
    return codes, alpha.half(), k_hat


def as_they_were(codes, alpha, k, bits):
    S = alpha.shape[1]
    codes, alpha, k_hat = right_storing(codes, alpha, k, bits)
    k_hat[:, :, S:] = k
    return codes, alpha, k_hat


def only_new(codes, alpha, k, bits):
    return right_storing(codes[:, :, :0], alpha[:, :0], k, bits)


def only_new_keys(codes, alpha, k, bits):
    S = alpha.shape[1]
    codes, alpha, k_hat = right_storing(codes, alpha, k, bits)
    return codes, alpha, k_hat[:, :, S:]


def all_rounded_again(codes, alpha, k, bits):
    old = codes.float() * alpha.float()[:, None, :, None]
    empty = codes[:, :, :0], alpha[:, :0]
    return right_storing(*empty, torch.cat([old, k], 2), bits)


def heads_and_tokens_swapped(codes, alpha, k, bits):
    codes, alpha, k_hat = right_storing(codes, alpha, k, bits)
    return codes.transpose(1, 2), alpha, k_hat


def mean_of_heads(k):
    return k.abs().amax(3, keepdim=True).mean(1, keepdim=True)


def newest_alpha(codes, alpha, k, bits):
    S = alpha.shape[1]
    codes, alpha, k_hat = right_storing(codes, alpha, k, bits)
    k_hat[:, :, :S] = codes[:, :, :S].float() * alpha[:, -1, None, None, None].float()
    return codes, alpha, k_hat


def other_codes(codes, alpha, k, bits):
    codes, alpha, k_hat = right_storing(codes, alpha, k, bits)
    return codes * 0, alpha, k_hat


def eight_bits(codes, alpha, k, bits):
    return right_storing(codes, alpha, k, 8)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("fake_quantize", by_a_function),
        ("fake_quantize", row_by_row),
        ("write_text", into_a_buffer),
        ("write_text", two_loops),
        ("soft_label_loss", by_the_library),
        ("soft_label_loss", by_logsumexp),
        ("append", token_by_token),
        ("append", with_arrays),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


Q, T, L, A = "fake_quantize", "write_text", "soft_label_loss", "append"
test_wrong_answers = rejects(
    "06-compression/07-llm-qat",
    [
        Wrong(Q, rounding(dims=(-2,)), "one per channel"),
        Wrong(Q, rounding(dims=(1, 2)), "the same for all tokens"),
        Wrong(Q, rounding(dims=(0, 1, 2)), "whole tensor"),
        Wrong(Q, rounding(top=lambda b: 2 ** (b - 1)), "as many below zero"),
        Wrong(Q, rounding(top=lambda b: 2**b - 1), "for the sign"),
        Wrong(Q, rounding(top=lambda b: (2**b - 1) / 2), "whole numbers are asked"),
        Wrong(Q, rounding(size=torch.clone), "not from the largest |value|"),
        Wrong(Q, rounding(clip=0.5), "MinMax clips nothing"),
        Wrong(Q, rounding(to_whole=torch.trunc), "cut off"),
        Wrong(Q, rounding(to_whole=torch.floor, low=lambda t: -t - 1), "rounded down"),
        Wrong(Q, the_codes, "multiply them by α"),
        Wrong(Q, nothing, "nothing is rounded"),
        Wrong(Q, no_gradient, "no gradient passes"),
        Wrong(Q, detached, "no gradient passes"),
        Wrong(Q, alpha_alone, "through α alone"),
        Wrong(Q, alpha_too, "through α, too"),
        Wrong(Q, alpha_after, "the codes are multiplied by, too"),
        Wrong(Q, last_codes_cut, "nothing is clipped"),
        Wrong(Q, of_the_mean, "the mean |value|"),
        Wrong(Q, largest_unclipped, "where the largest |value| is asked"),
        Wrong(Q, clipped_gradient, "nothing is clipped"),
        Wrong(Q, twice, "twice"),
        Wrong(Q, zeros_are_nan, "a token of zeros"),
        Wrong(Q, three_bits, "right for 3 bits"),
        Wrong(T, writing(is_greedy=lambda m, n: m < n - 1), "one greedy token too few"),
        Wrong(T, writing(is_greedy=lambda m, n: m <= n), "one greedy token too many"),
        Wrong(T, writing(is_greedy=lambda m, n: True), "all tokens are greedy"),
        Wrong(T, writing(is_greedy=lambda m, n: False), "no token is greedy"),
        Wrong(T, writing(is_greedy=lambda m, n: m >= n), "the other way round"),
        Wrong(T, writing(reads=lambda ids: ids[:, -1:]), "the newest token alone"),
        Wrong(T, writing(place=0), "the first position"),
        Wrong(T, writing(weights=torch.ones_like), "the same chance"),
        Wrong(
            T, writing(weights=lambda s: (-s).softmax(-1)), "likely tokens come least"
        ),
        Wrong(T, writing(weights=lambda s: s.softmax(-1).softmax(-1)), "taken twice"),
        Wrong(T, writing(weights=lambda s: s.softmax(0)), "over the texts"),
        Wrong(T, writing(use=lambda g: None), "generators of the same seed"),
        Wrong(T, writing(tokens=lambda n: n), "one token too many"),
        Wrong(T, writing(tokens=lambda n: n - 2), "one token is missing"),
        Wrong(T, writing(keep=torch.enable_grad), "gradients on"),
        Wrong(T, writing(reads=lambda ids: ids[:, -2:]), "the newest two tokens"),
        Wrong(T, writing(likeliest=torch.argmin), "the unlikeliest token"),
        Wrong(
            T,
            writing(use=lambda g: torch.Generator().manual_seed(0)),
            "not with one of your own",
        ),
        Wrong(T, without_the_first, "after the first token"),
        Wrong(T, draws_in_every_step, "greedy steps drew, too"),
        Wrong(T, four_and_eleven, "right for 4 greedy tokens"),
        Wrong(
            L, losing(cut=lambda p, q: (p[:, 1:], q[:, :-1])), "shifted by one: both"
        ),
        Wrong(L, losing(cut=lambda p, q: (p[:, :-1], q[:, 1:])), "the other way"),
        Wrong(L, losing(cut=lambda p, q: (p[:, :-1], q[:, :-1])), "last position"),
        Wrong(L, losing(cut=lambda p, q: (p[:, 1:], q[:, 1:])), "first position"),
        Wrong(L, losing(reduce=torch.sum), "sum over all positions"),
        Wrong(L, losing(reduce=lambda e: e.sum(1).mean()), "batchmean"),
        Wrong(L, losing(reduce=lambda e: e.sum(0).mean()), "mean over positions"),
        Wrong(L, losing(reduce=lambda e: -e.mean()), "the minus is missing"),
        Wrong(L, losing(of_student=lambda s: s), "stand in for log-probabilities"),
        Wrong(L, losing(of_teacher=lambda t: t.detach()), "stand in for probabilities"),
        Wrong(L, losing(of_student=lambda s: s.softmax(-1).log()), "far apart"),
        Wrong(L, cut_off, "far apart come out wrong"),
        Wrong(L, reverse_divergence, "the other way round"),
        Wrong(
            L,
            lambda s, t: F.mse_loss(s.softmax(-1), t.detach().softmax(-1)),
            "difference of the probabilities",
        ),
        Wrong(
            L,
            losing(of_teacher=lambda t: t.detach().log_softmax(-1)),
            "its probabilities are",
        ),
        Wrong(
            L,
            lambda s, t: F.cross_entropy(s, t.detach().softmax(-1)),
            "takes dimension 1 for the vocabulary",
        ),
        Wrong(L, over_the_vocabulary, "mean over the vocabulary"),
        Wrong(L, divergence, "Kullback-Leibler"),
        Wrong(L, divergence_of_texts, "with `batchmean`"),
        Wrong(L, hard, "likeliest token"),
        Wrong(L, swapped, "swapped"),
        Wrong(L, to_the_teacher, "reaches the teacher"),
        Wrong(L, no_student_gradient, "gradient"),
        Wrong(A, storing(shared=(1, 2, 3)), "all new tokens share"),
        Wrong(A, storing(shared=(0, 1, 3)), "all texts of the batch"),
        Wrong(A, per_head, "each head has its own"),
        Wrong(A, per_channel, "one per channel"),
        Wrong(A, storing(top=lambda b: 2 ** (b - 1)), "they end at"),
        Wrong(A, storing(size=torch.clone), "not from the largest |value|"),
        Wrong(A, unrounded_alpha, "before it was rounded to float16: the cache"),
        Wrong(A, rounded_last, "only after the codes"),
        Wrong(A, storing(by=lambda e, k: e), "divide by the one"),
        Wrong(A, storing(order=-1), "before the old ones"),
        Wrong(A, storing(to_whole=torch.trunc), "cut off"),
        Wrong(A, storing(to_whole=torch.floor), "rounded down"),
        Wrong(A, storing(give=lambda c, a: c.float()), "codes times α"),
        Wrong(A, storing(dtype=torch.float32), "float16 is asked"),
        Wrong(A, storing(safe=False), "a token of zeros"),
        Wrong(A, storing(zero=1e-4), "it is to be 1"),
        Wrong(A, storing(size=lambda k: k[:, :1].abs()), "the first head alone"),
        Wrong(A, storing(size=lambda k: k[:, -1:].abs()), "the last head alone"),
        Wrong(A, storing(size=mean_of_heads), "the mean of what the heads have"),
        Wrong(A, heads_and_tokens_swapped, "codes has shape"),
        Wrong(A, only_new_keys, "holds the new keys alone"),
        Wrong(A, all_rounded_again, "rounded once more"),
        Wrong(A, as_they_were, "pass through their codes"),
        Wrong(A, only_new, "the old ones must stay"),
        Wrong(A, newest_alpha, "each keeps its own"),
        Wrong(A, other_codes, "not what is stored"),
        Wrong(A, eight_bits, "right for 8 bits"),
    ],
)
