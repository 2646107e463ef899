"""What marks the exercises of 06-compression/03-smoothquant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.operations import ELSEWHERE, Operations
from llmlab.checks.telling import telling
from llmlab.compression import smoothquant
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/03-smoothquant")


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Two vectors of one number for each channel: how large it gets in X, and"
            " how large in any of the weights. Then the formula."
        ),
        (
            "A channel is a column of X, and a column of every W. `torch.cat(weights)`"
            " puts the weights one below the other."
        ),
        (
            "`torch.where((x_max > 0) & (w_max > 0), s, 1.0)` after"
            " `s = x_max.pow(alpha) / w_max.pow(1 - alpha)`."
        ),
    ),
)
def smoothing_scale(answer):
    """The scale of each channel, from the largest of X and of all weights."""

    def draw() -> tuple[Tensor, list[Tensor], float]:
        # square, so that the wrong axis fits; W's largest is now in one, now in another
        X = torch.randn(6, 6) * torch.logspace(-1, 1, 6)[torch.randperm(6)]
        weights = [torch.randn(6, 6), 3 * torch.randn(6, 6).pow(3), torch.randn(6, 6)]
        return X - 0.4 * X.abs().amax(0), weights, 0.3

    X, weights, alpha = telling(draw, scale_of, wrong_scales)
    what = "smoothing_scale(X, weights, 0.3)"
    got = expect(answer(X, weights, alpha), shape=(6,), dtype=torch.float32, what=what)
    right = scale_of(X, weights, alpha)
    diagnose(got, right=right, mistakes=wrong_scales(X, weights, alpha), what=what)
    for alpha in (0.0, 0.5, 0.85, 1.0):
        got = expect(answer(X, weights, alpha), shape=(6,), what="s")
        if not close(got, scale_of(X, weights, alpha)):
            raise Mistake(
                f"right for alpha = 0.3, wrong for alpha = {alpha}: take it from the"
                " argument; 0 and 1 are allowed"
            )
    X, weights = torch.randn(9, 5), [torch.randn(4, 5), torch.randn(2, 5)]
    got = expect(answer(X, weights, 0.5), shape=(5,), what="s")
    if not close(got, scale_of(X, weights, 0.5)):
        raise Mistake(
            "right for 6 tokens and three weights of 6 × 6, wrong for 9 tokens, 5"
            " channels and two weights of 4 and 2 rows"
        )
    dead_channels(answer)


def dead_channels(answer) -> None:
    """A channel that was always 0, one that no weight reads, and both."""
    X, weights = torch.randn(7, 5), [torch.randn(4, 5), torch.randn(2, 5)]
    X[:, 1] = 0
    X[:, 3] = 0
    for W in weights:
        W[:, 2] = 0
        W[:, 3] = 0
    weights[0][:, 4] = 0  # another one reads it
    for alpha in (0.5, 0.0, 1.0):
        got = expect(answer(X, weights, alpha), shape=(5,), what="s", finite=False)
        right = scale_of(X, weights, alpha)
        if close(got, right):
            continue
        cases = {
            1: "a channel of X that was always 0",
            2: "a channel that no weight reads, a column of zeros in all",
            3: "a channel of zeros in X and in the weights",
        }
        for j, case in cases.items():
            if not close(got[j], right[j]):
                raise Mistake(
                    f"{case} must get s = 1; with alpha = {alpha} it gets"
                    f" {got[j].item():.3g}"
                )
        raise Mistake(
            "where only one of the weights has a column of zeros, the other one counts"
        )


def scale_of(X: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """What is asked for."""
    w_max = torch.cat(weights).abs().amax(0)
    return smoothquant.smoothing_scale(X.abs().amax(0), w_max, alpha)


def wrong_scales(X: Tensor, weights: list[Tensor], alpha: float) -> dict[str, Tensor]:
    """What usual mistakes give for s."""
    x = X.abs().amax(0)
    every = torch.cat(weights)
    w = every.abs().amax(0)
    formula = smoothquant.smoothing_scale
    mean = torch.stack([W.abs().amax(0) for W in weights]).mean(0)
    total = torch.stack([W.abs().amax(0) for W in weights]).sum(0)
    x_range = X.amax(0) - X.amin(0)
    return {
        "alpha and 1 − alpha are exchanged: alpha belongs to X": formula(
            x, w, 1 - alpha
        ),
        "this is 1 / s: what is large in X is on top": 1 / formula(x, w, alpha),
        "you multiplied by the weights' part: divide by it": (
            x**alpha * w ** (1 - alpha)
        ),
        "the weights' exponent is alpha, too: it is 1 − alpha": (x / w) ** alpha,
        "the weights' exponent is missing: it is 1 − alpha": x**alpha / w,
        "the exponent of X is missing: it is alpha": x / w ** (1 - alpha),
        "this is x / w without exponents": x / w,
        "this is the root, as with alpha = 0.5: take alpha from the argument": (
            formula(x, w, 0.5)
        ),
        "only the weights count here: X is missing": w ** (alpha - 1),
        "only X counts here: the weights are missing": x**alpha,
        "you took the largest x of a channel, not the largest |x|": formula(
            X.amax(0).abs(), w, alpha
        ),
        "you took the largest w of a column, not the largest |w|": formula(
            x, every.amax(0).abs(), alpha
        ),
        "you took the mean of |x|: the largest is asked": formula(
            X.abs().mean(0), w, alpha
        ),
        "you took the mean of |w|: the largest is asked": formula(
            x, every.abs().mean(0), alpha
        ),
        "you took the largest |x| of each token: a channel is a column": formula(
            X.abs().amax(1), w, alpha
        ),
        "you took the largest |w| of each row: a channel is a column of W": formula(
            x, torch.stack([W.abs().amax(1) for W in weights]).amax(0), alpha
        ),
        "only the first weight counts: the largest is over all of them": formula(
            x, weights[0].abs().amax(0), alpha
        ),
        "only the last weight counts: the largest is over all of them": formula(
            x, weights[-1].abs().amax(0), alpha
        ),
        "you took the mean over the weights: the largest is asked": formula(
            x, mean, alpha
        ),
        "you added the weights up: the largest of them is asked": formula(
            x, total, alpha
        ),
        "you took max − min of a channel: the largest |x| is asked": formula(
            x_range, w, alpha
        ),
        "this is llmcompressor's formula, with max − min and twice the weight": (
            formula(x_range, 2 * w, alpha)
        ),
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "The norm's weight makes the channels. Each W reads them.",
        "What makes a channel is divided by its s; what reads it is multiplied.",
        "`gamma / s` and `W * s`: s has one number for each column of W.",
    ),
)
def fold(answer):
    """Scales go into the norm before, and into all that read it."""

    def draw() -> tuple[Tensor, list[Tensor], Tensor]:
        gamma = 1 + 0.3 * torch.randn(6)
        weights = [torch.randn(6, 6) for _ in range(3)]
        return gamma, weights, torch.rand(6) * 2 + 0.3

    gamma, weights, s = telling(draw, folded, wrong_folds)
    what = "fold(gamma, [q, k, v], s)"
    got = flat(answer(gamma, weights, s), [6, 6, 6], 6, what)
    mistakes = wrong_folds(gamma, weights, s)
    diagnose(got, right=folded(gamma, weights, s), mistakes=mistakes, what=what)
    # grouped-query attention: fewer rows in k and v; and two readers, as gate and up
    for rows, width in (([8, 2, 2], 8), ([5, 5], 3)):
        gamma, s = torch.randn(width), torch.rand(width) + 0.5
        weights = [torch.randn(count, width) for count in rows]
        case = f"weights of {' and '.join(map(str, rows))} rows, {width} channels"
        got = flat(answer(gamma, weights, s), rows, width, f"fold with {case}")
        if not close(got, folded(gamma, weights, s)):
            raise Mistake(f"right for three weights of 6 × 6, wrong for {case}")


def folded(gamma: Tensor, weights: list[Tensor], s: Tensor) -> Tensor:
    """What is asked for, one below the other."""
    return torch.cat([(gamma / s)[None], *(W * s for W in weights)])


def flat(value, rows: list[int], width: int, what: str) -> Tensor:
    """(gamma, weights) as one matrix."""
    pair = expect(value, kind=tuple, what=what)
    if len(pair) != 2:
        raise Mistake(f"{what} returned {len(pair)} things: return gamma and weights")
    gamma = expect(pair[0], shape=(width,), dtype=torch.float32, what="your gamma")
    weights = expect(pair[1], kind=list, what="your weights")
    if len(weights) != len(rows):
        raise Mistake(
            f"{len(weights)} weights came back, {len(rows)} went in: every linear that"
            " reads the norm must get the scale"
        )
    for W, count in zip(weights, rows, strict=True):
        expect(W, shape=(count, width), dtype=torch.float32, what="one of your weights")
    return torch.cat([gamma[None], *weights])


def wrong_folds(gamma: Tensor, weights: list[Tensor], s: Tensor) -> dict[str, Tensor]:
    """What usual mistakes give, as one matrix."""

    def both(g: Tensor, *found: Tensor) -> Tensor:
        return torch.cat([g[None], *found])

    by_column = [W * s for W in weights]
    return {
        "it is the other way round: divide the norm, multiply the weights": both(
            gamma * s, *(W / s for W in weights)
        ),
        "both are divided: the weights must make up for the norm": both(
            gamma / s, *(W / s for W in weights)
        ),
        "both are multiplied: the norm must be divided": both(gamma * s, *by_column),
        "the norm is as it was: divide gamma by s": both(gamma, *by_column),
        "the weights are as they were: multiply their columns by s": both(
            gamma / s, *weights
        ),
        "nothing has changed: neither the norm nor the weights": both(gamma, *weights),
        "you scaled rows of W: a channel is a column": both(
            gamma / s, *(W * s[:, None] for W in weights)
        ),
        "only the first weight is scaled: all of them read the norm": both(
            gamma / s, by_column[0], *weights[1:]
        ),
        "the last weight is not scaled: all of them read the norm": both(
            gamma / s, *by_column[:-1], weights[-1]
        ),
        "the weights are scaled one after the other by s, s², s³: once is enough": (
            both(gamma / s, *(W * s ** (i + 1) for i, W in enumerate(weights)))
        ),
        "the weights have s twice": both(gamma / s, *(W * s**2 for W in weights)),
        "gamma is divided by s twice: once is enough": both(gamma / s**2, *by_column),
        "gamma is divided once for each weight: once is enough": both(
            gamma / s ** len(weights), *by_column
        ),
        "this gamma is 1 / s: divide the norm's own weight by s": both(
            1 / s, *by_column
        ),
        "you took the root of s": both(
            gamma / s.sqrt(), *(W * s.sqrt() for W in weights)
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Three cases for the step of X, then the same lines for all: codes of X,"
            " codes of W, their product, the steps."
        ),
        (
            "Keep the step of X as (tokens, 1) or as one number, so that X / step"
            " works in all cases. Codes are clamped to −127 … 127, cast to int32 and"
            " multiplied."
        ),
        (
            "The product of codes is (tokens, out): times x_step, (tokens, 1), times"
            " w_step, (out,). Where a step is 0, divide by 1 instead."
        ),
    ),
)
def w8a8(answer):
    """A product of 8-bit codes, with steps for tokens, for the tensor, or static."""
    X, W = telling(draw_product, lambda X, W: product(X, W), wrong_products)
    with Arithmetic() as seen:
        got = answer(X, W, "token", None)
    what = 'w8a8(X, W, "token", None)'
    got = expect(got, shape=(6, 6), dtype=torch.float32, what=what)
    mistakes = wrong_products(X, W) | other_orders(X, W)
    diagnose(got, right=product(X, W), mistakes=mistakes, what=what)
    whole_tensor(answer, X, W)
    static(answer, X, W)
    other_shapes(answer)
    if not seen.integers:
        raise Mistake(
            "the values are right, but no integers are multiplied: multiply the codes,"
            " and scale what comes out"
        )


SUMS_OF_PRODUCTS = ("mm", "matmul", "einsum", "linear", "dot", "inner", "mv")


class Arithmetic(Operations):
    """Operations whose `integers` counts products alone: codes may meet in a clamp.

    One of element by element counts when it is itself of integers.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.integers
        out = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        integers = isinstance(out, Tensor) and not out.is_floating_point()
        if not (
            name in ELSEWHERE
            or any(part in name for part in SUMS_OF_PRODUCTS)
            or (integers and "mul" in name)
        ):
            self.integers = before
        return out


