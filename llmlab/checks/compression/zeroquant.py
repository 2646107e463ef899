"""Checks of 06-compression/04-zeroquant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/04-zeroquant")

# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "Three lines: the largest |x| of each row, the scales, the codes.",
        (
            "Keep the dimension of the rows: `X.abs().amax(-1, keepdim=True)`. The"
            " largest code is 2 ** (bits − 1) − 1."
        ),
        "`torch.where(largest > 0, largest / top, 1.0)` is the scale.",
    ),
)
def quantize_tokens(answer):
    """Codes and a scale for each token, from the tokens themselves."""
    X = torch.randn(4, 4)
    X[2, 1] = -3.0  # the largest of its row is negative
    # scales that are powers of two: no largest value falls beside its level
    X *= 7 * torch.tensor([0.5, 2.0, 1.0, 4.0])[:, None] / X.abs().amax(1, keepdim=True)
    compare_tokens(answer, X, 4)
    X = torch.randn(5, 9) * 2
    for bits in (8, 3):
        codes, scale = both(answer, X, bits)
        right_codes, right_scale = tokens(X, bits)
        if not (close(codes, right_codes) and close(scale, right_scale)):
            raise Mistake(
                f"right for 4 × 4 inputs and 4 bits, wrong for 5 × 9 and {bits} bits:"
                " take the sizes and `bits` from the arguments"
            )
    X[3] = 0
    codes, scale = both(answer, X, 8)
    scales = tokens(X, 8)[1]
    nothing = torch.arange(5)[:, None] == 3
    diagnose(
        scale,
        right=scales,
        mistakes={
            "the scale of a token of zeros is 0, or next to nothing: it is to be 1": (
                torch.where(nothing, 0.0, scales)
            ),
            "the scale of a token of zeros is 1 / top: it is to be 1": torch.where(
                nothing, 1 / 127, scales
            ),
        },
        what="the scales with a token of zeros",
    )
    if codes[3].any():
        raise Mistake("the codes of a token of zeros are to be 0")


def both(answer: Callable, X: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes and the scales of an answer, of the right shapes and types."""
    what = f"quantize_tokens(X, {bits})"
    got = answer(X, bits)
    if not isinstance(got, tuple) or len(got) != 2:
        raise Mistake(f"{what} must return two tensors: codes and scales")
    codes = expect(got[0], shape=tuple(X.shape), dtype=torch.int8, what="the codes")
    scale = expect(got[1], shape=(len(X), 1), dtype=torch.float32, what="the scales")
    return codes.float(), scale


