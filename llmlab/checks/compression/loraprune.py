"""Checks of 06-compression/11-loraprune."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression import loraprune
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/11-loraprune")


def factors(d: int, k: int, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W₀, A, B and the gradients of A and B, all of about the same size."""
    return (
        torch.randn(d, k),
        torch.randn(r, k),
        torch.randn(d, r),
        torch.randn(r, k),
        torch.randn(d, r),
    )


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "Three products of matrices, each of shape (d, k). Which operand comes first?",
        (
            "B and its gradient are (d, r), A and its gradient (r, k): of each pair one"
            " from B comes first, one from A second."
        ),
        (
            "`grad_B @ A + B @ grad_A - lr * (grad_B @ grad_A)`, and `scaling` times"
            " all of it."
        ),
    ),
)
def estimated_gradient(answer):
    """What a step of SGD on A and B takes off the weight."""

    def draw() -> tuple:
        _, *rest = factors(5, 5, 5)  # square, so that swapped factors fit
        return (*rest, 0.6, 0.3)

    case = telling(draw, loraprune.estimated_gradient, wrong_gradients)
    what = "estimated_gradient(A, B, grad_A, grad_B, 0.6, 0.3)"
    got = expect(answer(*case), shape=(5, 5), dtype=torch.float32, what=what)
    right = loraprune.estimated_gradient(*case)
    diagnose(got, right=right, mistakes=wrong_gradients(*case), what=what)
    for d, k, r, scaling, lr in ((4, 7, 2, 2.0, 1.0), (6, 3, 1, 0.5, 0.01)):
        _, *rest = factors(d, k, r)
        what = f"estimated_gradient for d = {d}, k = {k}, r = {r}"
        got = expect(answer(*rest, scaling, lr), shape=(d, k), what=what)
        if not close(got, loraprune.estimated_gradient(*rest, scaling, lr)):
            raise Mistake(
                f"right for square matrices, wrong for d = {d}, k = {k}, r = {r},"
                f" scaling = {scaling} and lr = {lr}: take them from the arguments"
            )


def wrong_gradients(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, s: float, lr: float
) -> dict[str, Tensor]:
    """What usual mistakes give for ĝ."""
    first = grad_B @ A
    second = B @ grad_A
    both = grad_B @ grad_A
    return {
        "the sign of the last term is wrong: in B'A' it has a plus, so in what is taken"
        " off a minus": s * (first + second + lr * both),
        "the last term is missing: −lr · ∂B ∂A": s * (first + second),
        "the last term lacks lr": s * (first + second - both),
        "the last term has lr twice: divide what was taken off by lr": s
        * (first + second - lr**2 * both),
        "the scale is missing: the model adds scaling · B A": first
        + second
        - lr * both,
        "the scale is there twice": s**2 * (first + second - lr * both),
        "the scale is on the first term only": s * first + second - lr * both,
        "you divided by the scale": (first + second - lr * both) / s,
        "this is the change over a whole step: divide it by lr": lr
        * s
        * (first + second - lr * both),
        "the change has the wrong sign: it is what is taken off": -s
        * (first + second - lr * both),
        "B ∂A is missing: A changes, too": s * (first - lr * both),
        "∂B A is missing: B changes, too": s * (second - lr * both),
        "this is ∂B ∂A alone": s * both,
        "each factor is multiplied with its own gradient: ∂B goes with A, and B with"
        " ∂A": s * (grad_B @ B + A @ grad_A - lr * both),
        "the factors are swapped: B and its gradient come first": s
        * (A @ grad_B + grad_A @ B - lr * grad_A @ grad_B),
        "the result is transposed": s * (first + second - lr * both).T,
        "a product has a transpose that is not asked": s
        * (grad_B @ A.T + B @ grad_A.T - lr * grad_B @ grad_A.T),
        "these are products of elements: products of matrices are asked": s
        * (grad_B * A + B * grad_A - lr * grad_B * grad_A),
        "this is B A itself: what a step takes off it is asked": s * B @ A,
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "Four steps: the weight at work; the score of each weight; a sum for each row"
        " or column; a sum for each run of `each` of them.",
        "The first sum goes over the other axis: `scores.sum(1 - axis)`.",
        "`lines.reshape(-1, each)` has a row for each unit.",
    ),
)
def group_importance(answer):
    """The sum of (gradient · weight)² over all weights of each unit."""

    def draw() -> tuple:
        W0, A, B, *_ = factors(6, 6, 2)  # square, so that a wrong axis fits
        # large scores and small ones, whose order a root or a mean would change
        gradient = torch.randn(6, 6) * torch.linspace(0.4, 1.6, 6)[torch.randperm(6)]
        axis = int(torch.randint(2, ()))
        return W0, A, B, 0.4, gradient, axis, 2

    case = telling(draw, scores, wrong_scores)
    axis = case[5]
    what = f"group_importance(W0, A, B, 0.4, gradient, {axis}, 2)"
    got = expect(answer(*case), shape=(3,), dtype=torch.float32, what=what)
    diagnose(
        got, right=scores(*case), mistakes=wrong_scores(*case), tol=1e-4, what=what
    )
    for d, k, axis, each in ((4, 6, 0, 1), (4, 6, 1, 3), (6, 4, 0, 3), (2, 5, 1, 5)):
        W0, A, B, *_ = factors(d, k, 3)
        case = (W0, A, B, 1.5, torch.randn(d, k), axis, each)
        what = f"group_importance for weights of {d} × {k}, axis={axis}, each={each}"
        units = (d, k)[axis] // each
        got = expect(answer(*case), shape=(units,), what=what)
        if not close(got, scores(*case), tol=1e-4):
            raise Mistake(
                f"right for 6 × 6 weights, wrong for {d} × {k} with axis={axis} and"
                f" each={each}: take the sizes, `axis` and `each` from the arguments"
            )


