"""The small pipeline that marks `run_schedule`, and what can be wrong with its
result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.course.grading.checking import Mistake, close, diagnose, expect


class _Logged(nn.Module):
    """A stage that writes down its forwards and backwards, each with the number of its
    microbatch: number i has 2 + i rows.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.log = layers, []

    def forward(self, x: Tensor) -> Tensor:
        i = len(x) - 2
        self.log.append(f"F{i}")
        y = self.layers(x)
        if y.requires_grad:
            y.register_hook(lambda _: self.log.append(f"B{i}"))
        return y


@dataclass(frozen=True)
class Problem:
    """p stages, m microbatches of different sizes, and the gradients of one process."""

    layers: list[nn.Module]
    xs: list[Tensor]
    ys: list[Tensor]
    losses: list[float]
    # of each microbatch's own loss: [microbatch][rank][parameter]
    grads: list[list[list[Tensor]]]
    # of the last stage's parameters, were it given xs
    unfed: list[Tensor]

    loss: Callable = F.cross_entropy

    def stage(self, rank: int) -> tuple[nn.Module, list[str]]:
        """A copy of a rank's stage, and the log that it writes."""
        stage = _Logged(copy.deepcopy(self.layers[rank]))
        return stage, stage.log

    def mean(self, rank: int, of: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
        """For each parameter of a rank, `of` its gradients for the microbatches."""
        return [
            of([g[rank][k] for g in self.grads])
            for k in range(len(self.grads[0][rank]))
        ]


def problem(p: int, m: int) -> Problem:
    """Three tanh layers and a head, cut into stages."""
    d, classes = 5, 4
    layers = [nn.Sequential(nn.Linear(d, d), nn.Tanh()) for _ in range(p - 1)] + [
        nn.Linear(d, classes)
    ]
    xs = [torch.randn(2 + i, d) for i in range(m)]
    ys = [torch.randint(classes, (2 + i,)) for i in range(m)]
    losses, grads = [], []
    for x, y in zip(xs, ys, strict=True):
        whole = nn.Sequential(*copy.deepcopy(layers))
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        losses.append(loss.item())
        grads.append([[w.grad for w in stage.parameters()] for stage in whole])
    head = copy.deepcopy(layers[-1])
    for x, y in zip(xs, ys, strict=True):
        (F.cross_entropy(head(x), y) / m).backward()
    unfed = [w.grad for w in head.parameters()]
    return Problem(layers, xs, ys, losses, grads, unfed)


def check_gradients(
    found: list[list[Tensor | None]], given: Problem, name: str
) -> None:
    """Every parameter's gradient on every rank, the last rank first: mistakes begin
    there.
    """
    m, last = len(given.xs), len(found) - 1
    tokens = torch.tensor([len(x) for x in given.xs], dtype=torch.float32)
    for r in range(last, -1, -1):
        if any(g is None for g in found[r]):
            where = "its own loss" if r == last else f"rank {r + 1}"
            raise Mistake(
                f"{name}: rank {r}'s parameters have no gradient: B goes backward from"
                f" what comes from {where}"
            )
        right = given.mean(r, lambda gs: torch.stack(gs).mean(0))
        mistakes = {
            (
                f"gradients are divided by the {last + 1} ranks: the loss is the mean"
                f" over the {m} microbatches"
            ): lambda gs: sum(gs) / (last + 1),
            (
                f"gradients are {m} times too large: the loss is the mean over the {m}"
                " microbatches"
            ): lambda gs: sum(gs),
            (
                "only the last microbatch's gradient is left: `.grad` adds up by"
                " itself, do not clear it in between"
            ): lambda gs: gs[-1] / m,
            (
                "this is the last microbatch's gradient: does every B go through its"
                " graph? keep each one's x and y until its B"
            ): lambda gs: gs[-1],
            (
                "microbatches are weighted by their size; asked is the mean of their"
                " losses, one as much as the other"
            ): lambda gs: (
                torch.stack(gs) * (tokens / tokens.sum()).view(-1, *[1] * gs[0].dim())
            ).sum(0),
            "the loss was divided by the number of microbatches twice": lambda gs: (
                sum(gs) / m**2
            ),
        }
        if r == last and r > 0 and close(found[r], given.unfed):
            raise Mistake(
                f"{name}: rank {r} runs on xs itself: they are rank 0's; another rank's"
                " input is the message that comes"
            )
        for text, of in mistakes.items():
            if close(found[r], given.mean(r, of)) and not close(found[r], right):
                raise Mistake(f"{name}, rank {r}: {text}")
        for k, (got, want) in enumerate(zip(found[r], right, strict=True)):
            diagnose(
                got,
                right=want,
                what=f"{name}: the gradient of parameter {k} of rank {r}",
            )


def check_loss(found: list, given: Problem, name: str) -> None:
    """The mean loss on the last rank, None elsewhere."""
    for r, got in enumerate(found[:-1]):
        if got is not None:
            raise Mistake(
                f"{name}: rank {r} returns {got!r}; only the last rank knows the loss,"
                " the others return None"
            )
    got = expect(found[-1], kind=float, what=f"{name}: the last rank's result")
    diagnose(
        got,
        right=sum(given.losses) / len(given.losses),
        mistakes={
            "the last rank returns the sum of the losses; asked is their mean": sum(
                given.losses
            ),
            (
                "the last rank returns the last microbatch's loss; asked is the mean"
                " of all"
            ): given.losses[-1],
            (
                "the last rank returns the last microbatch's share; asked is the mean"
                " of all"
            ): (given.losses[-1] / len(given.losses)),
        },
        what=f"{name}: the loss",
    )


def check_order(logs: list[list[str]], lists: list, name: str) -> None:
    """The stages must have been used in the order of the lists."""
    for r, (log, ops) in enumerate(zip(logs, lists, strict=True)):
        asked = [f"{kind}{i}" for kind, i in ops]
        if log == asked:
            continue
        raise Mistake(
            f"{name}: rank {r} was asked to do {' '.join(asked)} and did"
            f" {' '.join(log)}: go down the list, whatever its order; each op names its"
            " microbatch"
        )
