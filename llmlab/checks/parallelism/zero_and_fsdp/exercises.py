"""What marks the exercises of 05-parallelism/03-zero-and-fsdp.

Rank functions run on a `World`: a deadlock is told by name and never hangs, and the
ledger says when an answer sends too much.
"""

from __future__ import annotations

import itertools

import torch

from llmlab.checks.parallelism.ranks import Received, at_most, either, on_ranks
from llmlab.checks.parallelism.zero_and_fsdp.values import (
    check_chain,
    cut,
    one_process_step,
    piece_mistakes,
    step_mistakes,
)
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.parallelism.zero_and_fsdp import Adam

check = Checks("05-parallelism/03-zero-and-fsdp")


@check.exercise(
    points=1,
    minutes=10,
    difficulty=1,
    importance=4,
    hints=(
        (
            "Write down three numbers of bytes per parameter: for the weight, its"
            " gradient, and everything that Adam keeps in 32 bits."
        ),
        (
            "2, 2 and 12. At each stage, which of the three is multiplied by Ψ, and"
            " which by ⌈Ψ/N⌉?"
        ),
        (
            "piece = -(-Psi // N); weights 2 · (piece from stage 3 on, else Psi),"
            " gradients from stage 2 on, the 12 from stage 1 on."
        ),
    ),
)
def bytes_per_rank(answer):
    """Bytes of weights, gradients and optimizer state on each rank, by stage."""

    for stage in (1, 0, 2, 3):
        for psi, n in ((1000, 5), (1003, 7), (5, 8), (7_500_000_000, 64)):
            what = f"bytes_per_rank({stage}, {psi}, {n})"
            got = expect(answer(stage, psi, n), kind=int, what=what)
            diagnose(
                got,
                right=_held(stage, psi, n),
                mistakes={
                    f"{what}: {text}": value
                    for text, value in _held_mistakes(got, stage, psi, n).items()
                },
                what=what,
            )


