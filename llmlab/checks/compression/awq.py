"""Checks of 06-compression/06-awq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/06-awq")


def problem(out: int = 6, columns: int = 8, tokens: int = 12) -> tuple[Tensor, Tensor]:
    """W, and X (tokens, in), whose channels differ in size, in spread and in sign."""
    X = torch.randn(tokens, columns)
    X = X + 2 * torch.randn(columns)  # means that are not 0
    X[torch.arange(columns) % tokens, torch.arange(columns)] *= 1 + 6 * torch.rand(
        columns
    )
    X = X * torch.logspace(-0.6, 0.6, columns)[torch.randperm(columns)]
    W = torch.randn(out, columns) * torch.logspace(-0.4, 0.4, columns)
    return W[:, torch.randperm(columns)], X


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "A channel is a column of X and a column of W. Its size is one number.",
        "`X.abs().mean(0)` has a size for each channel; `topk(count).indices` picks.",
        "Clone W_hat, then copy `W[:, kept]` into the same columns of the clone.",
    ),
)
def keep_salient(answer):
    """The columns of the most salient channels stay as they are."""

    def draw() -> tuple[Tensor, Tensor, Tensor, int]:
        W, X = problem(8, 8, 8)  # square, so that a wrong axis fits
        # one large weight in each column: the mean and the norm differ
        W[torch.randperm(8), torch.arange(8)] *= 1 + 6 * torch.rand(8)
        return W, torch.round(W), X, 3

    not_squares(answer)
    W, W_hat, X, count = telling(draw, kept_salient, wrong_keeps)
    what = "keep_salient(W, W_hat, X, 3)"
    got = expect(
        answer(W, W_hat, X, count), shape=(8, 8), dtype=torch.float32, what=what
    )
    right = kept_salient(W, W_hat, X, count)
    diagnose(got, right=right, mistakes=wrong_keeps(W, W_hat, X, count), what=what)
    for out, columns, tokens, count in ((3, 9, 20, 1), (5, 6, 4, 6)):
        W, X = problem(out, columns, tokens)
        W_hat = torch.round(W)
        got = expect(answer(W, W_hat, X, count), shape=(out, columns), what="Ŵ")
        if not close(got, kept_salient(W, W_hat, X, count)):
            raise Mistake(
                "right for 8 × 8 weights and count = 3, wrong for"
                f" {out} × {columns} and count = {count}: take both from the arguments"
            )


def not_squares(answer) -> None:
    """Three channels, the first in |x|, the first in x², and the first in its peak."""
    X = torch.full((8, 8), 0.1)  # square, so that a wrong axis fits
    X[:, 0] = 1
    X[:4, 1] = -1.8
    X[3, 2] = 2.5
    W = torch.randn(8, 8)
    got = answer(W, torch.round(W), X[torch.randperm(8)], 1)
    expect(got, shape=(8, 8), dtype=torch.float32, what="Ŵ")
    if close(got, kept_salient(W, torch.round(W), X.square(), 1)):
        raise Mistake(
            "the channels are those of the largest squares: the mean of |x| is asked"
        )


def kept_salient(
    W: Tensor,
    W_hat: Tensor,
    X: Tensor,
    count: int,
    size: Callable[[Tensor, Tensor], Tensor] = lambda W, X: X.abs().mean(0),
    largest: bool = True,
) -> Tensor:
    """Ŵ of exercise 1, and what comes out with one thing changed."""
    kept = size(W, X).topk(count, largest=largest).indices
    found = W_hat.clone()
    found[:, kept] = W[:, kept]
    return found


def wrong_keeps(W: Tensor, W_hat: Tensor, X: Tensor, count: int) -> dict[str, Tensor]:
    """What usual mistakes give for Ŵ."""

    def by(size: Callable[[Tensor, Tensor], Tensor], **changes) -> Tensor:
        return kept_salient(W, W_hat, X, count, size, **changes)

    def mean(W: Tensor, X: Tensor) -> Tensor:
        return X.abs().mean(0)

    rows = W_hat.clone()
    kept = mean(W, X).topk(count).indices
    rows[kept] = W[kept]
    return {
        "the channels are those of the largest |x|: the mean of |x| is asked": by(
            lambda W, X: X.abs().amax(0)
        ),
        "the channels are those of the largest mean: of |x|, without its sign": by(
            lambda W, X: X.mean(0)
        ),
        "the channels are those of the largest weights: the inputs decide": by(
            lambda W, X: W.abs().mean(0)
        ),
        "the channels are those of the largest columns of W, by their norm: the inputs"
        " decide": by(lambda W, X: W.square().sum(0)),
        "the channels are those of the smallest inputs: the largest are asked": by(
            mean, largest=False
        ),
        "the mean is taken over the features of a token: over the tokens is asked": by(
            lambda W, X: X.abs().mean(1)
        ),
        "the sizes are those of x times w: those of the inputs are asked": by(
            lambda W, X: X.abs().mean(0) * W.abs().mean(0)
        ),
        "rows of W stay: a channel of the input is a column of W": rows,
        "the salient columns are rounded and all others stay: it is the other way"
        " round": W + W_hat - kept_salient(W, W_hat, X, count),
        "the salient columns are 0: they shall be those of W": kept_salient(
            torch.zeros_like(W), W_hat, X, count
        ),
        "one channel too few stays": kept_salient(W, W_hat, X, count - 1),
        "one channel too many stays": kept_salient(W, W_hat, X, count + 1),
        "nothing stays: this is W_hat": W_hat,
        "nothing is rounded: this is W": W,
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "Two lines: a power, then a division by one number.",
        "`X.abs().mean(0) ** alpha` has one entry for each channel.",
        "The number is `(s.max() * s.min()).sqrt()`, of the powers themselves.",
    ),
)
def channel_scale(answer):
    """The scale of each channel, from the mean size of its inputs."""

    def draw() -> tuple[Tensor, float]:
        return problem(2, 7, 7)[1], 0.6  # square, so that a wrong axis fits

    X, alpha = telling(draw, scale, wrong_scales)
    what = "channel_scale(X, 0.6)"
    got = expect(answer(X, alpha), shape=(7,), dtype=torch.float32, what=what)
    mistakes = wrong_scales(X, alpha)
    diagnose(got, right=scale(X, alpha), mistakes=mistakes, what=what)
    for tokens, columns, alpha in ((5, 9, 0.25), (30, 4, 1.0), (3, 6, 0.0)):
        X = problem(2, columns, tokens)[1]
        got = expect(answer(X, alpha), shape=(columns,), what="s")
        if not close(got, scale(X, alpha)):
            raise Mistake(
                f"right for alpha = 0.6, wrong for {tokens} tokens of {columns}"
                f" channels and alpha = {alpha}: take `alpha` from the argument"
            )


def normed(s: Tensor) -> Tensor:
    """s / √(max s · min s)."""
    return s / (s.max() * s.min()).sqrt()


def scale(
    X: Tensor,
    alpha: float,
    size: Callable[[Tensor], Tensor] = lambda X: X.abs().mean(0),
) -> Tensor:
    """s of exercise 2, or with another size of a channel."""
    return normed(size(X) ** alpha)


def wrong_scales(X: Tensor, alpha: float) -> dict[str, Tensor]:
    """What usual mistakes give for s."""
    power = X.abs().mean(0) ** alpha
    spread = power.max() * power.min()
    return {
        "the normalisation is missing": power,
        "this is divided by the largest: by √(max · min) is asked": power / power.max(),
        "this is divided by the smallest: by √(max · min) is asked": power
        / power.min(),
        "this is divided by the mean: by √(max · min) is asked": power / power.mean(),
        "the root is missing in √(max · min)": power / spread,
        "this is multiplied by √(max · min): divide by it": power * spread.sqrt(),
        "√(max · min) is that of the sizes before the power: it is that of s": power
        / (X.abs().mean(0).max() * X.abs().mean(0).min()).sqrt(),
        "the sizes are the largest |x|, as in SmoothQuant: AWQ takes the mean": scale(
            X, alpha, lambda X: X.abs().amax(0)
        ),
        "the mean is that of x: take |x| first": scale(
            X, alpha, lambda X: X.mean(0).abs()
        ),
        "the sizes are roots of mean squares: the mean of |x| is asked": scale(
            X, alpha, lambda X: X.square().mean(0).sqrt()
        ),
        "the power comes before the mean: the mean first": normed(
            (X.abs() ** alpha).mean(0)
        ),
        "the mean is taken over the features of a token: over the tokens is asked": (
            scale(X, alpha, lambda X: X.abs().mean(1))
        ),
        "alpha is a factor: it is the exponent": normed(X.abs().mean(0) * alpha),
        "the exponent is 1 − alpha: it is alpha": scale(X, 1 - alpha),
        "these are the inverses: channels with large inputs get a large s": normed(
            1 / power
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "Scale, cut into groups, find each group's step, round, undo both.",
        (
            "`(W * s).unflatten(1, (-1, group_size))` is (out, groups, group_size);"
            " `amax(-1, keepdim=True)` finds the largest of a group."
        ),
        (
            "With `step = V.abs().amax(-1, keepdim=True) / top` the rounded V is"
            " `torch.round(V / step) * step`; then `.flatten(1) / s`."
        ),
    ),
)
def scale_and_round(answer):
    """Channels are scaled up, rounded in groups, and scaled down again."""

    def draw() -> tuple[Tensor, Tensor, int, int]:
        W, X = problem(8, 8)
        return W, scale(X, 0.5), 4, 3

    W, s, size, top = telling(draw, rounded, wrong_roundings)
    what = "scale_and_round(W, s, 4, 3)"
    got = expect(answer(W, s, size, top), shape=(8, 8), dtype=torch.float32, what=what)
    mistakes = wrong_roundings(W, s, size, top)
    diagnose(
        got, right=rounded(W, s, size, top), mistakes=mistakes, tol=1e-5, what=what
    )
    for out, columns, size, top in ((3, 6, 2, 7), (5, 9, 9, 1), (2, 12, 3, 3)):
        W, X = problem(out, columns)
        s = scale(X, 0.7)
        got = expect(answer(W, s, size, top), shape=(out, columns), what="Ŵ")
        if not close(got, rounded(W, s, size, top), tol=1e-5):
            raise Mistake(
                f"right for 8 × 8 weights in groups of 4 and top = 3, wrong for"
                f" {out} × {columns} in groups of {size} and top = {top}: take them"
                " from the arguments"
            )


def steps_of(V: Tensor, size: int, top: float) -> Tensor:
    """The step of each weight's group."""
    largest = V.unflatten(1, (-1, size)).abs().amax(-1)
    return largest.repeat_interleave(size, 1) / top