def tokens(
    X: Tensor,
    bits: int,
    *,
    dim: int | None = -1,
    top: float | None = None,
    low: int | None = None,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    size: Callable[[Tensor], Tensor] = torch.abs,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of exercise 1, and what comes out with one thing changed."""
    most = 2 ** (bits - 1) - 1
    top = most if top is None else top
    if dim is None:
        largest = size(X).amax().expand(len(X), 1)
    else:
        largest = size(X).amax(dim, keepdim=True)
    scale = torch.where(largest != 0, largest / top, 1.0)
    codes = rounding(X / scale).clamp(-most if low is None else low, most)
    return codes, scale


def compare_tokens(answer: Callable, X: Tensor, bits: int) -> None:
    """Both results against usual mistakes; the scales come first."""
    codes, scale = both(answer, X, bits)
    right_codes, right_scale = tokens(X, bits)
    most = 2 ** (bits - 1) - 1
    by_column = tokens(X, bits, dim=0)[1].T
    diagnose(
        scale,
        right=right_scale,
        mistakes={
            "the scales are those of the columns: a token is a row": by_column,
            "all tokens have one scale: each is to have its own": tokens(
                X, bits, dim=None
            )[1],
            f"you divided by 2^(b−1) = {most + 1}: the largest code is {most}": tokens(
                X, bits, top=most + 1
            )[1],
            "you divided by 2^(b−1) − ½: the largest code is 2^(b−1) − 1": tokens(
                X, bits, top=most + 0.5
            )[1],
            "you divided by 2^b − 1: codes go from −top to top": tokens(
                X, bits, top=2 * most + 1
            )[1],
            "the scale is the largest |x| itself: divide it by the largest code": (
                right_scale * most
            ),
            "the scale is upside down: it is the step, largest / top": 1 / right_scale,
            "negative values are forgotten: the largest |x| of a row counts": tokens(
                X, bits, size=lambda x: x
            )[1],
            "the span from smallest to largest is divided by 2^b − 1: the largest |x|"
            " over top is asked, as codes go from −top to top": (
                (X.amax(-1, keepdim=True) - X.amin(-1, keepdim=True)) / (2 * most + 1)
            ),
            "the mean of |x| is taken: the largest is asked": (
                X.abs().mean(-1, keepdim=True) / most
            ),
            "the largest |x| is that of the last column": X[:, -1:].abs() / most,
            "this is for 8 bits: take `bits` from the argument": tokens(X, 8)[1],
        },
        what="the scales",
    )
    diagnose(
        codes,
        right=right_codes,
        mistakes={
            "you cut off instead of rounding to nearest": tokens(
                X, bits, rounding=torch.trunc
            )[0],
            "you rounded down: to the nearest is asked": tokens(
                X, bits, rounding=torch.floor
            )[0],
            "you rounded up: to the nearest is asked": tokens(
                X, bits, rounding=torch.ceil
            )[0],
            "you multiplied by the scale: divide by it": torch.round(
                X * right_scale
            ).clamp(-127, 127),
            "these are levels, or they were cut to integers after the scale came back:"
            " codes are integers before it": (right_codes * right_scale).trunc(),
            "negative codes are lost": right_codes.clamp(min=0),
            "the signs are lost": right_codes.abs(),
            "the codes start at 0: −top … top is asked": right_codes + most,
        },
        what="the codes",
    )


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "A loop over the groups. The columns of group g are"
            " `slice(g * size, (g + 1) * size)`, and size is in / groups."
        ),
        (
            "`(Q_x[:, columns].int() @ Q_w[:, columns].int().T)` has shape (tokens,"
            " out). `s_w[:, g]` has one number for each column of that."
        ),
        "s_x is the same in all groups: multiply once, after the loop.",
    ),
)
def group_product(answer):
    """A product of integers by groups of columns, and both scales."""
    case = product_case(4, 4, 8, 4)
    what = "group_product(Q_x, s_x, Q_w, s_w)"
    got = expect(answer(*case), shape=(4, 4), dtype=torch.float32, what=what)
    diagnose(got, right=product(*case), mistakes=wrong_products(*case), what=what)
    for shape in ((5, 3, 12, 3), (2, 7, 6, 1), (3, 4, 6, 6)):
        case = product_case(*shape)
        got = expect(answer(*case), shape=shape[:2], what=what)
        if not close(got, product(*case), tol=1e-5):
            raise Mistake(
                "right for 4 tokens, 4 outputs and 4 groups of 2 columns, wrong for"
                f" {shape[0]} tokens, {shape[1]} outputs and {shape[3]} groups of"
                f" {shape[2] // shape[3]}: take the sizes from the arguments"
            )
    # sums that leave 8 and 16 bits, and that a float16 does not hold
    Q = torch.full((2, 512), 127, dtype=torch.int8)
    one = torch.ones(2, 1)
    got = expect(answer(Q, one, Q, one), shape=(2, 2), what=what, finite=False)
    if not close(got, torch.full((2, 2), 512.0 * 127**2), tol=1e-5):
        raise Mistake(
            "a sum of 512 products 127 · 127 is wrong: codes of 8 bits must be summed"
            " in 32, so cast them before you multiply"
        )


def product_case(
    tokens: int, out: int, columns: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Small codes, so that a product in int8 overflows only where it is meant to."""
    Q_x = torch.randint(-5, 6, (tokens, columns), dtype=torch.int8)
    Q_w = torch.randint(-3, 4, (out, columns), dtype=torch.int8)
    Q_x[:, ::2] |= 1  # no column of zeros
    Q_w[:, ::2] |= 1
    return Q_x, torch.rand(tokens, 1) + 0.3, Q_w, torch.rand(out, groups) + 0.3


def product(Q_x: Tensor, s_x: Tensor, Q_w: Tensor, s_w: Tensor) -> Tensor:
    """X Wᵀ from the levels themselves, in float64: the oracle."""
    size = Q_w.shape[1] // s_w.shape[1]
    w = Q_w.double() * s_w.double().repeat_interleave(size, 1)
    return ((Q_x.double() * s_x.double()) @ w.T).float()


def wrong_products(Q_x: Tensor, s_x: Tensor, Q_w: Tensor, s_w: Tensor) -> dict:
    """What usual mistakes give; tokens and outputs are as many as groups."""
    groups = s_w.shape[1]
    size = Q_w.shape[1] // groups
    right = product(Q_x, s_x, Q_w, s_w)
    plain = Q_x.float() @ Q_w.float().T
    interleaved = Q_w.float() * s_w.repeat(1, size)
    by_group = []
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        by_group.append(Q_x[:, columns].float() @ Q_w[:, columns].float().T)
    stacked = torch.stack(by_group)  # (groups, tokens, out)
    rows = torch.einsum("gto,tg->to", stacked, s_w) * s_x
    mixed_up = torch.zeros_like(plain)
    running = torch.zeros_like(plain)
    for g in range(groups):
        columns = slice(g * groups, (g + 1) * groups)  # `groups` columns each
        mixed_up += (Q_x[:, columns].float() @ Q_w[:, columns].float().T) * s_w[:, g]
        running = (running + stacked[g]) * s_w[:, g]
    return {
        "the scales of the tokens are missing": right / s_x,
        "the scales of the weights are missing": plain * s_x,
        "both scales are missing: these are sums of integers": plain,
        "the scales of the tokens come in once for each group: the sum over the groups"
        " is multiplied by them once": product(Q_x, s_x**groups, Q_w, s_w),
        "the scales of the tokens come in twice": right * s_x,
        "the scales of the weights come in twice": product(Q_x, s_x, Q_w, s_w**2),
        "the scales of the tokens are on the outputs: s_x belongs to rows of the"
        " result": right / s_x * s_x.T,
        "the scales of the weights are on the tokens: s_w[:, g] belongs to the columns"
        " of the result": rows,
        "each group has as many columns here as there are groups: it has in / groups": (
            mixed_up * s_x
        ),
        "a group's scale multiplies the groups before it, too: scale it before you add"
        " it": running * s_x,
        "only the first group is there": (stacked[0] * s_w[:, 0]) * s_x,
        "only the last group is there: add the groups up": (stacked[-1] * s_w[:, -1])
        * s_x,
        "the last group is missing": right - (stacked[-1] * s_w[:, -1]) * s_x,
        "the first group is missing": right - (stacked[0] * s_w[:, 0]) * s_x,
        "the groups are added before their scales come in, which are summed then: each"
        " group has a scale of its own": plain * s_w.sum(1) * s_x,
        "all groups have the scale of the first": plain * s_w[:, 0] * s_x,
        "all groups have the scale of the last": plain * s_w[:, -1] * s_x,
        "the groups have the mean of their scales: each has its own": (
            plain * s_w.mean(1) * s_x
        ),
        "you divided by the scales of the tokens: multiply": right / s_x**2,
        "column j has the scale of group j % groups: neighbours share one, j // size": (
            (Q_x.float() * s_x) @ interleaved.T
        ),
        "the mean over the groups is taken: the sum is asked": right / groups,
        "this is the transpose: (tokens, out) is asked": right.T,
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        (
            "First the value, without a thought for the gradient. Then a sum: one term"
            " that carries the gradient, one that is detached and mends the value."
        ),
        (
            "`inside = torch.round(W / scale).abs() <= top` says which weights are not"
            " clipped. `W * inside` has the gradient that is asked."
        ),
        "`through + (levels - through).detach()` has the value of `levels`.",
    ),
)
def straight_through(answer):
    """Weights on their levels, and a gradient as if nothing had been rounded."""
    for rows, columns, top in ((4, 4, 3), (3, 6, 7), (5, 2, 1)):
        W = torch.randn(rows, columns)
        scale = W.abs().amax(1, keepdim=True) / (top + 1.2)  # the largest is clipped
        if rows == columns:  # clipped on both sides
            for row, sign in ((2, 1), (3, -1)):
                at = W[row].abs().argmax()
                W[row, at] = sign * W[row, at].abs()
        # both round to top: neither is clipped
        W[0, 0] = (top + 0.4) * scale[0, 0]
        W[1, 1] = (top - 0.3) * scale[1, 0]
        what = f"straight_through(W, scale, {top})"
        now = W.clone().requires_grad_()
        got = expect(
            answer(now, scale, top),
            shape=(rows, columns),
            dtype=torch.float32,
            what=what,
        )
        codes = torch.round(W / scale)
        levels = codes.clamp(-top, top) * scale
        upstream = torch.randn(rows, columns)
        if top == 3:
            mistakes = wrong_levels(W, scale, top)
            diagnose(got.detach(), right=levels, mistakes=mistakes, what=what)
        gradient = gradient_of(got, upstream, now)
        if top == 3:
            diagnose(
                gradient,
                right=upstream * (codes.abs() <= top),
                mistakes=wrong_gradients(W, scale, top, upstream),
                what="the gradient of W",
            )
        same = close(got.detach(), levels, tol=1e-5)
        if not same or not close(gradient, upstream * (codes.abs() <= top), tol=1e-5):
            raise Mistake(
                "right for 4 × 4 weights and top = 3, wrong for"
                f" {rows} × {columns} and top = {top}: take both from the arguments"
            )


