"""What marks the exercises of 05-parallelism/05-tensor.

Answers run on a `World`: a deadlock is told by name and never hangs, and the ledger
says when an answer sends too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.parallelism.ranks import Products, at_most, either, on_ranks
from llmlab.checks.parallelism.tensor.mlp import check_gradients, check_output
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.parallelism.runtime import chunks

check = Checks("05-parallelism/05-tensor")


@check.exercise(
    points=2,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        (
            "After `comm.reduce_scatter` each rank has one finished piece of the sum."
            " What collects the pieces?"
        ),
        (
            "`reduce_scatter` cuts dimension 0 into as many pieces as there are ranks."
            " Flatten x first, and pad it with zeros until its length is a multiple of"
            " `comm.size`."
        ),
        (
            "Flatten, `F.pad(flat, (0, -len(flat) % comm.size))`, reduce-scatter,"
            " all-gather, cut to `x.numel()`, `view_as(x)`."
        ),
    ),
)
def all_reduce(answer):
    """All-reduce built from a reduce-scatter and an all-gather, for any shape."""
    for p, shape in (
        (4, (8,)),
        (4, (2, 3)),
        (3, (2, 1, 5)),
        (3, (1,)),
        (2, ()),
        (1, (3,)),
    ):
        xs = [torch.randn(shape) for _ in range(p)]
        what = f"all_reduce(comm, x) with {p} ranks and x of shape {shape}"
        try:
            results, ledger = on_ranks(
                p, lambda comm, xs=xs: answer(comm, xs[comm.rank])
            )
        except ValueError as error:
            if "pad it" in str(error):
                raise Mistake(
                    f"{what}: {error}, and cut the padding off again at the end"
                ) from None
            raise
        _all_reduce_values(results, xs, what)
        if ledger.count("all_reduce"):
            raise Mistake(
                "you called comm.all_reduce: build it from reduce_scatter and"
                " all_gather"
            )
        longest = max(chunks(xs[0].numel(), p))
        at_most(
            ledger,
            2 * (p - 1) * longest,
            "let each rank finish one piece of the sum (reduce_scatter), then collect"
            " the pieces; x as one line needs less than one zero per rank, and none"
            " where its length divides",
        )
    for dtype in (torch.float64, torch.int64):
        xs = [torch.arange(5).to(dtype) + r for r in range(3)]
        what = f"all_reduce(comm, x) with x in {str(dtype).removeprefix('torch.')}"
        results, _ = on_ranks(3, lambda comm, xs=xs: answer(comm, xs[comm.rank]))
        got = expect(results[0], shape=(5,), dtype=dtype, what=what)
        diagnose(got, right=sum(xs), what=what)


def _all_reduce_values(results: list, xs: list[Tensor], what: str) -> None:
    total = torch.stack(xs).sum(0)
    p = len(xs)
    n = total.numel()
    padding = -n % p
    lines = [F.pad(x.reshape(-1), (0, padding)) for x in xs]
    own = torch.cat([line.chunk(p)[r] for r, line in enumerate(lines)])
    in_front = F.pad(total.reshape(-1), (padding, 0))
    shapes = {
        "the padding is still there: cut it off, and give it x's shape": (n + padding,),
        "the sum is one line: give it x's shape again": (n,),
        "this is one finished piece: collect all of them": ((n + padding) // p,),
    }
    for r, got in enumerate(results):
        for text, shape in shapes.items():
            if isinstance(got, Tensor) and got.shape == shape != total.shape:
                raise Mistake(f"{what}: {text}")
        diagnose(
            expect(got, shape=tuple(total.shape), dtype=torch.float32, what=what),
            right=total,
            mistakes=(
                {
                    "this is the mean; the sum is asked": total / p,
                    "the ranks' inputs come back unchanged: nothing was added up": xs[
                        r
                    ],
                    (
                        "the sum was taken twice: after reduce_scatter the pieces are"
                        " finished"
                    ): total * p,
                    (
                        "each rank brought its own piece and nothing was added:"
                        " reduce_scatter adds them"
                    ): own[:n].view_as(total),
                    (
                        "the zeros are in front, and were cut off at the end: pad at"
                        " the end"
                    ): in_front[:n].view_as(total),
                    "this is the maximum; the sum is asked": torch.stack(xs).amax(0),
                }
                if p > 1
                else {}
            ),
            what=f"{what}, on rank {r}",
        )


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "silu acts on each channel alone, so give each rank whole channels: which"
            " dimension of gate, up and down counts channels?"
        ),
        (
            "gate and up are (ff, d): cut dimension 0. down is (d, ff): cut dimension"
            " 1. The products with down are partial sums."
        ),
        (
            "x = f(x) once; h = silu(x @ gate_r.T) * (x @ up_r.T); z = g(h @ down_r.T);"
            " the bias is added to z, not before g."
        ),
    ),
)
def split_mlp(answer):
    """A gated MLP split over ranks, with f and g, differentiable."""
    p, d, ff = 4, 8, 12
    x = torch.randn(3, d)
    gate = torch.randn(ff, d)
    up = torch.randn(ff, d)
    down = torch.randn(d, ff)
    bias = torch.randn(d)
    upstream = torch.randn(3, d)
    names = ("x", "gate", "up", "down", "bias")

    def fn(comm):
        inputs = [t.clone().requires_grad_() for t in (x, gate, up, down, bias)]
        with Products() as counter:
            out = answer(comm, *inputs)
        expect(out, shape=(3, d), dtype=torch.float32, what="split_mlp(...)")
        before = comm.ledger.count("all_reduce", comm.rank)
        gathers = comm.ledger.count("all_gather", comm.rank)
        if out.requires_grad:
            out.backward(upstream)
        grads = {
            n: torch.zeros_like(t) if t.grad is None else t.grad
            for n, t in zip(names, inputs, strict=True)
        }
        spent = comm.ledger.count("all_reduce", comm.rank) - before
        sent = before, gathers
        return out.detach(), out.requires_grad, grads, spent, counter.total, sent

    try:
        results, ledger = on_ranks(p, fn)
    except RuntimeError as error:
        if "cannot be multiplied" not in str(error):
            raise
        raise Mistake(
            f"a product does not fit ({error}): channels, which are cut, are counted by"
            " dimension 0 of gate and up, and by another dimension of down"
        ) from error
    check_output([r[0] for r in results], x, gate, up, down, bias, p)
    if not all(r[1] for r in results):
        raise Mistake(
            "the output has no gradient: comm.all_reduce does not record one; g is"
            " `sum_over_ranks`"
        )
    if not ledger.count():
        raise Mistake(
            "nothing was sent: each rank computed the whole MLP; it shall use its share"
            " of the weights only"
        )
    before, gathers = results[0][5]
    if before > 1 or gathers:
        raise Mistake(
            f"forward does {before} all-reduces and {gathers} all-gathers, and one"
            " all-reduce is enough: a rank that has whole channels of gate and up needs"
            " nothing of the others before its product with down"
        )
    check_gradients([r[2] for r in results], (x, gate, up, down, bias), upstream, p)
    if results[0][4] > 3 * len(x) * d * ff // p:
        raise Mistake(
            "a rank computes more than its share: cut the weights before you multiply,"
            f" so that each does 1/{p}"
        )
    if results[0][3] > 1:
        raise Mistake(
            f"backward does {results[0][3]} all-reduces: put f before x once and use"
            " the result for gate and up"
        )
    at_most(
        ledger,
        2 * 2 * (p - 1) / p * x.numel(),
        "one all-reduce of the output forward, one of x's gradient backward",
    )


@check.exercise(
    points=3,
    minutes=25,
    difficulty=4,
    importance=4,
    hints=(
        (
            "Three reductions over ranks make the loss: which largest number, which"
            " sum, and whose logit?"
        ),
        (
            "Rank r has the columns from r·rows on, where rows = logits.shape[1]. A"
            " target is here if 0 ≤ target − r·rows < rows; elsewhere this rank adds 0."
        ),
        (
            "m = all_reduce(max), s = all_reduce(Σ exp(z − m)), z_target = all_reduce(z"
            " at the target, or 0): log s + m − z_target."
        ),
    ),
)
def vocab_parallel_loss(answer):
    """Cross-entropy from logits whose columns are spread over ranks."""
    p, N, V = 4, 8, 20
    for scale in (1.0, 60.0):
        logits = scale * torch.randn(N, V)
        logits[2] -= 4 * scale  # far below the others
        # rows with their maximum on the first and on the last rank
        logits[0, 0] = 3 * scale
        logits[1, -1] = 3.5 * scale
        targets = torch.tensor([0, V - 1, 5, 9, 3, 7, 16, 8])  # none is on rank 2
        pieces = logits.chunk(p, 1)
        results, ledger = on_ranks(
            p, lambda comm, z=pieces, t=targets: answer(comm, z[comm.rank], t)
        )
        for r, got in enumerate(results):
            what = f"vocab_parallel_loss(...) on rank {r}"
            if isinstance(got, Tensor) and got.shape in ((), (1,)):
                raise Mistake(
                    f"{what} is one number; the loss of each position is asked, not"
                    " their mean or sum"
                )
            expect(got, shape=(N,), dtype=torch.float32, finite=scale == 1, what=what)
            largest = logits.max()
            one = (logits - largest).exp().sum(1).log() + largest
            if close(got, one - logits[torch.arange(N), targets], 1e-4) and scale > 1:
                raise Mistake(
                    "one maximum was taken for all positions: where all logits are far"
                    " below it, every exponential vanishes; each position has its own"
                )
            if not got.isfinite().all():
                raise Mistake(
                    "with logits near 100 it holds infinity or NaN: exp overflows; take"
                    " the maximum of all ranks away, the largest of their largest"
                )
            _loss_value(got, logits, targets, r, p, what)
        at_most(
            ledger,
            3 * 2 * (p - 1) / p * N,
            "three numbers per token are reduced; the logits stay where they are",
        )


def _loss_value(
    got: Tensor, z: Tensor, targets: Tensor, rank: int, p: int, what: str
) -> None:
    rows = z.shape[1] // p
    token = torch.arange(len(z))
    slices = z.chunk(p, 1)
    own = slices[rank]
    z_target = z[token, targets]
    m = z.amax(1)
    local_m = torch.stack([c.amax(1) for c in slices])
    logsum = z.logsumexp(1)
    here = targets // rows == rank
    # what the mistakes lead to: a target that is not shifted, and p different maxima
    unshifted = sum(c[token, targets % rows] for c in slices)
    clamped = sum(
        c[token, (targets - r * rows).clamp(0, rows - 1)] for r, c in enumerate(slices)
    )
    mixed_sum = sum(
        (c - maximum[:, None]).exp().sum(1)
        for c, maximum in zip(slices, local_m, strict=True)
    )
    mixed = mixed_sum.log()

    def taken_where(here: Callable, reduced=sum, apart: int = rows) -> Tensor:
        """The targets' logits, when a rank has those for which `here` is true."""
        found = []
        for r, c in enumerate(slices):
            t = targets - r * apart
            logit = c[token, t.clamp(0, rows - 1)]
            found.append(torch.where(here(t), logit, 0.0))
        return reduced(found)

    def largest(found: list[Tensor]) -> Tensor:
        return torch.stack(found).amax(0)

    diagnose(
        got,
        right=logsum - z_target,
        mistakes={
            (
                "each rank took its own maximum: the exponentials can only be added if"
                " all ranks take away the same"
            ): either(got, mixed + local_m[rank] - z_target, mixed + m - z_target),
            "the sum of exponentials is this rank's only: add it up over ranks": (
                own.logsumexp(1) - z_target
            ),
            (
                "the target's logit is this rank's only: 0 where the target is"
                " elsewhere, then the sum over ranks"
            ): logsum - z_target * here,
            (
                "every rank added a logit for the target: only the rank that has the"
                " target's column may"
            ): logsum - unshifted,
            (
                "ranks that do not have the target add a logit all the same: clamping"
                " keeps the index legal, and the mask makes what it reads 0"
            ): logsum - clamped,
            (
                "the ranks' targets were reduced by their maximum: where a logit is"
                " below 0, the others' 0 wins; add them"
            ): logsum - taken_where(lambda t: (t >= 0) & (t < rows), largest),
            (
                "a rank takes the target that comes right after its last column for its"
                " own: its columns end before (rank + 1) · rows"
            ): logsum - taken_where(lambda t: (t >= 0) & (t <= rows)),
            "a rank does not take its first column for its own": (
                logsum - taken_where(lambda t: (t > 0) & (t < rows))
            ),
            "a rank does not take its last column for its own": (
                logsum - taken_where(lambda t: (t >= 0) & (t < rows - 1))
            ),
            "a rank's columns begin at rank · rows, not at rank": (
                logsum - taken_where(lambda t: (t >= 0) & (t < rows), apart=1)
            ),
            (
                "the ranks' log-sum-exps were added: it is the sums of exponentials"
                " that add up"
            ): sum(c.logsumexp(1) for c in slices) - z_target,
            "the maximum was taken away, or added, once on each rank": either(
                got, logsum - z_target + (p - 1) * m, logsum - z_target - (p - 1) * m
            ),
            "the exponentials were averaged on each rank; they are summed": (
                logsum - math.log(rows) - z_target
            ),
            "the sign is wrong: a loss is −log of the probability": z_target - logsum,
            "the maximum was taken away and not added again": logsum - m - z_target,
            "this is the log of the sum alone: the target's logit is missing": logsum,
        },
        tol=1e-4,
        what=what,
    )


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=3,
    hints=(
        "Y_ij = Σ_t X_it W_tj. Who holds X_it, and who holds W_tj?",
        (
            "X_it is with rank t of `along` (the ranks of this row), W_tj with rank t"
            " of `down` (the ranks of this column)."
        ),
        (
            "q times: broadcast X along the row from rank t, W down the column from"
            " rank t, multiply, and add to Y."
        ),
    ),
)
def matmul_2d(answer):
    """Challenge: one block of X W on a grid; no rank sends more than SUMMA does."""
    # 3 × 3 ranks with oblong blocks, 2 × 2 with square ones, one rank
    for q, m, k, n in ((3, 2, 4, 5), (2, 3, 3, 3), (1, 2, 3, 4)):
        _check_grid(answer, q, torch.randn(q * m, q * k), torch.randn(q * k, q * n))
    X, W = torch.randn(2, 4, 6).double()
    _check_grid(answer, 2, X, W.T)


