"""Wrong answers to the exercises of 04-peft/08-ia3, each with the diagnosis that it
must get.
"""

import torch

from tests.checks.rejecting import Wrong, rejects


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
    ],
)
