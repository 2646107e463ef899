"""Wrong answers to the exercises of 04-peft/04-adapters, each with the diagnosis that
it must get.
"""

import pytest
import torch

from llmlab.checks.peft.adapters import check
from tests.checks.rejecting import Wrong, rejects, verdict

relu = torch.relu


def made(formula):
    """adapter by a formula of (h, middle before the activation, up, b_up)."""

    def adapter(h, down, b_down, up, b_up):
        return formula(h, h @ down.T + b_down, up, b_up)

    return adapter


def no_b_down(h, down, b_down, up, b_up):
    return h + relu(h @ down.T) @ up.T + b_up


def no_biases(h, down, b_down, up, b_up):
    return h + relu(h @ down.T) @ up.T


def bias_after(h, down, b_down, up, b_up):
    return h + (relu(h @ down.T) + b_down) @ up.T + b_up


def gelu_instead(h, down, b_down, up, b_up):
    return h + torch.nn.functional.gelu(h @ down.T + b_down) @ up.T + b_up


def not_transposed(h, down, b_down, up, b_up):
    return h + relu(h @ down + b_down) @ up + b_up


def in_place(h, down, b_down, up, b_up):
    h += relu(h @ down.T + b_down) @ up.T + b_up
    return h


ADAPTER = [
    Wrong(
        "adapter",
        made(lambda h, mid, up, b: relu(mid) @ up.T + b),
        "residual is missing",
    ),
    Wrong(
        "adapter",
        made(lambda h, mid, up, b: h + mid @ up.T + b),
        "activation is missing",
    ),
    Wrong(
        "adapter", made(lambda h, mid, up, b: h + relu(mid @ up.T + b)), "wrong place"
    ),
    Wrong(
        "adapter",
        made(lambda h, mid, up, b: h + relu(relu(mid) @ up.T + b)),
        "applied twice",
    ),
    Wrong(
        "adapter",
        made(lambda h, mid, up, b: relu(h + relu(mid) @ up.T + b)),
        "residual goes through",
    ),
    Wrong(
        "adapter", made(lambda h, mid, up, b: h + relu(mid) @ up.T), "b_up is missing"
    ),
    Wrong(
        "adapter", made(lambda h, mid, up, b: h - (relu(mid) @ up.T + b)), "subtracted"
    ),
    Wrong("adapter", made(lambda h, mid, up, b: h), "nothing is added"),
    Wrong("adapter", no_b_down, "b_down is missing"),
    Wrong("adapter", no_biases, "both biases"),
    Wrong("adapter", bias_after, "belongs before"),
    Wrong("adapter", gelu_instead, "gelu: relu is asked"),
    Wrong("adapter", not_transposed, "shape"),
    Wrong("adapter", in_place, "in place"),
]


def fused(
    scores=lambda q, k: (q[..., None, :] * k).sum(-1),
    s=lambda x: torch.softmax(x, -1),
    add=0.0,
):
    """fuse with other scores or other weights."""

    def fuse(x, z, Q, K, V):
        return add * x + (s(scores(x @ Q.T, z @ K.T))[..., None] * (z @ V.T)).sum(-2)

    return fuse


def no_value(x, z, Q, K, V):
    s = torch.softmax(((x @ Q.T)[..., None, :] * (z @ K.T)).sum(-1), -1)
    return (s[..., None] * z).sum(-2)


def no_key(x, z, Q, K, V):
    s = torch.softmax(((x @ Q.T)[..., None, :] * z).sum(-1), -1)
    return (s[..., None] * (z @ V.T)).sum(-2)


def no_query(x, z, Q, K, V):
    s = torch.softmax((x[..., None, :] * (z @ K.T)).sum(-1), -1)
    return (s[..., None] * (z @ V.T)).sum(-2)


def transposed(x, z, Q, K, V):
    s = torch.softmax(((x @ Q)[..., None, :] * (z @ K)).sum(-1), -1)
    return (s[..., None] * (z @ V)).sum(-2)


def value_transposed(x, z, Q, K, V):
    s = torch.softmax(((x @ Q.T)[..., None, :] * (z @ K.T)).sum(-1), -1)
    return (s[..., None] * (z @ V)).sum(-2)


def exchanged(x, z, Q, K, V):
    s = torch.softmax(((x @ K.T)[..., None, :] * (z @ Q.T)).sum(-1), -1)
    return (s[..., None] * (z @ V.T)).sum(-2)


def keys_as_values(x, z, Q, K, V):
    return no_value(x, z, Q, K, V) @ K.T


def weights_only(x, z, Q, K, V):
    return torch.softmax(((x @ Q.T)[..., None, :] * (z @ K.T)).sum(-1), -1)


