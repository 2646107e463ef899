"""Wrong answers to the exercises of 04-peft/05-lora, each with the diagnosis that it
must get.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.peft.lora import check
from tests.checks.rejecting import Wrong, rejects, verdict


def scaled(factor):
    """lora_forward with another scale than alpha / r."""

    def forward(x, W, A, B, alpha, keep):
        return x @ W.T + factor(alpha, A.shape[0]) * (x * keep) @ A.T @ B.T

    return forward


def dropout_on_both(x, W, A, B, alpha, keep):
    x = x * keep
    return x @ W.T + alpha / A.shape[0] * x @ A.T @ B.T


def no_dropout(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / A.shape[0] * x @ A.T @ B.T


def dropout_on_the_base(x, W, A, B, alpha, keep):
    return (x * keep) @ W.T + alpha / A.shape[0] * x @ A.T @ B.T


def dropout_after_a(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / A.shape[0] * (x @ A.T * keep[..., : A.shape[0]]) @ B.T


def scaled_everything(x, W, A, B, alpha, keep):
    return alpha / A.shape[0] * (x @ W.T + (x * keep) @ A.T @ B.T)


def rank_from_the_wrong_side(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / A.shape[1] * (x * keep) @ A.T @ B.T


def hard_coded(x, W, A, B, alpha, keep):
    return x @ W.T + 5.0 * (x * keep) @ A.T @ B.T


def only_base(x, W, A, B, alpha, keep):
    return x @ W.T


def only_low(x, W, A, B, alpha, keep):
    return alpha / A.shape[0] * (x * keep) @ A.T @ B.T


def subtracted(x, W, A, B, alpha, keep):
    return x @ W.T - alpha / A.shape[0] * (x * keep) @ A.T @ B.T


def swapped(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / A.shape[0] * (x * keep) @ B @ A


def own_dropout(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / A.shape[0] * F.dropout(x, 0.25) @ A.T @ B.T


def changes_x(x, W, A, B, alpha, keep):
    base = x @ W.T
    x *= keep
    return base + alpha / A.shape[0] * x @ A.T @ B.T


def forgot_return(x, W, A, B, alpha, keep):
    x @ W.T


def keep_twice(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / len(A) * (x * keep * keep) @ A.T @ B.T


def keep_as_zeros_and_ones(x, W, A, B, alpha, keep):
    return x @ W.T + alpha / len(A) * (x * (keep != 0)) @ A.T @ B.T


def mean_of_keep(x, W, A, B, alpha, keep):
    low = (x * keep) @ A.T @ B.T
    return keep.mean() * (x @ W.T + alpha / len(A) * low)


FORWARD = [
    Wrong("lora_forward", mean_of_keep, "too small everywhere"),
    Wrong("lora_forward", keep_twice, "keep is used twice"),
    Wrong("lora_forward", keep_as_zeros_and_ones, "not only zeros and ones"),
    Wrong("lora_forward", scaled(lambda alpha, r: r), "scaled by r, not by alpha / r"),
    Wrong("lora_forward", scaled(lambda alpha, r: 1 / r), "alpha is missing"),
    Wrong(
        "lora_forward",
        scaled(lambda alpha, r: alpha),
        "scaled by alpha, not by alpha / r",
    ),
    Wrong("lora_forward", scaled(lambda alpha, r: r / alpha), "r / alpha"),
    Wrong("lora_forward", scaled(lambda alpha, r: 1), "the scale is missing"),
    Wrong("lora_forward", scaled(lambda alpha, r: (alpha / r) ** 2), "applied twice"),
    Wrong("lora_forward", scaled(lambda alpha, r: alpha / r**0.5), "rank-stabilised"),
    Wrong("lora_forward", dropout_on_both, "W sees all of x"),
    Wrong("lora_forward", dropout_on_the_base, "keep is on the wrong path"),
    Wrong("lora_forward", no_dropout, "keep is not used"),
    Wrong("lora_forward", dropout_after_a, "differs"),
    Wrong("lora_forward", scaled_everything, "the low-rank path alone"),
    Wrong("lora_forward", rank_from_the_wrong_side, "rows of A, not its width"),
    Wrong("lora_forward", hard_coded, "wrong for r = 2"),
    Wrong("lora_forward", only_base, "low-rank path is missing"),
    Wrong("lora_forward", only_low, "frozen path is missing"),
    Wrong("lora_forward", subtracted, "not subtracted"),
    Wrong("lora_forward", swapped, "shape"),
    Wrong("lora_forward", own_dropout, "differs"),
    Wrong("lora_forward", changes_x, "in place"),
    Wrong("lora_forward", forgot_return, "return"),
]


def merged(
    change=lambda deltas: sum(deltas),
    scale=lambda alpha, r: alpha / r,
    start=lambda W: W.float(),
):
    """merge with another way to add up, another scale, or another start."""

    def merge(W, adapters):
        deltas = [scale(alpha, len(A)) * B @ A for A, B, alpha in adapters]
        return (start(W) + (change(deltas) if deltas else 0)).to(W.dtype)

    return merge


def rounded_each_time(W, adapters):
    for A, B, alpha in adapters:
        W = (W.float() + alpha / len(A) * B @ A).to(W.dtype)
    return W


def added_in_half_precision(W, adapters):
    for A, B, alpha in adapters:
        W = W + (alpha / len(A) * B @ A).to(W.dtype)
    return W


def in_place(W, adapters):
    for A, B, alpha in adapters:
        W += (alpha / len(A) * B @ A).to(W.dtype)
    return W


def first_rank_for_all(W, adapters):
    r = len(adapters[0][0])
    return (W.float() + sum(alpha / r * B @ A for A, B, alpha in adapters)).to(W.dtype)


def left_in_float32(W, adapters):
    return W.float() + sum(alpha / len(A) * B @ A for A, B, alpha in adapters)


def needs_an_adapter(W, adapters):
    (A, B, alpha), *rest = adapters
    total = W.float() + alpha / len(A) * B @ A
    return (total + sum(alpha / len(A) * B @ A for A, B, alpha in rest)).to(W.dtype)


MERGE = [
    Wrong("merge", merged(lambda deltas: sum(d.T for d in deltas)), "transposed"),
    Wrong("merge", merged(lambda deltas: 2 * sum(deltas)), "merged twice"),
    Wrong("merge", merged(lambda deltas: -sum(deltas)), "subtracted"),
    Wrong("merge", merged(lambda deltas: deltas[0]), "only the first"),
    Wrong("merge", merged(lambda deltas: deltas[-1]), "only the last"),
    Wrong("merge", merged(lambda deltas: sum(deltas) / len(deltas)), "averaged"),
    Wrong("merge", merged(scale=lambda alpha, r: 1), "alpha / r is missing"),
    Wrong("merge", merged(scale=lambda alpha, r: alpha), "scaled by alpha"),
    Wrong("merge", merged(scale=lambda alpha, r: r), "scaled by r"),
    Wrong("merge", merged(scale=lambda alpha, r: 1 / r), "scaled by 1 / r"),
    Wrong("merge", merged(start=lambda W: 0), "changes alone"),
    Wrong("merge", merged(lambda deltas: 0), "as it was"),
    Wrong("merge", rounded_each_time, "after each adapter"),
    Wrong("merge", added_in_half_precision, "before adding"),
    Wrong("merge", in_place, "in place"),
    Wrong("merge", first_rank_for_all, "its own rank"),
    Wrong("merge", left_in_float32, "float32"),
    Wrong("merge", needs_an_adapter, "not enough values"),
]


def factors(b, a):
    """best_factors with these functions of (U, S, Vh, r, scale) for B and A."""

    def best_factors(delta, r, alpha):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return a(U, S, Vh, r, alpha / r), b(U, S, Vh, r, alpha / r)

    return best_factors


def top(U, S, Vh, r, scale):
    return Vh[:r]


def swapped_factors(delta, r, alpha):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :r] * S[:r] * r / alpha, Vh[:r]


def random_init(delta, r, alpha):
    return torch.randn(r, delta.shape[1]), torch.zeros(delta.shape[0], r)


def first_columns(delta, r, alpha):
    return torch.eye(r, delta.shape[1]), delta[:, :r] * r / alpha


def full_rank(delta, r, alpha):
    return torch.eye(delta.shape[1]), delta * r / alpha


def one_thing(delta, r, alpha):
    return delta


def three_things(delta, r, alpha):
    return torch.linalg.svd(delta, full_matrices=False)


FACTORS = [
    Wrong(
        "best_factors",
        factors(lambda U, S, Vh, r, c: U[:, :r] * S[:r], top),
        "divide one of the factors",
    ),
    Wrong(
        "best_factors",
        factors(lambda U, S, Vh, r, c: U[:, :r] * S[:r] * c, top),
        "where you should divide",
    ),
    Wrong(
        "best_factors",
        factors(lambda U, S, Vh, r, c: U[:, :r] * S[:r] / c**2, top),
        "once is enough",
    ),
    Wrong(
        "best_factors",
        factors(
            lambda U, S, Vh, r, c: U[:, -r:] * S[-r:] / c,
            lambda U, S, Vh, r, c: Vh[-r:],
        ),
        "smallest singular values",
    ),
    Wrong(
        "best_factors",
        factors(
            lambda U, S, Vh, r, c: U[:, :r] * S[:r] / c,
            lambda U, S, Vh, r, c: S[:r, None] * Vh[:r],
        ),
        "squared",
    ),
    Wrong(
        "best_factors", factors(lambda U, S, Vh, r, c: U[:, :r] / c, top), "left out"
    ),
    Wrong(
        "best_factors",
        factors(lambda U, S, Vh, r, c: U[:, :r], top),
        "alpha / r is not undone",
    ),
    Wrong(
        "best_factors",
        factors(lambda U, S, Vh, r, c: U[:, :r] * S[:r].sqrt() / c, top),
        "√S is in one factor only",
    ),
    Wrong(
        "best_factors",
        factors(
            lambda U, S, Vh, r, c: U[:, :r] * S[:r] / c, lambda U, S, Vh, r, c: Vh.T[:r]
        ),
        "rows and columns of V",
    ),
    Wrong("best_factors", swapped_factors, "wrong order"),
    Wrong("best_factors", random_init, "B A is zero everywhere"),
    Wrong("best_factors", first_columns, "times the squared error"),
    Wrong("best_factors", full_rank, "shape"),
    Wrong("best_factors", one_thing, "tuple or list"),
    Wrong("best_factors", three_things, "3 things"),
]


def served(change, base=True):
    """serve with another change, given (x, A[ids], B[ids], scale by row, mask of rows
    with an adapter).
    """

    def serve(x, W, A, B, scaling, ids):
        on, scale = (ids >= 0).float()[:, None, None], scaling[ids][:, None, None]
        return (x @ W.T if base else 0) + change(x, A[ids], B[ids], scale, on)

    return serve


def low(x, A, B):
    return x @ A.mT @ B.mT


def scaled_by_the_first(x, W, A, B, scaling, ids):
    return x @ W.T + (ids >= 0).float()[:, None, None] * scaling[0] * low(
        x, A[ids], B[ids]
    )


def first_row_s_adapter(x, W, A, B, scaling, ids):
    return x @ W.T + scaling[ids[0]] * low(x, A[ids[0]], B[ids[0]])


def base_rows_lost(x, W, A, B, scaling, ids):
    out = torch.zeros(*x.shape[:2], len(W))
    for i, a in enumerate(ids.tolist()):
        if a >= 0:
            out[i] = x[i] @ W.T + scaling[a] * low(x[i], A[a], B[a])
    return out


def by_position(x, W, A, B, scaling, ids):
    at = torch.arange(len(x)) % len(A)
    return x @ W.T + scaling[at][:, None, None] * low(x, A[at], B[at])


def clamped(x, W, A, B, scaling, ids):
    at = ids.clamp(min=0)
    return x @ W.T + scaling[at][:, None, None] * low(x, A[at], B[at])


def sorted_by_adapter(x, W, A, B, scaling, ids):
    at = ids.sort().values
    return x @ W.T + ((at >= 0) * scaling[at])[:, None, None] * low(x, A[at], B[at])


def scale_of_all(x, W, A, B, scaling, ids):
    at = ids.clamp(min=0)
    factor = torch.where(ids >= 0, scaling[at], 1.0)[:, None, None]
    on = (ids >= 0)[:, None, None]
    return factor * (x @ W.T + on * low(x, A[at], B[at]))


def mean_scale(x, W, A, B, scaling, ids):
    on = (ids >= 0)[:, None, None]
    return x @ W.T + on * scaling.mean() * low(x, A[ids], B[ids])


def adapter_0_is_none(x, W, A, B, scaling, ids):
    on = (ids > 0)[:, None, None]
    return x @ W.T + on * scaling[ids][:, None, None] * low(x, A[ids], B[ids])


SERVE = [
    Wrong("serve", scale_of_all, "W x is scaled too"),
    Wrong("serve", mean_scale, "one scale serves all, the mean"),
    Wrong("serve", adapter_0_is_none, "adapter 0 is an adapter too"),
    Wrong(
        "serve",
        served(lambda x, A, B, scale, on: scale * low(x, A, B)),
        "counts from the end",
    ),
    Wrong(
        "serve",
        served(lambda x, A, B, scale, on: on * low(x, A, B)),
        "scale is missing: adapter i",
    ),
    Wrong(
        "serve", served(lambda x, A, B, scale, on: low(x, A, B)), "and rows with id −1"
    ),
    Wrong(
        "serve",
        served(lambda x, A, B, scale, on: on * scale**2 * low(x, A, B)),
        "applied twice",
    ),
    Wrong(
        "serve",
        served(lambda x, A, B, scale, on: on * scale * low(x, A, B), base=False),
        "W x is missing",
    ),
    Wrong("serve", served(lambda x, A, B, scale, on: 0), "no adapter is added"),
    Wrong(
        "serve",
        served(lambda x, A, B, scale, on: on * scale * x @ A @ B),
        "expected size",
    ),
    Wrong("serve", scaled_by_the_first, "scaling[0]"),
    Wrong("serve", first_row_s_adapter, "first row's adapter"),
    Wrong("serve", base_rows_lost, "still go through W"),
    Wrong("serve", by_position, "ids is not used"),
    Wrong("serve", clamped, "go through adapter 0"),
    Wrong("serve", sorted_by_adapter, "is right only at"),
]


def sum_first(W, adapters):
    change = sum(alpha / len(A) * B @ A for A, B, alpha in adapters)
    return W + change.bfloat16() if adapters else W.clone()


def short_factors(W, adapters):
    total = W.float()
    for A, B, alpha in adapters:
        total += alpha / len(A) * (B.bfloat16() @ A.bfloat16()).float()
    return total.bfloat16()


def bits_cut_off(W, adapters):
    total = W.float()
    for A, B, alpha in adapters:
        total += alpha / len(A) * B @ A
    return (total.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()


def svd_of(delta, r, alpha):
    U, S, Vh = torch.linalg.svd(delta * r / alpha, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def s_in_both(delta, r, alpha):
    U, S, Vh = svd_of(delta, r, alpha)
    return S[:, None] * Vh, U * S


def root_in_one(delta, r, alpha):
    U, S, Vh = svd_of(delta, r, alpha)
    return Vh, U * S.sqrt()


def one_rank_too_few(delta, r, alpha):
    U, S, Vh = svd_of(delta, r, alpha)
    return Vh, U * S * torch.tensor([1.0] * (r - 1) + [0.0])


def first_rows(delta, r, alpha):
    A = delta[:r]
    return A, torch.linalg.lstsq(A.T, delta.T).solution.T * r / alpha


MORE = [
    Wrong("merge", sum_first, "rounded the sum of the changes"),
    Wrong("merge", short_factors, "rounded the factors"),
    Wrong("merge", bits_cut_off, "the last bits are cut off"),
    Wrong("best_factors", s_in_both, "comes squared too"),
    Wrong("best_factors", root_in_one, "so only √(alpha / r) is undone"),
    Wrong("best_factors", one_rank_too_few, "only r − 1"),
    Wrong("best_factors", first_rows, "times the squared error of the nearest"),
]


def by_einsum(x, W, A, B, alpha, keep):
    low = torch.einsum("...k,rk->...r", keep * x, A) * (alpha / B.shape[1])
    return torch.einsum("...r,dr->...d", low, B) + F.linear(x, W)


def one_wide_adapter(W, adapters):
    total = W.double()
    if adapters:
        wide = torch.cat([B * (alpha / B.shape[1]) for _, B, alpha in adapters], 1)
        total = total + wide.double() @ torch.cat([A for A, _, _ in adapters]).double()
    return total.to(W.dtype)


def by_eigenvectors(delta, r, alpha):
    A = torch.linalg.eigh(delta.T @ delta).eigenvectors[:, -r:].T
    return A, delta @ A.T * (r / alpha)


def adapter_by_adapter(x, W, A, B, scaling, ids):
    out = x @ W.T
    for j in range(len(A)):  # a loop over adapters is none over rows
        rows = ids == j
        out[rows] = out[rows] + scaling[j] * low(x[rows], A[j], B[j])
    return out


def an_adapter_of_zeros(x, W, A, B, scaling, ids):
    A, B = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (A, B))
    scale = torch.cat([scaling, torch.zeros(1)])[ids].view(-1, 1, 1)
    return F.linear(x, W) + scale * torch.bmm(torch.bmm(x, A[ids].mT), B[ids].mT)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("lora_forward", by_einsum),
        ("merge", one_wide_adapter),
        ("best_factors", by_eigenvectors),
        ("serve", adapter_by_adapter),
        ("serve", an_adapter_of_zeros),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/05-lora", FORWARD + MERGE + FACTORS + SERVE + MORE
)
