"""Wrong answers to 06-compression/03-smoothquant, each with its diagnosis."""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.smoothquant import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def scale(
    of_x=lambda X: X.abs().amax(0),
    of_w=lambda weights: torch.cat(weights).abs().amax(0),
    formula=lambda x, w, alpha: x.pow(alpha) / w.pow(1 - alpha),
    dead=lambda s, x, w: torch.where((x > 0) & (w > 0), s, 1.0),
):
    """smoothing_scale with one thing changed."""

    def smoothing_scale(X, weights, alpha):
        x, w = of_x(X), of_w(weights)
        return dead(formula(x, w, alpha), x, w)

    return smoothing_scale


right_scale = scale()


def channel_by_channel(X, weights, alpha):
    s = torch.ones(X.shape[1])
    for j in range(len(s)):
        x = max(abs(v) for v in X[:, j].tolist())
        w = max(abs(v) for W in weights for v in W[:, j].tolist())
        if x and w:
            s[j] = x**alpha * w ** (alpha - 1)
    return s


def by_logarithms(X, weights, alpha):
    x = X.abs().max(dim=0).values
    w = torch.stack([W.abs().max(dim=0).values for W in weights]).max(dim=0).values
    s = (alpha * x.log() - (1 - alpha) * w.log()).exp()
    return torch.where((x == 0) | (w == 0), torch.ones_like(s), s)


def scale_in_place(X, weights, alpha):
    return right_scale(X.abs_(), weights, alpha)


def only_the_first(X, weights, alpha):
    return right_scale(X, weights[:1], alpha)


def only_the_last(X, weights, alpha):
    return right_scale(X, weights[-1:], alpha)


def no_end(X, weights, alpha):
    return right_scale(X, weights, min(max(alpha, 0.1), 0.9))


def three_weights(X, weights, alpha):
    q, k, v = (*weights, weights[-1])[:3]
    return right_scale(X[:6], [q, k[:1], v] if len(weights) < 3 else [q, k, v], alpha)


# 2 ------------------------------------------------------------------------------------


def folding(
    norm=lambda g, s: g / s,
    weight=lambda W, s, i: W * s,
    all_of=lambda new, old: new,
):
    """fold with one thing changed."""

    def fold(gamma, weights, s):
        new = [weight(W, s, i) for i, W in enumerate(weights)]
        return norm(gamma, s), all_of(new, weights)

    return fold


def by_diagonals(gamma, weights, s):
    D = torch.diag(s)
    return torch.linalg.inv(D) @ gamma, [W @ D for W in weights]


def by_transposes(gamma, weights, s):
    return gamma.mul(1 / s), [(W.T * s[:, None]).T.contiguous() for W in weights]


def fold_in_place(gamma, weights, s):
    for W in weights:
        W *= s
    return gamma / s, weights


def fold_gives_a_list(gamma, weights, s):
    return [gamma / s, [W * s for W in weights]]


def first_alone(new, old):
    return [new[0], *old[1:]]


def last_left(new, old):
    return [*new[:-1], old[-1]]


# 3 ------------------------------------------------------------------------------------


def matmul(
    x_size=lambda X, per: X.abs().amax(1, keepdim=True),
    w_size=lambda W: W.abs().amax(1, keepdim=True),
    top=127,
    rounding=torch.round,
    clamp=lambda q: q.clamp(-127, 127),
    cast=torch.int32,
    scaled=lambda y, x_step, w_step: y * x_step * w_step.T,
    tensor=lambda size: size.amax().reshape(1, 1),
    zero=lambda step: torch.where(step > 0, step, 1.0),
    static=True,
):
    """w8a8 with one thing changed."""

    def w8a8(X, W, per, step):
        size = x_size(X, per)
        if per == "tensor":
            size = tensor(size)
        x_step = size / top
        if step is not None and static:
            x_step = torch.full((1, 1), step)
        w_step = w_size(W) / top
        q = clamp(rounding(X / zero(x_step))).to(cast)
        p = rounding(W / zero(w_step)).to(cast)
        return scaled((q @ p.T).float(), x_step, w_step)

    return w8a8


right_product = matmul()


def whole_x_without_abs(X, W, per, step):
    if per == "tensor" and step is None:
        step = X.amax().item() / 127
    return right_product(X, W, per, step)


def by_int_mm(X, W, per, step):
    size = X.abs().amax() if per == "tensor" else X.abs().amax(1)
    x_step = (size / 127 if step is None else torch.tensor(step)).expand(len(X))
    w_step = W.abs().amax(1) / 127
    q = (X / x_step.clamp(min=1e-30)[:, None]).round().clamp(-127, 127).char()
    p = (W / w_step.clamp(min=1e-30)[:, None]).round().char()
    return torch._int_mm(q, p.T) * torch.outer(x_step, w_step)