def gradient_of(got: Tensor, upstream: Tensor, W: Tensor) -> Tensor:
    """The gradient of Σ got · upstream.

    Raises:
        Mistake: there is none.
    """
    if not got.requires_grad:
        raise Mistake("the result has no gradient: it is detached from W")
    (gradient,) = torch.autograd.grad((got * upstream).sum(), W, allow_unused=True)
    if gradient is None:
        raise Mistake("the result has a gradient, but not to W")
    return gradient


def wrong_gradients(
    W: Tensor, scale: Tensor, top: int, upstream: Tensor
) -> dict[str, Tensor]:
    """What usual mistakes give for the gradient."""
    codes = torch.round(W / scale)
    inside = codes.abs() <= top
    return {
        "the gradient is 0 everywhere: rounding has none. Let it go straight"
        " through": torch.zeros_like(W),
        "clipped weights get a gradient: theirs is 0": upstream,
        "weights clipped at −top get a gradient: theirs is 0, too": (
            upstream * (codes <= top)
        ),
        "weights clipped at top get a gradient: theirs is 0, too": (
            upstream * (codes >= -top)
        ),
        "only clipped weights get a gradient: it is the other way round": (
            upstream * ~inside
        ),
        "the gradient is multiplied by the scale: it is that of the identity": (
            upstream * inside * scale
        ),
        "the gradient is divided by the scale: it is that of the identity": (
            upstream * inside / scale
        ),
        "the gradient comes twice": 2 * upstream * inside,
        "a weight that rounds to top is not clipped, though it is larger than"
        " top · scale: look at the rounded code": (
            upstream * ((W / scale).abs() <= top)
        ),
        "the gradient has the wrong sign": -upstream * inside,
        "weights on the last level get no gradient: they are not clipped": (
            upstream * (codes.abs() < top)
        ),
        "each gradient is multiplied by its level": (
            upstream * codes.clamp(-top, top) * scale
        ),
    }


