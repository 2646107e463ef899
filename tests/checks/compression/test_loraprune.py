"""Wrong answers to 06-compression/11-loraprune, each with its diagnosis."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.compression.loraprune import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def by_a_step(A, B, grad_A, grad_B, scaling, lr):
    """The step itself, in float64."""
    A, B, grad_A, grad_B = (t.double() for t in (A, B, grad_A, grad_B))
    after = (B - lr * grad_B) @ (A - lr * grad_A)
    return (scaling * (B @ A - after) / lr).float()


def by_einsum(A, B, grad_A, grad_B, scaling, lr):
    left = torch.cat([grad_B, B, grad_B], 1) * scaling
    right = torch.cat([A, grad_A, -lr * grad_A])
    return torch.einsum("dr,rk->dk", left, right)


def gradient(
    first=lambda A, B, gA, gB: gB @ A,
    second=lambda A, B, gA, gB: B @ gA,
    both=lambda A, B, gA, gB: gB @ gA,
    sign=-1,
    rate=lambda lr: lr,
    scale=lambda s, lr: s,
):
    """estimated_gradient with one thing changed."""

    def answer(A, B, grad_A, grad_B, scaling, lr):
        given = (A, B, grad_A, grad_B)
        change = first(*given) + second(*given) + sign * rate(lr) * both(*given)
        return scale(scaling, lr) * change

    return answer


def nothing(*given):
    return 0.0


def scale_on_two_terms(A, B, grad_A, grad_B, scaling, lr):
    return scaling * (grad_B @ A + B @ grad_A) - lr * grad_B @ grad_A


def own_gradients(A, B, grad_A, grad_B, scaling, lr):
    return scaling * (grad_B @ B + A @ grad_A - lr * grad_B @ grad_A)


def swapped(A, B, grad_A, grad_B, scaling, lr):
    return scaling * (A @ grad_B + grad_A @ B - lr * grad_A @ grad_B)


def transposed(A, B, grad_A, grad_B, scaling, lr):
    return by_einsum(A, B, grad_A, grad_B, scaling, lr).T


def elementwise(A, B, grad_A, grad_B, scaling, lr):
    return scaling * (grad_B * A + B * grad_A - lr * grad_B * grad_A)


def weight_itself(A, B, grad_A, grad_B, scaling, lr):
    return scaling * B @ A


def steps_in_place(A, B, grad_A, grad_B, scaling, lr):
    before = scaling * B @ A
    A -= lr * grad_A
    B -= lr * grad_B
    return (before - scaling * B @ A) / lr


def fixed_rate(A, B, grad_A, grad_B, scaling, lr):
    return by_einsum(A, B, grad_A, grad_B, scaling, 0.3)


# 2 ------------------------------------------------------------------------------------


def in_loops(W0, A, B, scaling, gradient, axis, each):
    W = W0 + scaling * B @ A
    if axis == 1:
        W, gradient = W.T, gradient.T
    found = []
    for start in range(0, len(W), each):
        rows = slice(start, start + each)
        found.append((W[rows] * gradient[rows]).pow(2).sum())
    return torch.stack(found)


def by_folding(W0, A, B, scaling, gradient, axis, each):
    product = ((W0 + scaling * torch.einsum("dr,rk->dk", B, A)) * gradient).double()
    blocks = product.movedim(axis, 0).unflatten(0, (-1, each))
    return blocks.flatten(1).norm(dim=1).square().float()


def group(
    weight=lambda W0, change: W0 + change,
    score=lambda g, W: (g * W) ** 2,
    scale=lambda s: s,
    total=lambda lines, each: lines.reshape(-1, each).sum(1),
    axis_of=lambda axis: axis,
    after=lambda scores: scores,
    along=torch.sum,
):
    """group_importance with one thing changed."""

    def answer(W0, A, B, scaling, gradient, axis, each):
        W = weight(W0, scale(scaling) * B @ A)
        lines = along(score(gradient, W), dim=1 - axis_of(axis))
        return after(total(lines, each))

    return answer


def mean_of_all(W0, A, B, scaling, gradient, axis, each):
    found = in_loops(W0, A, B, scaling, gradient, axis, each)
    return found / (W0.shape[1 - axis] * each)


def square_of_lines(W0, A, B, scaling, gradient, axis, each):
    lines = (gradient * (W0 + scaling * B @ A)).sum(1 - axis)
    return lines.square().reshape(-1, each).sum(1)


def scale_on_all(W0, A, B, scaling, gradient, axis, each):
    return group()(scaling * W0, A, B, scaling, gradient, axis, each)


def pairs_only(W0, A, B, scaling, gradient, axis, each):
    lines = (gradient * (W0 + scaling * B @ A)).square().sum(1 - axis)
    return lines.reshape(-1, 2).sum(1) if len(lines) % 2 == 0 else lines


# 3 ------------------------------------------------------------------------------------


def prog(
    average=lambda old, new, decay: decay * old + (1 - decay) * new,
    start=lambda steps, warmup: warmup * steps,
    stop=lambda steps, cooldown: steps - cooldown * steps,
    share=lambda left: 1 - left**3,
    after=lambda n, share: math.floor(round(n * share, 6)),
    final_of=lambda final: final,
):
    """progress with one thing changed."""

    def answer(old, new, decay, step, steps, warmup, cooldown, final):
        final = final_of(final)
        begin, end = start(steps, warmup), stop(steps, cooldown)
        if step >= end:
            now = final
        elif step <= begin:
            now = 0.0
        else:
            now = final * share(1 - (step - begin) / (end - begin))
        return average(old, new, decay), after(len(old), now)

    return answer


def by_lerp(old, new, decay, step, steps, warmup, cooldown, final):
    """torch's lerp; progress clamped to 0 … 1."""
    begin, end = warmup * steps, steps * (1 - cooldown)
    done = 1.0 if step >= end - 1e-9 else (step - begin) / max(end - begin, 1e-9)
    done = min(1.0, max(0.0, done))
    share = final * (1 - (1 - done) ** 3)
    return torch.lerp(new, old, decay), int(len(old) * share + 1e-6)


