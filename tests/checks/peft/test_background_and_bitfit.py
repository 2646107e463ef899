"""Wrong answers to the exercises of 04-peft/01-background-and-bitfit, each with the
diagnosis that it must get.
"""

import pytest
import torch

from llmlab.checks.peft.background_and_bitfit import check
from tests.checks.rejecting import Wrong, rejects, verdict


def sixteen_for_all(total, trained, activations):
    return 16 * total + activations


def weights_twice(total, trained, activations):
    return 2 * total + 16 * trained + activations


def only_the_trained(total, trained, activations):
    return 16 * trained + activations


def no_activations(total, trained, activations):
    return 2 * (total - trained) + 16 * trained


def no_master_copy(total, trained, activations):
    return 2 * (total - trained) + 12 * trained + activations


def swapped(total, trained, activations):
    return 16 * (total - trained) + 2 * trained + activations


def plain_sgd(total, trained, activations):
    return 2 * (total - trained) + 8 * trained + activations


def freeze_fully_trained(total, trained, activations):
    return (
        2 * (total - trained)
        + (16 * trained if trained < total else 2 * trained)
        + activations
    )


def is_bias(name):
    return name.split(".")[-1] == "bias"


def named_bias_anywhere(model):
    for name, p in model.named_parameters():
        p.requires_grad_("bias" in name)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def only_unfreezes(model):
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    for p in biases:
        p.requires_grad_(True)
    return sum(p.numel() for p in biases)


def only_freezes(model):
    for name, p in model.named_parameters():
        if not is_bias(name):
            p.requires_grad_(False)
    return sum(p.numel() for n, p in model.named_parameters() if is_bias(n))


def linears_only(model):
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def counts_tensors(model):
    for name, p in model.named_parameters():
        p.requires_grad_(is_bias(name))
    return sum(is_bias(name) for name, _ in model.named_parameters())


def counts_everything(model):
    for name, p in model.named_parameters():
        p.requires_grad_(is_bias(name))
    return sum(p.numel() for p in model.parameters())


def accepts_a_model_without(model):
    for name, p in model.named_parameters():
        p.requires_grad_(is_bias(name))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def zeroes_the_biases(model):
    for name, p in model.named_parameters():
        p.requires_grad_(is_bias(name))
        if is_bias(name):
            p.data.zero_()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def folded(combine):
    """`fold` by another rule; absent vectors are zeros."""

    def fold(W, b, c, beta):
        def zero(t, w):
            return torch.zeros(len(w)) if t is None else t

        return [
            combine(w, zero(b_i, w), zero(c_i, w), beta)
            for w, b_i, c_i in zip(W, b, c, strict=True)
        ]

    return fold


def crashes_on_none(W, b, c, beta):
    return [b_i + c_i + w @ beta for w, b_i, c_i in zip(W, b, c, strict=True)]


def keeps_none(W, b, c, beta):
    """A linear without a bias of its own gets none."""
    new = folded(lambda w, b, c, beta: b + c + w @ beta)(W, b, c, beta)
    return [None if b_i is None else one for one, b_i in zip(new, b, strict=True)]


# Kinds of mistake that once had no sentence, or got through.


def bitfit(is_bias=is_bias, count=torch.numel):
    def freeze_all_but_biases(model):
        biases = [p for n, p in model.named_parameters() if is_bias(n)]
        if not biases:
            raise ValueError("the model has no biases")
        model.requires_grad_(False)
        for p in biases:
            p.requires_grad_(True)
        return sum(count(p) for p in biases)

    return freeze_all_but_biases


def counts_what_trained(model):
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    bitfit()(model)
    return sum(
        p.numel() for n, p in model.named_parameters() if n in trained and is_bias(n)
    )


def counts_shared_twice(model):
    bitfit()(model)
    biases = [getattr(m, "bias", None) for m in model.modules()]
    return sum(b.numel() for b in biases if b is not None)


def only_with_b(W, b, c, beta):
    new = []
    for w, b_i, c_i in zip(W, b, c, strict=True):
        own = 0 if b_i is None else b_i + (0 if c_i is None else c_i)
        new.append(w @ beta + own)
    return new