def draw_product() -> tuple[Tensor, Tensor]:
    """6 tokens, 6 features, 6 outputs; no number lies between two levels."""
    while True:
        X = torch.randn(6, 6) * torch.linspace(0.4, 3, 6)[torch.randperm(6), None]
        X[:, 2] = -1.5 * X.abs().amax(1)  # the largest of each token is negative
        W = torch.randn(6, 6) * torch.linspace(0.2, 2, 6)[torch.randperm(6), None]
        size = X.abs()
        levels = [127 * X / size.amax(1)[:, None], 127 * X / size.max()]
        levels.append(127 * X / (0.6 * size.max()))
        levels.append(127 * W / W.abs().amax(1)[:, None])
        parts = torch.cat(levels).flatten().frac().abs()
        if (parts - 0.5).abs().min() > 2e-3:
            return X, W


def product(
    X: Tensor,
    W: Tensor,
    x_step: Tensor | None = None,
    w_step: Tensor | None = None,
    *,
    top: float = 127,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    clamp: bool = True,
) -> Tensor:
    """X Wᵀ by codes, and what comes out with one thing changed."""
    if x_step is None:
        x_step = X.abs().amax(1)[:, None] / top
    if w_step is None:
        w_step = W.abs().amax(1)[:, None] / top
    codes = []
    for values, step in ((X, x_step), (W, w_step)):
        code = rounding(values / torch.where(step > 0, step, 1.0))
        code = code.clamp(-top, top) if clamp else code
        codes.append(code.double() * step)
    return (codes[0] @ codes[1].T).float()


