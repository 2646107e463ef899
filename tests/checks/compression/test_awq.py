"""Wrong answers to the exercises of 06-compression/06-awq, each with the diagnosis
that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.awq import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def keep(
    size=lambda W, X: X.abs().mean(0),
    largest=True,
    more=0,
    put=lambda W, kept: W[:, kept],
):
    """keep_salient with one thing changed."""

    def answer(W, W_hat, X, count):
        kept = size(W, X).topk(count + more, largest=largest).indices
        out = W_hat.clone()
        out[:, kept] = put(W, kept)
        return out

    return answer


def keep_by_a_mask(W, W_hat, X, count):
    size = X.abs().sum(0)  # the same order as the mean's
    mask = size >= size.sort(descending=True).values[count - 1]
    return torch.where(mask, W, W_hat)


def keep_in_a_loop(W, W_hat, X, count):
    order = sorted(range(W.shape[1]), key=lambda j: -float(X[:, j].abs().mean()))
    columns = [
        W[:, j] if j in order[:count] else W_hat[:, j] for j in range(len(order))
    ]
    return torch.stack(columns, dim=1)


def keep_rows(W, W_hat, X, count):
    kept = X.abs().mean(0).topk(count).indices
    out = W_hat.clone()
    out[kept] = W[kept]
    return out


def keep_the_others(W, W_hat, X, count):
    kept = X.abs().mean(0).topk(count).indices
    out = W.clone()
    out[:, kept] = W_hat[:, kept]
    return out


def keep_in_place(W, W_hat, X, count):
    kept = X.abs().mean(0).topk(count).indices
    W_hat[:, kept] = W[:, kept]
    return W_hat


def always_three(W, W_hat, X, count):
    return keep()(W, W_hat, X, 3)


# 2 ------------------------------------------------------------------------------------


def by(
    size=lambda X: X.abs().mean(0),
    power=lambda m, a: m**a,
    norm=lambda s: s / (s.max() * s.min()).sqrt(),
):
    """channel_scale with one thing changed."""

    def answer(X, alpha):
        return norm(power(size(X), alpha))

    return answer


def scale_in_logarithms(X, alpha):
    log = alpha * X.abs().double().mean(0).log()
    return (log - (log.max() + log.min()) / 2).exp().float()


def scale_of_the_normalised(X, alpha):
    size = X.abs().sum(0)  # a factor of all channels falls out
    return (size / (size.max() * size.min()).sqrt()).pow(alpha)


def before_the_power(X, alpha):
    size = X.abs().mean(0)
    return size**alpha / (size.max() * size.min()).sqrt()


def power_first(X, alpha):
    s = (X.abs() ** alpha).mean(0)
    return s / (s.max() * s.min()).sqrt()


def half(X, alpha):
    return by()(X, 0.6)


# 3 ------------------------------------------------------------------------------------


def groups(V, size):
    return V.unflatten(1, (-1, size))


def quantise(
    into=lambda W, s: W * s,
    out=lambda V, s: V / s,
    largest=lambda W, V, size: groups(V, size).abs().amax(-1, keepdim=True),
    steps=lambda top: top,
    rounding=torch.round,
    codes=False,
):
    """scale_and_round with one thing changed."""

    def answer(W, s, group_size, top):
        V = into(W, s)
        step = largest(W, V, group_size) / steps(top)
        V = rounding(groups(V, group_size) / step)
        if not codes:
            V = V * step
        return out(V.flatten(1), s)

    return answer


def by_repeating(W, s, group_size, top):
    V = (W @ torch.diag(s)).double()
    blocks = V.reshape(-1, group_size)
    step = blocks.abs().max(1, keepdim=True).values / top
    back = (blocks / step).round().clamp(-top, top) * step
    return (back.reshape(W.shape) / s).float()


def weight_by_weight(W, s, group_size, top):
    out = torch.empty_like(W)
    for i in range(W.shape[0]):
        for start in range(0, W.shape[1], group_size):
            run = slice(start, start + group_size)
            v = W[i, run] * s[run]
            step = v.abs().max() / top
            out[i, run] = torch.round(v / step) * step / s[run]
    return out


def whole_rows(W, s, group_size, top):
    return quantise()(W, s, W.shape[1], top)


def one_step(W, V, size):
    return V.abs().max()


def down_the_columns(W, s, group_size, top):
    V = W * s
    largest = groups(V.T, group_size).abs().amax(-1)
    step = largest.repeat_interleave(group_size, 1).T / top
    return torch.round(V / step) * step / s


def rows_scaled(W, s, group_size, top):
    return quantise(lambda W, s: W * s[:, None], lambda V, s: V / s[:, None])(
        W, s, group_size, top
    )


def transposed(W, s, group_size, top):
    return quantise()(W.T, s, group_size, top).T


def scaled_in_place(W, s, group_size, top):
    W *= s
    return quantise(lambda W, s: W)(W, s, group_size, top)


def old_steps_clamped(W, s, group_size, top):
    step = groups(W, group_size).abs().amax(-1, keepdim=True) / top
    V = (groups(W * s, group_size) / step).round().clamp(-top, top) * step
    return V.flatten(1) / s


def top_of_three(W, s, group_size, top):
    return quantise()(W, s, group_size, 3)


# 4 ------------------------------------------------------------------------------------

right_scale = by()
right_rounding = quantise()


def trials(
    error=lambda W, W_hat, X, s: (X @ W_hat.T - X @ W.T).square().mean(),
    scale=right_scale,
    exponent=lambda a: a,
    finish=lambda errors: errors,
):
    """trial_errors with one thing changed."""

    def answer(W, X, alphas, group_size, top):
        errors = []
        for alpha in alphas:
            s = scale(X, exponent(alpha))
            errors.append(error(W, right_rounding(W, s, group_size, top), X, s))
        return finish(torch.stack(errors))

    return answer


def by_the_gram(W, X, alphas, group_size, top):
    gram = X.double().T @ X.double()
    errors = torch.zeros(len(alphas))
    for i, alpha in enumerate(alphas):
        delta = by_repeating(W, right_scale(X, alpha), group_size, top) - W
        total = torch.einsum("oi,ij,oj->", delta.double(), gram, delta.double())
        errors[i] = total / (len(X) * len(W))
    return errors


def with_weights_put_back(W, X, alphas, group_size, top):
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    right = linear(X).detach()
    before = W.clone()
    errors = []
    with torch.no_grad():
        for alpha in alphas:
            s = scale_in_logarithms(X, alpha)
            linear.weight.data = weight_by_weight(linear.weight, s, group_size, top)
            errors.append(torch.nn.functional.mse_loss(linear(X), right).item())
            linear.weight.data = before.clone()
    return torch.tensor(errors)


def piled_up(W, X, alphas, group_size, top):
    right = X @ W.T
    errors = []
    for alpha in alphas:
        W = right_rounding(W, right_scale(X, alpha), group_size, top)
        errors.append((X @ W.T - right).square().mean())
    return torch.stack(errors)


def piled_up_and_compared(W, X, alphas, group_size, top):
    errors = []
    for alpha in alphas:
        W_hat = right_rounding(W, right_scale(X, alpha), group_size, top)
        errors.append((X @ W_hat.T - X @ W.T).square().mean())
        W = W_hat
    return torch.stack(errors)


def scales_piled_up(W, X, alphas, group_size, top):
    V = W.clone()
    errors = []
    for alpha in alphas:
        s = right_scale(X, alpha)
        V = V * s
        W_hat = right_rounding(V, torch.ones_like(s), group_size, top) / s
        errors.append((X @ W_hat.T - X @ W.T).square().mean())
    return torch.stack(errors)


def trials_in_place(W, X, alphas, group_size, top):
    right = X @ W.T
    errors = []
    for alpha in alphas:
        W.copy_(right_rounding(W, right_scale(X, alpha), group_size, top))
        errors.append((X @ W.T - right).square().mean())
    return torch.stack(errors)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("keep_salient", keep_by_a_mask),
        ("keep_salient", keep_in_a_loop),
        ("channel_scale", scale_in_logarithms),
        ("channel_scale", scale_of_the_normalised),
        ("scale_and_round", by_repeating),
        ("scale_and_round", weight_by_weight),
        ("trial_errors", by_the_gram),
        ("trial_errors", with_weights_put_back),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


K, C, R, T = "keep_salient", "channel_scale", "scale_and_round", "trial_errors"
test_wrong_answers = rejects(
    "06-compression/06-awq",
    [
        Wrong(K, keep(lambda W, X: X.abs().amax(0)), "the mean of |x| is asked"),
        Wrong(K, keep(lambda W, X: X.mean(0)), "without its sign"),
        Wrong(K, keep(lambda W, X: W.abs().mean(0)), "the inputs decide"),
        Wrong(K, keep(lambda W, X: W.norm(dim=0)), "by their norm"),
        Wrong(K, keep(largest=False), "the smallest inputs"),
        Wrong(K, keep(lambda W, X: X.abs().mean(1)), "over the tokens is asked"),
        Wrong(K, keep(more=-1), "too few"),
        Wrong(K, keep(more=1), "too many"),
        Wrong(K, keep(put=lambda W, kept: 0.0), "the salient columns are 0"),
        Wrong(K, keep_rows, "rows of W stay"),
        Wrong(K, keep_the_others, "the other way round"),
        Wrong(K, keep_in_place, "in place"),
        Wrong(K, always_three, "from the arguments"),
        Wrong(C, by(norm=lambda s: s), "the normalisation is missing"),
        Wrong(C, by(norm=lambda s: s / s.max()), "divided by the largest"),
        Wrong(C, by(norm=lambda s: s / s.min()), "divided by the smallest"),
        Wrong(C, by(norm=lambda s: s / s.mean()), "divided by the mean"),
        Wrong(C, by(norm=lambda s: s / (s.max() * s.min())), "the root is missing"),
        Wrong(
            C, by(norm=lambda s: s * (s.max() * s.min()).sqrt()), "this is multiplied"
        ),
        Wrong(C, before_the_power, "before the power"),
        Wrong(C, by(lambda X: X.abs().amax(0)), "as in SmoothQuant"),
        Wrong(C, by(lambda X: X.mean(0).abs()), "take |x| first"),
        Wrong(C, by(lambda X: X.square().mean(0).sqrt()), "roots of mean squares"),
        Wrong(C, by(lambda X: X.abs().mean(1)), "over the tokens is asked"),
        Wrong(C, by(power=lambda m, a: m * a), "it is the exponent"),
        Wrong(C, by(power=lambda m, a: m ** (1 - a)), "1 − alpha"),
        Wrong(C, by(power=lambda m, a: m**-a), "these are the inverses"),
        Wrong(C, power_first, "the power comes before the mean"),
        Wrong(C, half, "from the argument"),
        Wrong(R, quantise(lambda W, s: W, lambda V, s: V), "round to nearest"),
        Wrong(R, quantise(out=lambda V, s: V), "not taken out again"),
        Wrong(R, quantise(out=lambda V, s: V / s / s), "taken out twice"),
        Wrong(
            R,
            quantise(lambda W, s: W / s, lambda V, s: V * s),
            "divides by s first",
        ),
        Wrong(R, quantise(lambda W, s: W), "rounded without s"),
        Wrong(R, rows_scaled, "in place of its columns"),
        Wrong(R, transposed, "the wrong way round"),
        Wrong(
            R,
            quantise(
                largest=lambda W, V, size: groups(W, size).abs().amax(-1, keepdim=True)
            ),
            "before it is scaled",
        ),
        Wrong(R, old_steps_clamped, "with codes clamped"),
        Wrong(R, whole_rows, "one step for a whole row"),
        Wrong(R, quantise(largest=one_step), "one step for all of W"),
        Wrong(R, down_the_columns, "run down the columns"),
        Wrong(R, quantise(steps=lambda top: top + 1), "top + 1"),
        Wrong(R, quantise(steps=lambda top: top + 0.5), "top + ½"),
        Wrong(
            R,
            quantise(largest=lambda W, V, size: groups(V, size).amax(-1, keepdim=True)),
            "with its sign",
        ),
        Wrong(R, quantise(rounding=torch.trunc), "cut off"),
        Wrong(R, quantise(rounding=torch.floor), "rounded down"),
        Wrong(R, quantise(codes=True, out=lambda V, s: V), "these are the codes"),
        Wrong(R, quantise(codes=True), "not multiplied by the step"),
        Wrong(R, scaled_in_place, "in place"),
        Wrong(R, top_of_three, "from the arguments"),
        Wrong(T, piled_up, "what the trial before it left"),
        Wrong(T, piled_up_and_compared, "compared with that"),
        Wrong(T, scales_piled_up, "pile up"),
        Wrong(T, trials_in_place, "in place"),
        Wrong(
            T,
            trials(lambda W, W_hat, X, s: (W_hat - W).square().mean()),
            "error of the weights",
        ),
        Wrong(
            T,
            trials(lambda W, W_hat, X, s: (X @ (W_hat - W).T).square().sum()),
            "added up",
        ),
        Wrong(
            T,
            trials(lambda W, W_hat, X, s: (X @ (W_hat - W).T).abs().mean()),
            "the mean of |error|",
        ),
        Wrong(T, trials(finish=torch.sqrt), "a root"),
        Wrong(
            T,
            trials(lambda W, W_hat, X, s: (X / s @ W_hat.T - X @ W.T).square().mean()),
            "out of Ŵ already",
        ),
        Wrong(
            T,
            trials(
                lambda W, W_hat, X, s: (X @ (W_hat * s).T - X @ W.T).square().mean()
            ),
            "still in Ŵ",
        ),
        Wrong(
            T,
            trials(lambda W, W_hat, X, s: (X @ (W_hat - W)).square().mean()),
            "those of Wᵀ",
        ),
        Wrong(T, trials(scale=by(lambda X: X.abs().amax(0))), "from the largest |x|"),
        Wrong(T, trials(exponent=lambda a: 1 - a), "1 − alpha"),
        Wrong(T, trials(finish=lambda e: e.flip(0)), "reverse"),
        Wrong(T, trials(finish=lambda e: e.sort().values), "sorted"),
        Wrong(T, trials(finish=lambda e: e / e[0]), "shares of the first"),
        Wrong(T, trials(finish=lambda e: e[:1].expand_as(e)), "the first exponent"),
        Wrong(T, trials(finish=lambda e: e.cummin(0).values), "least error so far"),
    ],
)
