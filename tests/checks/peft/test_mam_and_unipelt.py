"""Wrong answers to the exercises of 04-peft/09-mam-and-unipelt, each with the diagnosis
that it must get.
"""

import pytest
import torch

from llmlab.checks.peft.mam_and_unipelt import check
from tests.checks.rejecting import Wrong, rejects, verdict

relu = torch.relu


def beside(formula):
    """parallel by a formula of (x, MLP's output, adapter's output unscaled, s)."""

    def parallel(x, mlp, down, up, s):
        return formula(x, mlp(x), relu(x @ down.T) @ up.T, s)

    return parallel


def after(x, mlp, down, up, s):
    m = mlp(x)
    return m + s * relu(m @ down.T) @ up.T


def after_unscaled(x, mlp, down, up, s):
    m = mlp(x)
    return m + relu(m @ down.T) @ up.T


def linear(x, mlp, down, up, s):
    return mlp(x) + s * x @ down.T @ up.T


def late(x, mlp, down, up, s):
    return mlp(x) + s * relu(x @ down.T @ up.T)


def gelu(x, mlp, down, up, s):
    return mlp(x) + s * torch.nn.functional.gelu(x @ down.T) @ up.T


PARALLEL = [
    Wrong("parallel", beside(lambda x, m, a, s: m + a), "scale is missing"),
    Wrong(
        "parallel", beside(lambda x, m, a, s: s * (m + a)), "s belongs to the adapter"
    ),
    Wrong("parallel", beside(lambda x, m, a, s: s * m + a), "wrong path"),
    Wrong("parallel", beside(lambda x, m, a, s: m + s * s * a), "applied twice"),
    Wrong("parallel", beside(lambda x, m, a, s: x + m + s * a), "x is added"),
    Wrong("parallel", beside(lambda x, m, a, s: s * a), "MLP is missing"),
    Wrong("parallel", beside(lambda x, m, a, s: m), "adapter is missing"),
    Wrong("parallel", beside(lambda x, m, a, s: m + a / s), "divided by s"),
    Wrong(
        "parallel", beside(lambda x, m, a, s: m + 4.0 * a), "need not be the paper's 4"
    ),
    Wrong("parallel", gelu, "another one"),
    Wrong("parallel", after, "beside means"),
    Wrong("parallel", after_unscaled, "and the scale is missing"),
    Wrong("parallel", linear, "activation is missing"),
    Wrong("parallel", late, "between the two matrices"),
]


def shared(weights, scale=lambda D: D**-0.5):
    """prefix_share by a function of (all scores, p)."""

    def prefix_share(q, P, K):
        return weights(q @ torch.cat([P, K]).T * scale(q.shape[-1]), len(P))

    return prefix_share


def soft(scores):
    return torch.softmax(scores, -1)


SHARE = [
    Wrong(
        "prefix_share",
        shared(lambda z, p: soft(z)[:, :p].sum(-1), lambda D: 1.0),
        "not divided by √D",
    ),
    Wrong(
        "prefix_share",
        shared(lambda z, p: soft(z)[:, :p].sum(-1), lambda D: 1 / D),
        "divided by D",
    ),
    Wrong("prefix_share", shared(lambda z, p: soft(z)[:, p:].sum(-1)), "1 − λ"),
    Wrong("prefix_share", shared(lambda z, p: soft(z)[:, -p:].sum(-1)), "last keys"),
    Wrong(
        "prefix_share",
        shared(lambda z, p: soft(z)[:, :p].sum(-1) / soft(z)[:, p:].sum(-1)),
        "ratio",
    ),
    Wrong("prefix_share", shared(lambda z, p: soft(z)[:, :p].mean(-1)), "mean weight"),
    Wrong("prefix_share", shared(lambda z, p: soft(z)[:, 0]), "first prefix token"),
    Wrong(
        "prefix_share",
        shared(lambda z, p: z[:, :p].sum(-1) / z.sum(-1)),
        "exponentials",
    ),
    Wrong(
        "prefix_share",
        shared(lambda z, p: torch.softmax(z, 0)[:, :p].sum(-1)),
        "over the queries",
    ),
    Wrong(
        "prefix_share",
        shared(lambda z, p: torch.full((len(z),), p / z.shape[1])),
        "all scores are equal",
    ),
    Wrong("prefix_share", shared(lambda z, p: soft(z[:, :p]).sum(-1)), "prefix alone"),
    Wrong("prefix_share", shared(lambda z, p: soft(z)), "shape"),
]


def gated(gate, both=lambda g, k, v: (g * k, g * v)):
    """gated_prefix with another gate, given (x w + b, mask, x w), or other uses of
    it.
    """

    def gated_prefix(x, w, b, mask, P_K, P_V):
        return both(gate(x @ w + b, mask, x @ w)[:, None, None, None], P_K, P_V)

    return gated_prefix


def right(z, mask, _):
    return (torch.sigmoid(z) * mask).sum(1) / mask.sum(1)


def zeroed(x, w, b, mask, P_K, P_V):
    g = sigmoid((x * mask[..., None]) @ w + b).mean(1)[:, None, None, None]
    return g * P_K, g * P_V