def wrong_products(X: Tensor, W: Tensor) -> dict[str, Tensor]:
    """What usual mistakes give, with a step for each token."""
    right = product(X, W).double()
    a_x = X.abs().amax(1)[:, None].double()
    a_w = W.abs().amax(1).double()
    x_codes = torch.round(127 * X / a_x)
    w_codes = torch.round(127 * W / a_w[:, None])
    long = (x_codes.long(), w_codes.long())
    found = {
        "nothing is rounded: this is X Wᵀ": X @ W.T,
        "only W is rounded: X goes through codes, too": (
            X.double() @ (w_codes * a_w[:, None] / 127).T
        ),
        "only X is rounded: W goes through codes, too": (
            (x_codes * a_x / 127) @ W.double().T
        ),
        "one step for all of X: each token has its own": product(
            X, W, X.abs().max() / 127
        ),
        "one step for all of W: each of its rows has its own": product(
            X, W, None, W.abs().max() / 127
        ),
        "the step comes from the largest x of a token, not the largest |x|": product(
            X, W, X.amax(1).abs()[:, None] / 127
        ),
        "the step comes from columns of W: each row has its own": product(
            X, W, None, W.abs().amax(0)[:, None] / 127
        ),
        "the steps of W are those of its columns: each row has its own": product(
            X, W, None, W.abs().amax(0)[:, None] / 127, clamp=False
        ),
        "you cut off instead of rounding": product(X, W, rounding=torch.trunc),
        "you rounded down: to the nearest is asked": product(
            X, W, rounding=torch.floor
        ),
        "you divided by 128: the last code is 127": product(X, W, top=128),
        "the steps of X are missing": right / a_x * 127,
        "the steps of W are missing": right / a_w * 127,
        "both steps are missing: this is the product of the codes": (
            right / a_x / a_w * 127**2
        ),
        "one of the two 1 / 127 is missing": right * 127,
        "both 1 / 127 are missing": right * 127**2,
        "the steps of X are on the wrong axis: tokens are rows of Y": (
            right / a_x * a_x.T
        ),
        "the steps of W are on the wrong axis: outputs are columns of Y": (
            right / a_w * a_w[:, None]
        ),
        "the steps of X come in twice": right * a_x / 127,
        "the product overflowed 8 bits: cast the codes to int32 first": (
            (long[0] @ long[1].T).to(torch.int8) * a_x * a_w / 127**2
        ),
        "the product overflowed 16 bits: cast the codes to int32 first": (
            (long[0] @ long[1].T).to(torch.int16) * a_x * a_w / 127**2
        ),
    }
    return {text: value.float() for text, value in found.items()}