def rounded(
    W: Tensor,
    s: Tensor,
    size: int,
    top: int,
    *,
    step: Tensor | None = None,
    rounding: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """Ŵ of exercise 3, and what comes out with one thing changed."""
    V = W * s
    if step is None:
        step = steps_of(V, size, top)
    return rounding(V / step) * step / s


def wrong_roundings(W: Tensor, s: Tensor, size: int, top: int) -> dict[str, Tensor]:
    """What usual mistakes give for Ŵ."""
    V = W * s
    ones = torch.ones_like(s)
    step = steps_of(V, size, top)
    signed = V.unflatten(1, (-1, size)).amax(-1).repeat_interleave(size, 1) / top
    old = steps_of(W, size, top)
    return {
        "this is round to nearest: W is not scaled before it is rounded, or its rows"
        " are in place of its columns, which changes no code": rounded(
            W, ones, size, top
        ),
        "the scale is not taken out again: divide by s at the end": torch.round(
            V / step
        )
        * step,
        "the scale is taken out twice": rounded(W, s, size, top) / s,
        "this divides by s first and multiplies at the end: turn it round": (
            rounded(W, 1 / s, size, top)
        ),
        "W is the wrong way round: s[j] belongs to column j, and groups run along the"
        " rows": rounded(W.T, s, size, top).T,
        "W is rounded without s, and then divided by it": rounded(W, ones, size, top)
        / s,
        "the steps are those of W before it is scaled: take them from W · s": rounded(
            W, s, size, top, step=old
        ),
        "the steps are those of W before it is scaled, with codes clamped: take them"
        " from W · s": torch.round(V / old).clamp(-top, top) * old / s,
        "there is one step for a whole row: each group has its own": rounded(
            W, s, W.shape[1], top
        ),
        "there is one step for all of W: each group of each row has its own": rounded(
            W, s, size, top, step=(V.abs().max() / top).expand_as(V)
        ),
        "the groups run down the columns: they run along the rows": rounded(
            W, s, size, top, step=steps_of(V.T, size, top).T
        ),
        "the groups are interleaved: neighbours share a step": rounded(
            W, s, size, top, step=interleaved_steps(V, size, top)
        ),
        "the step is the largest by top + 1: by top is asked": rounded(
            W, s, size, top + 1
        ),
        "the step is the largest by top + ½: by top is asked": rounded(
            W, s, size, top + 0.5
        ),
        **{
            f"the step is the largest by {n}: by `top`, the argument, is asked": (
                rounded(W, s, size, n)
            )
            for n in (7, 8, 127)
        },
        "the largest is taken with its sign: of |W · s| is asked": rounded(
            W, s, size, top, step=signed
        ),
        "you cut off instead of rounding to nearest": rounded(
            W, s, size, top, rounding=torch.trunc
        ),
        "you rounded down: to the nearest is asked": rounded(
            W, s, size, top, rounding=torch.floor
        ),
        "these are the codes: multiply them by the step, divide by s": torch.round(
            V / step
        ),
        "the codes are divided by s, and not multiplied by the step": torch.round(
            V / step
        )
        / s,
        "nothing is rounded: this is W": W,
    }


def interleaved_steps(V: Tensor, size: int, top: int) -> Tensor:
    """Column j with j + groups, j + 2 · groups …"""
    largest = V.unflatten(1, (size, -1)).abs().amax(1)
    return largest.repeat(1, size) / top


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=20,
    difficulty=4,
    importance=4,
    hints=(
        (
            "A loop over the exponents. Each trial begins with W as it was given: give"
            " what you round a name of its own."
        ),
        "In it: s of this alpha, Ŵ of this s, and the outputs X Ŵᵀ beside X Wᵀ.",
        (
            "`(X @ W_hat.T - X @ W.T).square().mean()`, with your"
            " `scale_and_round(W, channel_scale(X, alpha), group_size, top)`."
        ),
    ),
)
def trial_errors(answer):
    """What each exponent leaves of the outputs' error, from the same weights."""
    alphas = [0.0, 0.3, 0.6, 1.0]

    def draw() -> tuple[Tensor, Tensor, list[float], int, int]:
        W, X = problem(8, 8, 8)
        return W, X, alphas, 4, 3

    W, X, _, size, top = telling(draw, errors_of, wrong_errors)
    what = "trial_errors(W, X, [0.0, 0.3, 0.6, 1.0], 4, 3)"
    got = expect(
        answer(W, X, alphas, size, top), shape=(4,), dtype=torch.float32, what=what
    )
    mistakes = wrong_errors(W, X, alphas, size, top)
    right = errors_of(W, X, alphas, size, top)
    diagnose(got, right=right, mistakes=mistakes, tol=1e-4, what=what)
    for out, columns, tokens, tried, size, top in (
        (3, 6, 20, [0.5, 0.1], 2, 7),
        (4, 9, 5, [0.2, 0.4, 0.9], 3, 1),
    ):
        W, X = problem(out, columns, tokens)
        got = expect(answer(W, X, tried, size, top), shape=(len(tried),), what="errors")
        if not close(got, errors_of(W, X, tried, size, top), tol=1e-4):
            raise Mistake(
                f"right for {len(alphas)} exponents from 0 on, wrong for {tried} and"
                f" {out} × {columns} weights in groups of {size} with top = {top}:"
                " take all of them from the arguments"
            )