def wrong_levels(W: Tensor, scale: Tensor, top: int) -> dict[str, Tensor]:
    """What usual mistakes give for the value."""
    codes = torch.round(W / scale)
    mistakes = {
        "nothing is clamped: codes go from −top to top": codes * scale,
        "these are the codes: multiply them by the scale": codes.clamp(-top, top),
        "nothing is rounded": (W / scale).clamp(-top, top) * scale,
        "the codes are clamped at −top − 1: at −top is asked": codes.clamp(
            -top - 1, top
        )
        * scale,
        "you cut off instead of rounding to nearest": torch.trunc(W / scale).clamp(
            -top, top
        )
        * scale,
        "you rounded down: to the nearest is asked": torch.floor(W / scale).clamp(
            -top, top
        )
        * scale,
        "clipped weights become 0: they are to be on the last level": (
            codes * scale * (codes.abs() <= top)
        ),
        "this is the error, level − weight": codes.clamp(-top, top) * scale - W,
        "the scale comes in twice": codes.clamp(-top, top) * scale**2,
        "nothing is quantised: this is W": W,
        "W is added once more: the value is to be that of the levels": (
            codes.clamp(-top, top) * scale + W
        ),
    }
    if W.shape[0] == W.shape[1]:
        by_column = torch.round(W / scale.T).clamp(-top, top) * scale.T
        mistakes["the scales are on the wrong axis: scale[i] belongs to row i"] = (
            by_column
        )
    return mistakes