def other_orders(X: Tensor, W: Tensor) -> dict[str, Tensor]:
    """Mistakes of rounding again. Where the largest value comes out a little below 127
    or above, depending on the order of products, another code is cut off.
    """
    a_x, a_w = X.abs().amax(1)[:, None], W.abs().amax(1)[:, None]
    found = {}
    for text, rounding in (
        ("you cut off instead of rounding: call torch.round", torch.trunc),
        ("you rounded down: call torch.round", torch.floor),
    ):
        q, p = rounding(127 * X / a_x), rounding(127 * W / a_w)
        found[text] = (q @ p.T) * a_x * a_w.T / 127**2
        found[f"{text} before the cast"] = product(X, W, rounding=rounding, clamp=False)
    return found


def whole_tensor(answer, X: Tensor, W: Tensor) -> None:
    """One step for all of X, found in X."""
    what = 'w8a8(X, W, "tensor", None)'
    got = expect(answer(X, W, "tensor", None), shape=(6, 6), what=what)
    mistakes = {
        "each token still has its own step: one for all of X is asked": product(X, W),
        "the step comes from the largest x, not the largest |x|": product(
            X, W, X.max() / 127
        ),
        "W has one step as well: each of its rows has its own": product(
            X, W, X.abs().max() / 127, W.abs().max() / 127
        ),
    }
    right = product(X, W, X.abs().max() / 127)
    diagnose(got, right=right, mistakes=mistakes, what=what)


