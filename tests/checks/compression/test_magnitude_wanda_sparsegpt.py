"""Wrong answers to the exercises of 06-compression/09-magnitude-wanda-sparsegpt, each
with the diagnosis that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.magnitude_wanda_sparsegpt import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def lowest(scores, count):
    """True for the `count` lowest of a row of numbers."""
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[scores.flatten().argsort(stable=True)[:count]] = True
    return found.reshape(scores.shape)


def magnitude(score=torch.abs, count=lambda n, s: int(n * s), invert=False):
    """magnitude_mask with one thing changed."""

    def answer(W, sparsity):
        gone = lowest(score(W), count(W.numel(), sparsity))
        return gone if invert else ~gone

    return answer


def magnitude_by_kthvalue(W, sparsity):
    """A threshold, and of those that are equal to it as many as are wanted."""
    size = W.abs().flatten().tolist()
    count = int(len(size) * sparsity)
    keep = [True] * len(size)
    for i in sorted(range(len(size)), key=lambda i: (size[i], i))[:count]:
        keep[i] = False
    return torch.tensor(keep).reshape(W.shape)


def magnitude_by_square(W, sparsity):
    size = (W * W).reshape(-1)
    rank = size.argsort(stable=True).argsort()
    return (rank >= int(size.numel() * sparsity)).view_as(W)


def by_threshold(W, sparsity):
    size = W.abs()
    count = int(W.numel() * sparsity)
    return size > size.flatten().sort().values[max(count - 1, 0)]


def by_low_threshold(W, sparsity):
    size = W.abs()
    return size >= size.flatten().sort().values[int(W.numel() * sparsity)]


def authors_threshold(W, sparsity):
    """As in a common code: one too many."""
    size = W.abs()
    return size > size.flatten().sort().values[int(W.numel() * sparsity)]


def last_of_the_equal(W, sparsity):
    return magnitude()(W.flip(0, 1), sparsity).flip(0, 1)


def each_row(W, sparsity):
    return torch.stack([magnitude()(row, sparsity) for row in W])


def each_column(W, sparsity):
    return each_row(W.T, sparsity).T


def weights_not_mask(W, sparsity):
    return W * magnitude()(W, sparsity)


def at_least_one(W, sparsity):
    return ~lowest(W.abs(), max(1, int(W.numel() * sparsity)))


def fixed_share(W, sparsity):
    return magnitude()(W, 0.375)


# 2 ------------------------------------------------------------------------------------


def wanda(
    norm=lambda X: X.norm(dim=0),
    score=lambda W, norm: W.abs() * norm,
    count=lambda n, s: int(n * s),
    invert=False,
):
    """wanda_mask with one thing changed."""

    def answer(W, X, sparsity):
        scores = score(W, norm(X))
        gone = torch.stack([lowest(row, count(len(row), sparsity)) for row in scores])
        return gone if invert else ~gone

    return answer


def wanda_by_rank(W, X, sparsity):
    scores = W.double().square() * X.double().square().sum(0)
    rank = scores.argsort(dim=1).argsort(dim=1)
    return rank >= int(W.shape[1] * sparsity)


def wanda_with_the_mean(W, X, sparsity):
    """A factor changes nothing."""
    return wanda(norm=lambda X: X.square().mean(0).sqrt())(W, X, sparsity)


def wanda_of_the_matrix(W, X, sparsity):
    return ~lowest(W.abs() * X.norm(dim=0), int(W.numel() * sparsity))


def wanda_of_columns(W, X, sparsity):
    scores = W.abs() * X.norm(dim=0)
    count = int(W.shape[0] * sparsity)
    return torch.stack([~lowest(column, count) for column in scores.T], 1)


def wanda_scales_rows(W, X, sparsity):
    """The norm of a channel on each row: within a row it changes nothing."""
    return wanda(score=lambda W, norm: W.abs() * norm[:, None])(W, X, sparsity)


def wanda_in_place(W, X, sparsity):
    W.abs_().mul_(X.norm(dim=0))
    return torch.stack([~lowest(row, int(len(row) * sparsity)) for row in W])


# 3 ------------------------------------------------------------------------------------


def pattern(count=lambda n, m: m - n, sign=1, invert=False):
    """n_of_m_mask with one thing changed."""

    def answer(scores, n, m):
        keep = torch.zeros_like(scores, dtype=torch.bool)
        for r in range(len(scores)):
            for start in range(0, scores.shape[1], m):
                group = sign * scores[r, start : start + m]
                keep[r, start : start + m] = ~lowest(group, count(n, m))
        return ~keep if invert else keep

    return answer


def pattern_by_sort(scores, n, m):
    groups = scores.unflatten(1, (-1, m))
    rank = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank >= m - n).flatten(1)


def pattern_by_topk(scores, n, m):
    """Of equal ones whichever topk likes: the last of them, by a little tilt."""
    tilted = scores.double() + 1e-9 * torch.arange(scores.shape[1])
    groups = tilted.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(1, groups.topk(n, dim=1).indices, True)
    return keep.reshape(scores.shape)


def down_the_columns(scores, n, m):
    return pattern()(scores.T, n, m).T


def far_apart(scores, n, m):
    groups = scores.reshape(len(scores), m, -1)
    rank = groups.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank >= m - n).reshape(scores.shape)


def whole_row(scores, n, m):
    count = scores.shape[1] // m * (m - n)
    return torch.stack([~lowest(row, count) for row in scores])


def last_of_a_group(scores, n, m):
    return pattern()(scores.flip(1), n, m).flip(1)


def one_of_four(scores, n, m):
    return pattern()(scores, 1, 4) if scores.shape[1] % 4 == 0 else scores > 0


def pattern_by_threshold(scores, n, m):
    groups = scores.reshape(len(scores), -1, m)
    limit = groups.sort(dim=-1).values[..., m - n]
    return (groups >= limit[..., None]).reshape(scores.shape)


# 4 ------------------------------------------------------------------------------------


def sparse(
    score=lambda W, U: (W / U.diagonal()) ** 2,
    error=lambda w, kept, d: (w - kept) / d,
    sign=-1,
    last=None,
    copy=True,
    mask=lambda scores, s: ~lowest(scores, int(scores.numel() * s)),
    factor=lambda U: U,
):
    """prune_block with one thing changed."""

    def answer(W, U, sparsity):
        keep = mask(score(W, U), sparsity)
        U = factor(U)
        W = W.clone()
        for q in range(W.shape[1]):
            w = W[:, q].clone() if copy else W[:, q]
            W[:, q] = w * keep[:, q]
            e = error(w, W[:, q], U[q, q])
            stop = None if last is None else q + 1 + last
            W[:, q + 1 : stop] += sign * torch.outer(e, U[q, q + 1 : stop])
        return W

    return answer


def looking_back(W, U, sparsity):
    """Each weight looks back at all the errors before it; in float64."""
    keep = ~lowest(W.abs() / U.diagonal(), int(W.numel() * sparsity))
    E = torch.zeros_like(W, dtype=torch.float64)
    out = torch.zeros_like(E)
    for q in range(W.shape[1]):
        w = W[:, q] - E[:, :q] @ U[:q, q].double()
        out[:, q] = torch.where(keep[:, q], w, 0.0)
        E[:, q] = torch.where(keep[:, q], 0.0, w / U[q, q])
    return out.float()


def by_least_squares(W, U, sparsity):
    """Without U in the loop: solve for the columns to come, each time anew."""
    keep = ~lowest(W.abs() / U.diagonal(), int(W.numel() * sparsity))
    H = torch.linalg.inv((U.T @ U).double())
    W = W.double()
    for q in range(W.shape[1]):
        gone = torch.where(keep[:, q], 0.0, W[:, q])
        W[:, q] = W[:, q] - gone
        if q + 1 < W.shape[1]:
            rest = H[q + 1 :, q + 1 :]
            move = torch.linalg.solve(rest, H[q + 1 :, q])
            W[:, q + 1 :] += torch.outer(gone, move)
    return W.float()


def only_masked(W, U, sparsity):
    return W * ~lowest(W.abs() / U.diagonal(), int(W.numel() * sparsity))


def mask_first(W, U, sparsity):
    keep = ~lowest(W.abs() / U.diagonal(), int(W.numel() * sparsity))
    now = W * keep
    for q in range(W.shape[1]):
        e = W[:, q] * ~keep[:, q] / U[q, q]
        now[:, q + 1 :] -= torch.outer(e, U[q, q + 1 :])
    return now


def first_errors(W, U, sparsity):
    keep = ~lowest(W.abs() / U.diagonal(), int(W.numel() * sparsity))
    E = W * ~keep / U.diagonal()
    now = W.clone()
    for q in range(W.shape[1]):
        now[:, q + 1 :] -= torch.outer(E[:, q], U[q, q + 1 :])
    return now * keep


def per_row(scores, sparsity):
    count = int(scores.shape[1] * sparsity)
    return torch.stack([~lowest(row, count) for row in scores])


def block_in_place(W, U, sparsity):
    W.copy_(sparse()(W, U, sparsity))
    return W


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("magnitude_mask", magnitude_by_kthvalue),
        ("magnitude_mask", magnitude_by_square),
        ("wanda_mask", wanda_by_rank),
        ("wanda_mask", wanda_with_the_mean),
        ("n_of_m_mask", pattern()),
        ("n_of_m_mask", pattern_by_sort),
        ("n_of_m_mask", pattern_by_topk),
        ("prune_block", looking_back),
        ("prune_block", by_least_squares),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


M, A, N, B = "magnitude_mask", "wanda_mask", "n_of_m_mask", "prune_block"
test_wrong_answers = rejects(
    "06-compression/09-magnitude-wanda-sparsegpt",
    [
        Wrong(M, magnitude(invert=True), "the wrong way round"),
        Wrong(M, magnitude(score=lambda W: W), "the signs count"),
        Wrong(M, each_row, "each row loses its share"),
        Wrong(M, each_column, "each column loses its share"),
        Wrong(M, authors_threshold, "one weight too many"),
        Wrong(M, magnitude(count=lambda n, s: int(n * s) - 1), "too few"),
        Wrong(M, magnitude(score=lambda W: -W.abs()), "the largest go"),
        Wrong(M, magnitude(count=lambda n, s: n - int(n * s)), "the share that goes"),
        Wrong(M, by_threshold, "more than were asked"),
        Wrong(M, by_low_threshold, "fewer than were asked"),
        Wrong(M, last_of_the_equal, "the last did"),
        Wrong(M, weights_not_mask, "dtype float32"),
        Wrong(M, fixed_share, "from the arguments"),
        Wrong(M, at_least_one, "with sparsity 0 no weight goes"),
        Wrong(A, wanda(invert=True), "the wrong way round"),
        Wrong(A, wanda(norm=lambda X: torch.ones(X.shape[1])), "this is magnitude"),
        Wrong(A, wanda_scales_rows, "this is magnitude"),
        Wrong(A, wanda(norm=lambda X: X.norm(dim=1)), "the wrong axis"),
        Wrong(A, wanda_of_the_matrix, "each row loses its own share"),
        Wrong(A, wanda_of_columns, "columns are compared"),
        Wrong(A, wanda(norm=lambda X: X.square().sum(0)), "the norm is squared"),
        Wrong(A, wanda(score=lambda W, n: W.square() * n), "not w²"),
        Wrong(A, wanda(norm=lambda X: X.abs().sum(0)), "sums |x|"),
        Wrong(A, wanda(norm=lambda X: X.abs().amax(0)), "the largest |x|"),
        Wrong(A, wanda(norm=lambda X: X.sum(0).abs()), "signs cancel"),
        Wrong(A, wanda(score=lambda W, n: W * n), "take |w|"),
        Wrong(A, wanda(score=lambda W, n: W.abs() / n), "multiply"),
        Wrong(A, wanda(count=lambda n, s: round(n * s)), "too many"),
        Wrong(A, wanda(count=lambda n, s: int(n * s) - 1), "too few"),
        Wrong(A, wanda(score=lambda W, n: -W.abs() * n), "the best go"),
        Wrong(A, wanda(count=lambda n, s: n - int(n * s)), "the share that goes"),
        Wrong(A, wanda_in_place, "in place"),
        Wrong(N, pattern(invert=True), "the wrong way round"),
        Wrong(N, pattern(count=lambda n, m: n), "n are kept, and m − n go"),
        Wrong(N, pattern(sign=-1), "the best n are asked"),
        Wrong(N, down_the_columns, "down the columns"),
        Wrong(N, far_apart, "columns apart"),
        Wrong(N, whole_row, "the whole row is compared"),
        Wrong(N, pattern(count=lambda n, m: m - n - 1), "one too many"),
        Wrong(N, pattern(count=lambda n, m: m - n + 1), "none of a group is left"),
        Wrong(N, last_of_a_group, "the last did"),
        Wrong(N, pattern_by_threshold, "count them"),
        Wrong(B, only_masked, "nothing makes up"),
        Wrong(B, sparse(copy=False), "Is `w` a copy"),
        Wrong(B, sparse(sign=1), "the wrong way"),
        Wrong(B, sparse(error=lambda w, k, d: w - k), "by U_qq is missing"),
        Wrong(B, sparse(error=lambda w, k, d: (w - k) * d), "multiplied the error"),
        Wrong(B, sparse(error=lambda w, k, d: (w - k) / d**2), "twice"),
        Wrong(B, sparse(error=lambda w, k, d: w / d), "the whole column"),
        Wrong(B, sparse(error=lambda w, k, d: k / d), "what is kept is taken"),
        Wrong(B, sparse(last=1), "only the next column"),
        Wrong(B, mask_first, "pruned weights come back"),
        Wrong(B, first_errors, "as they were at the start"),
        Wrong(B, sparse(score=lambda W, U: W.abs()), "the mask is that of magnitude"),
        Wrong(B, sparse(score=lambda W, U: (W * U.diagonal()) ** 2), "multiplied by"),
        Wrong(B, sparse(score=lambda W, U: W**2 / U.diagonal()), "the square of U_qq"),
        Wrong(
            B,
            sparse(score=lambda W, U: W**2 / (U.T @ U).diagonal()),
            "the diagonal of the inverse",
        ),
        Wrong(B, sparse(mask=per_row), "each row loses its share"),
        Wrong(
            B,
            sparse(mask=lambda S, s: ~lowest(S, int(S.numel() * s) + 1)),
            "one weight too many",
        ),
        Wrong(
            B,
            sparse(mask=lambda S, s: lowest(S, int(S.numel() * s))),
            "the wrong way round",
        ),
        Wrong(B, sparse(factor=lambda U: U.T @ U), "the inverse itself"),
        Wrong(B, block_in_place, "in place"),
    ],
)
