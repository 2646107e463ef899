"""What marks the exercises of 04-peft/04-adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("04-peft/04-adapters")

OTHER_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "leaky relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "the absolute value": torch.abs,
}


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=5,
    hints=(
        (
            "Go down to m numbers per token, through the activation, up to d again, and"
            " add the input back."
        ),
        (
            "A linear layer stores its weight as (out, in): down is (m, d), so h @"
            " down.T has m numbers. Each way has a bias."
        ),
        (
            "h + relu(h @ down.T + b_down) @ up.T + b_up: the last bias and the"
            " residual come after the activation."
        ),
    ),
    grads={"h": 0, "down": 1, "b_down": 2, "up": 3, "b_up": 4},
)
def adapter(answer):
    """The output of a bottleneck adapter, its residual connection included."""
    h, down, up = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(8, 3)
    b_down, b_up, what = torch.randn(3), torch.randn(8), "adapter(…)"
    got = expect(
        answer(h, down, b_down, up, b_up),
        shape=(2, 5, 8),
        dtype=torch.float32,
        what=what,
    )
    mid = h @ down.T + b_down
    right = h + torch.relu(mid) @ up.T + b_up
    mistakes = {
        "the residual is missing: the adapter's output is added to h": right - h,
        "the activation is missing: without it, this is a low-rank linear map": (
            h + mid @ up.T + b_up
        ),
        "the activation is in the wrong place: it comes after the way down,"
        " not after the way up": (h + torch.relu(mid @ up.T + b_up)),
        "the activation is applied twice: once after the way down is enough": (
            h + torch.relu(torch.relu(mid) @ up.T + b_up)
        ),
        "the residual goes through the activation too": torch.relu(right),
        "b_down is missing": h + torch.relu(h @ down.T) @ up.T + b_up,
        "b_up is missing": right - b_up,
        "both biases are missing": h + torch.relu(h @ down.T) @ up.T,
        "b_down is added after the activation: it belongs before": (
            h + (torch.relu(h @ down.T) + b_down) @ up.T + b_up
        ),
        "the adapter's output is subtracted: it is added": h - (right - h),
        "nothing is added: this is h as it was": h,
        "h is added twice": h + right,
        "the residual goes through the activation: it is h itself": (
            right - h + torch.relu(h)
        ),
        **{
            f"the activation is another one, {name}: relu is asked": (
                h + act(mid) @ up.T + b_up
            )
            for name, act in OTHER_ACTIVATIONS.items()
        },
    }
    ways = torch.relu(mid) @ up.T
    terms = [{"h": h, "the way down and up": ways, "b_up": b_up}]
    diagnose(got, right=right, mistakes=mistakes, terms=terms, what=what)
    zero = answer(
        h[0], down, b_down, torch.zeros_like(up), torch.zeros_like(b_up)
    )  # the oracle: near-identity at start
    if not close(zero, h[0]):
        raise Mistake(
            "with up and b_up at zero the output must be h itself: that is how an"
            " adapter starts"
        )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "For each token there is one query, from x, and N keys, from what the N"
            " adapters would add. Softmax over these N."
        ),
        (
            "scores = ((x @ Q.T)[..., None, :] * (z @ K.T)).sum(-1) has shape (..., N)."
            " There is no 1/√d in the paper."
        ),
        (
            "Then (softmax(scores)[..., None] * (z @ V.T)).sum(-2): a mean of the"
            " adapters' outputs, weighted token by token."
        ),
    ),
    grads={"x": 0, "z": 1, "Q": 2, "K": 3, "V": 4},
)
def fuse(answer):
    """AdapterFusion at one place: attention over the outputs of several adapters."""
    d, N, what = 6, 3, "fuse(…)"
    x, z = torch.randn(2, 4, d), torch.randn(2, 4, N, d)
    Q, K, V = (
        0.5 * torch.randn(d, d),
        0.5 * torch.randn(d, d),
        torch.eye(d) + 0.5 * torch.randn(d, d),
    )
    got = expect(answer(x, z, Q, K, V), shape=(2, 4, d), dtype=torch.float32, what=what)
    right, mistakes = _fused(x, z, Q, K, V)
    diagnose(got, right=right, mistakes=mistakes, what=what)
    # the oracle: with equal adapters the scores cannot matter
    same = z[..., :1, :].expand(-1, -1, N, -1)
    if not close(answer(x[0], same[0], Q, K, torch.eye(d)), z[0, :, 0]):
        raise Mistake(
            "when all adapters say the same and V is the identity, that is the output"
        )


def _fused(x, z, Q, K, V) -> tuple[Tensor, dict[str, Tensor]]:
    """What AdapterFusion adds, and what mistakes make of it."""
    N, d = z.shape[-2:]
    scores = ((x @ Q.T)[..., None, :] * (z @ K.T)).sum(-1)

    def mix(s, values):
        return (s[..., None] * values).sum(-2)

    values, soft = z @ V.T, torch.softmax(scores, -1)
    transposed = torch.softmax(((x @ Q)[..., None, :] * (z @ K)).sum(-1), -1)
    exchanged = torch.softmax(((x @ K.T)[..., None, :] * (z @ Q.T)).sum(-1), -1)
    mistakes = {
        "the scores are divided by √d: AdapterFusion does not scale them": mix(
            torch.softmax(scores / d**0.5, -1), values
        ),
        "the value matrix is not used: the output is a mean of z @ V.T, not of z": mix(
            soft, z
        ),
        "the key matrix is not used": mix(
            torch.softmax(((x @ Q.T)[..., None, :] * z).sum(-1), -1), values
        ),
        "the query matrix is not used": mix(
            torch.softmax((x[..., None, :] * (z @ K.T)).sum(-1), -1), values
        ),
        "the softmax is missing: the weights of the adapters must add up to 1": mix(
            scores, values
        ),
        "the softmax runs over the tokens: it runs over the adapters": mix(
            torch.softmax(scores, -2), values
        ),
        "the softmax runs over the batch: it runs over the adapters": mix(
            torch.softmax(scores, 0), values
        ),
        "all adapters weigh the same: the scores are not used": values.mean(-2),
        "the adapters' outputs are summed, not averaged with weights": values.sum(-2),
        "only the adapter with the highest score is read: softmax is not argmax": mix(
            F.one_hot(scores.argmax(-1), N).float(), values
        ),
        "a matrix is transposed: weights are stored as (out, in), so multiply"
        " with Q.T, K.T and V.T": mix(transposed, z @ V),
        "Q and K are transposed: weights are stored as (out, in), so multiply with Q.T"
        " and K.T": mix(transposed, values),
        "Q and K are exchanged: x asks with Q, and the adapters' outputs"
        " answer with K": mix(exchanged, values),
        "the values are z @ K.T: K makes the keys, V the values": mix(soft, z @ K.T),
        "each weight is a sigmoid of its score: a softmax lets the adapters compete": (
            mix(torch.sigmoid(scores), values)
        ),
        "V is transposed: weights are stored as (out, in), so multiply with V.T": mix(
            soft, z @ V
        ),
        "Q is transposed: weights are stored as (out, in), so multiply with Q.T": mix(
            torch.softmax(((x @ Q)[..., None, :] * (z @ K.T)).sum(-1), -1), values
        ),
        "K is transposed: weights are stored as (out, in), so multiply with K.T": mix(
            torch.softmax(((x @ Q.T)[..., None, :] * (z @ K)).sum(-1), -1), values
        ),
        "the values come from x: they are V z_i": x @ V.T,
        "each channel has a softmax of its own: sum over the channels first, a score is"
        " one number": (
            torch.softmax((x @ Q.T)[..., None, :] * (z @ K.T), -2) * values
        ).sum(-2),
        "the scores are a mean over the channels: the dot product sums": mix(
            torch.softmax(scores / d, -1), values
        ),
        "the weighted outputs are averaged over the adapters: they are summed": (
            mix(soft, values) / N
        ),
        "the scores have the wrong sign: the largest has the largest weight": mix(
            torch.softmax(-scores, -1), values
        ),
        "the scores are divided by √N: AdapterFusion does not scale them": mix(
            torch.softmax(scores / N**0.5, -1), values
        ),
        "the scores are cosines: AdapterFusion does not scale them": mix(
            torch.softmax(
                F.cosine_similarity((x @ Q.T)[..., None, :], z @ K.T, -1), -1
            ),
            values,
        ),
        "x is added: fuse gives only what is added to the stream": (
            x + mix(soft, values)
        ),
    }
    return mix(soft, values), mistakes


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Without sharing, each of the tasks runs all layers. With n dropped, which"
            " layers give every task the same result?"
        ),
        (
            "The lowest n run once, the others once for each task. An adapter costs"
            " `adapter` in each layer that has one."
        ),
        (
            "shared = n + tasks · (layers − n) · (1 + adapter); alone = tasks · layers"
            " · (1 + adapter); return alone / shared."
        ),
    ),
)
def speedup(answer):
    """How many times faster several tasks run together when the lowest layers have no
    adapters.
    """
    cases = [(12, 8, 5, 0.05), (4, 3, 2, 0.1), (24, 2, 0, 0.02), (6, 5, 6, 0.03)]
    for layers, tasks, n, adapter in cases:
        what = f"speedup({layers}, {tasks}, {n}, {adapter})"
        got = expect(answer(layers, tasks, n, adapter), kind=(int, float), what=what)
        each = 1 + adapter
        alone, shared = tasks * layers * each, n + tasks * (layers - n) * each
        mistakes = {
            "that is the share of the work that is left: the speedup is its inverse": (
                shared / alone
            ),
            "the dropped layers run for every task: they give the same for"
            " all, so they run once": (
                alone / (tasks * n + tasks * (layers - n) * each)
            ),
            "the dropped layers still run, once, without their adapters": (
                alone / max(1e-9, tasks * (layers - n) * each)
            ),
            "the adapters' own cost is left out, or dropped layers pay it too:"
            " a layer costs 1 without, 1 + adapter with one": (
                alone / (n * each + tasks * (layers - n) * each)
            ),
            "each layer costs adapter alone: it costs 1 + adapter": (
                tasks * layers * adapter / (n + tasks * (layers - n) * adapter)
            ),
            "n is the number of layers dropped, not of those that keep an adapter": (
                alone / ((layers - n) + tasks * n * each) if n else -1
            ),
            "the upper layers run once for every task": (
                alone / (n + (layers - n) * each)
            ),
            "alone each task runs all layers with adapters, at 1 + adapter each": (
                tasks * layers / shared
            ),
            "layers above the dropped ones still have adapters: 1 + adapter each": (
                alone / (n + tasks * (layers - n))
            ),
            "that is one task alone: run alone, all tasks cost tasks times as much": (
                layers * each / shared
            ),
            "that is the share of work that is saved: how many times less is asked": (
                1 - shared / alone
            ),
            "that is the difference of the two costs: their quotient is asked": (
                alone - shared
            ),
            "one layer too few is dropped: the lowest n share": (
                alone / max(1e-9, n - 1 + tasks * (layers - n + 1) * each)
            ),
            "one layer is lost: n are shared, layers − n are not": (
                alone / max(1e-9, n + tasks * (layers - n - 1) * each)
            ),
            "the quotient is cut off behind the point": alone // shared,
            "how many times less is the quotient: nothing is subtracted from it": (
                alone / shared - 1
            ),
            "an adapter costs `adapter` in each layer that has one": (
                tasks * (layers + adapter) / (n + tasks * (layers - n + adapter))
            ),
        }
        mistakes |= {
            "run alone, the lowest n layers have adapters too": (
                (tasks * n + tasks * (layers - n) * each) / shared
            ),
        }
        diagnose(
            torch.tensor(float(got)),
            right=torch.tensor(alone / shared),
            mistakes={
                name: torch.tensor(float(value)) for name, value in mistakes.items()
            },
            tol=1e-4,
            what=what,
        )