def expanded(old, new, decay, step, steps, warmup, cooldown, final):
    """The cubic multiplied out."""
    new_average = new + decay * (old - new)
    begin, end = warmup * steps, steps - cooldown * steps
    if step >= end:
        return new_average, int(round(len(old) * final, 6))
    if step <= begin:
        return new_average, 0
    u = (step - begin) / (end - begin)
    return new_average, int(round(len(old) * final * (3 * u - 3 * u**2 + u**3), 6))


def long_way(old, new, decay, step, steps, warmup, cooldown, final):
    average = decay * old + (1 - decay) * new
    begin, end = warmup * steps, steps - cooldown * steps
    if step >= end:
        return average, math.floor(round(len(old) * final, 6))
    if step <= begin:
        return average, 0
    share = final * (1 - (1 - (step - begin) / end) ** 3)
    return average, math.floor(round(len(old) * share, 6))


def no_rounding(old, new, decay, step, steps, warmup, cooldown, final):
    average, _ = right_progress(old, new, decay, step, steps, warmup, cooldown, final)
    begin, end = warmup * steps, steps - cooldown * steps
    if step >= end:
        return average, int(len(old) * final)
    if step <= begin:
        return average, 0
    left = 1 - (step - begin) / (end - begin)
    return average, int(len(old) * final * (1 - left**3))


right_progress = prog()


def never_final(old, new, decay, step, steps, warmup, cooldown, final):
    """As the authors' code: the last pruning comes just before `final`."""
    average, gone = right_progress(
        old, new, decay, step, steps, warmup, cooldown, final
    )
    if step >= steps - cooldown * steps:
        gone = right_progress(
            old, new, decay, step - 1, steps, warmup, cooldown, final
        )[1]
    return average, gone


def count_at(old, new, decay, step, steps, warmup, cooldown, final):
    """What the rule between start and stop gives, wherever the step is."""
    begin, end = warmup * steps, steps - cooldown * steps
    left = 1 - (step - begin) / (end - begin)
    return math.floor(round(len(old) * final * (1 - left**3), 6))


def no_start(*case):
    average, gone = right_progress(*case)
    step, steps, warmup = case[3:6]
    return average, count_at(*case) if step < warmup * steps else gone


def no_stop(*case):
    average, gone = right_progress(*case)
    step, steps, _, cooldown = case[3:7]
    return average, count_at(*case) if step > steps - cooldown * steps else gone


def stop_last(*case):
    average, gone = right_progress(*case)
    step, steps, warmup = case[3:6]
    return average, 0 if step <= warmup * steps else gone


def formula_at_stop(*case):
    average, gone = right_progress(*case)
    step, steps, warmup, cooldown = case[3:7]
    if warmup * steps <= step <= steps - cooldown * steps:
        gone = count_at(*case)
    return average, gone


def of_all_steps(*case):
    average, gone = right_progress(*case)
    n, step, steps, final = len(case[0]), case[3], case[4], case[7]
    if case[5] * steps < step < steps - case[6] * steps:
        gone = math.floor(round(n * final * (1 - (1 - step / steps) ** 3), 6))
    return average, gone


def average_in_place(old, new, decay, step, steps, warmup, cooldown, final):
    gone = right_progress(old, new, decay, step, steps, warmup, cooldown, final)[1]
    old.mul_(decay).add_(new, alpha=1 - decay)
    return old, gone


