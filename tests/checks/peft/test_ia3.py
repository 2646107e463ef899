"""Wrong answers to the exercises of 04-peft/08-ia3, each with the diagnosis that it
must get.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.peft.ia3 import check
from tests.checks.rejecting import Wrong, rejects, verdict


def plus(value, b):
    return value if b is None else value + b


def always_output(x, W, b, l, feedforward):  # noqa: E741
    return plus(x @ W.T, b) * l


def always_input(x, W, b, l, feedforward):  # noqa: E741
    return plus((x * l) @ W.T, b)


def bias_not_scaled(x, W, b, l, feedforward):  # noqa: E741
    return plus((x * l) @ W.T, b) if feedforward else plus(x @ W.T * l, b)


def bias_scaled_at_the_input(x, W, b, l, feedforward):  # noqa: E741
    return (
        plus((x * l) @ W.T, None if b is None else b * l)
        if feedforward
        else plus(x @ W.T, b) * l
    )


def forgot_the_bias(x, W, b, l, feedforward):  # noqa: E741
    return (x * l) @ W.T if feedforward else x @ W.T * l


def adds(x, W, b, l, feedforward):  # noqa: E741
    return plus((x + l) @ W.T, b) if feedforward else plus(x @ W.T, b) + l


def one_plus_l(x, W, b, l, feedforward):  # noqa: E741
    return plus((x * (1 + l)) @ W.T, b) if feedforward else plus(x @ W.T, b) * (1 + l)


def ignores_l(x, W, b, l, feedforward):  # noqa: E741
    return plus(x @ W.T, b)


def square_only(x, W, b, l, feedforward):  # noqa: E741
    return plus((x * l) @ W.T, b) if feedforward else plus(x @ W, b) * l


def needs_a_bias(x, W, b, l, feedforward):  # noqa: E741
    return (x * l) @ W.T + b if feedforward else (x @ W.T + b) * l


def merged(weight, bias):
    """`merge` with a rule for the weight and one for the bias, in fp32, rounded
    once.
    """

    def merge(W, b, l, feedforward):  # noqa: E741
        new_b = None if b is None else bias(b.float(), l, feedforward).to(b.dtype)
        return weight(W.float(), l, feedforward).to(W.dtype), new_b

    return merge


def right_weight(W, l, feedforward):  # noqa: E741
    return W * l if feedforward else l[:, None] * W


def right_bias(b, l, feedforward):  # noqa: E741
    return b if feedforward else l * b


def wrong_side(W, l, feedforward):  # noqa: E741
    return l[:, None] * W if feedforward else W * l


def always_columns(W, l, feedforward):  # noqa: E741
    return (
        W * l
        if feedforward or len(l) != len(W) or W.shape[0] == W.shape[1]
        else l[:, None] * W
    )


def divides(W, l, feedforward):  # noqa: E741
    return W / l if feedforward else W / l[:, None]


def rounds_l_first(W, b, l, feedforward):  # noqa: E741
    l = l.to(W.dtype)  # noqa: E741
    return right_weight(W, l, feedforward), (
        None if b is None else right_bias(b, l, feedforward)
    )


def always_bfloat16(W, b, l, feedforward):  # noqa: E741
    new_W, new_b = merged(right_weight, right_bias)(W, b, l, feedforward)
    return new_W.bfloat16(), new_b


def invents_a_bias(W, b, l, feedforward):  # noqa: E741
    new_W, new_b = merged(right_weight, right_bias)(W, b, l, feedforward)
    return new_W, torch.zeros(len(W)) if new_b is None else new_b


def last_task(x, W, l, ids):  # noqa: E741
    return x @ W.T * l[ids][:, None]


def first_task(x, W, l, ids):  # noqa: E741
    return x @ W.T * l[ids.clamp(min=0)][:, None]


def silences(x, W, l, ids):  # noqa: E741
    return x @ W.T * (l[ids] * (ids >= 0)[:, None])[:, None]


def along_tokens(x, W, l, ids):  # noqa: E741
    return x @ W.T * l[ids]


def first_row(x, W, l, ids):  # noqa: E741
    return x @ W.T * l[ids[0]]


def nobody(x, W, l, ids):  # noqa: E741
    return x @ W.T


def by_place(x, W, l, ids):  # noqa: E741
    return x @ W.T * l[torch.arange(len(x)) % len(l)][:, None]


# Kinds of mistake that once had no sentence, or got through.


def cut_at_the_input(x, W, b, scale, feedforward):
    if feedforward:
        return F.linear(x.detach() * scale, W, b)
    return F.linear(x, W, b) * scale


def divided(x, W, b, scale, feedforward):
    return F.linear(x / scale, W, b) if feedforward else F.linear(x, W, b) / scale


def merged_by(weight=lambda W, v: W * v, bias=lambda b, v: b * v):
    """merge with one thing changed; v is the scale, in the shape that fits."""

    def merge(W, b, scale, feedforward):
        side = scale if feedforward else scale[:, None]
        new_b = b
        if b is not None and not feedforward:
            new_b = bias(b, scale)
        return weight(W, side).to(W.dtype), None if b is None else new_b.to(W.dtype)

    return merge


def without_bias(W, b, scale, feedforward):
    return merged_by()(W, b, scale, feedforward)[0], None


def served(factor):
    def serve(x, W, scale, ids):
        return x @ W.T * factor(scale, ids)[:, None]

    return serve


MORE = [
    Wrong("ia3_linear", cut_at_the_input, "feedforward=True"),
    Wrong("ia3_linear", cut_at_the_input, "no gradient reaches `x`"),
    Wrong("ia3_linear", divided, "you divided by l"),
    Wrong("merge", without_bias, "b is dropped"),
    Wrong("merge", merged_by(lambda W, v: W * (1 + v)), "1 + l for l"),
    Wrong("merge", merged_by(bias=lambda b, v: b * v.bfloat16()), "scaled in bfloat16"),
    Wrong(
        "serve",
        served(lambda table, ids: torch.where((ids > 0)[:, None], table[ids], 1.0)),
        "task 0 is a task too",
    ),
    Wrong(
        "serve",
        served(
            lambda table, ids: torch.where(
                (ids >= 0)[:, None], table[ids], table.mean(0)
            )
        ),
        "the mean of all tasks",
    ),
    Wrong(
        "serve",
        served(lambda table, ids: torch.cat([torch.ones_like(table[:1]), table])[ids]),
        "the task before its own",
    ),
]


def scaled_weight(x, W, b, scale, feedforward):
    out = x @ (W * scale if feedforward else W * scale[:, None]).T
    if b is None:
        return out
    return out + b if feedforward else out + scale * b


def diagonal(W, b, scale, feedforward):
    d = torch.diag(scale.double())
    new = W.double() @ d if feedforward else d @ W.double()
    if b is None or feedforward:
        return new.to(W.dtype), b
    return new.to(W.dtype), (d @ b.double()).to(b.dtype)


def one_hot(x, W, scale, ids):
    hot = F.one_hot(ids.clamp(min=0), len(scale)) * (ids >= 0)[:, None]
    rows = hot.float() @ scale + (ids < 0)[:, None]
    return torch.einsum("nsi,oi,no->nso", x, W, rows)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("ia3_linear", scaled_weight),
        ("merge", diagonal),
        ("serve", one_hot),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/08-ia3",
    [
        Wrong("ia3_linear", always_output, "feedforward=True asks for the input"),
        Wrong("ia3_linear", always_input, "feedforward=False asks for the output"),
        Wrong("ia3_linear", bias_not_scaled, "the bias is not scaled"),
        Wrong("ia3_linear", bias_scaled_at_the_input, "the bias is scaled too"),
        Wrong("ia3_linear", forgot_the_bias, "the bias is missing"),
        Wrong("ia3_linear", adds, "l is added"),
        Wrong("ia3_linear", one_plus_l, "does not come on top"),
        Wrong("ia3_linear", ignores_l, "l is not used"),
        Wrong("ia3_linear", square_only, "differs"),
        Wrong("ia3_linear", needs_a_bias, "None"),
        Wrong("merge", merged(wrong_side, right_bias), "scaled the columns of W"),
        Wrong("merge", merged(always_columns, right_bias), "scaled the columns of W"),
        Wrong("merge", merged(divides, right_bias), "that is unmerging"),
        Wrong(
            "merge",
            merged(lambda W, scale, feedforward: W, right_bias),
            "W is not scaled",
        ),
        Wrong(
            "merge",
            merged(right_weight, lambda b, scale, feedforward: b),
            "the bias is not scaled",
        ),
        Wrong(
            "merge",
            merged(right_weight, lambda b, scale, feedforward: scale * b),
            "the bias is scaled",
        ),
        Wrong("merge", rounds_l_first, "rounded to bfloat16 before"),
        Wrong("merge", always_bfloat16, "has dtype bfloat16"),
        Wrong("merge", invents_a_bias, "must stay without one"),
        Wrong("serve", last_task, "counts from the end"),
        Wrong("serve", first_task, "task 0's"),
        Wrong("serve", silences, "give 0"),
        Wrong("serve", along_tokens, "laid along the tokens"),
        Wrong("serve", first_row, "first row's"),
        Wrong("serve", nobody, "nobody's"),
        Wrong("serve", by_place, "ids is not used"),
        *MORE,
    ],
)
