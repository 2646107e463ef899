"""Wrong answers to the exercises of 04-peft/01-background-and-bitfit, each with the
diagnosis that it must get.
"""

import torch

from tests.checks.rejecting import Wrong, rejects


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
        if not name.endswith(".bias"):
            p.requires_grad_(False)
    return sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias"))


def linears_only(model):
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def counts_tensors(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias"))
    return sum(name.endswith(".bias") for name, _ in model.named_parameters())


def counts_everything(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias"))
    return sum(p.numel() for p in model.parameters())


def accepts_a_model_without(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias"))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def zeroes_the_biases(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias"))
        if name.endswith(".bias"):
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
        Wrong("freeze_all_but_biases", counts_everything, "they hold"),
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
        Wrong("fold", keeps_none, "bias 1"),
    ],
)