def _check_grid(answer, q: int, X: Tensor, W: Tensor) -> None:
    def fn(comm):
        mesh = comm.mesh(q, q)
        down, along = mesh.axes
        i, j = mesh.coords
        return answer(along, down, block(X, q, i, j), block(W, q, i, j))

    results, ledger = on_ranks(q * q, fn)
    if X.dtype == torch.float64:
        what = "matmul_2d(...) of float64 blocks"
        got, right = results[1], block(X @ W, q, 0, 1)
        expect(got, shape=tuple(right.shape), dtype=torch.float64, what=what)
        diagnose(got, right=right, tol=1e-10, what=what)
        return
    # on the diagonal a rank's own blocks are partners
    for rank in sorted(range(q * q), key=lambda r: r // q == r % q):
        got = results[rank]
        i, j = divmod(rank, q)
        what = f"matmul_2d(...) on rank ({i}, {j}) of a grid of {q} × {q}"
        right = block(X @ W, q, i, j)
        expect(got, shape=tuple(right.shape), dtype=torch.float32, what=what)
        mistakes = grid_mistakes(X, W, q, i, j) if q > 1 else {}
        diagnose(got, right=right, mistakes=mistakes, tol=1e-4, what=what)
    at_most(
        ledger,
        (q - 1) * (X.numel() + W.numel()) // q**2,
        "each block travels once along its row or column, and no product travels",
    )


def block(whole: Tensor, q: int, i: int, j: int) -> Tensor:
    """Block (i, j) of q × q."""
    return whole.chunk(q, 0)[i].chunk(q, 1)[j].clone()


def grid_mistakes(X: Tensor, W: Tensor, q: int, i: int, j: int) -> dict:
    """Diagnosis → the block on rank (i, j) that this mistake leads to."""

    def x(i: int, j: int) -> Tensor:
        return block(X, q, i, j)

    def w(i: int, j: int) -> Tensor:
        return block(W, q, i, j)

    steps = range(q)
    terms = [x(i, t) @ w(t, j) for t in steps]
    return {
        "this is the first step's product alone: add up all of them": terms[0],
        "the last step's product overwrote the others: add them up": terms[-1],
        (
            "this rank's two blocks were multiplied, without their partners: broadcast"
            " them"
        ): x(i, j) @ w(i, j),
        "the first step is missing": lambda: sum(terms[1:]),
        "the last step is missing": lambda: sum(terms[:-1]),
        (
            "X went down the columns and W along the rows: X_it belongs to row i, W_tj"
            " to column j"
        ): lambda: sum(x(t, j) @ w(i, t) for t in steps),
        "W comes along the row as well: W_tj is with rank t of the column": (
            lambda: sum(x(i, t) @ w(i, t) for t in steps)
        ),
        "W does not travel: step t needs W_tj, from rank t of the column": (
            lambda: sum(x(i, t) for t in steps) @ w(i, j)
        ),
        "X does not travel: step t needs X_it, from rank t of the row": (
            lambda: x(i, j) @ sum(w(t, j) for t in steps)
        ),
        "X and W do not come from the same step: X_it goes with W_tj": (
            lambda: sum(x(i, t) @ w(q - 1 - t, j) for t in steps)
        ),
        "the sum over t is whole: nothing is to be added over ranks": (
            lambda: sum(block(X @ W, q, i, t) for t in steps)
        ),
        "this is the mean of the steps; their sum is asked": lambda: sum(terms) / q,
    }