sigmoid = torch.sigmoid
GATED = [
    Wrong(
        "gated_prefix", gated(lambda z, m, _: sigmoid(z).mean(1)), "padding is counted"
    ),
    Wrong(
        "gated_prefix", gated(lambda z, m, _: (sigmoid(z) * m).mean(1)), "whole length"
    ),
    Wrong(
        "gated_prefix",
        gated(lambda z, m, _: sigmoid((z * m).sum(1) / m.sum(1))),
        "before the sigmoid",
    ),
    Wrong(
        "gated_prefix",
        gated(lambda z, m, _: (z * m).sum(1) / m.sum(1)),
        "sigmoid is missing",
    ),
    Wrong(
        "gated_prefix",
        gated(lambda z, m, y: (sigmoid(y) * m).sum(1) / m.sum(1)),
        "b is missing",
    ),
    Wrong("gated_prefix", gated(lambda z, m, _: 1 - right(z, m, _)), "1 − g"),
    Wrong(
        "gated_prefix", gated(lambda z, m, _: torch.ones(len(z))), "gate is not used"
    ),
    Wrong(
        "gated_prefix",
        gated(lambda z, m, _: (sigmoid(z) * m).sum().expand(len(z)) / m.sum()),
        "over the batch",
    ),
    Wrong("gated_prefix", gated(lambda z, m, _: sigmoid(z)[:, -1]), "last token"),
    Wrong("gated_prefix", gated(lambda z, m, _: sigmoid(z)[:, 0]), "first token"),
    Wrong(
        "gated_prefix",
        gated(lambda z, m, _: (sigmoid(z) * m).sum(1)),
        "summed, not averaged",
    ),
    Wrong("gated_prefix", zeroed, "zeroing x is not enough"),
    Wrong(
        "gated_prefix",
        gated(right, lambda g, k, v: (g * k, v + 0 * g)),
        "only the keys",
    ),
    Wrong(
        "gated_prefix",
        gated(right, lambda g, k, v: (k + 0 * g, g * v)),
        "only the values",
    ),
    Wrong("gated_prefix", gated(right, lambda g, k, v: (g * v, g * k)), "swapped"),
    Wrong("gated_prefix", gated(right, lambda g, k, v: g * k), "tuple or list"),
]

# Kinds of mistake that once had no sentence, or got through.


def mlp_behind(x, mlp, down, up, s):
    return mlp(x + s * torch.relu(x @ down.T) @ up.T)


def divided_by_m(x, mlp, down, up, s):
    return mlp(x) + s / len(down) * torch.relu(x @ down.T) @ up.T


def shares(change):
    """prefix_share from the scores of both parts."""

    def prefix_share(q, P, K):
        return change(q @ P.T / q.shape[1] ** 0.5, q @ K.T / q.shape[1] ** 0.5)

    return prefix_share


def of_sums(a, b):
    a, b = a.exp().sum(1), b.exp().sum(1)
    return a / (a + b)


def of_means(a, b):
    a, b = a.exp().mean(1), b.exp().mean(1)
    return a / (a + b)


def each_less_its_own(a, b):
    return of_sums(a - a.amax(1, keepdim=True), b - b.amax(1, keepdim=True))


def less_one_for_all(a, b):
    most = max(a.max(), b.max())
    return of_sums(a - most, b - most)


def gated_by(gate):
    def gated_prefix(x, w, b, mask, P_K, P_V):
        g = gate(x @ w + b, mask)[:, None, None, None]
        return g * P_K, g * P_V

    return gated_prefix


def of_the_first(z, mask):
    n = mask.sum(1).int().tolist()
    return torch.stack([z[i, : n[i]].sigmoid().mean() for i in range(len(z))])


MORE = [
    Wrong("parallel", mlp_behind, "the MLP reads what the adapter gives"),
    Wrong("parallel", divided_by_m, "not divided by m"),
    Wrong("prefix_share", shares(of_sums), "exp overflows"),
    Wrong("prefix_share", shares(less_one_for_all), "0 / 0"),
    Wrong("prefix_share", shares(each_less_its_own), "off each part by itself"),
    Wrong("prefix_share", shares(of_means), "you compared means"),
    Wrong(
        "gated_prefix",
        gated_by(lambda z, mask: (z * mask).sigmoid().sum(1) / mask.sum(1)),
        "½ in the sum",
    ),
    Wrong("gated_prefix", gated_by(of_the_first), "padding may be on the left"),
    Wrong(
        "gated_prefix",
        gated_by(lambda z, mask: (z.sigmoid() * mask).sum(1) / mask.sum(1).mean()),
        "the same count",
    ),
]


def clamped(x, mlp, down, up, s):
    z = torch.einsum("...d,md->...m", x, down)
    return torch.einsum("...m,dm->...d", z.clamp(min=0), up * s) + mlp(x)


def by_sigmoid(q, P, K):
    scale = q.shape[1] ** -0.5
    parts = [torch.logsumexp(q @ t.T * scale, 1) for t in (P, K)]
    return torch.sigmoid(parts[0] - parts[1])


def row_by_row(x, w, b, mask, P_K, P_V):
    rows = [row[real.bool()] for row, real in zip(x, mask, strict=True)]
    g = torch.stack([torch.sigmoid(row @ w + b).mean() for row in rows])
    return torch.einsum("n,hpd->nhpd", g, P_K), torch.einsum("n,hpd->nhpd", g, P_V)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("parallel", clamped),
        ("prefix_share", by_sigmoid),
        ("gated_prefix", row_by_row),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/09-mam-and-unipelt", PARALLEL + SHARE + GATED + MORE
)
