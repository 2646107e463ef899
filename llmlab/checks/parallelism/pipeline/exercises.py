"""What marks the exercises of 05-parallelism/04-pipeline.

The last one runs answers on a `World`: ranks that wait for each other are told by name,
and never hang.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from llmlab.checks.parallelism.pipeline.challenge import check_challenge
from llmlab.checks.parallelism.pipeline.lists import check_lists
from llmlab.checks.parallelism.pipeline.run import (
    Problem,
    check_gradients,
    check_loss,
    check_order,
    problem,
)
from llmlab.checks.parallelism.ranks import Products, either, on_ranks
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("05-parallelism/04-pipeline")


@check.exercise(
    points=1,
    minutes=10,
    difficulty=1,
    importance=5,
    hints=(
        (
            "For how many slots of a forward and a backward does rank 0 work? For how"
            " many more does the step last?"
        ),
        (
            "The step lasts m slots and what it takes the first microbatch to get to"
            " the last rank and back: p − 1 slots, each 1/v as long when a rank's"
            " layers lie in v chunks."
        ),
        (
            "waiting = (p − 1) / v, working = m; the share is waiting / (waiting +"
            " working)."
        ),
    ),
)
def bubble(answer):
    """The share of a step in which a rank waits, for p ranks, m microbatches and v
    chunks per rank.
    """
    for p, m, v in ((4, 8, 1), (8, 24, 1), (4, 2, 1), (4, 8, 2), (6, 12, 3), (1, 5, 1)):
        what = f"bubble({p}, {m}, {v})"
        got = expect(answer(p, m, v), kind=float, what=what)
        right = (p - 1) / (v * m + p - 1)
        diagnose(
            got,
            right=right,
            mistakes={
                (
                    "this compares waiting with working; asked is its share of the"
                    " whole step, waiting and working"
                ): ((p - 1) / (v * m)),
                (
                    "this is the share in which a rank works; asked is the share in"
                    " which it waits"
                ): (1 - right),
                (
                    "v changes nothing here: with v chunks per rank, the pipe fills in"
                    " p − 1 shorter slots"
                ): ((p - 1) / (m + p - 1)),
                (
                    "only the waiting gets shorter with v, and with it the step: the"
                    " work stays m slots"
                ): ((p - 1) / (v * (m + p - 1))),
                "count the slots again: the step lasts m + p − 1 of them, not m + p": (
                    (p - 1) / (v * m + p)
                ),
                (
                    "p − 1 slots are lost, not p: the first rank waits for the others"
                    " only"
                ): either(got, p / (v * m + p - 1), p / (v * m + p)),
                (
                    "a slot is a forward and a backward together: p − 1 of them are"
                    " lost, not 2(p − 1)"
                ): either(
                    got,
                    2 * (p - 1) / (v * m + 2 * (p - 1)),
                    2 * (p - 1) / (v * m + p - 1),
                ),
                (
                    "work and waiting are counted in different slots: a slot is a"
                    " forward and a backward, in both"
                ): either(
                    got,
                    (p - 1) / (2 * v * m + p - 1),
                    (p - 1) / (3 * v * m + p - 1),
                ),
                (
                    "chunks are counted as ranks: the pipe is pv chunks long, but a"
                    " chunk's slot is 1/v as long"
                ): either(
                    got,
                    (p * v - 1) / (m + p * v - 1),
                    (p * v - 1) / (v * m + p * v - 1),
                ),
                "v makes the bubble smaller, not larger": (
                    v * (p - 1) / (m + v * (p - 1))
                ),
            },
            what=what,
        )


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Three phases: forwards alone, a forward and a backward in turn, backwards"
            " alone. How far ahead of its backwards must the last rank be? And the one"
            " before it?"
        ),
        (
            "The last rank does F, B, F, B …: no forward ahead. Each rank before it"
            " needs one more, because its first gradient comes a slot later. And nobody"
            " can do more than m."
        ),
        (
            "w = min(p − r − 1, m) forwards; then F of microbatch w + k and B of"
            " microbatch k, for k = 0 … m − w − 1; then the last w backwards."
        ),
    ),
)
def one_f_one_b(answer):
    """The 1F1B list of rank r: (kind, microbatch) in order."""
    for p, m in ((4, 8), (3, 3), (4, 2), (4, 1), (1, 3)):
        lists = [answer(p, m, r) for r in range(p)]
        check_lists(lists, p, m)


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Walk from the last linear to the first with the gradient of its output."
            " Which of the two products does the walk need, and which can be left until"
            " later?"
        ),
        (
            "At linear k: keep (inputs[k], dy) for later, then dy = dy @ weights[k],"
            " then zero where inputs[k] is not positive, unless k = 0: no ReLU stands"
            " before the first linear."
        ),
        (
            "kept.append((inputs[k], dy)) for k = n−1 … 0; later() returns [dy.T @ x"
            " for x, dy in reversed(kept)]."
        ),
    ),
)
def backward_in_two(answer):
    """The backward of a chain of linears: the input's gradient at once, the weights'
    when `later()` is called.
    """
    for sizes in ((6, 8, 5, 7), (3, 4)):
        _check_backward(answer, sizes)


def _check_backward(answer, sizes: tuple[int, ...]) -> None:
    weights = [torch.randn(b, a) for a, b in pairwise(sizes)]
    x, upstream = torch.randn(9, sizes[0]), torch.randn(9, sizes[-1])
    inputs = [x]
    for w in weights[:-1]:
        inputs.append((inputs[-1] @ w.T).relu())
    leaf, leaves = (
        x.clone().requires_grad_(),
        [w.clone().requires_grad_() for w in weights],
    )
    y = leaf
    for k, w in enumerate(leaves):
        y = (y.relu() if k else y) @ w.T
    y.backward(upstream)

    with Products() as first:
        out = answer(list(inputs), list(weights), upstream)
    if not (isinstance(out, tuple) and len(out) == 2 and callable(out[1])):
        raise Mistake(
            "backward_in_two(...) shall return two things: the gradient of x, and a"
            " function without arguments"
        )
    dx, later = out
    _check_dx(
        expect(dx, shape=tuple(x.shape), dtype=torch.float32, what="dx"),
        leaf.grad,
        weights,
        inputs,
        upstream,
    )
    with Products() as second:
        grads = later()
    _check_weights(grads, leaves, weights, inputs, upstream)
    _check_products(first.total, second.total, sum(len(x) * w.numel() for w in weights))


def _check_products(first: int, second: int, half: int) -> None:
    """The multiplications before `later()` and in it; either may need `half`."""
    if first > half:
        raise Mistake(
            f"the values are right, but {first} multiplications are done before"
            f" `later()`, where {half} are enough: the products for the weights'"
            " gradients can wait, and the forward pass is not needed again"
        )
    if second > half:
        raise Mistake(
            f"the values are right, but `later()` does {second} multiplications,"
            f" where {half} are enough: keep each dy from the first walk instead of"
            " walking again"
        )


def _check_dx(got, right, weights, inputs, upstream) -> None:
    def passes(x):
        return x > 0

    def walk(masked=lambda k: k > 0, last=0, upstream=upstream, factor=passes):
        dy = upstream
        for k in range(len(weights) - 1, last - 1, -1):
            dy = dy @ weights[k]
            dy = dy * factor(inputs[k]) if masked(k) else dy
        return dy

    n = len(weights)
    y = inputs[-1] @ weights[-1].T

    diagnose(
        got,
        right=right,
        mistakes={
            (
                "a ReLU stands before every linear but the first: where its output is"
                " 0, no gradient goes through (> 0, not ≥ 0)"
            ): walk(lambda k: False),
            (
                "x itself has not been through a ReLU: its gradient is not zero where"
                " x is negative"
            ): walk(lambda k: True),
            "the mask of the first ReLU, before the second linear, is missing": (
                walk(lambda k: k > 1)
            ),
            "the mask of the last ReLU, before the last linear, is missing": (
                walk(lambda k: 0 < k < n - 1)
            ),
            "no ReLU stands behind the last linear: dy is its output's gradient": (
                walk(upstream=upstream * (y > 0))
            ),
            (
                "the gradient was multiplied by what the ReLU lets through: it passes"
                " whole where that is positive, a factor of 0 or 1"
            ): walk(factor=lambda x: x),
            (
                "ReLU was applied to the gradient: what counts is where its *input* was"
                " positive"
            ): _rectified(weights, upstream),
            "dx is divided by the number of rows: nothing is averaged here": (
                right / len(inputs[0])
            ),
        },
        what="dx",
    )


def _rectified(weights: list, dy: torch.Tensor) -> torch.Tensor:
    """What comes of ReLU on gradients, in the place of its mask."""
    for k in range(len(weights) - 1, -1, -1):
        dy = dy @ weights[k]
        dy = dy.relu() if k else dy
    return dy


def _check_weights(grads, leaves, weights, inputs, upstream) -> None:
    expect(grads, kind=(list, tuple), what="later()")
    if len(grads) != len(leaves):
        raise Mistake(
            f"later() returns {len(grads)} gradients, where there are {len(leaves)}"
            " weights"
        )
    turned = zip(reversed(grads), leaves, strict=True)
    if len(grads) > 1 and all(close(g, w.grad) for g, w in turned):
        raise Mistake(
            "later() returns the last linear's gradient first: give them in the order"
            " of the weights"
        )
    if all(
        close(getattr(g, "T", g), w.grad) for g, w in zip(grads, leaves, strict=True)
    ):
        raise Mistake(
            "the gradients are transposed: ∂W has the shape of W, (out, in), and is"
            " dyᵀ x"
        )
    for k, (got, leaf) in enumerate(zip(grads, leaves, strict=True)):
        what = f"later()[{k}]"
        if isinstance(got, torch.Tensor) and got.dim() == 2:
            _factors(got.shape, leaf.shape, what)
        expect(got, shape=tuple(leaf.shape), dtype=torch.float32, what=what)
        unmasked = upstream
        for j in range(len(weights) - 1, k, -1):
            unmasked = unmasked @ weights[j]
        diagnose(
            got,
            right=leaf.grad,
            mistakes={
                (
                    "keep dy after it has been through the ReLU: the gradient of a"
                    " linear's *output*, not of its ReLU's"
                ): (unmasked.T @ inputs[k]),
                (
                    f"{what} is the mean over the rows: a weight's gradient is their"
                    " sum"
                ): leaf.grad / len(inputs[0]),
            },
            what=what,
        )


def _factors(got: tuple[int, int], right: tuple[int, int], what: str) -> None:
    """Which factor of dyᵀ x a shape tells to be another linear's."""
    if got[0] == right[0] and got[1] != right[1]:
        raise Mistake(
            f"{what} has shape {tuple(got)}: its x is another linear's input"
            " (inputs[k] belongs to linear k)"
        )
    if got[1] == right[1] and got[0] != right[0]:
        raise Mistake(
            f"{what} has shape {tuple(got)}: its dy is not the gradient of this"
            " linear's output; keep dy before it goes on to x"
        )


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=5,
    hints=(
        (
            "One loop over ops. For F: get x (a microbatch, or a message), compute,"
            " keep x and y, pass y on. For B: get dy, go backward through the y that"
            " was kept, pass x's gradient back."
        ),
        (
            "A received x needs `.requires_grad_()`, or it has no `.grad`. On the last"
            " rank y becomes the loss, divided by the number of microbatches, and its"
            " backward needs no dy. `comm.send` waits until the other side receives,"
            " and under 1F1B both sides send at the same time: use `comm.isend`."
        ),
        (
            "kept[i] = x, y; later x, y = kept.pop(i); y.backward(None if last else"
            " comm.recv(comm.rank + 1)); if not first: comm.isend(x.grad, comm.rank −"
            " 1). Gradients add up in .grad by themselves."
        ),
    ),
)
def run_schedule(answer):
    """Run one rank's list of ops: forward, messages, backward, gradients of the mean
    loss.
    """
    for p, m in ((3, 4), (1, 2)):
        for name, lists in _schedules(p, m).items():
            _check_run(answer, problem(p, m), lists, name if p > 1 else "one rank")