def scores(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    gradient: Tensor,
    axis: int,
    each: int,
    *,
    weight: Callable[[Tensor, Tensor], Tensor] = torch.add,
    score: Callable[[Tensor, Tensor], Tensor] = lambda g, W: (g * W).square(),
) -> Tensor:
    """Exercise 2, and what comes out with one thing changed."""
    lines = score(gradient, weight(W0, s * B @ A)).sum(1 - axis)
    return lines.reshape(-1, each).sum(1)


def wrong_scores(
    W0: Tensor, A: Tensor, B: Tensor, s: float, gradient: Tensor, axis: int, each: int
) -> dict:
    """What usual mistakes give for the scores."""
    case = (W0, A, B, s, gradient)
    right = scores(*case, axis, each)
    product = gradient * (W0 + s * B @ A)
    count = product.shape[1 - axis] * each
    lines = product.square().sum(1 - axis)

    def units(x: Tensor) -> Tensor:
        return x.sum(1 - axis).reshape(-1, each).sum(1)

    return {
        "LoRA's part is missing: the weight at work is W0 + scaling · B A": scores(
            *case, axis, each, weight=lambda W, change: W
        ),
        "this is LoRA's part alone: the weight at work is W0 + scaling · B A": scores(
            *case, axis, each, weight=lambda W, change: change
        ),
        "the scale is missing in the weight at work": scores(
            W0, A, B, 1.0, gradient, axis, each
        ),
        "LoRA's part is subtracted: it is added to W0": scores(
            W0, A, B, -s, gradient, axis, each
        ),
        "this adds absolute values: squares are asked (the authors' code takes absolute"
        " values, the paper squares)": units(product.abs()),
        "this is the sum of gradient · weight: square each product": units(product),
        "squared after the sum: changes of opposite sign have cancelled. Square each"
        " product before": units(product).square(),
        "squared after the sum of each row or column: square each product": (
            product.sum(1 - axis).square().reshape(-1, each).sum(1)
        ),
        "this is the mean over a unit's weights: the sum is asked": right / count,
        "within a unit you take the mean of its rows or columns: the sum is asked": (
            right / each
        ),
        "along each row or column you take the mean: the sum is asked": right
        / product.shape[1 - axis],
        "there is a root too many": right.sqrt(),
        "the wrong axis: axis 0 means that a unit is made of rows": scores(
            *case, 1 - axis, each
        ),
        "units lie one after the other, `each` rows or columns apiece: here each takes"
        " every so-manieth": lines.reshape(each, -1).sum(0),
        "the gradient is missing: this is the size of the weights": scores(
            *case, axis, each, score=lambda g, W: W.square()
        ),
        "the weight is missing: this is the size of the gradients": scores(
            *case, axis, each, score=lambda g, W: g.square()
        ),
        "only the gradient is squared": scores(
            *case, axis, each, score=lambda g, W: g.square() * W
        ),
        "only the weight is squared": scores(
            *case, axis, each, score=lambda g, W: g * W.square()
        ),
        "these are the scores turned over: what matters more gets more": 1 / right,
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        "First the average, a line. Then three cases for the share, and the floor.",
        "Ask `step >= stop` first: then no division by stop − start = 0 is left.",
        (
            "Between: `left = 1 - (step - start) / (stop - start)`, and the share is"
            " `final * (1 - left**3)`."
        ),
    ),
)
def progress(answer):
    """The moving average, and how many units are gone after a step."""
    n = 1007  # many units, so that each mistake gives another number
    for step in (9, 13, 4, 5, 16, 17, 20):
        average, new = torch.rand(n) + 0.5, torch.rand(n) + 0.5
        case = (average, new, 0.8, step, 20, 0.2, 0.15, 0.6)
        what = f"progress(average, new, 0.8, {step}, 20, 0.2, 0.15, 0.6)"
        got = answer(*case)
        expect(got, kind=tuple, what=what)
        if len(got) != 2:
            raise Mistake(f"{what} holds {len(got)} items, where 2 are asked")
        found = expect(
            got[0], shape=(n,), dtype=torch.float32, what=f"{what}: the average"
        )
        diagnose(
            found,
            right=loraprune.moving_average(average, new, 0.8),
            mistakes=wrong_averages(average, new, 0.8),
            what=f"{what}: the average",
        )
        gone = expect(got[1], kind=int, what=f"{what}: how many units are gone")
        diagnose(
            gone,
            right=units_gone(n, *case[3:]),
            mistakes=wrong_counts(n, *case[3:]),
            what=f"{what}: how many units are gone",
        )
    others = (
        (0.0, 100, 3, 10, 0.0, 0.9, 0.29),  # from the first step on; 100 · 0.29
        (0.5, 3, 4, 4, 1.0, 0.0, 0.7),  # at the last step
        (0.9, 3, 3, 4, 1.0, 0.0, 0.7),
        (0.3, 7, 6, 13, 0.3, 0.3, 0.5),
    )
    for decay, n, step, steps, warmup, cooldown, final in others:
        average, new = torch.rand(n), torch.rand(n)
        case = (average, new, decay, step, steps, warmup, cooldown, final)
        settings = f"decay={decay}, step={step}, steps={steps}, warmup={warmup}"
        what = f"progress with {settings}, cooldown={cooldown}, final={final}"
        found, gone = answer(*case)
        if not close(found, loraprune.moving_average(average, new, decay)):
            raise Mistake(f"{what}: the average is wrong. Take `decay` as it is given")
        right = units_gone(n, step, steps, warmup, cooldown, final)
        if gone != right:
            cure = ": round to 6 digits before the floor" if final == 0.29 else ""
            raise Mistake(
                f"{what}, {n} units: {gone} are gone, and that is not right{cure}"
            )


