"""Checks of 06-compression/05-gptq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression import gptq
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/05-gptq")


def problem(columns: int, out: int = 6, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """W, and X Xᵀ of correlated inputs of unequal size in no order.

    Its diagonal has the mean 3, so that no factor of U is near 0 or hides in another.
    """
    X = torch.randn(columns, tokens) + 1.5 * torch.randn(1, tokens)
    X = torch.randn(columns, columns) @ X
    X *= torch.logspace(-0.4, 0.4, columns)[torch.randperm(columns), None]
    H = X @ X.T
    return torch.randn(out, columns), 3 * H / H.diagonal().mean()


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "Two lines: a number, the error over one entry of H_inv; then a row.",
        "The denominator is H_inv[q, q]. The column is H_inv[:, q].",
        "`w - (w[q] - value) / H_inv[q, q] * H_inv[:, q]`: no entry needs care.",
    ),
)
def surgeon(answer):
    """One weight is set, and the others of its row make up for it."""
    W, H = problem(7, out=1)
    w = W[0]
    H_inv = torch.linalg.inv(H.double()).float()
    for q, value in ((2, 0.25), (0, -1.0), (6, 2.0)):
        what = f"surgeon(w, {q}, {value}, H_inv)"
        got = expect(
            answer(w, q, value, H_inv), shape=(7,), dtype=torch.float32, what=what
        )
        right = gptq.surgeon(w, q, value, H_inv)
        diagnose(got, right=right, mistakes=wrong_rows(w, q, value, H_inv), what=what)


def wrong_rows(w: Tensor, q: int, value: float, H_inv: Tensor) -> dict[str, Tensor]:
    """What usual mistakes make of the row."""
    gap = w[q] - value
    d = H_inv[q, q]
    column = H_inv[:, q]

    def with_value(row: Tensor) -> Tensor:
        row = row.clone()
        row[q] = value
        return row

    H = torch.linalg.inv(H_inv)
    plus = w + gap / d * column
    without_d = w - gap * column
    return {
        "only weight q changes: the others must make up for it": with_value(w),
        "the row is as it was: add δ to it": w,
        "this is δ alone: add it to w": -gap / d * column,
        "the others move the wrong way: check the sign of δ": plus,
        "the others move the wrong way: check the sign of δ, (w_q − value) with a"
        " minus before it": with_value(plus),
        "the division by [H⁻¹]_qq is missing": without_d,
        "the division by [H⁻¹]_qq is missing, which entry q hides": with_value(
            without_d
        ),
        "you multiplied by [H⁻¹]_qq: divide by it": w - gap * d * column,
        "you divided by the root of [H⁻¹]_qq: here it stands without a root": (
            w - gap / d.sqrt() * column
        ),
        "each entry is divided by its own [H⁻¹]_jj: all are divided by [H⁻¹]_qq": (
            w - gap / H_inv.diagonal() * column
        ),
        "you used H, not its inverse": w - gap / H[q, q] * H[:, q],
        "the denominator is that of H, not of its inverse": w - gap / H[q, q] * column,
        "the error is missing: this moves the row as if w_q − value were 1": (
            w - column / d
        ),
        "this sets weight q to 0: its error is w_q − value": w - w[q] / d * column,
        "this moves by `value` itself: the error is w_q − value": (
            w - value / d * column
        ),
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=3,
    importance=4,
    hints=(
        "Three steps: damp, invert, factor. The damping goes on the diagonal only.",
        (
            "`torch.eye(len(H))` is a diagonal. The inverse comes from"
            " `torch.linalg.inv`, or from a Cholesky factor by"
            " `torch.cholesky_inverse`."
        ),
        (
            "`torch.linalg.cholesky(inverse, upper=True)` is U: its transpose times"
            " itself is the inverse."
        ),
    ),
)
def inverse_factor(answer):
    """The upper factor of the inverse of H, after damping."""
    _, H = problem(6)
    what = "inverse_factor(H, 0.05)"
    got = expect(answer(H, 0.05), shape=(6, 6), dtype=torch.float32, what=what)
    right = gptq.inverse_factor(H, 0.05)
    diagnose(got, right=right, mistakes=wrong_factors(H, 0.05), tol=2e-3, what=what)
    X = torch.randn(5, 2)
    H = X @ X.T * 40  # fewer tokens than inputs: without damping it has no inverse
    got = expect(answer(H, 0.3), shape=(5, 5), what="inverse_factor(H, 0.3)")
    if not close(got, gptq.inverse_factor(H, 0.3), tol=2e-3):
        raise Mistake(
            "right for one H, wrong for one of fewer tokens than inputs and damping"
            " 0.3: take `damping` from the argument"
        )
    product = got.T @ got  # an oracle of its own
    damped = H + 0.3 * H.diagonal().mean() * torch.eye(5)
    if not close(product @ damped, torch.eye(5), tol=2e-3):
        raise Mistake("Uᵀ U is not the inverse of the damped H")


def wrong_factors(H: Tensor, damping: float) -> dict[str, Callable[[], Tensor]]:
    """What usual mistakes give for U."""
    eye = torch.eye(len(H))
    mean = H.diagonal().mean()
    damped = H + damping * mean * eye

    def upper(damped: Tensor) -> Tensor:
        return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)

    lower = torch.linalg.cholesky(damped)
    inverse = torch.linalg.inv(damped)
    flipped = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return {
        "the damping is missing": upper(H),
        "the damping is `damping` itself: times the mean of the diagonal": upper(
            H + damping * eye
        ),
        "each diagonal entry has its own damping: all get that of the mean": upper(
            H + damping * torch.diag(H.diagonal())
        ),
        "the damping uses the mean of all of H: of its diagonal is asked": upper(
            H + damping * H.mean() * eye
        ),
        "the damping uses the largest entry of the diagonal: the mean is asked": upper(
            H + damping * H.diagonal().max() * eye
        ),
        "the damping uses the sum of the diagonal: the mean is asked": upper(
            H + damping * H.diagonal().sum() * eye
        ),
        "the damping is added to every entry: only the diagonal gets it": upper(
            H + damping * mean
        ),
        "the damping is added to the inverse: it belongs to H": (
            torch.linalg.cholesky(
                torch.linalg.inv(H) + damping * mean * eye, upper=True
            )
        ),
        "this is lower triangular: its transpose is asked": upper(damped).T,
        "this is the factor of H: that of its inverse is asked": lower.T,
        "this is the lower factor of H: the upper one of its inverse is asked": lower,
        "this is the inverse: its upper Cholesky factor is asked": inverse,
        "this is the inverse of H's own factor: it is lower, and not U": (
            torch.linalg.inv(lower)
        ),
        "H⁻¹ is U Uᵀ here: Uᵀ U is asked, so factor the inverse itself": (
            torch.linalg.inv(lower).T
        ),
        "this is the damped H: its inverse is to be factored": damped,
        "this is another triangular factor: Uᵀ U must be the inverse": flipped,
    }


# 3 ------------------------------------------------------------------------------------


def feedback(
    W: Tensor,
    U: Tensor,
    scale: Tensor,
    top: int,
    *,
    low: int | None = None,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    error: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda e, d, s: e / d,
    reach: int | None = None,
    sign: int = 1,
    codes: bool = False,
) -> Tensor:
    """Ŵ of exercises 3 and 4, and what comes out with one thing changed.

    Args:
        scale: (out, in).
        error: of (w − ŵ, U_qq, s).
        reach: how many of the later columns are updated.
    """
    now = W.clone()
    found = torch.zeros_like(W)
    for q in range(W.shape[1]):
        s = scale[:, q]
        code = rounding(now[:, q] / s).clamp(-top if low is None else low, top)
        e = error(now[:, q] - code * s, U[q, q], s)
        found[:, q] = code if codes else code * s
        stop = None if reach is None else q + 1 + reach
        now[:, q + 1 : stop] -= sign * torch.outer(e, U[q, q + 1 : stop])
    return found


def from_old_weights(W: Tensor, U: Tensor, scale: Tensor, top: int) -> Tensor:
    """The error of each column is that of plain rounding."""
    now = W.clone()
    for q in range(W.shape[1]):
        s = scale[:, q]
        e = (W[:, q] - torch.round(W[:, q] / s).clamp(-top, top) * s) / U[q, q]
        now[:, q + 1 :] -= torch.outer(e, U[q, q + 1 :])
    return torch.round(now / scale).clamp(-top, top) * scale


@check.exercise(
    points=4,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        (
            "A loop over the columns of a copy of W. In it: round, find the error,"
            " update the columns that follow."
        ),
        (
            "Keep the column before you round it (`.clone()`), as the error needs"
            " both. Every row has its own error: the update is an outer product."
        ),
        (
            "`W[:, q + 1:] -= torch.outer((w - W[:, q]) / U[q, q], U[q, q + 1:])`,"
            " with w the column before rounding."
        ),
    ),
)
def round_with_feedback(answer):
    """Columns are rounded one by one, and later ones make up for the errors."""
    top = 3

    def draw() -> tuple[Tensor, Tensor, Tensor, int]:
        W, H = problem(6)  # square, so that a scale on the wrong axis fits
        W = W * torch.linspace(0.4, 1.6, 6)[:, None]
        # some values are beyond the last level
        s = (W.abs().amax(1) / (top + 0.8))[:, None].expand(6, 6)
        return W, gptq.inverse_factor(H), s, top

    W, U, s, _ = telling(draw, feedback, wrong_roundings)
    row_scale = s[:, 0].clone()
    what = "round_with_feedback(W, U, scale, 3)"
    got = expect(
        answer(W, U, row_scale, top), shape=(6, 6), dtype=torch.float32, what=what
    )
    right = feedback(W, U, s, top)
    diagnose(
        got, right=right, mistakes=wrong_roundings(W, U, s, top), tol=1e-5, what=what
    )
    for out, columns, top in ((3, 9, 1), (8, 5, 7), (2, 1, 3)):
        W, H = problem(columns, out)
        U = gptq.inverse_factor(H)
        row_scale = W.abs().amax(1) / (top + 0.6)
        got = expect(answer(W, U, row_scale, top), shape=(out, columns), what="Ŵ")
        right = feedback(W, U, row_scale[:, None].expand(out, columns), top)
        if not close(got, right, tol=1e-5):
            raise Mistake(
                f"right for 6 × 6 weights and top = 3, wrong for {out} × {columns}"
                f" and top = {top}: take the sizes and `top` from the arguments"
            )


def wrong_roundings(W: Tensor, U: Tensor, s: Tensor, top: int) -> dict:
    """What usual mistakes give for Ŵ."""

    def but(**changes) -> Callable[[], Tensor]:
        return lambda: feedback(W, U, s, top, **changes)

    backwards = feedback(W.flip(1), U.flip(0, 1).T, s, top).flip(1)
    return {
        "this is round to nearest: no later column makes up for the errors. Is `w` a"
        " copy of the column, and is it a row of U that you use?": but(reach=0),
        "later columns move the wrong way: subtract the error times U_qj": but(sign=-1),
        "the division by U_qq is missing": but(error=lambda e, d, s: e),
        "you multiplied the error by U_qq: divide by it": but(
            error=lambda e, d, s: e * d
        ),
        "the error is divided by U_qq twice": but(error=lambda e, d, s: e / d**2),
        "the error is divided by the scale, too: it is one of weights": but(
            error=lambda e, d, s: e / d / s
        ),
        "only the next column is updated: all later ones are": but(reach=1),
        "the errors are those of the weights as they were at the start: round each"
        " column as it is now": lambda: from_old_weights(W, U, s, top),
        "the codes are clamped at −top − 1: at −top is asked": but(low=-top - 1),
        "these are the codes: multiply them by the scale": but(codes=True),
        "you cut off instead of rounding to nearest": but(rounding=torch.trunc),
        "you rounded down: to the nearest is asked": but(rounding=torch.floor),
        "the scales are on the wrong axis: scale[i] belongs to row i": lambda: feedback(
            W, U, s.T, top
        ),
        "you go from the last column to the first": backwards,
        "nothing is rounded: this is W": W,
        "you used the inverse itself, Uᵀ U, where U is asked": lambda: feedback(
            W, U.T @ U, s, top
        ),
        "the codes are not clamped to −top … top: an updated weight may leave the"
        " range": lambda: feedback(W, U, s, 99),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=4,
    importance=3,
    hints=(
        (
            "`perm = H.diagonal().argsort(descending=True)`. W is permuted along its"
            " columns, H along both."
        ),
        (
            "In the loop, column i is the original column perm[i]: that one decides"
            " the group. Otherwise it is exercise 3."
        ),
        "The way back is `W[:, perm.argsort()]`; `W[:, perm]` would permute twice.",
    ),
)
def largest_first(answer):
    """The columns with the largest inputs are rounded first."""
    top, size = 3, 2

    def draw() -> tuple[Tensor, Tensor, Tensor, int, int]:
        W, H = problem(8)
        scale = W.unflatten(1, (-1, size)).abs().amax(-1) / (top + 0.3)
        return W, H, scale, size, top

    W, H, scale, _, _ = telling(draw, permuted, wrong_orders)
    what = "largest_first(W, H, scale, 2, 3)"
    got = expect(
        answer(W, H, scale, size, top), shape=(6, 8), dtype=torch.float32, what=what
    )
    right = permuted(W, H, scale, size, top)
    mistakes = wrong_orders(W, H, scale, size, top)
    diagnose(got, right=right, mistakes=mistakes, tol=1e-5, what=what)
    W, H = problem(9, out=4)
    scale = W.unflatten(1, (-1, 3)).abs().amax(-1) / 7
    got = expect(answer(W, H, scale, 3, 7), shape=(4, 9), what="Ŵ")
    if not close(got, permuted(W, H, scale, 3, 7), tol=1e-5):
        raise Mistake(
            "right for groups of 2 and top = 3, wrong for groups of 3 and top = 7:"
            " take both from the arguments"
        )


def perm_of(H: Tensor) -> Tensor:
    """The columns in order of decreasing H_jj."""
    return H.diagonal().argsort(descending=True)


def permuted(
    W: Tensor,
    H: Tensor,
    scale: Tensor,
    size: int,
    top: int,
    *,
    perm: Tensor | None = None,
    groups: Tensor | None = None,
    H_perm: Tensor | None = None,
    back: Tensor | None = None,
    damping: float = 0.01,
    reach: int | None = None,
) -> Tensor:
    """Ŵ of exercise 4, and what comes out with one thing changed."""
    perm = perm_of(H) if perm is None else perm
    groups = perm // size if groups is None else groups
    H_perm = H[perm][:, perm] if H_perm is None else H_perm
    U = gptq.inverse_factor(H_perm, damping)
    found = feedback(W[:, perm], U, scale[:, groups], top, reach=reach)
    return found[:, perm.argsort() if back is None else back]


def wrong_orders(W: Tensor, H: Tensor, scale: Tensor, size: int, top: int) -> dict:
    """What usual mistakes give for Ŵ."""
    perm = perm_of(H)
    same = torch.arange(len(H))

    def but(**changes) -> Callable[[], Tensor]:
        return lambda: permuted(W, H, scale, size, top, **changes)

    return {
        "the columns are not put back in their places": but(back=same),
        "the columns are permuted once more: the way back is perm.argsort()": but(
            back=perm
        ),
        "the groups are those of neighbours in the new order: column i has the scale"
        " of group perm[i] // group_size": but(groups=same // size),
        "the columns are not put back, and the groups are those of the new order": but(
            back=same, groups=same // size
        ),
        "the smallest inputs come first: the largest are asked": but(perm=perm.flip(0)),
        "the columns are in their original order: nothing is permuted": but(perm=same),
        "H is not permuted: its rows and columns must go with those of W": but(
            H_perm=H
        ),
        "only the rows of H are permuted, or only its columns: both are asked": (
            lambda: half_permuted(W, H, scale, size, top)
        ),
        "the order is that of the weights' size: that of the inputs, H_jj, is asked": (
            but(perm=W.square().sum(0).argsort(descending=True))
        ),
        "the damping is missing": but(damping=0.0),
        "this is round to nearest: no later column makes up for the errors": but(
            reach=0
        ),
    }


def half_permuted(W: Tensor, H: Tensor, scale: Tensor, size: int, top: int) -> Tensor:
    """With H permuted along one side; NaN where that has no factor."""
    try:
        return permuted(W, H, scale, size, top, H_perm=H[perm_of(H)])
    except ValueError:
        return torch.full_like(W, torch.nan)
