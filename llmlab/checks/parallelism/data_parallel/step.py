"""What is wrong with a step of data-parallel training: the gradients that each usual
mistake leads to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.checks.parallelism.ranks import on_ranks
from llmlab.course.grading.checking import Mistake, close, diagnose, expect

Data = list[list[tuple[Tensor, Tensor]]]  # data[rank][microbatch] = (x, y)


def problem(lengths: Sequence[Sequence[int]]) -> tuple[nn.Module, Data]:
    """A small classifier, and microbatches of these lengths for each rank; longer ones
    have larger losses.
    """
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = [
        [(torch.randn(n, 4) * (1 + n / 10), torch.randint(3, (n,))) for n in row]
        for row in lengths
    ]
    return model, data


def gradients(
    model: nn.Module, weighted: Sequence[tuple[float, Tensor, Tensor]]
) -> list[Tensor]:
    """Of Σ weight · (sum of the losses of x, y)."""
    model = copy.deepcopy(model)
    total = sum(
        weight * F.cross_entropy(model(x), y, reduction="sum")
        for weight, x, y in weighted
    )
    return list(torch.autograd.grad(total, list(model.parameters())))


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """All of them as one vector."""
    return torch.cat([t.flatten() for t in tensors])


def read(grads: list, model: nn.Module, what: str) -> Tensor:
    """A rank's gradients as one vector, each of its parameter's shape."""
    expect(grads, kind=(list, tuple), what=what)
    asked = len(list(model.parameters()))
    if len(grads) != asked:
        raise Mistake(
            f"{what}: {len(grads)} gradients, where {asked} are asked, one for each"
            " parameter"
        )
    for got, (name, w) in zip(grads, model.named_parameters(), strict=True):
        if got is None:
            raise Mistake(f"{what}: {name} has no gradient: is backward called?")
        expect(got, shape=tuple(w.shape), what=f"{what}: the gradient of {name}")
    return flat(grads)


def diagnose_mean(results: list, model: nn.Module, data: Data, what: str) -> None:
    """Value and gradients on every rank, one microbatch each."""
    p, mine = len(data), [row[0] for row in data]
    counts = [len(y) for _, y in mine]
    N = sum(counts)
    first = next(model.parameters()).numel()

    def weigh(f):
        return flat(gradients(model, [(f(r), *mine[r]) for r in range(p)]))

    with torch.no_grad():
        sums = [F.cross_entropy(model(x), y, reduction="sum").item() for x, y in mine]
    for r, (value, grads) in enumerate(results):
        where = f"{what}, on rank {r}"
        own = flat(gradients(model, [(1.0, *mine[r])]))
        diagnose(
            read(grads, model, where),
            right=weigh(lambda r: 1 / N),
            mistakes={
                (
                    "this is the mean of the ranks' means: a rank with 3 tokens has"
                    " the say of one with 50"
                ): weigh(lambda r: 1 / counts[r] / p),
                "these are the ranks' means, added up": weigh(lambda r: 1 / counts[r]),
                (
                    f"divided by N and by {p} ranks: the sum over ranks of gradients"
                    " of loss_sum / N is already the mean"
                ): weigh(lambda r: 1 / N / p),
                "the gradients are sums over tokens: nothing was divided": weigh(
                    lambda r: 1.0
                ),
                (
                    "the sums over tokens were divided by the number of ranks, not of"
                    " tokens"
                ): weigh(lambda r: 1 / p),
                (
                    f"the gradient is {p} times too large: was it summed over ranks"
                    " twice, or divided by the ranks' mean number of tokens?"
                ): weigh(lambda r: p / N),
                (
                    "only the first weight's gradient is summed over ranks; go through"
                    " all of them"
                ): torch.cat([weigh(lambda r: 1 / N)[:first], own[first:] / N]),
                (
                    "this is the rank's own gradient: the gradients must be summed"
                    " over ranks"
                ): (own / N),
                (
                    "this is the rank's own mean gradient: the gradients must be"
                    " summed over ranks"
                ): (own / counts[r]),
            },
            tol=1e-4,
            what=where,
        )
        diagnose(
            expect(value, kind=float, what=f"the loss, {where}"),
            right=sum(sums) / N,
            mistakes={
                "the loss is the mean of the ranks' means": (
                    sum(s / n for s, n in zip(sums, counts, strict=True)) / p
                ),
                "the loss is this rank's own": sums[r] / counts[r],
                "the loss is the sum of all ranks over this rank's tokens": (
                    sum(sums) / counts[r]
                ),
                "the loss is this rank's part of it: sum it over ranks": sums[r] / N,
                "the loss is a sum over tokens; the mean is asked": sum(sums),
                "the loss was divided by the number of ranks once too often": (
                    sum(sums) / N / p
                ),
            },
            tol=1e-4,
            what=f"the loss, {where}",
        )


def check_step(answer: Callable) -> None:
    """Two ranks with as many microbatches, then with unequally many, clipped and not;
    then one rank.
    """
    uneven = [[3, 12, 5], [30, 4]]
    for lengths, max_norm in (
        ([[3, 12], [30, 4]], 1e9),
        (uneven, 1e9),
        (uneven, 0.05),
        ([[6, 2]], 0.05),
    ):
        model, data = problem(lengths)
        what = (
            f"gradients_of_step(...) with microbatches of {lengths} tokens,"
            f" max_norm={max_norm:g}"
        )

        def fn(comm, model=model, data=data, max_norm=max_norm):
            mine = copy.deepcopy(model)
            return answer(comm, mine, data[comm.rank], max_norm)

        results, ledger = on_ranks(len(lengths), fn)
        wrongs = _wrong_steps(model, data, max_norm)
        for r, grads in enumerate(results):
            got = read(grads, model, f"{what}, on rank {r}")
            diagnose(
                got,
                right=wrongs["right"],
                mistakes=wrongs["mistakes"](r),
                tol=1e-4,
                what=f"{what}, on rank {r}",
            )
        numbers = sum(w.numel() for w in model.parameters())
        most = max(
            sum(math.prod(e.shape) for e in ledger.events("all_reduce", r))
            for r in range(len(lengths))
        )
        if len(lengths) > 1 and most > numbers + 16:
            raise Mistake(
                f"{what}: the values are right, but {most} numbers are all-reduced,"
                f" where {numbers} of gradients and one count are enough: reduce the"
                " gradients once, after the last microbatch"
            )


def _clipped(g: Tensor, max_norm: float) -> Tensor:
    return g * min(1.0, max_norm / (g.norm().item() + 1e-6))


def _wrong_steps(model: nn.Module, data: Data, max_norm: float) -> dict:
    """The right gradient, and those of the usual mistakes."""
    p = len(data)
    each = [[flat(gradients(model, [(1.0, x, y)])) for x, y in row] for row in data]
    counts = [[len(y) for _, y in row] for row in data]
    N, m = sum(map(sum, counts)), [len(row) for row in data]

    def total(f):
        return sum(f(r, k) * each[r][k] for r in range(p) for k in range(m[r]))

    def clip(g):
        return _clipped(g, max_norm)

    def rank(r, f):
        return sum(f(r, k) * each[r][k] for k in range(m[r]))

    right = total(lambda r, k: 1 / N)
    mistakes = {
        (
            "each microbatch was divided by its own length: a microbatch of 3 tokens"
            " weighs as much as one of 30"
        ): clip(total(lambda r, k: 1 / counts[r][k] / m[r] / p)),
        (
            "the microbatches' means are added up: divide by the tokens of all"
            " microbatches and ranks"
        ): clip(total(lambda r, k: 1 / counts[r][k])),
        "each rank divided by its own tokens, and the ranks' means were averaged": clip(
            total(lambda r, k: 1 / sum(counts[r]) / p)
        ),
        "each rank divided by its own tokens, and the ranks' means were added up": clip(
            total(lambda r, k: 1 / sum(counts[r]))
        ),
        "divided by N, and averaged over ranks once more: sum over ranks": clip(
            right / p
        ),
        "nothing was divided: these are sums over tokens": clip(
            total(lambda r, k: 1.0)
        ),
        "N counts the numbers in x; tokens are its rows, as many as y has": clip(
            right / data[0][0][0].shape[1]
        ),
        (
            "the norm was clipped before the gradients were summed over ranks: clip"
            " the sum"
        ): sum(clip(rank(r, lambda r, k: 1 / N)) for r in range(p)),
        (
            "only the last microbatch is in it: zero_grad was called between"
            " microbatches, or .grad was overwritten"
        ): clip(sum(each[r][-1] / N for r in range(p))),
    }
    if p > 1 and len(set(m)) == 1:
        mistakes[
            "what was reduced after one microbatch is reduced again after the next:"
            " reduce once, after the last"
        ] = clip(total(lambda r, k: p ** (m[r] - 1 - k) / N))
    sizes = [w.numel() for w in model.parameters()]
    if not close(clip(right), right, 1e-3):
        largest = right.abs().max()
        mistakes |= {
            "max_norm is divided by the ranks: it limits the norm of the sum": (
                _clipped(right, max_norm / p)
            ),
            "the norm is the root of the sum of squares, not the largest number": (
                right * min(1.0, max_norm / (float(largest) + 1e-6))
            ),
            (
                "the norm was clipped before the division by the tokens: what is"
                " clipped is the mean's gradient"
            ): clip(right * N) / N,
            "the norm is not clipped": right,
            (
                "each parameter was clipped by its own norm: there is one norm, that of"
                " all of them together"
            ): torch.cat([clip(g) for g in right.split(sizes)]),
            (
                "each number was clipped: what max_norm limits is the norm, and all"
                " numbers shrink alike"
            ): right.clamp(-max_norm, max_norm),
        }
    else:
        mistakes[
            "a norm below max_norm stays as it is: clipping never makes it larger"
        ] = right * max_norm / right.norm()

    def of_rank(r: int) -> dict:
        alone = {
            "this is the rank's own gradient: nothing was summed over ranks": clip(
                rank(r, lambda r, k: 1 / N)
            )
        }
        return mistakes | (alone if p > 1 else {})

    return {"right": clip(right), "mistakes": of_rank}