def row_by_row(X, W, per, step):
    Y = torch.zeros(len(X), len(W))
    for t, x in enumerate(X):
        d = step or float((x if per == "token" else X).abs().max()) / 127
        q = torch.round(x / d).clamp(-127, 127).long() if d else x.long() * 0
        for o, w in enumerate(W):
            e = float(w.abs().max()) / 127
            p = torch.round(w / e).long() if e else w.long() * 0
            Y[t, o] = torch.einsum("j,j->", q, p) * d * e
    return Y


def in_floats(X, W, per, step):
    return X @ W.T


def rounded_floats(X, W, per, step):
    size = X.abs().amax(1, keepdim=True)
    size = size.amax() if per == "tensor" else size
    d = size / 127 if step is None else torch.tensor(step)
    e = W.abs().amax(1, keepdim=True) / 127
    x = torch.round(X / torch.where(d > 0, d, 1.0)).clamp(-127, 127) * d
    return x @ (torch.round(W / torch.where(e > 0, e, 1.0)) * e).T


def only_w(X, W, per, step):
    e = W.abs().amax(1, keepdim=True) / 127
    return X @ (torch.round(W / e) * e).T


def only_x(X, W, per, step):
    d = X.abs().amax(1, keepdim=True) / 127
    return (torch.round(X / d) * d) @ W.T


def product_in_place(X, W, per, step):
    Y = right_product(X, W, per, step)
    X.zero_()
    return Y


def wraps(q):
    return q.to(torch.int32).to(torch.int8)


# 4 ------------------------------------------------------------------------------------


def search(
    calibrated=lambda X, held: X,
    judged=lambda X, held: held,
    x_scale=lambda x, s: x / s,
    w_scale=lambda W, s: W * s,
    error=lambda y, right: (y - right).square().sum() / right.square().sum(),
    best=lambda errors, alphas: alphas[int(errors.argmin())],
    reference=lambda x, W: x @ W.T,
    per_is=None,
):
    """search_alpha with one thing changed."""

    def search_alpha(X, held_out, W, alphas, per):
        x = judged(X, held_out)
        errors = []
        for alpha in alphas:
            s = right_scale(calibrated(X, held_out), [W], alpha)
            y = right_product(x_scale(x, s), w_scale(W, s), per_is or per, None)
            errors.append(error(y, reference(x, W)))
        errors = torch.stack(errors)
        return best(errors, alphas), errors

    return search_alpha


def search_by_comprehension(X, held_out, W, alphas, per):
    right = held_out.double() @ W.double().T
    size = right.norm() ** 2
    table = {}
    for alpha in alphas:
        s = by_logarithms(X, [W], alpha)
        y = by_int_mm(held_out / s, W * s, per, None)
        table[alpha] = float((y.double() - right).norm() ** 2 / size)
    return min(table, key=table.get), torch.tensor([*table.values()])


def search_with_a_loop(X, held_out, W, alphas, per):
    errors = torch.zeros(len(alphas))
    best, least = None, float("inf")
    for i, alpha in enumerate(alphas):
        s = channel_by_channel(X, [W], alpha)
        gap = rounded_floats(held_out / s, W * s, per, None) - held_out @ W.T
        errors[i] = gap.pow(2).sum() / (held_out @ W.T).pow(2).sum()
        if errors[i] < least:
            best, least = alpha, float(errors[i])
    return best, errors


def always_seven(X, held_out, W, alphas, per):
    return search()(X, held_out, W, [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0], per)


def alpha_alone(X, held_out, W, alphas, per):
    return search()(X, held_out, W, alphas, per)[0]


def rounded_reference(x, W):
    e = W.abs().amax(1, keepdim=True) / 127
    return x @ (torch.round(W / e) * e).T


S, F, M, A = "smoothing_scale", "fold", "w8a8", "search_alpha"


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (S, channel_by_channel),
        (S, by_logarithms),
        (F, by_diagonals),
        (F, by_transposes),
        (M, by_int_mm),
        (M, row_by_row),
        (A, search_by_comprehension),
        (A, search_with_a_loop),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


def formula(how):
    """Formulas for `scale`, each with one thing wrong, by name."""
    return {
        "exchanged": lambda x, w, a: x ** (1 - a) / w**a,
        "inverse": lambda x, w, a: w ** (1 - a) / x**a,
        "times": lambda x, w, a: x**a * w ** (1 - a),
        "same": lambda x, w, a: (x / w) ** a,
        "no w": lambda x, w, a: x**a / w,
        "no x": lambda x, w, a: x / w ** (1 - a),
        "none": lambda x, w, a: x / w,
        "root": lambda x, w, a: (x / w).sqrt(),
        "w alone": lambda x, w, a: 1 / w ** (1 - a),
        "x alone": lambda x, w, a: x**a,
    }[how]


