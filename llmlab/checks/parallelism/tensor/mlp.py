"""What is wrong with a split MLP: the values and gradients of each usual mistake."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.parallelism.ranks import either
from llmlab.course.grading.checking import Mistake, diagnose


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The whole MLP without its bias."""
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


ACTIVATIONS = (F.gelu, F.relu, F.sigmoid, F.tanh)


def others(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation) -> Tensor:
    """The MLP with another activation."""
    return (activation(x @ gate.T) * (x @ up.T)) @ down.T


def check_output(outputs: list[Tensor], x, gate, up, down, bias, p: int) -> None:
    """The forward pass, on every rank."""
    right = mlp(x, gate, up, down) + bias
    parts = list(zip(gate.chunk(p), up.chunk(p), down.chunk(p, 1), strict=True))
    narrow = zip(x.chunk(p, 1), gate.chunk(p, 1), up.chunk(p, 1), strict=True)
    for r, got in enumerate(outputs):
        mine = mlp(x, *parts[r])
        diagnose(
            got,
            right=right,
            mistakes={
                (
                    f"the bias was added {p} times, once on each rank: add it after"
                    " the sum"
                ): right + (p - 1) * bias,
                "the bias is missing": right - bias,
                "these are one rank's partial sums: g is missing": either(
                    got, mine + bias, mine
                ),
                (
                    "silu was applied before the sum over ranks: cut gate and up by"
                    " channels (dimension 0), so that each channel is whole on one"
                    " rank"
                ): (sum(mlp(a, b, c, down) for a, b, c in narrow) + bias),
                (
                    f"the result is {p} times too large: the ranks' results are added,"
                    " so each must bring its part only"
                ): either(got, p * right, p * (right - bias) + bias),
                (
                    "the pieces of down belong to other channels than those of gate"
                    " and up"
                ): (
                    sum(
                        mlp(x, a, b, c)
                        for (a, b, _), (_, _, c) in zip(parts, parts[::-1], strict=True)
                    )
                    + bias
                ),
                "f and g are exchanged: f stands before the first product, g behind": (
                    either(got, mlp(p * x, *parts[r]) + bias, mlp(p * x, *parts[r]))
                ),
                "silu is to be taken of the gate alone, not of the product with up": (
                    F.silu((x @ gate.T) * (x @ up.T)) @ down.T + bias
                ),
                "this is another activation than silu": either(
                    got, *[others(x, gate, up, down, a) + bias for a in ACTIVATIONS]
                ),
                "silu was applied to up as well; it belongs to gate": (
                    (F.silu(x @ gate.T) * F.silu(x @ up.T)) @ down.T + bias
                ),
                "the ranks' parts were averaged; they are summed": (
                    (right - bias) / p + bias
                ),
                "the gate's silu is missing": (
                    ((x @ gate.T) * (x @ up.T)) @ down.T + bias
                ),
                "silu was applied to up; it belongs to gate": (
                    mlp(x, up, gate, down) + bias
                ),
            },
            tol=1e-4,
            what=f"split_mlp(...) on rank {r}",
        )


def check_gradients(
    grads: list[dict[str, Tensor]], inputs: tuple, upstream: Tensor, p: int
) -> None:
    """Each rank's gradients: of its share of the weights, and of what all have."""
    x, gate, up, down, bias = (t.clone().requires_grad_() for t in inputs)
    (mlp(x, gate, up, down) + bias).backward(upstream)
    whole = {"gate": gate.grad, "up": up.grad, "down": down.grad}
    for name, grad in whole.items():
        if any(g[name].count_nonzero() > grad.numel() // p for g in grads):
            raise Mistake(
                f"a rank uses more than its share of {name}: it shall use 1/{p} of it"
            )
        if not any(g[name].any() for g in grads):
            raise Mistake(
                f"no gradient reaches {name}: comm.all_reduce and comm.all_gather do"
                " not record one (g, which is `sum_over_ranks`, does); `.detach()` and"
                " `.data` cut it"
            )
        diagnose(
            sum(g[name] for g in grads),
            right=grad,
            mistakes={
                (
                    f"its gradient is {p} times too large: the gradient of g is the"
                    " identity"
                ): (grad * p)
            },
            tol=1e-4,
            what=f"the gradient of {name}, summed over ranks",
        )
    for r, g in enumerate(grads):
        part = [
            t.chunk(p, dim)[r].detach() for t, dim in ((gate, 0), (up, 0), (down, 1))
        ]
        alone = inputs[0].clone().requires_grad_()
        mlp(alone, *part).backward(upstream)
        diagnose(
            g["x"],
            right=x.grad,
            mistakes={
                (
                    "it is one rank's part: f is missing before x, so nothing sums it"
                    " over ranks"
                ): (alone.grad),
                f"it is {p} times too large: f stands before x twice": p * x.grad,
                "no gradient reaches x: it is cut on its way": 0 * x.grad,
            },
            tol=1e-4,
            what=f"the gradient of x on rank {r}",
        )
        diagnose(
            g["bias"],
            right=bias.grad,
            mistakes={
                (
                    f"the bias is divided by {p} before the sum: then its gradient is,"
                    " too; add it whole, once, after g"
                ): bias.grad / p,
                "f stands before the bias: every rank has its whole gradient already": (
                    p * bias.grad
                ),
                "no gradient reaches the bias: it is cut on its way": 0 * bias.grad,
            },
            tol=1e-4,
            what=f"the gradient of the bias on rank {r}",
        )