def _check_run(answer, given: Problem, lists: list, name: str) -> None:
    def fn(comm):
        stage, log = given.stage(comm.rank)
        ops = lists[comm.rank]
        loss = answer(comm, stage, ops, list(given.xs), list(given.ys), given.loss)
        return loss, [w.grad for w in stage.parameters()], log

    try:
        results, _ = on_ranks(len(lists), fn)
    except ValueError as error:
        raise Mistake(_in_their_terms(error, name)) from error
    check_gradients([r[1] for r in results], given, name)
    check_loss([r[0] for r in results], given, name)
    check_order([r[2] for r in results], lists, name)


def _in_their_terms(error: ValueError, name: str) -> str:
    """What an error of torch or of the communicator says of the schedule."""
    text = str(error)
    if "not NoneType" in text:
        return (
            f"{name}: None is sent: a received x has no `.grad` unless it is told to"
            " keep one, by `.requires_grad_()`, before it goes through the stage"
        )
    if "batch_size" in text:
        return (
            f"{name}: the outputs of one microbatch meet the targets of another: each"
            " op names its microbatch; keep what a forward leaves by that number"
        )
    if "must be one of the group's 1 ranks" in text:
        return (
            f"{name}: a rank that is alone is the first and the last: it feeds xs, has"
            f" the loss and sends nothing ({text})"
        )
    raise error


