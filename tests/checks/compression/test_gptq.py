"""Wrong answers to the exercises of 06-compression/05-gptq, each with the diagnosis
that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.gptq import check
from llmlab.compression import gptq
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def surgeon_by_solving(w, q, value, H_inv):
    """Least squares over the other weights, in float64."""
    H = torch.linalg.inv(H_inv.double())
    rest = [i for i in range(len(w)) if i != q]
    gap = w[q].double() - value
    out = w.double().clone()
    out[q] = value
    out[rest] += torch.linalg.solve(H[rest][:, rest], H[rest, q] * gap)
    return out.float()


def surgeon_in_a_loop(w, q, value, H_inv):
    step = (float(w[q]) - value) / float(H_inv[q, q])
    return torch.stack([w[i] - step * H_inv[i, q] for i in range(len(w))])


def surgeon_by_a_row(w, q, value, H_inv):
    """H⁻¹ is symmetric: its row q is its column q."""
    out = w.double() + (value - float(w[q])) * H_inv[q].double() / float(H_inv[q, q])
    return out.float()


def only_later(w, q, value, H_inv):
    out = w.clone()
    out[q:] -= (w[q] - value) / H_inv[q, q] * H_inv[q:, q]
    return out


def only_q(w, q, value, H_inv):
    out = w.clone()
    out[q] = value
    return out


def plus(w, q, value, H_inv):
    return w + (w[q] - value) / H_inv[q, q] * H_inv[:, q]


def plus_and_value(w, q, value, H_inv):
    out = plus(w, q, value, H_inv)
    out[q] = value
    return out


def no_denominator(w, q, value, H_inv):
    return w - (w[q] - value) * H_inv[:, q]


def no_denominator_and_value(w, q, value, H_inv):
    out = no_denominator(w, q, value, H_inv)
    out[q] = value
    return out


def root(w, q, value, H_inv):
    return w - (w[q] - value) / H_inv[q, q] ** 0.5 * H_inv[:, q]


def own_diagonal(w, q, value, H_inv):
    return w - (w[q] - value) / H_inv.diagonal() * H_inv[:, q]


def not_inverse(w, q, value, H_inv):
    H = torch.linalg.inv(H_inv)
    return w - (w[q] - value) / H[q, q] * H[:, q]


def only_delta(w, q, value, H_inv):
    return -(w[q] - value) / H_inv[q, q] * H_inv[:, q]


def to_zero(w, q, value, H_inv):
    return w - w[q] / H_inv[q, q] * H_inv[:, q]


def changes_w(w, q, value, H_inv):
    w -= (w[q] - value) / H_inv[q, q] * H_inv[:, q]
    return w


# 2 ------------------------------------------------------------------------------------


def factor(damp=lambda H, d: d * H.diagonal().mean() * torch.eye(len(H))):
    """inverse_factor with another damping."""

    def answer(H, damping):
        inverse = torch.linalg.inv(H + damp(H, damping))
        return torch.linalg.cholesky(inverse, upper=True)

    return answer


right_factor = factor()


def factor_by_transpose(H, damping):
    H = H.clone().double()
    H.diagonal().add_(damping * H.diagonal().mean())
    return torch.linalg.cholesky(torch.linalg.inv(H)).T.float()


def factor_by_flipping(H, damping):
    """H = L' L'ᵀ with L' upper, from the factor of H read backwards; U = L'⁻¹ … ."""
    damped = H.double() + damping * H.diagonal().mean() * torch.eye(len(H))
    lower = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # upper triangular
    return torch.linalg.inv(lower).float()


def lower_factor(H, damping):
    return right_factor(H, damping).T


def factor_of_h(H, damping):
    share = damping * H.diagonal().mean()
    return torch.linalg.cholesky(H + share * torch.eye(len(H)), upper=True)


def inverse_alone(H, damping):
    return torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H)))


def inverse_of_factor(H, damping):
    return torch.linalg.inv(factor_of_h(H, damping))


def one_percent(H, damping):
    return right_factor(H, 0.05)


def in_place(H, damping):
    H.diagonal().add_(damping * H.diagonal().mean())
    return torch.linalg.cholesky(torch.linalg.inv(H), upper=True)


# 3 ------------------------------------------------------------------------------------


def loop(
    rounding=torch.round,
    low=lambda top: -top,
    high=lambda top: top,
    error=lambda e, d: e / d,
    sign=-1,
    last=None,
    copy=True,
    scale_of=lambda scale, W: scale,
):
    """round_with_feedback with one thing changed."""

    def answer(W, U, scale, top):
        W = W.clone()
        scale = scale_of(scale, W)
        for q in range(W.shape[1]):
            w = W[:, q].clone() if copy else W[:, q]
            codes = rounding(w / scale).clamp(low(top), high(top))
            W[:, q] = codes * scale
            e = error(w - W[:, q], U[q, q])
            stop = None if last is None else q + 1 + last
            W[:, q + 1 : stop] += sign * torch.outer(e, U[q, q + 1 : stop])
        return W

    return answer


right_loop = loop()


def by_einsum(W, U, scale, top):
    """Rows as columns, the whole row of U at once."""
    now, found = W.T.clone().double(), []
    for q in range(len(now)):
        level = (now[q] / scale).round().clamp(-top, top) * scale
        found.append(level)
        e = (now[q] - level) / U[q, q]
        now = now - torch.einsum("i,o->io", U[q].double(), e)
    return torch.stack(found, 1).float()


def row_by_row(W, U, scale, top):
    """Each weight looks back at all the errors before it."""
    out, columns = W.shape
    E = torch.zeros_like(W)
    found = torch.zeros_like(W)
    for r in range(out):
        for q in range(columns):
            w = W[r, q] - (E[r, :q] * U[:q, q]).sum()
            found[r, q] = (w / scale[r]).round().clamp(-top, top) * scale[r]
            E[r, q] = (w - found[r, q]) / U[q, q]
    return found


def to_nearest(W, U, scale, top):
    s = scale[:, None]
    return (W / s).round().clamp(-top, top) * s


def old_errors(W, U, scale, top):
    e_all = (W - to_nearest(W, U, scale, top)) / U.diagonal()
    now = W.clone()
    for q in range(W.shape[1]):
        now[:, q + 1 :] -= torch.outer(e_all[:, q], U[q, q + 1 :])
    return to_nearest(now, U, scale, top)


def codes(W, U, scale, top):
    return right_loop(W, U, scale, top) / scale[:, None]


def with_the_inverse(W, U, scale, top):
    return right_loop(W, U.T @ U, scale, top)


def top_of_three(W, U, scale, top):
    return right_loop(W, U, scale, 3)


def wrong_axis(W, U, scale, top):
    now = W.clone()
    for q in range(W.shape[1]):
        s = scale[q % len(scale)]
        level = (now[:, q] / s).round().clamp(-top, top) * s
        e = (now[:, q] - level) / U[q, q]
        now[:, q] = level
        now[:, q + 1 :] -= torch.outer(e, U[q, q + 1 :])
    return now


# 4 ------------------------------------------------------------------------------------


def ordered(
    order=lambda W, H: H.diagonal().argsort(descending=True),
    back=lambda perm: perm.argsort(),
    group=lambda perm, size: perm // size,
    of_h=lambda H, perm: H[perm][:, perm],
    damping=0.01,
    top_is=None,
):
    """largest_first with one thing changed."""

    def answer(W, H, scale, group_size, top):
        perm = order(W, H)
        U = gptq.inverse_factor(of_h(H, perm), damping)
        groups = group(perm, group_size)
        top = top_is or top
        now = W[:, perm].clone()
        for i in range(W.shape[1]):
            s = scale[:, groups[i]]
            w = now[:, i].clone()
            now[:, i] = (w / s).round().clamp(-top, top) * s
            e = (w - now[:, i]) / U[i, i]
            now[:, i + 1 :] -= torch.outer(e, U[i, i + 1 :])
        return now[:, back(perm)]

    return answer


def half_old_errors(W, U, scale, top):
    now = W.clone()
    for q in range(W.shape[1]):
        now[:, q] = (now[:, q] / scale).round().clamp(-top, top) * scale
        error = (W[:, q] - now[:, q]) / U[q, q]
        now[:, q + 1 :] -= error[:, None] * U[q, q + 1 :]
    return now


def plain_inverse(H, perm):
    """What `ordered` without damping takes for H, by torch.linalg.inv, in float32."""
    return torch.linalg.inv(torch.linalg.inv(H[perm][:, perm]))


def late_permuted(W, H, scale, group_size, top):
    perm = H.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(len(H)))
    U = torch.linalg.cholesky(inverse, upper=True)[perm][:, perm]
    now = W[:, perm].clone()
    scale = scale.repeat_interleave(group_size, 1)[:, perm]
    for q in range(len(H)):
        w = now[:, q].clone()
        now[:, q] = (w / scale[:, q]).round().clamp(-top, top) * scale[:, q]
        error = (w - now[:, q]) / U[q, q]
        now[:, q + 1 :] -= error[:, None] * U[q, q + 1 :]
    return now[:, perm.argsort()]


def columns(perm):
    return torch.arange(len(perm))


def put_back_by_assignment(W, H, scale, group_size, top):
    perm = (-H.diagonal()).argsort()
    s_all = scale.repeat_interleave(group_size, 1)[:, perm]
    U = factor_by_transpose(H[perm][:, perm], 0.01)
    now = W[:, perm]
    found = torch.empty_like(W)
    for i, j in enumerate(perm.tolist()):
        s = s_all[:, i]
        found[:, j] = (now[:, i] / s).round().clamp(-top, top) * s
        now = now - torch.outer((now[:, i] - found[:, j]) / U[i, i], U[i])
    return found


def by_the_package(W, H, scale, group_size, top):
    """Without loops of its own: exercise 3 takes one scale for each weight."""
    perm = H.diagonal().argsort(descending=True)
    U = gptq.inverse_factor(H[perm][:, perm])
    out = torch.zeros_like(W)
    for r in range(len(W)):
        now = W[r, perm].clone()
        for i in range(len(now)):
            s = scale[r, perm[i] // group_size]
            level = (now[i] / s).round().clamp(-top, top) * s
            now = now - (now[i] - level) / U[i, i] * U[i]
            out[r, perm[i]] = level
    return out


def nearest_groups(W, H, scale, group_size, top):
    s = scale.repeat_interleave(group_size, 1)
    return (W / s).round().clamp(-top, top) * s


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("surgeon", surgeon_by_solving),
        ("surgeon", surgeon_in_a_loop),
        ("surgeon", surgeon_by_a_row),
        ("inverse_factor", factor_by_transpose),
        ("inverse_factor", factor_by_flipping),
        ("round_with_feedback", by_einsum),
        ("round_with_feedback", row_by_row),
        ("largest_first", put_back_by_assignment),
        ("largest_first", by_the_package),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


S, F, R, L = "surgeon", "inverse_factor", "round_with_feedback", "largest_first"
test_wrong_answers = rejects(
    "06-compression/05-gptq",
    [
        Wrong(S, only_q, "the others must make up for it"),
        Wrong(S, only_later, "those before it do, too"),
        Wrong(S, plus, "wrong way"),
        Wrong(S, plus_and_value, "wrong way"),
        Wrong(S, no_denominator, "the division by [H⁻¹]_qq is missing"),
        Wrong(S, no_denominator_and_value, "which entry q hides"),
        Wrong(S, root, "without a root"),
        Wrong(S, own_diagonal, "its own"),
        Wrong(S, not_inverse, "not its inverse"),
        Wrong(S, only_delta, "δ alone"),
        Wrong(S, to_zero, "sets weight q to 0"),
        Wrong(S, changes_w, "in place"),
        Wrong(F, factor(lambda H, d: 0 * H), "the damping is missing"),
        Wrong(F, factor(lambda H, d: d * torch.eye(len(H))), "times the mean"),
        Wrong(F, factor(lambda H, d: d * H.diagonal().diag()), "its own damping"),
        Wrong(F, factor(lambda H, d: d * H.diagonal().mean()), "only the diagonal"),
        Wrong(
            F, factor(lambda H, d: d * H.mean() * torch.eye(len(H))), "mean of all of H"
        ),
        Wrong(
            F,
            factor(lambda H, d: d * H.diagonal().max() * torch.eye(len(H))),
            "the largest entry",
        ),
        Wrong(F, lower_factor, "lower triangular"),
        Wrong(F, factor_of_h, "the factor of H"),
        Wrong(F, inverse_alone, "this is the inverse"),
        Wrong(F, inverse_of_factor, "H⁻¹ is U Uᵀ here"),
        Wrong(F, one_percent, "from the argument"),
        Wrong(F, in_place, "in place"),
        Wrong(R, to_nearest, "round to nearest"),
        Wrong(R, loop(copy=False), "Is `w` a copy"),
        Wrong(R, loop(sign=1), "wrong way"),
        Wrong(R, loop(error=lambda e, d: e), "division by U_qq is missing"),
        Wrong(R, loop(error=lambda e, d: e * d), "multiplied the error"),
        Wrong(R, loop(error=lambda e, d: e / d**2), "twice"),
        Wrong(R, loop(last=1), "only the next column"),
        Wrong(R, old_errors, "as they were at the start"),
        Wrong(
            R,
            loop(low=lambda t: -99, high=lambda t: 99),
            "not clamped",
        ),
        Wrong(R, loop(low=lambda t: -t - 1), "clamped at −top − 1"),
        Wrong(R, loop(rounding=torch.trunc), "cut off"),
        Wrong(R, loop(rounding=torch.floor), "rounded down"),
        Wrong(R, half_old_errors, "its error is taken from W as it was"),
        Wrong(R, codes, "multiply them by the scale"),
        Wrong(R, with_the_inverse, "the inverse itself"),
        Wrong(R, wrong_axis, "wrong axis"),
        Wrong(R, top_of_three, "from the arguments"),
        Wrong(L, ordered(back=columns), "not put back"),
        Wrong(L, ordered(back=lambda p: p), "permuted once more"),
        Wrong(
            L,
            ordered(group=lambda p, size: columns(p) // size),
            "neighbours in the new order",
        ),
        Wrong(
            L,
            ordered(order=lambda W, H: H.diagonal().argsort()),
            "the smallest inputs come first",
        ),
        Wrong(L, ordered(order=lambda W, H: columns(H)), "nothing is permuted"),
        Wrong(L, ordered(of_h=lambda H, p: H), "H is not permuted"),
        Wrong(
            L,
            ordered(order=lambda W, H: W.square().sum(0).argsort(descending=True)),
            "the weights' size",
        ),
        Wrong(L, ordered(damping=0.0), "the damping is missing"),
        Wrong(L, ordered(damping=0.0, of_h=plain_inverse), "the damping is missing"),
        Wrong(L, late_permuted, "U is permuted"),
        Wrong(
            L,
            ordered(group=lambda p, size: p % (len(p) // size)),
            "the scales are repeated as a whole",
        ),
        Wrong(
            L,
            ordered(order=lambda W, H: (-torch.linalg.inv(H).diagonal()).argsort()),
            "the inverse's diagonal",
        ),
        Wrong(L, ordered(top_is=3), "from the arguments"),
        Wrong(L, nearest_groups, "round to nearest"),
    ],
)