FUSE = [
    Wrong(
        "fuse",
        fused(scores=lambda q, k: (q[..., None, :] * k).sum(-1) / q.shape[-1] ** 0.5),
        "divided by √d",
    ),
    Wrong("fuse", fused(s=lambda x: x), "softmax is missing"),
    Wrong("fuse", fused(s=lambda x: torch.softmax(x, 1)), "over the tokens"),
    Wrong("fuse", fused(s=lambda x: torch.softmax(x, 0)), "over the batch"),
    Wrong("fuse", fused(s=lambda x: torch.full_like(x, 1 / 3)), "weigh the same"),
    Wrong("fuse", fused(s=torch.ones_like), "summed, not averaged"),
    Wrong(
        "fuse",
        fused(s=lambda x: (x == x.max(-1, keepdim=True).values).float()),
        "not argmax",
    ),
    Wrong("fuse", fused(add=1.0), "x is added"),
    Wrong("fuse", no_value, "value matrix is not used"),
    Wrong("fuse", no_key, "key matrix is not used"),
    Wrong("fuse", no_query, "query matrix is not used"),
    Wrong("fuse", transposed, "a matrix is transposed"),
    Wrong("fuse", value_transposed, "V is transposed"),
    Wrong("fuse", exchanged, "Q and K are exchanged"),
    Wrong("fuse", keys_as_values, "K makes the keys, V the values"),
    Wrong("fuse", fused(s=torch.sigmoid), "a sigmoid of its score"),
    Wrong("fuse", weights_only, "shape"),
]

SPEEDUP = [
    Wrong(
        "speedup",
        lambda L, t, n, a: (n + t * (L - n) * (1 + a)) / (t * L * (1 + a)),
        "its inverse",
    ),
    Wrong(
        "speedup",
        lambda L, t, n, a: L * (1 + a) / (n + (L - n) * (1 + a)),
        "run for every task",
    ),
    Wrong("speedup", lambda L, t, n, a: L / (L - n), "still run"),
    Wrong("speedup", lambda L, t, n, a: t * L / (n + t * (L - n)), "own cost"),
    Wrong(
        "speedup",
        lambda L, t, n, a: t * L * (1 + a) / (n + (L - n) * (1 + a)),
        "upper layers run once",
    ),
    Wrong(
        "speedup",
        lambda L, t, n, a: t * L * (1 + a) / (n * (1 + a) + t * (L - n) * (1 + a)),
        "dropped layers pay it too",
    ),
    Wrong(
        "speedup",
        lambda L, t, n, a: t * L * (1 + a) / ((L - n) + t * n * (1 + a)),
        "not of those that keep",
    ),
    Wrong(
        "speedup",
        lambda L, t, n, a: t * L * a / (n + t * (L - n) * a),
        "costs 1 + adapter",
    ),
    Wrong("speedup", lambda L, t, n, a: None, "return"),
]

# Kinds of mistake that once had no sentence.


def with_activation(act, residual=lambda h: h):
    def adapter(h, down, b_down, up, b_up):
        return residual(h) + act(h @ down.T + b_down) @ up.T + b_up

    return adapter


def a_softmax_each(x, z, Q, K, V):
    weights = ((x @ Q.T)[..., None, :] * (z @ K.T)).softmax(-2)
    return (weights * (z @ V.T)).sum(-2)


def costs(change):
    """speedup from the two costs."""

    def speedup(layers, tasks, n, adapter):
        each = 1 + adapter
        alone = tasks * layers * each
        return change(alone, n + tasks * (layers - n) * each, layers, tasks, n, each)

    return speedup


MORE = [
    Wrong("adapter", with_activation(torch.nn.functional.gelu), "gelu: relu is asked"),
    Wrong("adapter", with_activation(torch.relu, lambda h: 2 * h), "added twice"),
    Wrong("adapter", with_activation(torch.relu, torch.relu), "it is h itself"),
    Wrong("fuse", a_softmax_each, "a softmax of its own"),
    Wrong("fuse", lambda x, z, Q, K, V: x @ V.T, "the values come from x"),
    Wrong("speedup", costs(lambda a, s, *_: 1 - s / a), "share of work that is saved"),
    Wrong("speedup", costs(lambda a, s, *_: a - s), "difference of the two costs"),
    Wrong(
        "speedup",
        costs(lambda a, s, L, t, n, each: a / (n + t * (L - n))),
        "still have adapters",
    ),
    Wrong(
        "speedup", costs(lambda a, s, L, t, n, each: t * L / s), "at 1 + adapter each"
    ),
    Wrong(
        "speedup",
        costs(lambda a, s, L, t, n, each: a / (n - 1 + t * (L - n + 1) * each)),
        "one layer too few",
    ),
]


def by_where(h, down, b_down, up, b_up):
    z = torch.einsum("...d,md->...m", h, down) + b_down
    z = torch.where(z > 0, z, torch.zeros_like(z))
    return h + b_up + torch.einsum("...m,dm->...d", z, up)


def by_products(x, z, Q, K, V):
    weights = (z @ K.T @ (x @ Q.T).unsqueeze(-1)).softmax(-2)
    return ((z @ V.T).mT @ weights).squeeze(-1)


def layer_by_layer(layers, tasks, n, adapter):
    alone = sum(1 + adapter for _ in range(layers)) * tasks
    return alone / (n + sum(tasks * (1 + adapter) for _ in range(n, layers)))


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("adapter", by_where),
        ("fuse", by_products),
        ("speedup", layer_by_layer),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects("04-peft/04-adapters", ADAPTER + FUSE + SPEEDUP + MORE)