def only_the_count(*case):
    return right_progress(*case)[1]


# 4 ------------------------------------------------------------------------------------


def by_the_merged_weight(x, W0, A, B, scaling, mask):
    return F.linear(x, (W0 + scaling * B @ A) * mask[:, None])


def by_masked_factors(x, W0, A, B, scaling, mask):
    frozen = F.linear(x, W0 * mask[:, None])
    return frozen + scaling * F.linear(F.linear(x, A), B * mask[:, None])


def linear(
    frozen=lambda x, W0: x @ W0.T,
    change=lambda x, A, B: x @ A.T @ B.T,
    out=lambda frozen, change, mask: (frozen + change) * mask,
    scale=lambda s: s,
):
    """masked_linear with one thing changed."""

    def answer(x, W0, A, B, scaling, mask):
        return out(frozen(x, W0), scale(scaling) * change(x, A, B), mask)

    return answer


def mask_on_inputs(x, W0, A, B, scaling, mask):
    return linear()(x * mask, W0, A, B, scaling, torch.ones_like(mask))


def untransposed(x, W0, A, B, scaling, mask):
    return (x @ W0 + scaling * (x @ (B @ A))) * mask


def detached(x, W0, A, B, scaling, mask):
    return linear()(x, W0, A, B.detach(), scaling, mask)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("estimated_gradient", by_a_step),
        ("estimated_gradient", by_einsum),
        ("group_importance", in_loops),
        ("group_importance", by_folding),
        ("progress", by_lerp),
        ("progress", expanded),
        ("masked_linear", by_the_merged_weight),
        ("masked_linear", by_masked_factors),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