def _schedules(p: int, m: int) -> dict[str, list[list[tuple[str, int]]]]:
    forwards, backwards = [("F", i) for i in range(m)], [("B", i) for i in range(m)]
    alternating = []
    for r in range(p):
        w = p - r - 1
        steady = [op for k in range(m - w) for op in (forwards[w + k], backwards[k])]
        alternating.append([*forwards[:w], *steady, *backwards[m - w :]])
    return {
        "GPipe's order": [forwards + backwards] * p,
        "GPipe's order, backwards last in, first out": [forwards + backwards[::-1]] * p,
        "1F1B": alternating,
        "GPipe's order, the last microbatch first": [forwards[::-1] + backwards] * p,
    }


@check.exercise(
    points=3,
    minutes=30,
    difficulty=5,
    importance=3,
    hints=(
        (
            "Where does a rank wait under ZB-H1? Rank 0 has done its forwards, and no"
            " gradient is back yet. What could it do meanwhile, if it had the memory?"
        ),
        (
            "The first gradient of rank r comes back 2(p − r − 1) units after its"
            " first forward is done. That is room for as many forwards."
        ),
        (
            "ZB-H2: rank r is min(2(p − r − 1), m) forwards ahead, then F and I in"
            " turn; each W comes 2r microbatches after its I, and those that are left"
            " come at the end."
        ),
    ),
)
def beat_h1(answer):
    """All ranks' lists: less time than ZB-H1, and at most twice its memory."""
    for p, m in ((4, 8), (3, 9), (2, 4), (5, 16)):
        check_challenge(answer(p, m), p, m)