def static(answer, X: Tensor, W: Tensor) -> None:
    """A step that is given; some of X is beyond its last level."""
    step = (0.6 * X.abs().max() / 127).item()
    what = f'w8a8(X, W, "tensor", {step:.4f})'
    got = expect(answer(X, W, "tensor", step), shape=(6, 6), what=what)
    wrapped = torch.round(X / step).to(torch.int32).to(torch.int8)
    low = torch.round(X / step).clamp(-128, 127)
    w_step = W.abs().amax(1)[:, None] / 127
    W_hat = torch.round(W / w_step) * w_step
    mistakes = {
        "the static step is not used: a step was found in X": product(
            X, W, X.abs().max() / 127
        ),
        "each token has its own step: the static one is for all": product(X, W),
        "codes beyond 127 stay: clamp them to −127 … 127": product(
            X, W, torch.tensor(step), clamp=False
        ),
        "codes beyond 127 wrapped around in int8: clamp before the cast": (
            wrapped * step
        )
        @ W_hat.T,
        "codes are clamped at −128: at −127 is asked": (low * step) @ W_hat.T,
    }
    right = product(X, W, torch.tensor(step))
    diagnose(got, right=right, mistakes=mistakes, what=what)


def other_shapes(answer) -> None:
    """Zeros; more features than tokens and outputs; sums that 16 bits do not hold."""
    X, W = torch.ones(3, 70), torch.full((2, 70), 0.5)
    W[1] = 2
    X[0] = 0.25
    for per in ("token", "tensor"):
        got = expect(answer(X, W, per, None), shape=(3, 2), what="w8a8 of (3, 70)")
        step = X.abs().amax(1)[:, None] / 127 if per == "token" else X.max() / 127
        if not close(got, product(X, W, step)):
            raise Mistake(
                "right for 6 features, wrong for 70 ones: a sum of codes here is up to"
                " 70 · 127² = 1,129,030, more than 16 bits hold"
            )
    X[1] = 0
    W[0] = 0
    for case, inputs, per in (
        ("a token of zeros", X, "token"),
        ("an X of zeros", 0 * X, "tensor"),
    ):
        got = answer(inputs, W, per, None)
        expect(got, shape=(3, 2), what="w8a8 of zeros", finite=False)
        step = inputs.abs().amax(1)[:, None] / 127 if per == "token" else None
        right = product(inputs, W, step)
        if not close(got, right):
            raise Mistake(
                f"{case}, or a row of zeros in W, must give zeros: divide by something"
                " that is not 0"
            )


