"""What marks the exercises of 05-parallelism/05-tensor.

Answers run on a `World`: a deadlock is told by name and never hangs, and the ledger
says when an answer sends too much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.checks.parallelism.ranks import Products, at_most, either, on_ranks
from llmlab.checks.parallelism.tensor.mlp import check_gradients, check_output
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
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
    for p, shape in ((4, (8,)), (4, (2, 3)), (3, (2, 1, 5)), (3, (1,)), (1, (3,))):
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
            " the pieces",
        )


def _all_reduce_values(results: list, xs: list[Tensor], what: str) -> None:
    total = torch.stack(xs).sum(0)
    p = len(xs)
    for r, got in enumerate(results):
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
        if out.requires_grad:
            out.backward(upstream)
        grads = {
            n: torch.zeros_like(t) if t.grad is None else t.grad
            for n, t in zip(names, inputs, strict=True)
        }
        spent = comm.ledger.count("all_reduce", comm.rank) - before
        return out.detach(), out.requires_grad, grads, spent, counter.total

    results, ledger = on_ranks(p, fn)
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
        # rows with their maximum on the first and on the last rank
        logits[0, 0] = 3 * scale
        logits[1, -1] = 3 * scale
        targets = torch.tensor([0, V - 1, 5, 9, 3, 7, 16, 8])  # none is on rank 2
        pieces = logits.chunk(p, 1)
        results, ledger = on_ranks(
            p, lambda comm, z=pieces, t=targets: answer(comm, z[comm.rank], t)
        )
        for r, got in enumerate(results):
            what = f"vocab_parallel_loss(...) on rank {r}"
            expect(got, shape=(N,), dtype=torch.float32, finite=scale == 1, what=what)
            if not got.isfinite().all():
                raise Mistake(
                    "with logits near 100 it holds infinity or NaN: exp overflows; take"
                    " the maximum of all ranks away"
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
    q = 3
    m, k, n = 2, 4, 5  # sides of the blocks
    X = torch.randn(q * m, q * k)
    W = torch.randn(q * k, q * n)

    def cut(whole: Tensor, i: int, j: int) -> Tensor:
        """Block (i, j)."""
        return whole.chunk(q, 0)[i].chunk(q, 1)[j].clone()

    def terms(i: int, j: int) -> list[Tensor]:
        """The products whose sum is Y_ij."""
        return [cut(X, i, t) @ cut(W, t, j) for t in range(q)]

    def fn(comm):
        mesh = comm.mesh(q, q)
        down, along = mesh.axes
        i, j = mesh.coords
        return answer(along, down, cut(X, i, j), cut(W, i, j))

    results, ledger = on_ranks(q * q, fn)
    for rank, got in enumerate(results):
        i, j = divmod(rank, q)
        diagnose(
            expect(
                got,
                shape=(m, n),
                dtype=torch.float32,
                what=f"matmul_2d(...) on rank ({i}, {j})",
            ),
            right=cut(X @ W, i, j),
            mistakes={
                "this is one step's product: add up all of them": (
                    terms(i, j)[:-1] if i != j else terms(i, j)
                ),
                "the last step's product overwrote the others: add them up": terms(
                    i, j
                )[-1],
                (
                    "this rank's two blocks were multiplied, without their partners:"
                    " broadcast them"
                ): cut(X, i, j) @ cut(W, i, j),
                "the first step is missing": sum(terms(i, j)[1:]),
                "the last step is missing": sum(terms(i, j)[:-1]),
                (
                    "X went down the columns and W along the rows: X_it belongs to row"
                    " i, W_tj to column j"
                ): sum(cut(X, t, j) @ cut(W, i, t) for t in range(q)),
            },
            tol=1e-4,
            what=f"matmul_2d(...) on rank ({i}, {j})",
        )
    at_most(
        ledger,
        (q - 1) * (m * k + k * n),
        "each block travels once along its row or column, and no product travels",
    )