# 4 ------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A layer with a nonlinear end; it counts how often it reads."""

    def __init__(self, columns: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, out)
        self.seen: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        self.seen.append(h.detach().clone())
        return torch.tanh(self.linear(h))


def rounded(W: Tensor) -> Tensor:
    """W on a grid with a step of 0.25, straight through."""
    return W + (torch.round(W * 4) / 4 - W).detach()


def student_of(bias: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What a quantised layer computes with weights W from h."""

    def student(W: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h @ rounded(W).T + bias)

    return student


@check.exercise(
    points=4,
    minutes=20,
    difficulty=4,
    importance=5,
    hints=(
        (
            "A loop over `inputs`. In it: the teacher's output without a gradient, the"
            " student's with one, the mean squared error, one step."
        ),
        (
            "`W = W.detach().requires_grad_()` starts each step afresh."
            " `torch.autograd.grad(loss, W)` returns the gradient in a tuple, and"
            " leaves no `.grad` behind."
        ),
        (
            "`with torch.no_grad(): target = teacher(h)`; then `W = W -"
            " learning_rate * gradient`."
        ),
    ),
)
def distill_layer(answer):
    """One pass of layer-by-layer distillation, with plain gradient steps."""
    for columns, out, sizes, rate in (
        (6, 4, (5, 3, 7), 1.7),
        (3, 5, (2, 4), 0.7),
        (4, 2, (6,), 3.0),
    ):
        teacher = Teacher(columns, out)
        student = student_of(torch.randn(out) * 0.1)
        W = teacher.linear.weight.detach().clone() + 0.3 * torch.randn(out, columns)
        inputs = [torch.randn(size, columns) * 1.5 for size in sizes]
        before = [p.detach().clone() for p in teacher.parameters()]
        what = "distill_layer(W, student, teacher, inputs, learning_rate)"
        teacher.seen.clear()
        got = expect(
            answer(W.clone(), student, teacher, inputs, rate),
            shape=(out, columns),
            dtype=torch.float32,
            what=what,
        )
        after_all(teacher, before, inputs)
        if got.requires_grad:
            raise Mistake("the result still has a gradient: detach it")
        right = steps(W, student, teacher, inputs, rate)
        mistakes = wrong_steps(W, student, teacher, inputs, rate)
        diagnose(got, right=right, mistakes=mistakes, tol=1e-5, what=what)


def after_all(teacher: Teacher, before: list[Tensor], inputs: list[Tensor]) -> None:
    """What holds of the teacher once an answer has run."""
    if any(p.grad is not None for p in teacher.parameters()):
        raise Mistake(
            "the teacher got gradients: its output is a fixed target, so compute it"
            " under torch.no_grad() or detach it"
        )
    for p, old in zip(teacher.parameters(), before, strict=True):
        if not torch.equal(p.detach(), old):
            raise Mistake("the teacher was changed: only W is trained")
    if not teacher.seen:
        raise Mistake("the teacher was never asked: its output is the target")
    for h in teacher.seen:
        if not any(h.shape == x.shape and torch.equal(h, x) for x in inputs):
            raise Mistake(
                "the teacher was given something else than the inputs: teacher and"
                " student read the same h"
            )


def steps(
    W: Tensor,
    student: Callable,
    teacher: Callable,
    inputs: list[Tensor],
    rate: float,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    sign: int = 1,
    at_start: bool = False,
    adding: bool = False,
    round_result: bool = False,
) -> Tensor:
    """W after one step for each input, and what comes out with one thing changed."""
    now = W.detach().clone()
    total = torch.zeros_like(now)
    for h in inputs:
        leaf = (W if at_start else now).detach().clone().requires_grad_()
        with torch.no_grad():
            target = teacher(h)
        (gradient,) = torch.autograd.grad(loss(student(leaf, h), target), leaf)
        total = total + gradient
        now = now - sign * rate * (total if adding else gradient)
    return rounded(now).detach() if round_result else now


def adams_steps(
    W: Tensor, student: Callable, teacher: Callable, inputs: list[Tensor], rate: float
) -> Tensor:
    """W after as many steps of Adam."""
    leaf = W.detach().clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=rate)
    for h in inputs:
        adam.zero_grad()
        with torch.no_grad():
            target = teacher(h)
        nn.functional.mse_loss(student(leaf, h), target).backward()
        adam.step()
    return leaf.detach()


def wrong_steps(
    W: Tensor, student: Callable, teacher: Callable, inputs: list[Tensor], rate: float
) -> dict:
    """What usual mistakes give for W."""

    def but(**changes) -> Callable[[], Tensor]:
        return lambda: steps(W, student, teacher, inputs, rate, **changes)

    def summed(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().sum()

    def per_token(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().sum(-1).mean()

    def absolute(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).abs().mean()

    def root(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean().sqrt()

    def half(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean() / 2

    mistakes: dict[str, Tensor | Callable[[], Tensor]] = {
        "nothing was trained: this is W": W,
        "you went up the hill: subtract the gradient": but(sign=-1),
        "the sum of squares is taken: their mean is asked": but(loss=summed),
        "the squares are summed over the outputs: the mean over all numbers is asked": (
            but(loss=per_token)
        ),
        "the absolute error is taken: its square is asked": but(loss=absolute),
        "the root of the mean square is taken: the mean square itself is asked": but(
            loss=root
        ),
        "half of the squares is taken: without the half": but(loss=half),
        "these are steps of Adam: plain gradient descent is asked": (
            lambda: adams_steps(W, student, teacher, inputs, rate)
        ),
        "the learning rate is missing": lambda: steps(W, student, teacher, inputs, 1.0),
        "W itself was rounded at the end: the float weights are asked": but(
            round_result=True
        ),
    }
    if len(inputs) > 1:
        mistakes |= {
            "only the first input was read: one step for each": (
                lambda: steps(W, student, teacher, inputs[:1], rate)
            ),
            "only the last input was read: one step for each": (
                lambda: steps(W, student, teacher, inputs[-1:], rate)
            ),
            "the last input was not read": (
                lambda: steps(W, student, teacher, inputs[:-1], rate)
            ),
            "all gradients are taken at the W of the start: take each at the W that"
            " the steps before have made": but(at_start=True),
            "gradients pile up: each step starts without those before it": but(
                adding=True
            ),
            "the inputs are read from last to first": lambda: steps(
                W, student, teacher, inputs[::-1], rate
            ),
            "one step is made on all inputs together: one for each is asked": (
                lambda: steps(W, student, teacher, [torch.cat(inputs)], rate)
            ),
        }
    return mistakes
