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
        "this is ∂B A alone, as if A stood still": s * first,
        "this is B ∂A alone, as if B stood still": s * second,
        "the scale is not on the last term": s * (first + second) - lr * both,
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

    for axis in torch.randperm(2).tolist():
        square_units(answer, axis)
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


def square_units(answer: Callable, axis: int) -> None:
    """Three units of two rows or columns, by which the mistakes are named."""

    def draw() -> tuple:
        W0, A, B, *_ = factors(6, 6, 2)  # square, so that a wrong axis fits
        # large scores and small ones, whose order a root or a mean would change
        gradient = torch.randn(6, 6) * torch.linspace(0.4, 1.6, 6)[torch.randperm(6)]
        return W0, A, B, 0.4, gradient, axis, 2

    case = telling(draw, scores, wrong_scores)
    what = f"group_importance(W0, A, B, 0.4, gradient, {axis}, 2)"
    got = answer(*case)
    if isinstance(got, Tensor) and got.shape == (6,):
        raise Mistake(
            "each row or column has a score of its own: add those of a unit, `each` of"
            " them"
        )
    got = expect(got, shape=(3,), dtype=torch.float32, what=what)
    mistakes = wrong_scores(*case)
    diagnose(got, right=scores(*case), mistakes=mistakes, tol=1e-4, what=what)


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
    made_of = ("rows", "columns")[axis]

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
        f"the wrong axis: axis {axis} means that a unit is made of {made_of}": scores(
            *case, 1 - axis, each
        ),
        "the scale is on W0, too: it belongs to B A alone": scores(
            s * W0, A, B, s, gradient, axis, each
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
    for step in (9, 2, 13, 4, 5, 16, 17, 20):
        usual_step(answer, step)
    for case in (
        (0.0, 100, 3, 10, 0.0, 0.9, 0.29),  # from the first step on; 100 · 0.29
        (0.5, 3, 4, 4, 1.0, 0.0, 0.7),  # at the last step
        (0.9, 3, 3, 4, 1.0, 0.0, 0.7),
        (0.3, 100, 6, 13, 0.3, 0.3, 0.5),  # start and stop are not whole
    ):
        unusual_step(answer, *case)


def usual_step(answer: Callable, step: int) -> None:
    """A step of 20, with so many units that each mistake gives another number."""
    n = 1007
    average, new = torch.rand(n) + 0.5, torch.rand(n) + 0.5
    case = (average, new, 0.8, step, 20, 0.2, 0.15, 0.6)
    what = f"progress(average, new, 0.8, {step}, 20, 0.2, 0.15, 0.6)"
    got = answer(*case)
    expect(got, kind=tuple, what=what)
    if len(got) != 2:
        raise Mistake(f"{what} holds {len(got)} items, where 2 are asked")
    found = expect(got[0], shape=(n,), dtype=torch.float32, what=f"{what}: the average")
    diagnose(
        found,
        right=loraprune.moving_average(average, new, 0.8),
        mistakes=wrong_averages(average, new, 0.8),
        what=f"{what}: the average",
    )
    if isinstance(got[1], float):
        raise Mistake(
            f"{got[1]:g} is a share: times n, and cut off to a whole number of units"
            if 0 < got[1] <= 1
            else f"{got[1]:g} units are no int: cut off to a whole number, by"
            " `math.floor`"
        )
    diagnose(
        expect(got[1], kind=int, what=f"{what}: how many units are gone"),
        right=units_gone(n, *case[3:]),
        mistakes=wrong_counts(n, *case[3:]),
        what=f"{what}: how many units are gone",
    )


def unusual_step(
    answer: Callable,
    decay: float,
    n: int,
    step: int,
    steps: int,
    warmup: float,
    cooldown: float,
    final: float,
) -> None:
    """The edges: a product just below a whole number, and where start and stop lie."""
    average, new = torch.rand(n), torch.rand(n)
    case = (step, steps, warmup, cooldown, final)
    settings = f"decay={decay}, step={step}, steps={steps}, warmup={warmup}"
    what = f"progress with {settings}, cooldown={cooldown}, final={final}"
    same = warmup + cooldown == 1
    try:
        found, gone = answer(average, new, decay, *case)
    except ZeroDivisionError as error:
        if not same:
            raise
        raise Mistake(
            f"{what} divides by 0, for start and stop are the same: everything goes at"
            " stop, so ask `step >= stop` first"
        ) from error
    if not close(found, loraprune.moving_average(average, new, decay)):
        raise Mistake(f"{what}: the average is wrong. Take `decay` as it is given")
    right = units_gone(n, *case)
    if gone == right:
        return
    cure = ""
    if final == 0.29 and gone == right - 1:
        cure = ": round to 6 digits before the floor"
    elif same:
        cure = ": where start and stop are the same, everything goes at stop"
    elif gone in with_whole_borders(n, *case):
        cure = ": start and stop need not be whole, so do not round them"
    raise Mistake(f"{what}, {n} units: {gone} are gone, and that is not right{cure}")


def with_whole_borders(
    n: int, step: int, steps: int, warmup: float, cooldown: float, final: float
) -> set[int]:
    """How many are gone if start and stop are rounded, in three ways."""
    start, stop = warmup * steps, steps - cooldown * steps
    return {
        units_gone(n, step, steps, to(start) / steps, 1 - to(stop) / steps, final)
        for to in (math.floor, round, math.ceil)
    }


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
    units = n * loraprune.share_pruned(step, steps, warmup, cooldown, final)
    before = units_gone(n, step - 1, steps, warmup, cooldown, final)
    left = 1 - (step - start) / (stop - start)
    if step >= stop:
        return {
            "from stop on `final` is gone, at stop already": before,
            "after stop nothing more goes: `final` is all": count(final * cubic(left)),
        }
    if step < start:
        return {"up to start none is gone: this is below 0": count(final * cubic(left))}
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
        "the way from start to stop counts, not the share of all steps": count(
            final * cubic(1 - step / steps)
        ),
        "a step too early: the first step is 1": between(start - 1, stop - 1, cubic),
        "a step too late": between(start + 1, stop + 1, cubic),
        "rounded to the nearest: the floor is asked": round(units),
        "rounded up: the floor is asked": math.ceil(round(units, 6)),
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
        got = answer(*case)
        if isinstance(got, Tensor) and got.shape == (*batch, int(mask.sum())):
            raise Mistake("outputs are left out: they stay, multiplied by 0")
        got = expect(got, shape=(*batch, d), dtype=torch.float32, what=what)
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
        "nothing is transposed: x has one row for each token, so `x @ W0.T`": (
            (x @ W0 + s * (x @ B @ A)) * mask
        ),
        "W0 and both factors lack their transposes: `x @ W0.T`": (
            (x @ W0 + s * (x @ A @ B)) * mask
        ),
        "LoRA's part is subtracted": (frozen - change) * mask,
        "the part of LoRA is multiplied with the other: the two are added": frozen
        * change
        * mask,
    }