def errors_of(
    W: Tensor,
    X: Tensor,
    alphas: list[float],
    size: int,
    top: int,
    *,
    error: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    scale_by: Callable[[Tensor, float], Tensor] = scale,
) -> Tensor:
    """The errors of exercise 4, and what comes out with one thing changed.

    Args:
        error: of (W, Ŵ, X, s).
    """
    if error is None:
        error = mean_square
    found = []
    for alpha in alphas:
        s = scale_by(X, alpha)
        found.append(error(W, rounded(W, s, size, top), X, s))
    return torch.stack(found)


def mean_square(W: Tensor, W_hat: Tensor, X: Tensor, s: Tensor) -> Tensor:
    """The mean squared error of the outputs."""
    return (X @ W_hat.T - X @ W.T).square().mean()


def not_restored(
    W: Tensor, X: Tensor, alphas: list[float], size: int, top: int, against_first: bool
) -> Tensor:
    """Each trial rounds what the one before it left.

    Args:
        against_first: whether the right outputs are those of the first W.
    """
    now = W
    found = []
    for alpha in alphas:
        after = rounded(now, scale(X, alpha), size, top)
        found.append(mean_square(W if against_first else now, after, X, X))
        now = after
    return torch.stack(found)


def scales_pile_up(
    W: Tensor, X: Tensor, alphas: list[float], size: int, top: int
) -> Tensor:
    """W keeps the scale of each trial."""
    now = W
    found = []
    for alpha in alphas:
        s = scale(X, alpha)
        now = now * s
        step = steps_of(now, size, top)
        W_hat = torch.round(now / step) * step / s
        found.append(mean_square(W, W_hat, X, s))
    return torch.stack(found)