def pow_of_one(x, w, a):
    """Right but for alpha = 0, where X does not count."""
    return x.pow(a or 0.5) / w.pow(1 - a)


test_wrong_answers = rejects(
    "06-compression/03-smoothquant",
    [
        Wrong(S, scale(formula=formula("exchanged")), "are exchanged"),
        Wrong(S, scale(formula=formula("inverse")), "1 / s"),
        Wrong(S, scale(formula=formula("times")), "divide by it"),
        Wrong(S, scale(formula=formula("same")), "is alpha, too"),
        Wrong(S, scale(formula=formula("no w")), "weights' exponent is missing"),
        Wrong(S, scale(formula=formula("no x")), "exponent of X is missing"),
        Wrong(S, scale(formula=formula("none")), "without exponents"),
        Wrong(S, scale(formula=formula("root")), "alpha from the argument"),
        Wrong(S, scale(formula=formula("w alone")), "X is missing"),
        Wrong(S, scale(formula=formula("x alone")), "the weights are missing"),
        Wrong(S, scale(of_x=lambda X: X.amax(0).abs()), "not the largest |x|"),
        Wrong(S, scale(of_x=lambda X: X.abs().mean(0)), "mean of |x|"),
        Wrong(S, scale(of_x=lambda X: X.abs().amax(1)), "each token"),
        Wrong(S, scale(of_x=lambda X: X.amax(0) - X.amin(0)), "max − min"),
        Wrong(
            S,
            scale(
                of_x=lambda X: X.amax(0) - X.amin(0),
                of_w=lambda ws: 2 * torch.cat(ws).abs().amax(0),
            ),
            "llmcompressor",
        ),
        Wrong(
            S,
            scale(of_w=lambda ws: torch.cat(ws).amax(0).abs()),
            "not the largest |w|",
        ),
        Wrong(S, scale(of_w=lambda ws: torch.cat(ws).abs().mean(0)), "mean of |w|"),
        Wrong(
            S,
            scale(of_w=lambda ws: torch.stack([W.abs().amax(1) for W in ws]).amax(0)),
            "each row",
        ),
        Wrong(
            S,
            scale(of_w=lambda ws: torch.stack([W.abs().amax(0) for W in ws]).mean(0)),
            "mean over the weights",
        ),
        Wrong(
            S,
            scale(of_w=lambda ws: torch.stack([W.abs().amax(0) for W in ws]).sum(0)),
            "added the weights up",
        ),
        Wrong(S, only_the_first, "only the first weight"),
        Wrong(S, only_the_last, "only the last weight"),
        Wrong(S, scale_in_place, "changes its argument"),
        Wrong(S, no_end, "0 and 1 are allowed"),
        Wrong(S, scale(formula=pow_of_one), "alpha = 0.0"),
        Wrong(S, three_weights, "two weights of 4 and 2 rows"),
        Wrong(S, scale(dead=lambda s, x, w: s), "always 0"),
        Wrong(S, scale(dead=lambda s, x, w: s.clamp(min=1e-5)), "always 0"),
        Wrong(
            S,
            scale(dead=lambda s, x, w: torch.where(x > 0, s, 1.0)),
            "no weight reads",
        ),
        Wrong(F, folding(lambda g, s: g * s, lambda W, s, i: W / s), "other way round"),
        Wrong(F, folding(weight=lambda W, s, i: W / s), "both are divided"),
        Wrong(F, folding(norm=lambda g, s: g * s), "both are multiplied"),
        Wrong(F, folding(norm=lambda g, s: g.clone()), "the norm is as it was"),
        Wrong(F, folding(weight=lambda W, s, i: W.clone()), "weights are as they were"),
        Wrong(F, folding(weight=lambda W, s, i: W * s**2), "s twice"),
        Wrong(F, folding(weight=lambda W, s, i: W * s ** (i + 1)), "s², s³"),
        Wrong(F, folding(all_of=first_alone), "only the first weight"),
        Wrong(F, folding(all_of=last_left), "the last weight"),
        Wrong(F, folding(all_of=lambda new, old: new[:1]), "weights came back"),
        Wrong(F, folding(norm=lambda g, s: 1 / s), "this gamma is 1 / s"),
        Wrong(F, folding(norm=lambda g, s: g / s**3), "once for each weight"),
        Wrong(
            F,
            folding(lambda g, s: g / s.sqrt(), lambda W, s, i: W * s.sqrt()),
            "the root of s",
        ),
        Wrong(
            F, folding(weight=lambda W, s, i: W * s[: len(W), None]), "you scaled rows"
        ),
        Wrong(F, fold_in_place, "changes its argument"),
        Wrong(F, fold_gives_a_list, "tuple"),
        Wrong(M, in_floats, "nothing is rounded"),
        Wrong(M, rounded_floats, "no integers are multiplied"),
        Wrong(M, only_w, "only W is rounded"),
        Wrong(M, only_x, "only X is rounded"),
        Wrong(
            M,
            matmul(x_size=lambda X, per: X.abs().amax().expand(len(X), 1)),
            "each token has its own",
        ),
        Wrong(
            M,
            matmul(w_size=lambda W: W.abs().amax().expand(len(W), 1)),
            "one step for all of W",
        ),
        Wrong(
            M,
            matmul(x_size=lambda X, per: X.amax(1, keepdim=True).abs()),
            "not the largest |x|",
        ),
        Wrong(
            M,
            matmul(
                w_size=lambda W: W.abs().amax(0)[:, None],
                clamp=lambda q: q,
            ),
            "of its columns",
        ),
        Wrong(M, matmul(rounding=torch.trunc), "cut off"),
        Wrong(M, matmul(rounding=torch.floor), "rounded down"),
        Wrong(M, matmul(top=128, clamp=lambda q: q), "128"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * e.T), "steps of X are missing"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * d), "steps of W are missing"),
        Wrong(M, matmul(scaled=lambda y, d, e: y), "both steps are missing"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * d * e.T * 127), "one of the two"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * d * e.T * 127**2), "both 1 / 127"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * d.T * e.T), "tokens are rows"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * d * e), "outputs are columns"),
        Wrong(M, matmul(scaled=lambda y, d, e: y * d**2 * e.T), "come in twice"),
        Wrong(M, matmul(cast=torch.int8), "overflowed 8 bits"),
        Wrong(M, matmul(cast=torch.int16), "16 bits"),
        Wrong(M, matmul(tensor=lambda size: size), "each token still has its own"),
        Wrong(M, whole_x_without_abs, "comes from the largest x"),
        Wrong(M, matmul(static=False), "the static step is not used"),
        Wrong(M, matmul(clamp=lambda q: q), "clamp them"),
        Wrong(M, matmul(clamp=wraps), "wrapped around"),
        Wrong(M, matmul(clamp=lambda q: q.clamp(-128, 127)), "clamped at −128"),
        Wrong(M, matmul(zero=lambda step: step, cast=torch.float32), "zeros"),
        Wrong(M, product_in_place, "changes its argument"),
        Wrong(A, search(judged=lambda X, held: X), "judge on the held-out"),
        Wrong(A, search(calibrated=lambda X, held: held), "calibrate on X"),
        Wrong(
            A,
            search(calibrated=lambda X, held: held, judged=lambda X, held: X),
            "exchanged",
        ),
        Wrong(A, search(x_scale=lambda x, s: x), "inputs are not divided"),
        Wrong(A, search(w_scale=lambda W, s: W), "weights are not multiplied"),
        Wrong(
            A,
            search(x_scale=lambda x, s: x, w_scale=lambda W, s: W),
            "nothing is smoothed",
        ),
        Wrong(
            A,
            search(x_scale=lambda x, s: x * s, w_scale=lambda W, s: W / s),
            "wrong way round",
        ),
        Wrong(A, search(reference=rounded_reference), "compare with the floats"),
        Wrong(
            A,
            search(error=lambda y, right: (y - right).square().sum()),
            "not divided by the size",
        ),
        Wrong(
            A,
            search(error=lambda y, right: (y - right).square().mean()),
            "mean of the squared errors",
        ),
        Wrong(
            A,
            search(error=lambda y, right: (y - right).abs().sum() / right.abs().sum()),
            "not squared",
        ),
        Wrong(
            A,
            search(error=lambda y, right: (y - right).norm() / right.norm()),
            "root of the error",
        ),
        Wrong(A, search(per_is="token"), "hand `per` on"),
        Wrong(A, search(per_is="tensor"), "hand `per` on"),
        Wrong(
            A,
            search(best=lambda errors, alphas: alphas[int(errors.argmax())]),
            "the largest one",
        ),
        Wrong(
            A,
            search(best=lambda errors, alphas: int(errors.argmin())),
            "return the alpha",
        ),
        Wrong(A, search(best=lambda errors, alphas: 0.5 + 1e-3), "least error"),
        Wrong(A, always_seven, "use the argument"),
        Wrong(A, alpha_alone, "tuple"),
    ],
)