E, G, P, M = "estimated_gradient", "group_importance", "progress", "masked_linear"
test_wrong_answers = rejects(
    "06-compression/11-loraprune",
    [
        Wrong(E, gradient(sign=1), "the sign of the last term"),
        Wrong(E, gradient(both=nothing), "the last term is missing"),
        Wrong(E, gradient(rate=lambda lr: 1), "lacks lr"),
        Wrong(E, gradient(rate=lambda lr: lr**2), "lr twice"),
        Wrong(E, gradient(scale=lambda s, lr: 1), "the scale is missing"),
        Wrong(E, gradient(scale=lambda s, lr: s**2), "the scale is there twice"),
        Wrong(E, gradient(scale=lambda s, lr: 1 / s), "divided by the scale"),
        Wrong(E, gradient(scale=lambda s, lr: s * lr), "divide it by lr"),
        Wrong(E, gradient(scale=lambda s, lr: -s), "what is taken off"),
        Wrong(E, gradient(second=nothing), "B ∂A is missing"),
        Wrong(E, gradient(first=nothing), "∂B A is missing"),
        Wrong(E, gradient(second=nothing, both=nothing), "∂B A alone"),
        Wrong(E, gradient(first=nothing, both=nothing), "B ∂A alone"),
        Wrong(E, scale_on_two_terms, "not on the last term"),
        Wrong(E, own_gradients, "its own gradient"),
        Wrong(E, swapped, "the factors are swapped"),
        Wrong(E, transposed, "transposed"),
        Wrong(E, elementwise, "products of elements"),
        Wrong(E, weight_itself, "B A itself"),
        Wrong(E, steps_in_place, "in place"),
        Wrong(E, fixed_rate, "from the arguments"),
        Wrong(G, group(weight=lambda W, c: W), "LoRA's part is missing"),
        Wrong(G, group(weight=lambda W, c: c), "LoRA's part alone"),
        Wrong(G, group(weight=lambda W, c: W - c), "subtracted"),
        Wrong(G, group(scale=lambda s: 1), "the scale is missing"),
        Wrong(G, group(score=lambda g, W: (g * W).abs()), "absolute values"),
        Wrong(G, group(score=lambda g, W: g * W), "square each product"),
        Wrong(
            G,
            group(score=lambda g, W: g * W, after=torch.square),
            "squared after the sum: changes",
        ),
        Wrong(G, square_of_lines, "of each row or column: square"),
        Wrong(G, mean_of_all, "the mean over a unit's weights"),
        Wrong(
            G,
            group(total=lambda lines, each: lines.reshape(-1, each).mean(1)),
            "within a unit",
        ),
        Wrong(G, group(along=torch.mean), "along each row or column"),
        Wrong(G, group(after=torch.sqrt), "root too many"),
        Wrong(G, group(axis_of=lambda axis: 1 - axis), "the wrong axis"),
        Wrong(
            G, group(axis_of=lambda axis: 0), "axis 1 means that a unit is made of c"
        ),
        Wrong(
            G, group(axis_of=lambda axis: 1), "axis 0 means that a unit is made of r"
        ),
        Wrong(G, group(total=lambda lines, each: lines), "score of its own"),
        Wrong(G, scale_on_all, "the scale is on W0, too"),
        Wrong(
            G,
            group(total=lambda lines, each: lines.reshape(each, -1).sum(0)),
            "one after the other",
        ),
        Wrong(G, group(score=lambda g, W: W**2), "the gradient is missing"),
        Wrong(G, group(score=lambda g, W: g**2), "the weight is missing"),
        Wrong(G, group(score=lambda g, W: g**2 * W), "only the gradient is squared"),
        Wrong(G, group(score=lambda g, W: g * W**2), "only the weight is squared"),
        Wrong(G, group(after=lambda s: 1 / s), "turned over"),
        Wrong(G, pairs_only, "asked"),
        Wrong(
            P,
            prog(average=lambda old, new, d: (1 - d) * old + d * new),
            "the weight of the old average",
        ),
        Wrong(P, prog(average=lambda old, new, d: new), "the new scores alone"),
        Wrong(P, prog(average=lambda old, new, d: old), "has not moved"),
        Wrong(P, prog(average=lambda old, new, d: d * old + new), "added whole"),
        Wrong(P, prog(average=lambda old, new, d: (old + new) / 2), "plain mean"),
        Wrong(P, prog(share=lambda left: 1 - left), "straight line"),
        Wrong(P, prog(share=lambda left: 1 - left**2), "a square"),
        Wrong(P, prog(share=lambda left: (1 - left) ** 3), "slow first"),
        Wrong(P, prog(share=lambda left: left**3), "still to go"),
        Wrong(P, long_way, "stop − start steps long"),
        Wrong(P, prog(start=lambda s, w: 0), "the warm-up is forgotten"),
        Wrong(P, prog(stop=lambda s, c: s), "the cool-down is forgotten"),
        Wrong(P, prog(stop=lambda s, c: c * s), "stop is taken for"),
        Wrong(P, prog(final_of=lambda f: 1.0), "`final` is missing"),
        Wrong(P, prog(after=lambda n, s: n - math.floor(round(n * s, 6))), "stay"),
        Wrong(P, prog(after=lambda n, s: math.ceil(round(n * s, 6))), "rounded up"),
        Wrong(P, prog(after=lambda n, s: round(n * s)), "to the nearest"),
        Wrong(P, prog(after=lambda n, s: s), "is a share"),
        Wrong(P, prog(after=lambda n, s: n * s), "no int"),
        Wrong(P, prog(start=lambda s, w: int(w * s)), "need not be whole"),
        Wrong(P, no_start, "below 0"),
        Wrong(P, no_stop, "after stop nothing more goes"),
        Wrong(P, stop_last, "everything goes at stop"),
        Wrong(P, formula_at_stop, "divides by 0"),
        Wrong(P, of_all_steps, "not the share of all steps"),
        Wrong(P, no_rounding, "round to 6 digits"),
        Wrong(P, never_final, "at stop already"),
        Wrong(P, average_in_place, "in place"),
        Wrong(P, only_the_count, "tuple"),
        Wrong(
            M,
            linear(out=lambda f, c, m: f * m + c),
            "what LoRA adds must go, too",
        ),
        Wrong(M, linear(out=lambda f, c, m: f + c * m), "on LoRA's part only"),
        Wrong(M, linear(out=lambda f, c, m: f + c), "the mask is missing"),
        Wrong(M, linear(out=lambda f, c, m: (f + c) * (1 - m)), "turned over"),
        Wrong(M, linear(out=lambda f, c, m: f * m), "LoRA's part is missing"),
        Wrong(M, linear(out=lambda f, c, m: c * m), "frozen weight's part is missing"),
        Wrong(M, linear(scale=lambda s: 1), "the scale is missing"),
        Wrong(M, linear(scale=lambda s: s**2), "the scale is there twice"),
        Wrong(M, mask_on_inputs, "on the inputs"),
        Wrong(M, linear(frozen=lambda x, W0: x @ W0), "W0 lacks its transpose"),
        Wrong(M, linear(change=lambda x, A, B: x @ B.T @ A.T), "wrong order"),
        Wrong(M, linear(change=lambda x, A, B: x @ A @ B), "lack their transposes"),
        Wrong(M, linear(out=lambda f, c, m: (f - c) * m), "subtracted"),
        Wrong(M, detached, "gradient"),
        Wrong(M, linear(out=lambda f, c, m: (f + c)[..., m == 1]), "are left out"),
        Wrong(M, untransposed, "nothing is transposed"),
        Wrong(
            M,
            linear(lambda x, W0: x @ W0, lambda x, A, B: x @ A @ B),
            "lack their transposes",
        ),
    ],
)