def _held(
    stage: int,
    psi: int,
    n: int,
    w: int = 2,
    g: int = 2,
    o: int = 12,
    piece: int | None = None,
) -> int:
    """Bytes per rank, with w, g and o bytes per parameter, and pieces of `piece`."""
    cut = -(-psi // n) if piece is None else piece
    return sum(
        each * (cut if stage >= first else psi)
        for each, first in ((w, 3), (g, 2), (o, 1))
    )


def _held_mistakes(got: int, stage: int, psi: int, n: int) -> dict[str, int]:
    whole = sum(each for each, first in ((2, 3), (2, 2), (12, 1)) if stage < first)
    return {
        "a piece has ⌈Ψ/N⌉ elements, padding included: round up": (
            _held(stage, psi, n, piece=psi // n)
        ),
        "a piece has ⌈Ψ/N⌉ elements; where N divides Ψ, that is no more than Ψ/N": (
            _held(stage, psi, n, piece=psi // n + 1)
        ),
        "elements are rounded up, not bytes: a piece has ⌈Ψ/N⌉ whole elements": (
            whole * psi + -(-(16 - whole) * psi // n)
        ),
        "what is not cut needs no padding: it has Ψ elements": (
            whole * -(-psi // n) * n + (16 - whole) * -(-psi // n)
        ),
        "the 32-bit numbers are three: master weight, momentum, variance": (
            _held(stage, psi, n, o=8)
        ),
        "the 32-bit numbers alone are counted: weight and gradient are held, too": (
            _held(stage, psi, n, w=0, g=0)
        ),
        "gradients are kept in 16 bits, 2 bytes each": _held(stage, psi, n, g=4),
        "weight and gradient have 16 bits, 2 bytes each": _held(
            stage, psi, n, w=4, g=4
        ),
        "the gradients, or the 16-bit weights, are missing": either(
            got, _held(stage, psi, n, g=0), _held(stage, psi, n, w=0)
        ),
        "stage 3 cuts the weights as well as what the stages before it cut": (
            14 * psi + 2 * -(-psi // n) if stage == 3 else -1
        ),
        "this is what all N ranks hold together; one is asked": (
            n * _held(stage, psi, n)
        ),
        "a stage cuts what the stages before it cut, too": (
            14 * psi + 2 * -(-psi // n) if stage == 2 else -1
        ),
        "this is what the next stage holds: see which stage cuts what": _held(
            stage + 1, psi, n
        ),
        "this is what the stage before holds: see which stage cuts what": _held(
            stage - 1, psi, n
        ),
    }


@check.exercise(
    points=2,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Three steps: each object once, one line of all elements, equal pieces."
            " `id(w)` tells objects apart."
        ),
        (
            "`{id(w): w for w in parameters}.values()` keeps each object once, in"
            " order. `F.pad(flat, (0, -len(flat) % comm.size))` makes the line"
            " divisible."
        ),
        (
            "flat = torch.cat([w.reshape(-1) for w in once]); pad; flat.view(comm.size,"
            " -1)[comm.rank]."
        ),
    ),
)
def my_piece(answer):
    """This rank's piece of all parameters: uneven sizes, tied weights once."""
    tied, twin = torch.randn(3, 4), torch.ones(5)
    slanted = torch.randn(3, 4).T
    cases = [
        (4, [torch.randn(8)], "one parameter whose size divides"),
        (
            3,
            [torch.randn(2, 3), torch.randn(5)],
            "sizes that do not divide by the ranks",
        ),
        (
            4,
            [torch.randn(3), slanted, torch.randn(())],
            "a parameter that is not contiguous, and a scalar",
        ),
        (4, [tied, torch.randn(7), tied], "a tied weight, twice in the list"),
        (
            2,
            [twin, torch.ones(5), torch.randn(2)],
            "two parameters that hold equal numbers and are not tied",
        ),
        (8, [torch.randn(3)], "more ranks than elements"),
        (
            2,
            [slanted[:2], slanted[:1], torch.randn(2)],
            "two parameters whose numbers begin at one address",
        ),
    ]
    for p, parameters, name in cases:
        _check_pieces(answer, p, parameters, name)


def _check_pieces(answer, p: int, parameters: list, name: str) -> None:
    try:
        pieces, ledger = on_ranks(p, lambda comm: answer(comm, parameters))
    except RuntimeError as error:
        text = str(error)
        if "Boolean value" in text or "size of tensor a" in text:
            raise Mistake(
                "tensors are compared by their values, which `in` and `==` do: whether"
                " two are one object says `is`, or their ids"
            ) from error
        raise
    if ledger.count():
        raise Mistake(
            "something was sent: every rank has all parameters, and can cut its piece"
            " by itself"
        )
    once = list({id(w): w for w in parameters}.values())
    right = cut(once, p)
    for rank, got in enumerate(pieces):
        what = f"my_piece on rank {rank} of {p}, {name}"
        length = right.shape[1]
        if isinstance(got, torch.Tensor):
            _piece_length(got, once, parameters, p, rank, what)
        expect(got, shape=(length,), dtype=torch.float32, what=what)
        wrong = piece_mistakes(got, once, parameters, p, rank)
        diagnose(
            got,
            right=right[rank],
            mistakes={f"{what}: {text}": value for text, value in wrong.items()},
            what=what,
        )


def _piece_length(
    got: torch.Tensor, once: list, parameters: list, p: int, rank: int, what: str
) -> None:
    """Mistakes that a piece's length tells."""
    distinct = [
        w
        for i, w in enumerate(once)
        if not any(w.shape == v.shape and torch.equal(w, v) for v in once[:i])
    ]
    line = sum(w.numel() for w in once)
    length = -(-line // p)
    shapes = {
        "the tied weight is counted twice; keep each object once, by its id": (
            cut(parameters, p)[rank].shape
        ),
        (
            "two parameters that only hold equal numbers were merged; compare by id,"
            " not by value"
        ): cut(distinct, p)[rank].shape,
        (
            "two parameters whose numbers begin at one address were merged; compare by"
            " id, not by data_ptr"
        ): cut([*{w.data_ptr(): w for w in reversed(once)}.values()], p)[rank].shape,
        "this is the whole line; a rank's piece is asked": (length * p,),
        "a line whose length N divides needs no padding: −n % N is 0 then": (
            ((line // p + 1),) if line % p == 0 else None
        ),
    }
    for text, shape in shapes.items():
        if got.shape == shape != (length,):
            raise Mistake(f"{what}: {text}")
    if got.dim() == 1 and len(got) < length:
        raise Mistake(
            f"{what} has {len(got)} elements; all pieces have ⌈Ψ/N⌉ = {length}: pad"
            " with zeros"
        )


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=5,
    in_place=True,
    hints=(
        (
            "Two numbers must be known to all: the tokens of all ranks, and the squared"
            " norm of the whole gradient. Each is a sum over ranks of what each rank"
            " knows."
        ),
        (
            "g = comm.reduce_scatter(grad) / total. Its squares, summed here and then"
            " over ranks, give ‖g‖². Clip g, then step"
            " weights.chunk(comm.size)[comm.rank].clone() with it."
        ),
        (
            "total = all_reduce(tensor(tokens)); g = reduce_scatter(grad) / total; norm"
            " = all_reduce(g.square().sum()).sqrt(); g *= min(1, clip / (norm + 1e-6));"
            " w = own chunk, cloned; adamw_(w, m, v, g, t, adam); return all_gather(w)."
        ),
    ),
)
def zero_step(answer):
    """One clipped AdamW step with sharded state, over ranks with unequal numbers of
    tokens.
    """
    for p, n, clip, what in (
        (4, 24, 0.05, "clipping at work"),
        (3, 15, 1e3, "a gradient within the limit"),
        (1, 6, 0.1, "one rank"),
    ):
        adam, counts = Adam(lr=0.1, clip=clip, weight_decay=0.1), [3, 1, 8, 2][:p]
        w, m, v = torch.randn(n), 0.1 * torch.randn(n), 0.01 * torch.rand(n)
        grads = [
            c * (torch.randn(n) + r * torch.arange(n) / n) for r, c in enumerate(counts)
        ]

        def fn(comm, p=p, w=w, m=m, v=v, grads=grads, counts=counts, adam=adam):
            mine = [t.chunk(p)[comm.rank].clone() for t in (m, v)]
            out = answer(
                comm,
                w.clone(),
                *mine,
                grads[comm.rank].clone(),
                counts[comm.rank],
                3,
                adam,
            )
            return out, *mine

        results, ledger = on_ranks(p, fn)
        _check_step(
            results, w, m, v, grads, counts, adam, f"zero_step with {p} ranks, {what}"
        )
        at_most(
            ledger,
            2 * (p - 1) / p * n + 16,
            "reduce-scatter the gradient, step a piece, all-gather the weights; no"
            " whole gradient is needed",
        )


def _check_step(results: list, w, m, v, grads, counts, adam, what: str) -> None:
    p = len(results)
    right = one_process_step(w, m, v, sum(grads) / sum(counts), 3, adam)
    mistakes = step_mistakes(w, m, v, grads, counts, 3, adam)
    alone = [right[0].chunk(p), w.chunk(p)]
    for rank, (got, got_m, got_v) in enumerate(results):
        where = f"{what}, on rank {rank}"
        if isinstance(got, torch.Tensor) and p > 1 and got.shape == (len(w) // p,):
            raise Mistake(
                f"{where}: this is one piece; every rank needs the whole weights:"
                " gather them"
            )
        diagnose(
            expect(got, shape=tuple(w.shape), dtype=torch.float32, what=where),
            right=right[0],
            mistakes={
                f"{where}: {text}": value
                for text, value in mistakes.items()
                if p > 1 or "every" in text
            }
            | {
                f"{where}: only this rank's piece is new: gather the others'": (
                    torch.cat([alone[r != rank][r] for r in range(p)])
                )
            },
            tol=1e-4,
            what=where,
        )
        for name, mine, before, after in (
            ("m", got_m, m, right[1]),
            ("v", got_v, v, right[2]),
        ):
            if close(mine, before.chunk(p)[rank]):
                raise Mistake(
                    f"{where}: {name} did not change: hand adamw_ the tensors that you"
                    " were given, not copies"
                )
            diagnose(
                mine,
                right=after.chunk(p)[rank],
                mistakes={},
                tol=1e-4,
                what=f"{where}: {name}",
            )


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Forward: gather W_i, compute h_{i+1}, let W_i go. Which tensors does"
            " backward need from forward? No matrix is among them."
        ),
        (
            "Keep the list of all h. Going back, δ = g ⊙ [h_{i+1} > 0]; the"
            " reduce-scatter of δᵀ h_i is this rank's piece; gather W_i a second time"
            " for g = δ W_i."
        ),
        (
            "for i in reversed(range(len(pieces))): delta = g * (h[i + 1] > 0); W ="
            " comm.all_gather(pieces[i]); g = delta @ W; del W; gradients.insert(0,"
            " comm.reduce_scatter(delta.T @ h[i]))."
        ),
    ),
)
def chain_gradients(answer):
    """Challenge: ZeRO-3 by hand, with at most two whole matrices at a time and 3Ψ
    numbers on the wire.
    """
    p, sizes, batch = 3, (4, 6, 9, 3, 6), 5
    W = [torch.randn(o, i) / i**0.5 for i, o in itertools.pairwise(sizes)]
    xs, gs = (
        [torch.randn(batch, sizes[0]) for _ in range(p)],
        [torch.randn(batch, sizes[-1]) for _ in range(p)],
    )
    most = [0] * p

    def fn(comm):
        r, watched = comm.rank, Received(comm, "all_gather")
        got = answer(
            watched, [w.chunk(p)[r].clone() for w in W], xs[r].clone(), gs[r].clone()
        )
        most[r] = watched.most
        return got

    results, ledger = on_ranks(p, fn)
    check_chain(results, W, xs, gs)
    gathers = ledger.count("all_gather", 0)
    if gathers < 2 * len(W) - 1:
        raise Mistake(
            f"the gradients are right, with {gathers} gathers for {len(W)} layers: the"
            " matrices of forward were kept for backward. Let them go, and gather them"
            " again"
        )
    if max(most) > 2:
        raise Mistake(
            f"the gradients are right, but {max(most)} whole matrices were alive at a"
            " time: let each go after its use"
        )
    begun = [e.op for e in ledger.events(rank=0)]
    last = len(begun) - 1 - begun[::-1].index("all_gather")
    kept = begun[last:].count("reduce_scatter")
    if kept > 2:
        raise Mistake(
            f"the gradients are right, but those of {kept} matrices were kept whole to"
            " the end: reduce and cut each one as soon as it is there"
        )
    psi = sum(w.numel() for w in W)
    at_most(
        ledger,
        3 * (p - 1) / p * psi,
        "two gathers and one reduce-scatter for each layer are enough",
    )
