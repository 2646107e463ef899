"""Checks of 06-compression/09-magnitude-wanda-sparsegpt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression import hessian
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/09-magnitude-wanda-sparsegpt")

INVERTED = "the mask is the wrong way round: True where the weight is kept"


def worst(scores: Tensor, count: int, *, last: bool = False) -> Tensor:
    """True for the `count` lowest of the last dimension; of equal ones the first."""
    if last:
        return worst(scores.flip(-1), count).flip(-1)
    return ~pruning.keep_best(scores, count)


def everywhere(scores: Tensor, count: int, **how: bool) -> Tensor:
    """The same among the whole matrix."""
    return worst(scores.flatten(), count, **how).reshape(scores.shape)


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "Flatten |W|, find the places of the lowest, and mark them in a mask of ones.",
        (
            "`W.abs().flatten().argsort(stable=True)` has the places in order. A"
            " threshold is not enough: equal weights would all go, or none."
        ),
        "`keep[order[: int(W.numel() * sparsity)]] = False`, then `.reshape(W.shape)`.",
    ),
)
def magnitude_mask(answer):
    """The weights of least magnitude go, exactly as many as were asked."""

    def draw() -> tuple[Tensor, float]:
        W = torch.randn(5, 5) * torch.linspace(0.3, 2, 5)[:, None]
        return W, 0.375  # 9.375 weights, 1.875 of a row

    W, sparsity = telling(draw, right_magnitude, wrong_magnitudes)
    what = "magnitude_mask(W, 0.375)"
    got = expect(answer(W, sparsity), shape=(5, 5), dtype=torch.bool, what=what)
    mistakes = wrong_magnitudes(W, sparsity)
    diagnose(got, right=right_magnitude(W, sparsity), mistakes=mistakes, what=what)
    for shape, sparsity in (((3, 8), 0.5), ((7, 2), 0.25)):
        W = torch.randn(shape)
        got = expect(answer(W, sparsity), shape=shape, dtype=torch.bool, what="M")
        if not close(got, right_magnitude(W, sparsity)):
            raise Mistake(
                f"right for 5 × 5 weights, wrong for {shape[0]} × {shape[1]} and"
                f" sparsity {sparsity}: take sizes and `sparsity` from the arguments"
            )

    with_ties(answer)
    W = torch.randn(2, 3)
    if not expect(answer(W, 0.0), shape=(2, 3), dtype=torch.bool, what="M").all():
        raise Mistake("with sparsity 0 no weight goes: all of M is True")


def right_magnitude(W: Tensor, sparsity: float) -> Tensor:
    """M of exercise 1."""
    return pruning.from_matrix(W.abs(), sparsity)


def wrong_magnitudes(W: Tensor, sparsity: float) -> dict[str, Tensor]:
    """What usual mistakes give for M."""
    size = W.abs()
    count = int(W.numel() * sparsity)
    kept = W.numel() - count
    return {
        INVERTED: everywhere(size, count),
        "the signs count: take |w|": ~everywhere(W, count),
        "each row loses its share: the whole matrix is asked": ~worst(
            size, int(W.shape[1] * sparsity)
        ),
        "each column loses its share: the whole matrix is asked": ~worst(
            size.T, int(W.shape[0] * sparsity)
        ).T,
        "one weight too many goes: n · sparsity is cut off, and with a threshold the"
        " one that is equal to it must stay": ~everywhere(size, count + 1),
        "one weight too few goes": ~everywhere(size, count - 1),
        "the largest go: the smallest are asked": ~everywhere(-size, count),
        "`sparsity` is the share that goes, not the one that is kept": (
            ~everywhere(size, kept)
        ),
    }


def with_ties(answer: Callable) -> None:
    """Weights of equal magnitude: of these the first go, and no more than asked."""
    W = torch.tensor([[2.0, -1, 1, 3], [1, -1, 2, 1]])
    what = "magnitude_mask(W, 0.5) for weights of equal magnitude"
    got = expect(answer(W, 0.5), shape=(2, 4), dtype=torch.bool, what=what)
    size = W.abs()
    diagnose(
        got,
        right=right_magnitude(W, 0.5),
        mistakes={
            "all that are equal to a threshold go, more than were asked: count the"
            " weights, and of equal ones let the first go": size > 1,
            "none that is equal to a threshold goes, fewer than were asked: count the"
            " weights, and of equal ones let the first go": size >= 1,
            "of equal weights the first go, and here the last did": ~everywhere(
                size, 4, last=True
            ),
        },
        what=what,
    )


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "First the norms, one for each column of W; then the scores; then the"
            " lowest of each row."
        ),
        (
            "X has a row for each token, so the norm of channel j is that of X[:, j]:"
            " `X.norm(dim=0)`."
        ),
        (
            "`(W.abs() * X.norm(dim=0)).argsort(dim=1, stable=True)`, and"
            " `keep.scatter_(1, order[:, :count], False)`."
        ),
    ),
)
def wanda_mask(answer):
    """The weights whose magnitude times input norm is least go, row by row."""

    def draw() -> tuple[Tensor, Tensor, float]:
        # square, so that a norm along the wrong axis fits
        X = torch.randn(8, 8).exp() * torch.randn(8, 8).sign()
        X *= torch.logspace(-0.6, 0.6, 8)[torch.randperm(8)]
        W = torch.randn(8, 8) * torch.linspace(0.4, 1.6, 8)[:, None]
        return W, X, 0.45  # 3.6 weights of a row

    W, X, sparsity = telling(draw, right_wanda, wrong_wandas)
    what = "wanda_mask(W, X, 0.45)"
    got = expect(answer(W, X, sparsity), shape=(8, 8), dtype=torch.bool, what=what)
    mistakes = wrong_wandas(W, X, sparsity)
    diagnose(got, right=right_wanda(W, X, sparsity), mistakes=mistakes, what=what)
    for out, columns, tokens, sparsity in ((3, 6, 20, 0.5), (5, 9, 4, 0.25)):
        W = torch.randn(out, columns)
        X = torch.randn(tokens, columns)
        got = expect(answer(W, X, sparsity), shape=(out, columns), what="M")
        if not close(got, right_wanda(W, X, sparsity)):
            raise Mistake(
                f"right for 8 × 8 weights, wrong for {out} × {columns}, {tokens} tokens"
                f" and sparsity {sparsity}: take all of them from the arguments"
            )


def right_wanda(W: Tensor, X: Tensor, sparsity: float) -> Tensor:
    """M of exercise 2."""
    return pruning.from_each_row(pruning.wanda_scores(W, X.norm(dim=0)), sparsity)


def wrong_wandas(W: Tensor, X: Tensor, sparsity: float) -> dict[str, Tensor]:
    """What usual mistakes give for M."""
    norm = X.norm(dim=0)
    scores = W.abs() * norm
    count = int(W.shape[1] * sparsity)
    kept = W.shape[1] - count
    return {
        INVERTED: worst(scores, count),
        "this is magnitude in each row: is the norm there, and is it one for each"
        " column of W?": ~worst(W.abs(), count),
        "the norms run along the wrong axis: channel j is X[:, j], over all tokens": (
            ~worst(W.abs() * X.norm(dim=1), count)
        ),
        "the whole matrix is compared: each row loses its own share": ~everywhere(
            scores, int(W.numel() * sparsity)
        ),
        "columns are compared: each row loses its own share": ~worst(
            scores.T, int(W.shape[0] * sparsity)
        ).T,
        "the norm is squared: |w| times the norm itself": ~worst(
            W.abs() * norm.square(), count
        ),
        "the norm is without its root on one side: |w|, not w²": ~worst(
            W.square() * norm, count
        ),
        "this sums |x|: the 2-norm is the root of the sum of squares": ~worst(
            W.abs() * X.abs().sum(0), count
        ),
        "this takes the largest |x|: the 2-norm is asked": ~worst(
            W.abs() * X.abs().amax(0), count
        ),
        "this takes the sum of x, where signs cancel: the 2-norm is asked": ~worst(
            W.abs() * X.sum(0).abs(), count
        ),
        "the signs of the weights count: take |w|": ~worst(W * norm, count),
        "the scores are divided by the norm: multiply": ~worst(W.abs() / norm, count),
        "one weight too many goes from each row: in · sparsity is cut off": ~worst(
            scores, count + 1
        ),
        "one weight too few goes from each row": ~worst(scores, count - 1),
        "the best go: the lowest scores are asked": ~worst(-scores, count),
        "`sparsity` is the share that goes, not the one that is kept": (
            ~worst(scores, kept)
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=3,
    importance=4,
    hints=(
        "Give the scores a third dimension, so that each group has a row of its own.",
        (
            "`scores.reshape(out, -1, m)`: the last dimension is a group. Of each the"
            " m − n lowest go."
        ),
        (
            "`order = groups.argsort(dim=-1, stable=True)`, `keep.scatter_(-1,"
            " order[..., : m - n], False)`, and the shape of `scores` again."
        ),
    ),
)
def n_of_m_mask(answer):
    """N of each M neighbours are kept."""

    def draw() -> tuple[Tensor, int, int]:
        return torch.rand(8, 8), 1, 4

    scores, n, m = telling(draw, pruning.n_of_m, wrong_patterns)
    what = "n_of_m_mask(scores, 1, 4)"
    got = expect(answer(scores, n, m), shape=(8, 8), dtype=torch.bool, what=what)
    diagnose(
        got,
        right=pruning.n_of_m(scores, n, m),
        mistakes=wrong_patterns(scores, n, m),
        what=what,
    )
    tied = torch.tensor([[1.0, 1, 1, 1, 2, 0, 0, 0]])
    threshold = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    got = expect(answer(tied, 2, 4), shape=(1, 8), dtype=torch.bool, what="M")
    diagnose(
        got,
        right=pruning.n_of_m(tied, 2, 4),
        mistakes={
            "of equal scores the first go, and here the last did": (
                ~worst(tied.unflatten(1, (-1, 4)), 2, last=True).flatten(1)
            ),
            "all that are equal to a threshold stay: count them": (tied >= threshold),
        },
        what="n_of_m_mask(scores, 2, 4) for equal scores",
    )
    for shape, n, m in (((3, 15), 3, 5), ((2, 16), 4, 8), ((5, 6), 1, 2)):
        scores = torch.rand(shape)
        got = expect(answer(scores, n, m), shape=shape, what="M")
        if not close(got, pruning.n_of_m(scores, n, m)):
            raise Mistake(
                f"right for 1:4, wrong for {n}:{m} and {shape[0]} × {shape[1]} scores:"
                " take n, m and the sizes from the arguments"
            )


def wrong_patterns(scores: Tensor, n: int, m: int) -> dict[str, Tensor]:
    """What usual mistakes give for M."""
    groups = scores.unflatten(1, (-1, m))
    strided = scores.unflatten(1, (m, -1))  # every (in / m)-th column
    whole_row = scores.shape[1] // m * (m - n)
    return {
        INVERTED: worst(groups, m - n).flatten(1),
        "n of each group go: n are kept, and m − n go": (~worst(groups, n).flatten(1)),
        "the lowest n are kept: the best n are asked": (
            ~worst(-groups, m - n).flatten(1)
        ),
        "the groups run down the columns: they are neighbours in a row": (
            pruning.n_of_m(scores.T, n, m).T
        ),
        "a group is m neighbours; here its members are in / m columns apart": (
            ~worst(strided.transpose(1, 2), m - n).transpose(1, 2).flatten(1)
        ),
        "the whole row is compared: each group of m is asked": ~worst(
            scores, whole_row
        ),
        "one too many of each group is kept": ~worst(groups, m - n - 1).flatten(1),
        "none of a group is left: n are kept": ~worst(groups, m - n + 1).flatten(1),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=20,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Two parts: the mask, from all of W before anything changes; then a loop"
            " over the columns of a copy."
        ),
        (
            "The mask is that of exercise 1 with other scores,"
            " `(W / U.diagonal()) ** 2`. In the loop, the error of a column is what it"
            " is now minus what is kept of it."
        ),
        (
            "`error = (w - w * keep[:, q]) / U[q, q]`, and `W[:, q + 1:] -="
            " torch.outer(error, U[q, q + 1:])`, with w a copy of the column."
        ),
    ),
)
def prune_block(answer):
    """One block of SparseGPT: a mask, then column by column what makes up for it."""

    def draw() -> tuple[Tensor, Tensor, float]:
        X = torch.randn(6, 20) + 1.2 * torch.randn(1, 20)
        X *= torch.logspace(-0.7, 0.7, 6)[torch.randperm(6), None]
        H = X @ X.T
        H = 3 * H / H.diagonal().mean()
        W = torch.randn(7, 6) * torch.linspace(0.5, 1.5, 7)[:, None]
        return W, hessian.inverse_factor(H), 0.4  # 16.8 weights, 2.4 of a row

    W, U, sparsity = telling(draw, block, wrong_blocks)
    what = "prune_block(W, U, 0.4)"
    got = expect(answer(W, U, sparsity), shape=(7, 6), dtype=torch.float32, what=what)
    mistakes = wrong_blocks(W, U, sparsity)
    diagnose(got, right=block(W, U, sparsity), mistakes=mistakes, tol=1e-5, what=what)
    for out, columns, sparsity in ((3, 8, 0.5), (8, 5, 0.25), (4, 1, 0.5)):
        X = torch.randn(columns, 30) + torch.randn(1, 30)
        U = hessian.inverse_factor(X @ X.T)
        W = torch.randn(out, columns)
        got = expect(answer(W, U, sparsity), shape=(out, columns), what="Ŵ")
        if not close(got, block(W, U, sparsity), tol=1e-5):
            raise Mistake(
                f"right for 7 × 6 weights, wrong for {out} × {columns} and sparsity"
                f" {sparsity}: take the sizes and `sparsity` from the arguments"
            )


def block(
    W: Tensor,
    U: Tensor,
    sparsity: float,
    *,
    keep: Tensor | None = None,
    error: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda w, w_hat, d: (
        (w - w_hat) / d
    ),
    reach: int | None = None,
    sign: int = 1,
    factor: Tensor | None = None,
    masked_first: bool = False,
    old_error: bool = False,
) -> Tensor:
    """Ŵ of exercise 4, and what comes out with one thing changed.

    Args:
        error: of (w, ŵ, U_qq).
        reach: how many of the later columns are updated.
        factor: used in the loop in place of U.
        masked_first: the zeros are put in before the loop, and change as it goes.
        old_error: the errors are those of the weights as they were at the start.
    """
    if keep is None:
        keep = pruning.from_matrix(pruning.obs_scores(W, U.diagonal()), sparsity)
    U = U if factor is None else factor
    now = W * keep if masked_first else W.clone()
    found = torch.zeros_like(W)
    for q in range(W.shape[1]):
        w = now[:, q].clone()
        found[:, q] = w if masked_first else w * keep[:, q]
        if old_error or masked_first:
            e = error(W[:, q], W[:, q] * keep[:, q], U[q, q])
        else:
            e = error(w, found[:, q], U[q, q])
        stop = None if reach is None else q + 1 + reach
        now[:, q + 1 : stop] -= sign * torch.outer(e, U[q, q + 1 : stop])
    return found


def wrong_blocks(W: Tensor, U: Tensor, sparsity: float) -> dict:
    """What usual mistakes give for Ŵ."""
    d = U.diagonal()
    scores = pruning.obs_scores(W, d)
    count = int(W.numel() * sparsity)

    def but(**changes) -> Callable[[], Tensor]:
        return lambda: block(W, U, sparsity, **changes)

    return {
        "nothing makes up for what is pruned: later columns must change. Is `w` a copy"
        " of the column, and is it a row of U that you use?": but(reach=0),
        "later columns move the wrong way: subtract the error times U_qj": but(sign=-1),
        "the division of the error by U_qq is missing": but(
            error=lambda w, w_hat, d: w - w_hat
        ),
        "you multiplied the error by U_qq: divide by it": but(
            error=lambda w, w_hat, d: (w - w_hat) * d
        ),
        "the error is divided by U_qq twice": but(
            error=lambda w, w_hat, d: (w - w_hat) / d**2
        ),
        "the whole column is taken for the error: only what is pruned of it is": but(
            error=lambda w, w_hat, d: w / d
        ),
        "what is kept is taken for the error: what is pruned is": but(
            error=lambda w, w_hat, d: w_hat / d
        ),
        "only the next column is updated: all later ones are": but(reach=1),
        "the errors are those of the weights as they were at the start: take each"
        " column as it is now": but(old_error=True),
        "pruned weights come back: apply the mask to each column when its turn comes": (
            but(masked_first=True)
        ),
        "the mask is that of magnitude: the scores are w² / U_qq²": but(
            keep=~everywhere(W.abs(), count)
        ),
        "the scores are multiplied by U_qq²: divide by it": but(
            keep=~everywhere((W * d).abs(), count)
        ),
        "the scores are w² / U_qq: the square of U_qq is asked": but(
            keep=~everywhere(W.square() / d, count)
        ),
        "the scores are divided by the diagonal of the inverse, Uᵀ U: that of U,"
        " squared, is asked": but(
            keep=~everywhere(W.square() / (U.T @ U).diagonal(), count)
        ),
        "each row loses its share: the block is compared as a whole": but(
            keep=~worst(scores, int(W.shape[1] * sparsity))
        ),
        "each column loses its share: the block is compared as a whole": but(
            keep=~worst(scores.T, int(W.shape[0] * sparsity)).T
        ),
        "one weight too many goes: n · sparsity is cut off, and the one that is equal"
        " to a threshold must stay": but(keep=~everywhere(scores, count + 1)),
        "one weight too few goes": but(keep=~everywhere(scores, count - 1)),
        "the mask is the wrong way round: the lowest scores go": but(
            keep=everywhere(scores, count)
        ),
        "the highest scores go: the lowest are asked": but(
            keep=~everywhere(-scores, count)
        ),
        "`sparsity` is the share that goes, not the one that is kept": but(
            keep=~everywhere(scores, W.numel() - count)
        ),
        "you used the inverse itself, Uᵀ U, where U is asked": but(factor=U.T @ U),
        "nothing is pruned: this is W": W,
    }