# 4 ------------------------------------------------------------------------------------

ALPHAS = [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "A loop over alphas: s from exercise 1, the product from exercise 3, the"
            " error. What is calibrated on is X; what is judged on is `held_out`."
        ),
        (
            "The inputs are divided by s and the columns of W multiplied:"
            " `w8a8(held_out / s, W * s, per, None)`."
        ),
        (
            "The error is `(y - right).square().sum() / right.square().sum()` with"
            " `right = held_out @ W.T`. `errors.argmin()` is the place of the least."
        ),
    ),
)
def search_alpha(answer):
    """The alpha with the least output error on inputs that were not calibrated on."""
    for per in ("tensor", "token"):

        def right(X: Tensor, held_out: Tensor, W: Tensor, per=per) -> Tensor:
            return searched(X, held_out, W, per)

        def mistakes(X: Tensor, held_out: Tensor, W: Tensor, per=per) -> dict:
            return wrong_searches(X, held_out, W, per)

        X, held_out, W = telling(draw_search, right, mistakes)
        what = f'search_alpha(X, held_out, W, alphas, "{per}")'
        pair = expect(answer(X, held_out, W, ALPHAS, per), kind=tuple, what=what)
        if len(pair) != 2:
            raise Mistake(f"{what} returned {len(pair)} things: alpha and the errors")
        errors = expect(
            pair[1], shape=(len(ALPHAS),), dtype=torch.float32, what="your errors"
        )
        diagnose(
            errors,
            right=right(X, held_out, W),
            mistakes=mistakes(X, held_out, W),
            tol=1e-3,
            what="your tensor of errors",
        )
        best = expect(pair[0], kind=float, what="your alpha")
        named(best, errors)
    few = [0.8, 0.3]
    alpha, errors = answer(X, held_out, W, few, per)
    if len(errors) != 2 or alpha not in few:
        raise Mistake("right for seven alphas, wrong for [0.8, 0.3]: use the argument")


def named(best: float, errors: Tensor) -> None:
    """The alpha itself."""
    place = int(errors.argmin())
    if best == ALPHAS[int(errors.argmax())]:
        raise Mistake("the errors are right, but this is the alpha of the largest one")
    if best == place and best != ALPHAS[place]:
        raise Mistake("the errors are right, but return the alpha, not its place")
    if abs(best - ALPHAS[place]) > 1e-6:
        raise Mistake(
            f"the errors are right, but alpha = {best} is not that of the least error"
        )


