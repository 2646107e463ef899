"""What marks the exercises of 04-peft/01-background-and-bitfit."""

from __future__ import annotations

import torch
from torch import nn

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.models.llama import Llama, LlamaConfig

check = Checks("04-peft/01-background-and-bitfit")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=5,
    hints=(
        (
            "Every parameter is held at all times. Only the trained ones have a"
            " gradient and what the optimizer remembers."
        ),
        (
            "A frozen parameter costs its 2 bytes and nothing more. A trained one: 2 +"
            " 2 + 4 + 4 + 4."
        ),
        "Return 2 · (total − trained) + 16 · trained + activations.",
    ),
)
def training_bytes(answer):
    """The memory of a training step in which some of the parameters are frozen."""
    total, trained, activations = (int(n) for n in torch.randint(1_000, 2_000, (3,)))
    total = 7 * total + trained
    what = "training_bytes(total, trained, activations)"
    got = expect(answer(total, trained, activations), kind=(int, float), what=what)
    frozen = total - trained
    right = 2 * frozen + 16 * trained + activations
    mistakes = {
        "every parameter gets 16 bytes here: frozen ones have no gradient and"
        " no optimizer state": (16 * total + activations),
        "2 bytes too many for each trained parameter: are its weights counted"
        " twice, or its gradient in fp32?": (2 * total + 16 * trained + activations),
        "the frozen weights are missing: they are not trained, but they are held": (
            16 * trained + activations
        ),
        "the activations are missing": right - activations,
        "2 bytes of each trained parameter are missing: its gradient has 2, its weight"
        " too, its master copy 4, and each of Adam's averages 4": right - 2 * trained,
        "4 bytes of each trained parameter are missing: the fp32 master copy,"
        " or one of Adam's two averages": (right - 4 * trained),
        "Adam keeps two averages of 4 bytes each: both are missing": (
            right - 8 * trained
        ),
        "frozen and trained are swapped": 16 * frozen + 2 * trained + activations,
        "2 bytes too many for each frozen parameter: its weights in fp32, or a gradient"
        " that it has not?": right + 2 * frozen,
        "2 bytes too many for each parameter: weights are held in 16 bits, 2 bytes": (
            right + 2 * total
        ),
        "all parameters have a master copy in fp32: only those that train have one": (
            right + 4 * frozen
        ),
        "these are bits: 8 make a byte": 8 * (right - activations) + activations,
        "these are bits, and the activations are given in bytes": 8 * right,
        "the activations are given as they are: they do not shrink with the share that"
        " trains": int(right - activations + activations * trained / total),
        "the frozen parameters have Adam's averages too: only what trains has them": (
            right + 8 * frozen
        ),
        "activations are multiplied by 2: they are given in bytes": right + activations,
    }
    diagnose(
        float(got),
        right=float(right),
        mistakes={k: float(v) for k, v in mistakes.items()},
        what=what,
    )
    if isinstance(got, float):
        raise Mistake("the value is right, but a float: a number of bytes is an int")
    if answer(1000, 0, 5) != 2005 or answer(1000, 1000, 0) != 16_000:
        raise Mistake(
            "wrong at an end: nothing trained must cost 2 bytes per parameter,"
            " everything trained 16"
        )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=4,
    in_place=True,
    hints=(
        (
            "Two steps: freeze every parameter, then let those train whose name says"
            " that they are biases."
        ),
        (
            "`named_parameters()` gives dotted names; a bias is the one whose last part"
            " is exactly 'bias'."
        ),
        (
            "Collect `[p for n, p in model.named_parameters() if n.split('.')[-1] =="
            " 'bias']`; raise ValueError if it is empty."
        ),
    ),
)
def freeze_all_but_biases(answer):
    """BitFit on a model that has biases; one that has none must be refused, not trained
    silently.
    """
    model = _biased()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = expect(answer(model), kind=int, what="freeze_all_but_biases(model)")
    if any(not torch.equal(p, before[n]) for n, p in model.named_parameters()):
        raise Mistake(
            "a parameter has changed its value: only requires_grad may change"
        )
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    wanted = {n for n in before if n.split(".")[-1] == "bias"}
    if trains == before.keys():
        raise Mistake(
            "nothing is frozen: set requires_grad on every parameter that is no bias to"
            " False"
        )
    if extra := sorted(trains - wanted):
        raise Mistake(
            f"{extra[0]!r} trains, and it is no bias: look at the last part of the"
            " name, and at all of it"
        )
    if missing := sorted(wanted - trains, key=lambda name: (name == "bias", name)):
        hint = "let those train that were frozen before, too"
        if "norm" in missing[0]:
            hint = "norms count too"
        if missing[0] == "bias":
            hint = "the name of the model's own bias has no dot before it"
        raise Mistake(f"{missing[0]!r} is frozen: {hint}")
    if count == sum(before[n].numel() for n in wanted - {"out.bias"}):
        raise Mistake(
            "the biases that were frozen before are not counted: they train now, too"
        )
    if count == sum(before[n].numel() for n in wanted) + 5:
        raise Mistake(
            "a bias that two linears share is counted twice: `named_parameters` gives"
            " it once"
        )
    if count == sum(len(before[n]) for n in wanted):
        raise Mistake(
            "`len` of a tensor is its first size: `numel()` counts the numbers in it"
        )
    if count == sum(p.numel() for p in model.parameters()):
        raise Mistake("you counted all parameters: count those that train")
    if count == len(wanted):
        raise Mistake(
            f"you returned the number of tensors, {count}: count the numbers in them"
        )
    if count != (right := sum(before[n].numel() for n in wanted)):
        raise Mistake(
            f"the set of trained parameters is right; they hold {right} numbers, and"
            f" you returned {count}"
        )
    none = Llama(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    try:
        answer(none)
    except ValueError:
        return
    raise Mistake(
        "a Llama without biases goes through: nothing would train, and nobody would"
        " know. Raise a ValueError"
    )


def _biased() -> nn.Module:
    """Linears with and without a bias, a norm, and names that look like biases.

    One bias starts frozen, one is shared, one has two dimensions and no dot.
    """
    torch.manual_seed(int(torch.randint(99, ())))
    model = nn.ModuleDict(
        {
            "proj": nn.Linear(4, 5),
            "bias_gate": nn.Linear(5, 3, bias=False),
            "norm": nn.LayerNorm(3),
            "out": nn.Linear(3, 2),
        }
    )
    model["out"].bias.requires_grad_(False)
    model["shared"] = nn.Linear(4, 5)
    model["shared"].bias = model["proj"].bias
    model["scores"] = nn.Linear(3, 2, bias=False)
    model["scores"].register_parameter("unbias", nn.Parameter(torch.randn(2)))
    model.register_parameter("bias", nn.Parameter(torch.randn(2, 3)))
    return model


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=3,
    hints=(
        (
            "Follow the bias through one linear: y = W (x + β) + b. What is the bias of"
            " the whole?"
        ),
        (
            "A norm's β reaches three linears, q, k and v, each by its own W. And a"
            " linear adds its own change on top."
        ),
        (
            "For each W with own bias b and change c, the new bias is b + c + W @ beta;"
            " b and c may be None."
        ),
    ),
)
def fold(answer):
    """The changes of BitFit, also those behind a norm, folded into the biases of the
    linears that read it.
    """
    beta = torch.randn(6)
    W = [torch.randn(n, 6) for n in (6, 4, 4)]
    b = [torch.randn(6), None, torch.randn(4)]
    c = [torch.randn(6), torch.randn(4), None]
    got = expect(answer(W, b, c, beta), kind=(list, tuple), what="fold(W, b, c, beta)")
    if len(got) != 3:
        raise Mistake(f"fold returned {len(got)} biases for 3 linears")
    for i, one in enumerate(got):
        if one is None:
            raise Mistake(
                f"linear {i} gets no bias: one without a bias gets a new one, for β"
            )
        if len(W[i]) != 6 and getattr(one, "shape", None) == (6,):
            raise Mistake("β itself is no bias of a linear: it passes through W first")
        expect(
            one,
            shape=(len(W[i]),),
            dtype=torch.float32,
            what=f"bias {i} of fold(W, b, c, beta)",
        )
    zero = lambda t, i: torch.zeros(len(W[i])) if t is None else t  # noqa: E731

    def joined(make):
        return torch.cat([make(W[i], zero(b[i], i), zero(c[i], i)) for i in range(3)])

    mistakes = {
        "β is left out: it passes through each W on its way": joined(
            lambda W, b, c: b + c
        ),
        "the linear's own change is left out": joined(lambda W, b, c: b + W @ beta),
        "the linear's own bias b is left out: it was there before, and stays": joined(
            lambda W, b, c: c + W @ beta
        ),
        **_one_missing(W, b, c, beta),
        "β is subtracted: it is added": joined(lambda W, b, c: b + c - W @ beta),
        "W is transposed: y = W x, with W (out, d)": joined(
            lambda W, b, c: b + c + (W.T if len(W) == 6 else W) @ beta
        ),
        "W is applied to the change c too: c sits behind the linear, only β"
        " before it": joined(
            lambda W, b, c: b + (W[:, : len(c)] @ c if len(c) == 6 else c) + W @ beta
        ),
        "b and c are left out: they stay": joined(lambda W, b, c: W @ beta),
        "a change c without a bias b is lost: each of the two may be missing": joined(
            lambda W, b, c: W @ beta + (b + c if b.any() else 0)
        ),
        "a bias b without a change c is lost: each of the two may be missing": joined(
            lambda W, b, c: W @ beta + (b + c if c.any() else 0)
        ),
        "c is added twice": joined(lambda W, b, c: b + 2 * c + W @ beta),
        "b is added twice": joined(lambda W, b, c: 2 * b + c + W @ beta),
        "β is added as it is, cut to size: it passes through W first": joined(
            lambda W, b, c: b + c + beta[: len(W)]
        ),
    }
    diagnose(
        torch.cat(list(got)),
        right=joined(lambda W, b, c: b + c + W @ beta),
        mistakes=mistakes,
        terms=[
            {
                "W β": joined(lambda W, b, c: W @ beta),
                "b": joined(lambda W, b, c: b),
                "c": joined(lambda W, b, c: c),
            }
        ],
        what="fold(…)",
    )
    x = torch.randn(3, 6)  # the oracle: the same outputs
    for i in range(3):
        if not close(
            x @ W[i].T + got[i], (x + beta) @ W[i].T + zero(b[i], i) + zero(c[i], i)
        ):
            raise Mistake(
                f"linear {i} does not give the output that it gave before folding"
            )
    if not close(torch.cat(list(answer([W[1]], [None], [None], beta))), W[1] @ beta):
        raise Mistake("a linear with neither b nor c still gets a bias: W β")


def _one_missing(W: list, b: list, c: list, beta: torch.Tensor) -> dict:
    """What comes out where the missing b[1] or c[2] is misread."""
    through = [w @ beta for w in W]
    return {
        "a linear without a bias gets one, for β: yours stays without it": torch.cat(
            [through[0] + b[0] + c[0], c[1], through[2] + b[2]]
        ),
        "c is taken only where b is missing: both count": torch.cat(
            [through[0] + b[0], through[1] + c[1], through[2] + b[2]]
        ),
        "with one of b and c missing, the other is left out as well": torch.cat(
            [through[0] + b[0] + c[0], through[1], through[2]]
        ),
    }
