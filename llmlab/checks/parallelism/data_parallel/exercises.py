"""What marks the exercises of 05-parallelism/02-data-parallel.

Ranks have data of unequal length, so that a mean of means is not the mean. The last
exercise runs on a clock: each gradient takes a second to compute, each message its
latency and its bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from llmlab.checks.parallelism.data_parallel.step import (
    check_step,
    diagnose_mean,
    problem,
)
from llmlab.checks.parallelism.ranks import explained, on_ranks
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.parallelism.data_parallel import plan_buckets, timeline
from llmlab.parallelism.runtime import CollectiveMismatch, DeadlockError, Link, World

check = Checks("05-parallelism/02-data-parallel")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Walk through the parameters from the last to the first and keep a list"
            " that is being filled."
        ),
        (
            "After adding a parameter, ask whether the bucket has `limit` bytes or"
            " more. If so, close it. What about the one that is open at the end?"
        ),
        (
            "for i in reversed(range(len(sizes))): filling.append(i); if its bytes ≥"
            " limit: plan.append(filling); filling = []. At the end append what is"
            " left, if anything is."
        ),
    ),
)
def buckets(answer):
    """Parameters in buckets, the last parameter first."""
    found = []
    for sizes, limit in (
        ([2, 4, 5, 6, 5, 9, 6], 12),
        ([10, 10, 30, 5, 5], 15),
        ([4, 4, 4, 4], 8),
        ([1, 2, 3], 100),
        ([7, 1, 9], 1),
        ([2, 9, 1, 9], 9),
        ([], 5),
    ):
        what = f"buckets({sizes}, limit={limit})"
        got = expect(answer(list(sizes), limit), kind=list, what=what)
        if [] in got:
            raise Mistake(f"{what}: there is an empty bucket")
        found.append(((sizes, limit), got))
    if all(got == plan_buckets(*args) for args, got in found):
        return
    texts = _other_plans([], 1)
    explained(
        found,
        {t: lambda sizes, limit, t=t: _other_plans(sizes, limit)[t] for t in texts},
    )
    for (sizes, limit), got in found:
        if got != plan_buckets(sizes, limit):
            _unexplained(got, sizes, f"buckets({sizes}, limit={limit})")


def _unexplained(got: list, sizes: list[int], what: str) -> None:
    order = list(range(len(sizes)))
    named = []
    for bucket in got:
        named += bucket if isinstance(bucket, list) else [bucket]
    if sorted(named) == order[1:]:
        raise Mistake(
            f"{what}: parameter 0 is missing: a range that runs down to 0 stops at −1"
        )
    if sorted(named) != order:
        raise Mistake(
            f"{what}: each of the {len(sizes)} parameters must be in one bucket, once"
        )
    raise Mistake(
        f"{what} is {got}: the parameters are all there, but cut into buckets at other"
        " places"
    )


def _other_plans(sizes: list[int], limit: int) -> dict[str, list[list[int]]]:
    """Diagnosis → the plan, where the bytes are counted, or named, wrongly."""
    n = len(sizes)
    right = plan_buckets(sizes, limit)
    order = range(n - 1, -1, -1)
    by_size = sorted(range(n), key=lambda i: -sizes[i])
    joined = right
    if right and sum(sizes[i] for i in right[-1]) < limit:
        joined = [*right[:-2], [i for bucket in right[-2:] for i in bucket]]
    forward = plan_buckets(sizes, limit, order=range(n))
    return {
        "this is in the order of the model; gradients come in the reverse order": (
            forward
        ),
        (
            "the buckets are made in the order of the model and then turned around:"
            " fill them in the order in which gradients come"
        ): [bucket[::-1] for bucket in forward[::-1]],
        (
            "within a bucket the order is the model's: the last parameter comes first"
            " there too"
        ): [bucket[::-1] for bucket in right],
        "the last bucket is missing: what is open at the end must be sent too": (
            _counted(sizes, limit, order, lambda filled: 0, open_too=False)
        ),
        (
            "a bucket is closed before it would reach the limit; close it once it"
            " holds `limit` bytes or more"
        ): _before(sizes, limit),
        (
            "a bucket that holds exactly `limit` bytes is closed, not only one that"
            " holds more"
        ): plan_buckets(sizes, limit + 1),
        "a bucket holds numbers of parameters, not their bytes": [
            [sizes[i] for i in bucket] for bucket in right
        ],
        "the count of bytes is not set back to 0 when a bucket is closed": (
            _counted(sizes, limit, order, lambda filled: filled)
        ),
        (
            "what a bucket holds beyond the limit is counted for the next: a new bucket"
            " begins with 0 bytes"
        ): _counted(sizes, limit, order, lambda filled: filled - limit),
        "the parameters are sorted by size; gradients come in the reverse order": (
            _counted(sizes, limit, by_size, lambda filled: 0)
        ),
        (
            "these are places in the reversed list; a bucket holds numbers of the"
            " model's order"
        ): [[n - 1 - i for i in bucket] for bucket in right],
        "the limit counts bytes, not parameters": [
            [*order[i : i + limit]] for i in range(0, n, limit)
        ],
        "the last bucket was joined to the one before; it may hold less": joined,
    }


def _counted(
    sizes: list[int],
    limit: int,
    order: Sequence[int],
    left: Callable[[int], int],
    open_too: bool = True,
) -> list[list[int]]:
    """The plan when `left(filled)` bytes are counted after a bucket is closed.

    `open_too`: whether what is open at the end is a bucket.
    """
    plan, filling, filled = [], [], 0
    for i in order:
        filling.append(i)
        filled += sizes[i]
        if filled >= limit:
            plan.append(filling)
            filling = []
            filled = left(filled)
    return [*plan, filling] if filling and open_too else plan


def _before(sizes: list[int], limit: int) -> list[list[int]]:
    """The plan of those who never let a bucket exceed the limit."""
    plan, filling = [], []
    for i in reversed(range(len(sizes))):
        if filling and sum(sizes[j] for j in filling) + sizes[i] > limit:
            plan.append(filling)
            filling = []
        filling.append(i)
    return [*plan, filling] if filling else plan


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "Every token of every rank has the weight 1/N. Who knows N?",
        (
            "N = comm.all_reduce(torch.tensor(tokens)). If each rank runs backward on"
            " loss_sum / N, what is left to do with the gradients?"
        ),
        (
            "(loss_sum / N).backward(), then w.grad = comm.all_reduce(w.grad) for every"
            " weight: a sum, not a mean. The loss is the sum over ranks of loss_sum,"
            " divided by N."
        ),
    ),
)
def backward_mean(answer):
    """Gradient and value of the mean loss over all ranks' tokens."""
    for counts in ((3, 50, 11), (8, 8), (5,)):
        model, data = problem([[n] for n in counts])
        what = f"backward_mean(...) with {counts} tokens"

        def fn(comm, model=model, data=data):
            mine = copy.deepcopy(model)
            weights = list(mine.parameters())
            x, y = data[comm.rank][0]
            loss = nn.functional.cross_entropy(mine(x), y, reduction="sum")
            value = answer(comm, loss, len(y), weights)
            return value, [w.grad for w in weights]

        results, ledger = on_ranks(len(counts), fn)
        if len(counts) > 1 and not ledger.count("all_reduce"):
            raise Mistake(
                f"{what}: nothing was sent: each rank has only its own gradient"
            )
        diagnose_mean(results, model, data, what)


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "backward() adds to .grad. If every microbatch's loss sum is divided by the"
            " same number, the gradients of all microbatches just add up."
        ),
        (
            "That number is the tokens of all microbatches of all ranks: one all-reduce"
            " before the first backward. The gradients travel once, after the last."
        ),
        (
            "Count, all-reduce the count, backward on each sum / N, all-reduce the"
            " gradients (a sum), and then clip."
        ),
    ),
)
def gradients_of_step(answer):
    """Accumulated, reduced and clipped gradients of one step."""
    check_step(answer)


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=4,
    hints=(
        (
            "Count in a hook how many gradients of the bucket are still missing. When"
            " none is, start the all-reduce with async_op=True and keep the handle."
        ),
        (
            "Do not wait in the hook: backward would stand still. Wait for all handles"
            " after `backward()` has returned."
        ),
        (
            "flat = torch.cat([weights[j].grad.flatten() for j in plan[b]]); handles[b]"
            " = comm.all_reduce(flat, 'mean', async_op=True). Afterwards:"
            " handles[b].wait().split([weights[j].numel() for j in plan[b]])."
        ),
    ),
)
def overlapped(answer):
    """Challenge: buckets that travel while backward goes on."""
    p, layers, link = 3, 6, Link(latency=0.5, bandwidth=300.0)
    model = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(layers)])
    xs, plan = [torch.randn(4, 5) * (r + 1) for r in range(p)], [[5, 4], [3, 2], [1, 0]]
    spent: dict[str, float] = {}

    def fn(comm):
        mine = copy.deepcopy(model)
        weights = list(mine.parameters())
        for w in weights:
            w.register_post_accumulate_grad_hook(lambda _: comm.work(1.0, "gradient"))
        loss = mine(xs[comm.rank]).square().mean()

        ran = []

        def backward():
            if ran:
                raise Mistake("backward() is called twice; the gradients come once")
            ran.append(True)
            loss.backward()
            spent.setdefault("backward", comm.world.clock[comm.rank])

        return answer(comm, weights, plan, backward)

    world = World(p, link=link)
    try:
        results = world.run(fn)
    except (DeadlockError, CollectiveMismatch) as error:
        raise Mistake(f"the ranks do not fit together\n{error}") from None
    if not spent:
        raise Mistake("backward() was not called")
    _means(results, model, xs)
    _on_time(world, plan, layers, link, p, spent["backward"])


