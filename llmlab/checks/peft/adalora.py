"""What marks the exercises of 04-peft/06-adalora."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmlab.checks.operations import Operations, not_built
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.peft import adalora
from llmlab.peft.adalora import AdaLoRAConfig
from llmlab.peft.adalora import budget as adalora_budget

check = Checks("04-peft/06-adalora")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=4,
    hints=(
        "It is LoRA with Q for A and P for B, and a diagonal matrix between the two.",
        (
            "A diagonal matrix times Q multiplies row i of Q by λ_i. `lam` is a column,"
            " so broadcasting does it."
        ),
        (
            "x @ (lam * Q).T is (…, r); then @ P.T; the scale alpha / r0 may sit"
            " anywhere on that path, and on no other."
        ),
    ),
    grads={"x": 0, "P": 2, "lam": 3, "Q": 4},
)
def svd_forward(answer):
    """The output of a linear layer with triplets P Λ Q beside it."""
    x, W, P, Q = (
        torch.randn(2, 5, 8),
        torch.randn(7, 8),
        torch.randn(7, 3),
        torch.randn(3, 8),
    )
    lam, alpha, r0, what = torch.randn(3, 1), 10.0, 4, "svd_forward(…)"
    got = expect(
        answer(x, W, P, lam, Q, alpha, r0),
        shape=(2, 5, 7),
        dtype=torch.float32,
        what=what,
    )
    base, low = x @ W.T, x @ (lam * Q).T @ P.T
    mistakes = {
        "you scaled by alpha / r with today's r: triplets were dropped, the"
        " scale keeps r0": (base + alpha / 3 * low),
        "the scale alpha / r0 is missing": base + low,
        "you scaled by alpha, not by alpha / r0": base + alpha * low,
        "you scaled by r0 / alpha": base + r0 / alpha * low,
        "Λ is missing: row i of Q is multiplied by λ_i": (
            base + alpha / r0 * x @ Q.T @ P.T
        ),
        "Λ is in it twice": base + alpha / r0 * x @ (lam**2 * Q).T @ P.T,
        "W x is missing: the triplets are added to it": alpha / r0 * low,
        "the triplets are missing: this is W x alone": base,
        "the scale belongs to the triplets alone, not to W x": (
            alpha / r0 * (base + low)
        ),
        "the triplets are added, not subtracted": base - alpha / r0 * low,
        "that is alpha / √r0: here it is alpha / r0": base + alpha / r0**0.5 * low,
        "the scale alpha / r0 is applied twice": base + (alpha / r0) ** 2 * low,
        "one λ serves all triplets, their mean: each has its own": (
            base + alpha / r0 * lam.mean() * x @ Q.T @ P.T
        ),
        "the signs of λ are lost: no absolute value": (
            base + alpha / r0 * x @ (lam.abs() * Q).T @ P.T
        ),
        "λ is under a root: it multiplies as it is": (
            base + alpha / r0 * x @ (lam.abs().sqrt() * Q).T @ P.T
        ),
    }
    terms = [{"W x": base, "the triplets' path": alpha / r0 * low}]
    each = {
        f"triplet {i}": alpha / r0 * lam[i] * (x @ Q[i])[..., None] * P[:, i]
        for i in range(3)
    }
    terms.append({"W x": base, **each})
    diagnose(
        got, right=base + alpha / r0 * low, mistakes=mistakes, terms=terms, what=what
    )
    # the oracle: one linear with W + ΔW
    merged = W + adalora.delta_weight(P[:, :2], lam[:2], Q[:2], 3.0)
    with Operations() as seen:
        other = answer(x[0], W, P[:, :2], lam[:2], Q[:2], 6.0, 2)
    if not close(other, x[0] @ merged.T):
        raise Mistake(
            "right for alpha = 10 and r0 = 4, wrong for alpha = 6 and r0 = 2: take both"
            " from the arguments"
        )
    not_built(seen, (7, 8), "P Λ Q")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "First the sensitivity of this step, I = |w · grad|: of the product, number"
            " by number."
        ),
        "An exponential average keeps β of the old and adds 1 − β of the new.",
        "Compute the new Ī first; Ū averages |I − Ī| with that new Ī, and uses beta2.",
    ),
)
def importance(answer):
    """One step of the smoothed sensitivity and of its smoothed uncertainty."""
    smooth, unsure, w, grad = (
        torch.rand(3, 4),
        torch.rand(3, 4),
        torch.randn(3, 4),
        torch.randn(3, 4),
    )
    b1, b2, what = 0.7, 0.9, "importance(…)"
    pair = expect(
        answer(smooth, unsure, w, grad, b1, b2), kind=(tuple, list), what=what
    )
    if len(pair) != 2:
        raise Mistake(f"importance returned {len(pair)} things: return Ī and Ū")
    got = torch.stack(
        [
            expect(t, shape=(3, 4), dtype=torch.float32, what=n)
            for t, n in zip(pair, "ĪŪ", strict=True)
        ]
    )
    right, mistakes = _averages(smooth, unsure, w, grad, b1, b2)
    diagnose(got, right=right, mistakes=mistakes, parts={"Ī": 0, "Ū": 1})
    # the reference, which works in place
    adalora_budget.update(smooth, unsure, w, grad, b1, b2)
    if not close(got, torch.stack([smooth, unsure])):
        raise Mistake("Ī and Ū differ from the reference")


def _averages(smooth, unsure, w, grad, b1, b2) -> tuple[Tensor, dict[str, Tensor]]:
    """Ī and Ū, and what mistakes make of them."""
    now = (w * grad).abs()
    new = b1 * smooth + (1 - b1) * now

    def both(first: Tensor, second: Tensor | None = None) -> Tensor:
        return torch.stack(
            [
                first,
                (
                    b2 * unsure + (1 - b2) * (now - first).abs()
                    if second is None
                    else second
                ),
            ]
        )

    signed = b1 * smooth + (1 - b1) * w * grad
    mistakes = {
        "Ū uses the old Ī: update Ī first": both(
            new, b2 * unsure + (1 - b2) * (now - smooth).abs()
        ),
        "the two are in the wrong order: return Ī, then Ū": both(new).flip(0),
        "beta1 and beta2 are swapped": torch.stack(
            [
                s := b2 * smooth + (1 - b2) * now,
                b1 * unsure + (1 - b1) * (now - s).abs(),
            ]
        ),
        "β and 1 − β are swapped: most of the old average stays": torch.stack(
            [
                s := (1 - b1) * smooth + b1 * now,
                (1 - b2) * unsure + b2 * (now - s).abs(),
            ]
        ),
        "Ū uses beta1: it has a β of its own": both(
            new, b1 * unsure + (1 - b1) * (now - new).abs()
        ),
        "the absolute value of w · grad is missing": torch.stack(
            [signed, b2 * unsure + (1 - b2) * (w * grad - signed).abs()]
        ),
        "the absolute value of I − Ī is missing": both(
            new, b2 * unsure + (1 - b2) * (now - new)
        ),
        "sensitivity is |w · grad|: you used the gradient alone": both(
            s := b1 * smooth + (1 - b1) * grad.abs(),
            b2 * unsure + (1 - b2) * (grad.abs() - s).abs(),
        ),
        "sensitivity is |w · grad|: you used the size of w alone": both(
            s := b1 * smooth + (1 - b1) * w.abs(),
            b2 * unsure + (1 - b2) * (w.abs() - s).abs(),
        ),
        "Ū averages the square of I − Ī: take the absolute value": both(
            new, b2 * unsure + (1 - b2) * (now - new).square()
        ),
        "Ī is right, Ū is as it was": both(new, unsure),
    }
    return both(new), mistakes | _wrong_sensitivities(smooth, unsure, w, grad, b1, b2)


def _wrong_sensitivities(smooth, unsure, w, grad, b1, b2) -> dict[str, Tensor]:
    """Ī and Ū from another I, or from another mean of it."""
    now = (w * grad).abs()
    new = b1 * smooth + (1 - b1) * now
    other = b2 * unsure + (1 - b2) * (now - new).abs()

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second])

    return {
        "the absolute value is of w · grad, not of w alone": both(
            s := b1 * smooth + (1 - b1) * w.abs() * grad,
            b2 * unsure + (1 - b2) * (w.abs() * grad - s).abs(),
        ),
        "the absolute value comes before the average: I = |w · grad|": both(
            s := (b1 * smooth + (1 - b1) * w * grad).abs(),
            b2 * unsure + (1 - b2) * (now - s).abs(),
        ),
        "the absolute value comes before the average, also in Ū: I = |w · grad|": both(
            s := (b1 * smooth + (1 - b1) * w * grad).abs(),
            b2 * unsure + (1 - b2) * (w * grad - s).abs(),
        ),
        "the score Ī · Ū comes later: return Ī and Ū": both(new * other, other),
        "Ū averages how far I is from the new Ī, not how far Ī has moved": both(
            new, b2 * unsure + (1 - b2) * (new - smooth).abs()
        ),
        "Ī is divided by 1 − β, as Adam's first step is: it is not here": both(
            new / (1 - b1), other
        ),
        "Ū is the new |I − Ī| alone: average it with the old": both(
            new, (now - new).abs()
        ),
        "Ī is the new I alone, and Ū with it: average with the old": both(
            now, b2 * unsure
        ),
        "I is |w · grad| number by number: you summed it": both(
            s := b1 * smooth + (1 - b1) * (w * grad).sum().abs(), other
        ),
        "I is the product of w and grad: you added them": both(
            s := b1 * smooth + (1 - b1) * (w.abs() + grad.abs()),
            b2 * unsure + (1 - b2) * (w.abs() + grad.abs() - s).abs(),
        ),
        "the factor 1 − β of the new I is missing": both(
            s := b1 * smooth + now, b2 * unsure + (1 - b2) * (now - s).abs()
        ),
        "the factor 1 − β₂ of |I − Ī| is missing": both(
            new, b2 * unsure + (now - new).abs()
        ),
        "I is the square of w · grad: take the size": both(
            s := b1 * smooth + (1 - b1) * now**2,
            b2 * unsure + (1 - b2) * (now**2 - s).abs(),
        ),
    }


# b0, b_T, T, ti, tf: with a small model, with one so large that each step counts, and
# with neither a start nor an end apart
SCHEDULES = [(96, 30, 40, 5, 8), (9000, 20, 30, 4, 6), (50, 7, 12, 0, 0)]


def _schedules() -> dict[str, slice]:
    """Where each schedule lies in all of them joined."""
    places = {}
    start = 0
    for b0, bT, T, ti, tf in SCHEDULES:
        name = f"with b0 = {b0}, bT = {bT}, T = {T}, ti = {ti}, tf = {tf} the budget"
        places[name] = slice(start, start + T)
        start += T
    return places


def _budgets(wrong) -> Tensor:
    """`wrong(t, b0, bT, T, ti, tf)` at each step of each schedule."""
    values = []
    for b0, bT, T, ti, tf in SCHEDULES:
        values += [wrong(t, b0, bT, T, ti, tf) for t in range(T)]
    return torch.tensor(values).double()


def _curve(share, rounding=int, first=0, last=0):
    """A budget that falls otherwise.

    `share(s)` is the part of b0 − b_T that is left after the fraction s of the way;
    `first` and `last` move the two borders.
    """

    def budget(t, b0, bT, T, ti, tf):
        if t <= ti + first:
            return b0
        if t > T - tf + last:
            return bT
        return rounding(bT + (b0 - bT) * share((t - ti) / (T - ti - tf)))

    return budget


def _cube(s: float) -> float:
    return (1 - s) ** 3


def _free(start, end):
    """The cube between other borders, of which each may be left out."""

    def budget(t, b0, bT, T, ti, tf):
        low = start(ti)
        high = end(T, tf)
        if ti == low and t <= ti:
            return b0
        if T - tf == high and t > high:
            return bT
        return int(bT + (b0 - bT) * (1 - (t - low) / (high - low)) ** 3)

    return budget


def _ends_at_tf(t, b0, bT, T, ti, tf):
    if t <= ti:
        return b0
    if t > tf:
        return bT
    return int(bT + (b0 - bT) * (1 - (t - ti) / (T - ti - tf)) ** 3)


def _of_a_longer_way(t, b0, bT, T, ti, tf):
    if t <= ti:
        return b0
    if t > T - tf:
        return bT
    return int(bT + (b0 - bT) * _cube((t - ti) / (T - ti)))


WRONG_BUDGETS = {
    "the power 3 is missing": _curve(lambda s: 1 - s),
    "you squared where a cube is asked": _curve(lambda s: (1 - s) ** 2),
    "1 − (…)³ is not (1 − …)³: the budget falls fast first": _curve(lambda s: 1 - s**3),
    "round down, not to the nearest": _curve(_cube, round),
    "round down, not up": _curve(_cube, math.ceil),
    "b_T is not added": lambda t, b0, bT, T, ti, tf: (
        _curve(_cube)(t, b0 - bT, 0, T, ti, tf)
        if ti < t <= T - tf
        else _curve(_cube)(t, b0, bT, T, ti, tf)
    ),
    "the whole b0 shrinks: it is b0 − b_T that does": lambda t, b0, bT, T, ti, tf: (
        _curve(_cube)(t, b0 + bT, bT, T, ti, tf)
        if ti < t <= T - tf
        else _curve(_cube)(t, b0, bT, T, ti, tf)
    ),
    "the cube runs from 0 to T: it begins at ti and ends at T − tf": _free(
        lambda ti: 0, lambda T, tf: T
    ),
    "this is the equation as the paper prints it, which starts above b0: take t − ti in"
    " the numerator": lambda t, b0, bT, T, ti, tf: _curve(
        lambda s: (1 - (s - tf / (T - ti - tf))) ** 3
    )(t, b0, bT, T, ti, tf),
    "tf is not used: the last tf steps have the final budget": _free(
        lambda ti: ti, lambda T, tf: T
    ),
    "ti is not used: up to step ti the budget is whole": _free(
        lambda ti: 0, lambda T, tf: T - tf
    ),
    "t is to be counted from ti: (t − ti), not t": lambda t, b0, bT, T, ti, tf: _curve(
        lambda s: (1 - s - ti / (T - ti - tf)) ** 3
    )(t, b0, bT, T, ti, tf),
    "the end is the step T − tf, not tf": _ends_at_tf,
    "b0 and b_T are swapped: the budget falls": lambda t, b0, bT, T, ti, tf: _curve(
        _cube
    )(t, bT, b0, T, ti, tf),
    "b0 and b_T are swapped between the borders: the budget falls": (
        lambda t, b0, bT, T, ti, tf: (
            _curve(_cube)(t, bT, b0, T, ti, tf)
            if ti < t <= T - tf
            else _curve(_cube)(t, b0, bT, T, ti, tf)
        )
    ),
    "after step T − tf the budget is b_T: the cube turns negative there": _curve(
        _cube, last=10**6
    ),
    "up to step ti the budget is b0, and after T − tf it is b_T: these two cases are"
    " missing": _curve(_cube, first=-(10**6), last=10**6),
    "up to step ti the budget is b0: this case is missing": _curve(
        _cube, first=-(10**6)
    ),
    "the budget begins to fall a step too late: step ti + 1 is the first": _curve(
        _cube, first=1
    ),
    "the end comes a step too early: it is b_T from step T − tf on": _curve(
        _cube, last=-2
    ),
    "the end comes a step too late: it is b_T after step T − tf": _curve(_cube, last=1),
    "the budget stays whole until it is b_T: // cuts the fraction off": _curve(
        lambda s: float(s < 1)
    ),
    "the way from ti to T − tf has T − ti − tf steps: tf is not taken away": (
        _of_a_longer_way
    ),
    "that is half a cosine: the cube is asked": _curve(
        lambda s: (1 + math.cos(math.pi * s)) / 2
    ),
    "that is the power 4: a cube is asked": _curve(lambda s: (1 - s) ** 4),
    "the budget of the next step: count t from ti": lambda t, b0, bT, T, ti, tf: _curve(
        lambda s: _cube(s + 1 / (T - ti - tf))
    )(t, b0, bT, T, ti, tf),
    "b0 shrinks to 0 and is held at b_T: it is b0 − b_T that shrinks": (
        lambda t, b0, bT, T, ti, tf: (
            max(bT, int(b0 * _cube((t - ti) / (T - ti - tf))))
            if ti < t <= T - tf
            else _curve(_cube)(t, b0, bT, T, ti, tf)
        )
    ),
    "b0 shrinks to 0: b_T is missing": lambda t, b0, bT, T, ti, tf: (
        int(b0 * _cube((t - ti) / (T - ti - tf)))
        if ti < t <= T - tf
        else _curve(_cube)(t, b0, bT, T, ti, tf)
    ),
    "the budget never falls": lambda t, b0, bT, T, ti, tf: b0,
}


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=3,
    hints=(
        "Three cases, in this order: t ≤ ti, then t > T − tf, then the rest.",
        (
            "The fraction of the way that is behind is (t − ti) / (T − ti − tf); cube"
            " what is left of it."
        ),
        (
            "int(…) rounds down, since nothing here is negative. Round at the end, not"
            " in between."
        ),
    ),
)
def budget(answer):
    """How many triplets the model may have at step t."""
    got = []
    right = []
    for b0, bT, T, ti, tf in SCHEDULES:
        config = AdaLoRAConfig(
            total_step=T, tinit=ti, tfinal=tf, init_r=b0, target_r=bT
        )
        for t in range(T):
            value = expect(
                answer(t, b0, bT, T, ti, tf), kind=int, what=f"budget({t}, …)"
            )
            got.append(value)
            right.append(adalora_budget.budget(t, config, 1))
    mistakes = {text: _budgets(wrong) for text, wrong in WRONG_BUDGETS.items()}
    diagnose(
        torch.tensor(got).double(),
        right=torch.tensor(right).double(),
        mistakes=mistakes,
        tol=1e-9,
        parts=_schedules(),
    )
    if answer(3, 10, 10, 9, 0, 0) != 10:
        raise Mistake("with b0 = b_T the budget stays what it is")
    try:
        steps = [answer(t, 10, 4, 9, 4, 5) for t in (0, 4, 5, 8)]
    except ZeroDivisionError:
        steps = None
    if steps != [10, 10, 4, 4]:
        raise Mistake(
            "with ti + tf = T there are no steps between: up to ti the budget is b0,"
            " then b_T; ask where t is before you divide by T − ti − tf"
        )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        (
            "The b best of the whole model: put all scores in one tensor before you"
            " look for a threshold."
        ),
        (
            "Sort all scores from large to small; number b (from 0) is the best of"
            " those that go. Nothing goes when b ≥ all."
        ),
        (
            "λ · (score > threshold), with the mask as a column: `mask[:, None]`. Layer"
            " by layer, in the order that you got."
        ),
    ),
)
def allocate(answer):
    """λ of every layer, zero but for the b best triplets of the model."""
    sizes, b = (3, 9, 2, 8), 6
    scores = list((torch.randperm(22) + torch.rand(22) / 2).split(sizes))
    scores[2] = scores[2] + 30  # a layer that keeps all
    scores[0] = scores[0] - 30  # and one that keeps none
    # negative ones: the size of λ is no score
    lam = [torch.randn(n, 1) - 3 for n in sizes]
    got = _lambdas(answer(lam, scores, b), lam)
    right, mistakes = _masked(lam, scores, b)
    diagnose(
        got,
        right=right,
        mistakes=mistakes,
        parts=_layers(sizes),
    )
    # an independent reference, another b
    kept = adalora_budget.keep_best({str(i): s for i, s in enumerate(scores)}, 9)
    if not close(
        _lambdas(answer(lam, scores, 9), lam),
        torch.cat([v * k[:, None] for v, k in zip(lam, kept.values(), strict=True)]),
    ):
        raise Mistake("right for b = 6, wrong for b = 9: take b from the argument")
    for all_of_them in (22, 30):
        kept_all = answer(lam, scores, all_of_them)
        if not close(_lambdas(kept_all, lam), torch.cat(lam)):
            raise Mistake(f"with b = {all_of_them} and 22 triplets nothing is masked")
        if any(new is old for new, old in zip(kept_all, lam, strict=True)):
            raise Mistake(
                f"with b = {all_of_them} the tensors that came in go out again: return"
                " new ones"
            )
    if _lambdas(answer(lam, scores, 0), lam).any():
        raise Mistake("with b = 0 no triplet is kept: every λ becomes zero")


def _masked(lam, scores, b: int) -> tuple[Tensor, dict[str, Tensor]]:
    """All λ with the b best triplets kept, and what mistakes make of them."""
    sizes = [len(s) for s in scores]
    every = torch.cat(scores)
    ranked = every.sort(descending=True).values

    def masked(keep) -> Tensor:
        return torch.cat(
            [
                values * keep(values, s)[:, None]
                for values, s in zip(lam, scores, strict=True)
            ]
        )

    top = lambda s, n: s >= s.sort(descending=True).values[max(0, min(n, len(s)) - 1)]  # noqa: E731
    mistakes = {
        "one triplet too many is kept": masked(lambda _, s: s >= ranked[b]),
        "one triplet too few is kept": masked(lambda _, s: s > ranked[b - 1]),
        "the b best are cut, and the others kept": masked(lambda _, s: s <= ranked[b]),
        "these are the b worst": masked(lambda _, s: s <= every.sort().values[b - 1]),
        "you kept the b best of each layer: the budget is the whole model's": masked(
            lambda _, s: top(s, b)
        ),
        "every layer keeps the same share: the budget moves between layers": masked(
            lambda _, s: top(s, b // len(sizes))
        ),
        "you ranked by the size of λ, not by the scores": masked(
            lambda v, _: (
                v.flatten().abs()
                > torch.cat(lam).flatten().abs().sort(descending=True).values[b]
            )
        ),
        "nothing is masked": torch.cat(lam),
        "scores may be negative: the largest count, not those of the largest size": (
            masked(lambda _, s: s.abs() > every.abs().sort().values[-b - 1])
        ),
        "each layer keeps at least one: a layer may lose all": masked(
            lambda _, s: (s > ranked[b]) | (s == s.max())
        ),
        "these are the masks, ones and zeros: multiply λ by them": (
            torch.cat([(s > ranked[b]).float()[:, None] for s in scores])
        ),
        "these are the first b triplets: the best are asked": torch.cat(
            [
                v * (n < b)[:, None]
                for v, n in zip(lam, torch.arange(22).split(sizes), strict=True)
            ]
        ),
        "you ranked by score times λ: by the scores alone": masked(
            lambda v, s: (
                (s * v[:, 0])
                > torch.cat([s * v[:, 0] for s, v in zip(scores, lam, strict=True)])
                .sort()
                .values[-b - 1]
            )
        ),
        "those that go change their sign: they become zero": masked(
            lambda _, s: torch.where(s > ranked[b], 1.0, -1.0)
        ),
        "those that go are halved: they become zero": masked(
            lambda _, s: torch.where(s > ranked[b], 1.0, 0.5)
        ),
        "whole layers go or stay: the triplets do, one by one": masked(
            lambda _, s: (s.mean() >= every.mean()).expand(len(s))
        ),
        "each kept λ is multiplied by its score: it stays as it is": masked(
            lambda _, s: (s > ranked[b]) * s
        ),
    }
    return masked(lambda _, s: s > ranked[b]), mistakes


def _layers(sizes: tuple[int, ...]) -> dict[str, slice]:
    """Where each layer's λ lie in all of them joined."""
    places = {}
    start = 0
    for i, size in enumerate(sizes):
        places[f"λ of layer {i}"] = slice(start, start + size)
        start += size
    return places


def _lambdas(value: object, lam: list[Tensor]) -> Tensor:
    expect(value, kind=(list, tuple), what="allocate(…)")
    if len(value) != len(lam):
        raise Mistake(f"allocate returned {len(value)} tensors for {len(lam)} layers")
    shapes = [tuple(getattr(v, "shape", ())) for v in value]
    asked = [tuple(w.shape) for w in lam]
    if shapes != asked and sorted(shapes) == sorted(asked):
        raise Mistake("the layers are in another order: return them as they came")
    if any(len(s) == 2 and s[0] == s[1] > 1 for s in shapes):
        raise Mistake(
            "the mask of a layer is a row, and λ a column: make it one, mask[:, None]"
        )
    if any(s[1:] == (1,) and s[0] < len(w) for s, w in zip(shapes, lam, strict=True)):
        raise Mistake("a λ that goes becomes zero: its place stays")
    return torch.cat(
        [
            expect(v, shape=tuple(w.shape), dtype=torch.float32, what=f"λ of layer {i}")
            for i, (v, w) in enumerate(zip(value, lam, strict=True))
        ]
    )