MORE = [
    Wrong("training_bytes", lambda n, k, a: 16 * n + 112 * k + a, "these are bits"),
    Wrong("training_bytes", lambda n, k, a: 4 * n + 14 * k + a, "for each parameter"),
    Wrong("training_bytes", lambda n, k, a: 4 * n + 12 * k + a, "that it has not"),
    Wrong("training_bytes", lambda n, k, a: 2.0 * n + 14 * k + a, "but a float"),
    Wrong(
        "training_bytes",
        lambda n, k, a: int(2 * n + 14 * k + a * k / n),
        "do not shrink",
    ),
    Wrong("freeze_all_but_biases", bitfit(lambda n: n.endswith("bias")), "unbias"),
    Wrong("freeze_all_but_biases", bitfit(lambda n: n.endswith(".bias")), "no dot"),
    Wrong("freeze_all_but_biases", bitfit(count=len), "first size"),
    Wrong("freeze_all_but_biases", counts_what_trained, "frozen before are not"),
    Wrong("freeze_all_but_biases", counts_shared_twice, "counted twice"),
    Wrong("fold", folded(lambda w, b, c, beta: w @ beta), "b and c are left out"),
    Wrong("fold", folded(lambda w, b, c, beta: b + 2 * c + w @ beta), "c is added"),
    Wrong("fold", only_with_b, "a change c without"),
    Wrong("fold", lambda W, b, c, beta: [beta.clone() for _ in W], "β itself"),
]


def in_bits(total, trained, activations):
    return (16 * total + trained * (16 + 32 + 2 * 32)) // 8 + activations


def by_loop(W, b, c, beta):
    new = []
    for i, w in enumerate(W):
        bias = torch.einsum("od,d->o", w, beta)
        for own in (b[i], c[i]):
            if own is not None:
                bias = bias + own
        new.append(bias)
    return new


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("training_bytes", in_bits),
        ("freeze_all_but_biases", bitfit()),
        ("fold", by_loop),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/01-background-and-bitfit",
    [
        Wrong("training_bytes", sixteen_for_all, "frozen ones have no gradient"),
        Wrong("training_bytes", weights_twice, "counted twice"),
        Wrong("training_bytes", only_the_trained, "the frozen weights are missing"),
        Wrong("training_bytes", no_activations, "the activations are missing"),
        Wrong("training_bytes", no_master_copy, "4 bytes of each trained parameter"),
        Wrong("training_bytes", swapped, "swapped"),
        Wrong("training_bytes", plain_sgd, "both are missing"),
        Wrong("training_bytes", freeze_fully_trained, "wrong at an end"),
        Wrong(
            "freeze_all_but_biases", named_bias_anywhere, "'bias_gate.weight' trains"
        ),
        Wrong("freeze_all_but_biases", only_unfreezes, "nothing is frozen"),
        Wrong("freeze_all_but_biases", only_freezes, "frozen before"),
        Wrong("freeze_all_but_biases", linears_only, "norms count too"),
        Wrong("freeze_all_but_biases", counts_tensors, "number of tensors"),
        Wrong("freeze_all_but_biases", counts_everything, "you counted all parameters"),
        Wrong("freeze_all_but_biases", accepts_a_model_without, "Raise a ValueError"),
        Wrong("freeze_all_but_biases", zeroes_the_biases, "changed its value"),
        Wrong("fold", folded(lambda w, b, c, beta: b + c), "β is left out"),
        Wrong(
            "fold", folded(lambda w, b, c, beta: b + w @ beta), "own change is left out"
        ),
        Wrong(
            "fold", folded(lambda w, b, c, beta: c + w @ beta), "own bias b is left out"
        ),
        Wrong("fold", folded(lambda w, b, c, beta: b + c - w @ beta), "subtracted"),
        Wrong(
            "fold",
            folded(lambda w, b, c, beta: b + c + beta[: len(w)]),
            "passes through W first",
        ),
        Wrong("fold", crashes_on_none, "None"),
        Wrong("fold", keeps_none, "gets no bias"),
        *MORE,
    ],
)