def _means(results: list, model: nn.Module, xs: list) -> None:
    own = [
        torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        for x in xs
    ]
    for r, grads in enumerate(results):
        expect(grads, kind=list, what="overlapped(...)")
        if len(grads) != len(own[0]):
            raise Mistake(
                f"overlapped(...) holds {len(grads)} gradients, where {len(own[0])} are"
                " asked, one for each weight"
            )
        for i, got in enumerate(grads):
            parts = torch.stack([o[i] for o in own])
            what = f"the gradient of weight {i} on rank {r}"
            diagnose(
                expect(got, shape=tuple(parts[0].shape), what=what),
                right=parts.mean(0),
                mistakes={
                    (
                        f"{what} was sent before it had come: a bucket is complete in"
                        " the hook of its *last* gradient"
                    ): 0 * parts[0],
                    (
                        f"{what} is the rank's own: the mean is what handle.wait()"
                        " returns"
                    ): parts[r],
                    f"{what} is the sum over ranks; the mean is asked": parts.sum(0),
                    (
                        f"{what} is another weight's: return them in the order of the"
                        " weights"
                    ): next(
                        (
                            torch.stack([o[j] for o in own]).mean(0)
                            for j in range(len(grads))
                            if j != i and _is(got, own, j)
                        ),
                        parts[r],
                    ),
                },
                what=what,
            )


def _is(got, own: list, j: int) -> bool:
    return torch.allclose(got, torch.stack([o[j] for o in own]).mean(0), atol=1e-6)


def _on_time(
    world: World, plan: list, layers: int, link: Link, p: int, backward: float
) -> None:
    """The messages, and the time against the best schedule with these buckets."""
    sent = world.ledger.count("all_reduce", 0)
    if sent != len(plan):
        cure = (
            "join the gradients of a bucket in one tensor"
            if sent > len(plan)
            else "send each bucket by itself"
        )
        raise Mistake(
            f"{sent} all-reduces were started, where the plan has {len(plan)} buckets:"
            f" {cure}"
        )
    spans = timeline([1.0] * layers, [5 * 5 * 4] * layers, plan, p, link)
    best = max(s.end for s in spans)
    if backward > layers + 1e-6:
        raise Mistake(
            f"backward took {backward:.1f} s, where the gradients need {layers}: a hook"
            " waits for its all-reduce; wait after backward"
        )
    if world.ledger.time > best + 1e-6:
        raise Mistake(
            f"the values are right, but all is over after {world.ledger.time:.1f} s,"
            f" where {best:.1f} are enough: start a bucket's all-reduce in the hook of"
            " its last gradient, not after backward"
        )