def wrong_errors(
    W: Tensor, X: Tensor, alphas: list[float], size: int, top: int
) -> dict[str, Tensor]:
    """What usual mistakes give for the errors."""

    def but(error: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return errors_of(W, X, alphas, size, top, error=error)

    def with_scale(scale_by: Callable[[Tensor, float], Tensor]) -> Tensor:
        return errors_of(W, X, alphas, size, top, scale_by=scale_by)

    right = errors_of(W, X, alphas, size, top)
    return {
        "each trial rounds what the trial before it left: begin each with W as it was"
        " given": not_restored(W, X, alphas, size, top, True),
        "each trial rounds what the trial before it left, and is compared with that:"
        " begin each with W, and compare with W": not_restored(
            W, X, alphas, size, top, False
        ),
        "the scales of all trials pile up in W: begin each with W as it was given": (
            scales_pile_up(W, X, alphas, size, top)
        ),
        "there is one step for a whole row: each group has its own": errors_of(
            W, X, alphas, W.shape[1], top
        ),
        "this is the error of the weights: that of the outputs is asked": but(
            lambda W, W_hat, X, s: (W_hat - W).square().mean()
        ),
        "the squares are added up: their mean is asked": but(
            lambda W, W_hat, X, s: (X @ (W_hat - W).T).square().sum()
        ),
        "this is the mean of |error|: of its square is asked": but(
            lambda W, W_hat, X, s: (X @ (W_hat - W).T).abs().mean()
        ),
        "this is a root of the mean square: without the root": right.sqrt(),
        "the largest squared error: the mean is asked": but(
            lambda W, W_hat, X, s: (X @ (W_hat - W).T).square().amax()
        ),
        "the inputs are divided by s, although s is out of Ŵ already": but(
            lambda W, W_hat, X, s: ((X / s) @ W_hat.T - X @ W.T).square().mean()
        ),
        "s is still in Ŵ, and the inputs are not divided by it": but(
            lambda W, W_hat, X, s: (X @ (W_hat * s).T - X @ W.T).square().mean()
        ),
        "the right outputs are divided by s, too: they are X Wᵀ": but(
            lambda W, W_hat, X, s: (X / s @ (W_hat - W).T).square().mean()
        ),
        "the outputs are those of Wᵀ: X Ŵᵀ is asked": but(
            lambda W, W_hat, X, s: (X @ (W_hat - W)).square().mean()
        ),
        "the scales come from the largest |x|: from its mean is asked": with_scale(
            lambda X, alpha: scale(X, alpha, lambda X: X.abs().amax(0))
        ),
        "the exponents are used as 1 − alpha": with_scale(
            lambda X, alpha: scale(X, 1 - alpha)
        ),
        "all trials use the first exponent": right[:1].expand_as(right),
        "all trials use the last exponent": right[-1:].expand_as(right),
        "the errors are in the reverse order": right.flip(0),
        "the errors are sorted: leave them in the order of the exponents": (
            right.sort().values
        ),
        "these are shares of the first error: the errors themselves are asked": right
        / right[0],
        "each is the least error so far: the error of each trial is asked": (
            right.cummin(0).values
        ),
    }