def units_gone(
    n: int, step: int, steps: int, warmup: float, cooldown: float, final: float
) -> int:
    """Exercise 3's second half."""
    share = loraprune.share_pruned(step, steps, warmup, cooldown, final)
    return loraprune.units_pruned(n, share)


def wrong_averages(average: Tensor, new: Tensor, decay: float) -> dict[str, Tensor]:
    """What usual mistakes give for the moving average."""
    return {
        "`decay` is the weight of the old average, not of the new scores": (1 - decay)
        * average
        + decay * new,
        "these are the new scores alone": new,
        "the average has not moved": average,
        "the new scores are added whole: 1 − decay of them is asked": decay * average
        + new,
        "the old average is kept whole: decay of it is asked": average
        + (1 - decay) * new,
        "both have the weight decay: the new scores have 1 − decay": decay
        * (average + new),
        "this is their plain mean: use `decay`": (average + new) / 2,
        "the old average and the new scores are added up": average + new,
        "the larger of the two is no average": torch.maximum(average, new),
    }


def wrong_counts(
    n: int, step: int, steps: int, warmup: float, cooldown: float, final: float
) -> dict[str, int]:
    """What usual mistakes give for the number of units that are gone."""
    start, stop = warmup * steps, steps - cooldown * steps

    def count(share: float) -> int:
        return math.floor(round(n * share, 6))

    def between(start: float, stop: float, share: Callable[[float], float]) -> int:
        if step >= stop:
            return count(final)
        if step <= start:
            return 0
        return count(final * share(1 - (step - start) / (stop - start)))

    def cubic(left: float) -> float:
        return 1 - left**3

    right = between(start, stop, cubic)
    before = units_gone(n, step - 1, steps, warmup, cooldown, final)
    if step >= stop:
        return {"from stop on `final` is gone, at stop already": before}
    return {
        "these are the units that stay: how many are gone is asked": n - right,
        "this rises in a straight line: as 1 − left³ is asked": between(
            start, stop, lambda left: 1 - left
        ),
        "this is a square: as 1 − left³, a cube, is asked": between(
            start, stop, lambda left: 1 - left**2
        ),
        "slow first and fast later: 1 − left³ is fast first": between(
            start, stop, lambda left: (1 - left) ** 3
        ),
        "this falls: left³ is what is still to go": between(
            start, stop, lambda left: left**3
        ),
        "the warm-up is forgotten: the share begins to rise at start": between(
            0, stop, cubic
        ),
        "the way from start to stop is stop − start steps long": between(
            start, stop, lambda left: cubic(1 - (step - start) / stop)
        ),
        "the cool-down is forgotten: `final` is reached at stop": between(
            start, steps, cubic
        ),
        "stop is taken for cooldown · steps: it is steps − cooldown · steps": between(
            start, cooldown * steps, cubic
        ),
        "`final` is missing: not all units go": between(start, stop, cubic)
        if step <= start
        else count(cubic(max(0.0, 1 - (step - start) / (stop - start)))),
        "a step too early: the first step is 1": between(start - 1, stop - 1, cubic),
        "a step too late": between(start + 1, stop + 1, cubic),
        "rounded up: the floor is asked": math.ceil(
            round(
                n * loraprune.share_pruned(*(step, steps, warmup, cooldown, final)), 6
            )
        ),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    grads={"x": 0, "A": 2, "B": 3},
    hints=(
        "What the frozen weight gives, what LoRA adds to it, and the mask on the sum.",
        "`x @ W0.T`; LoRA goes through r numbers: `x @ A.T @ B.T`.",
        "`(x @ W0.T + scaling * (x @ A.T @ B.T)) * mask`.",
    ),
)
def masked_linear(answer):
    """The frozen weight and LoRA, and a mask on both."""
    for d, k, r, batch, scaling in (
        (5, 5, 5, (3,), 0.6),
        (4, 7, 2, (2, 3), 2.0),
        (6, 3, 1, (), 1.0),
    ):
        W0, A, B, *_ = factors(d, k, r)
        x = torch.randn(*batch, k)
        mask = (torch.arange(d) % 2).float()
        mask[0] = 1.0
        case = (x, W0, A, B, scaling, mask)
        what = f"masked_linear for d = {d}, k = {k}, r = {r}"
        got = expect(answer(*case), shape=(*batch, d), dtype=torch.float32, what=what)
        mistakes = wrong_outputs(*case) if d == k else None
        diagnose(
            got, right=loraprune.masked_linear(*case), mistakes=mistakes, what=what
        )