def draw_search() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with loud channels, held-out ones that are a little louder."""
    loud = torch.logspace(-0.5, 1.2, 8)[torch.randperm(8)]
    X = torch.randn(24, 8) * loud
    held_out = 1.5 * torch.randn(16, 8) * loud * (1 + 0.6 * torch.rand(8))
    W = torch.randn(5, 8) * torch.logspace(-0.4, 0.4, 8)[torch.randperm(8)]
    return X, held_out, W


def searched(
    X: Tensor,
    held_out: Tensor,
    W: Tensor,
    per: str,
    *,
    judged: Tensor | None = None,
    x_scale: Callable[[Tensor], Tensor] = lambda s: s,
    w_scale: Callable[[Tensor], Tensor] = lambda s: s,
    reference: Callable[[Tensor], Tensor] = lambda W: W,
    size: Callable[[Tensor, Tensor], Tensor] = lambda d, y: (
        d.square().sum() / y.square().sum()
    ),
) -> Tensor:
    """The error of each alpha, and what comes out with one thing changed."""
    judged = held_out if judged is None else judged
    errors = []
    for alpha in ALPHAS:
        s = scale_of(X, [W], alpha)
        x, w = judged / x_scale(s), W * w_scale(s)
        step = None if per == "token" else x.abs().max() / 127
        y = judged @ reference(W).T
        errors.append(size(product(x, w, step) - y, y))
    return torch.stack(errors)


def wrong_searches(X: Tensor, held_out: Tensor, W: Tensor, per: str) -> dict:
    """What usual mistakes give for the errors."""
    ones = torch.ones(X.shape[1])
    step = W.abs().amax(1)[:, None] / 127
    other = "token" if per == "tensor" else "tensor"

    def but(**changes) -> Tensor:
        return searched(X, held_out, W, per, **changes)

    return {
        "the errors are those on X: judge on the held-out inputs": but(judged=X),
        "the scales come from the held-out inputs: calibrate on X": searched(
            held_out, held_out, W, per
        ),
        "X and the held-out inputs are exchanged": searched(held_out, X, W, per),
        "the inputs are not divided by s": but(x_scale=lambda s: ones),
        "the weights are not multiplied by s": but(w_scale=lambda s: ones),
        "nothing is smoothed: all alphas have one error": but(
            x_scale=lambda s: ones, w_scale=lambda s: ones
        ),
        "s is used the wrong way round: divide the inputs, multiply W": but(
            x_scale=lambda s: 1 / s, w_scale=lambda s: 1 / s
        ),
        "you compare with a product of the rounded W: compare with the floats": but(
            reference=lambda W: torch.round(W / step) * step
        ),
        "the error is not divided by the size of the outputs": but(
            size=lambda d, y: d.square().sum()
        ),
        "this is the mean of the squared errors: divide by that of the outputs": but(
            size=lambda d, y: d.square().mean()
        ),
        "the errors are not squared": but(
            size=lambda d, y: d.abs().sum() / y.abs().sum()
        ),
        "this is the root of the error": but(size=lambda d, y: d.norm() / y.norm()),
        "the steps are the other ones: hand `per` on": searched(X, held_out, W, other),
        "each alpha smooths what the one before left: begin each with W and the inputs"
        " as they were given": piled_up(X, held_out, W, per, inputs=True),
        "W keeps the s of the alpha before: begin each with W as it was given": (
            piled_up(X, held_out, W, per)
        ),
        "W keeps the s of the alpha before, also in the product of floats: begin each"
        " with W as it was given": piled_up(X, held_out, W, per, reference=True),
    }


def piled_up(
    X: Tensor,
    held_out: Tensor,
    W: Tensor,
    per: str,
    *,
    inputs: bool = False,
    reference: bool = False,
) -> Tensor:
    """The errors when W, or the inputs too, are overwritten in the loop."""
    y = held_out @ W.T
    errors = []
    for alpha in ALPHAS:
        if reference:
            y = held_out @ W.T
        s = scale_of(X, [W], alpha)
        W, x = W * s, held_out / s
        if inputs:
            held_out = x
        step = None if per == "token" else x.abs().max() / 127
        d = product(x, W, step) - y
        errors.append(d.square().sum() / y.square().sum())
    return torch.stack(errors)