def wrong_outputs(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, s: float, mask: Tensor
) -> dict[str, Tensor]:
    """What usual mistakes give for z."""
    frozen = x @ W0.T
    change = s * (x @ A.T @ B.T)
    whole = frozen + change
    return {
        "the mask is on the frozen weight's part only: what LoRA adds must go, too": (
            frozen * mask + change
        ),
        "the mask is on LoRA's part only": frozen + change * mask,
        "the mask is missing": whole,
        "the mask is turned over: 1 is kept": whole * (1 - mask),
        "the mask is on the inputs: it is one of outputs": (x * mask) @ W0.T
        + s * ((x * mask) @ A.T @ B.T),
        "LoRA's part is missing": frozen * mask,
        "the frozen weight's part is missing": change * mask,
        "the scale is missing": (frozen + change / s) * mask,
        "the scale is on the frozen weight's part, too": s
        * (frozen + change / s)
        * mask,
        "the scale is there twice": (frozen + s * change) * mask,
        "W0 lacks its transpose": (x @ W0 + change) * mask,
        "A and B are in the wrong order: x goes through A first": (
            frozen + s * (x @ B.T @ A.T)
        )
        * mask,
        "A and B lack their transposes": (frozen + s * (x @ A @ B)) * mask,
        "LoRA's part is subtracted": (frozen - change) * mask,
        "the part of LoRA is multiplied with the other: the two are added": frozen
        * change
        * mask,
    }
