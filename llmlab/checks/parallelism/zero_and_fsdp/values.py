"""The values that right and wrong answers to the exercises of
05-parallelism/03-zero-and-fsdp lead to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.parallelism.ranks import either
from llmlab.course.grading.checking import Mistake, diagnose, expect
from llmlab.parallelism.zero_and_fsdp import Adam, adamw_


def one_process_step(
    w, m, v, g: Tensor, t: int, adam: Adam, scale: float | Tensor | None = None
) -> tuple:
    """(w, m, v) after one step with the whole gradient g; `scale` in place of the
    clipping's own.
    """
    if scale is None:
        scale = min(1.0, adam.clip / (g.norm().item() + 1e-6))
    w, m, v = w.clone(), m.clone(), v.clone()
    adamw_(w, m, v, g * scale, t, adam)
    return w, m, v


def step_mistakes(
    w, m, v, grads: list[Tensor], counts: list[int], t: int, adam: Adam
) -> dict[str, Tensor]:
    """Diagnosis → the weights that this mistake leads to."""
    p, total = len(grads), sum(counts)
    g = sum(grads) / total

    def step(g, scale=None):
        return one_process_step(w, m, v, g, t, adam, scale)[0]

    def clip(norm):
        return min(1.0, adam.clip / (float(norm) + 1e-6))

    def of_pieces(fn):
        return torch.cat([torch.full_like(c, fn(c)) for c in g.chunk(p)])

    norms = torch.stack([c.norm() for c in g.chunk(p)])
    clipped = sum(c * clip(c.norm()) for c in (x / total for x in grads))
    return {
        "the weights did not change": w,
        (
            "this is the mean of the ranks' means: divide the sum of gradients by the"
            " tokens of all ranks"
        ): step(sum(x / c for x, c in zip(grads, counts, strict=True)) / p),
        (
            "the gradient was divided by the tokens of this rank: divide by the tokens"
            " of all ranks"
        ): step(
            torch.cat([c / n for c, n in zip(sum(grads).chunk(p), counts, strict=True)])
        ),
        (
            "the gradient was divided by the mean of the ranks' tokens: divide by"
            " their sum"
        ): step(g * p),
        (
            "the gradient is the sum over all tokens: divide it by the tokens of all"
            " ranks"
        ): step(sum(grads)),
        "the gradient was divided by the largest of the ranks' tokens, not by all": (
            step(sum(grads) / max(counts))
        ),
        "the gradient was averaged over ranks as well as over tokens": step(g / p),
        (
            "each rank clipped by the norm of its own piece: sum the squares over"
            " ranks first"
        ): step(g, of_pieces(lambda c: clip(c.norm()))),
        "norms do not add: it is their squares that are summed over ranks": step(
            g, clip(norms.sum())
        ),
        (
            "this is the root of the mean of the pieces' squared norms; their sum is"
            " asked"
        ): step(g, clip(norms.square().mean().sqrt())),
        "the norm is that of the gradient before it is divided by the tokens": step(
            g, clip(sum(grads).norm())
        ),
        "each number is clamped by itself; the whole gradient is scaled": step(
            g.clamp(-adam.clip, adam.clip), 1.0
        ),
        "the step is number t + 1, not t": (
            one_process_step(w, m, v, g, t + 1, adam)[0]
        ),
        "the step is number t − 1, not t": (
            one_process_step(w, m, v, g, t - 1, adam)[0]
        ),
        "every rank stepped the first piece of the weights: take its own": (
            torch.cat(
                [
                    one_process_step(w.chunk(p)[0], a, b, c, t, adam, clip(g.norm()))[0]
                    for a, b, c in zip(m.chunk(p), v.chunk(p), g.chunk(p), strict=True)
                ]
            )
        ),
        "the root of the summed squares is missing": step(
            g, clip(norms.square().sum())
        ),
        "this clips by the mean of the pieces' norms": step(g, clip(norms.mean())),
        "this clips by the largest of the pieces' norms": step(g, clip(norms.max())),
        "every gradient was scaled to the norm c: one that is smaller stays as it is": (
            step(g, adam.clip / (g.norm() + 1e-6))
        ),
        "each rank clipped its own gradient before the sum: clip the sum": step(
            clipped, 1.0
        ),
        (
            "the gradient is not made shorter, at every step: is clipping missing, or"
            " max for min, or the fraction upside down?"
        ): step(g, 1.0),
    }


def cut(parameters: list[Tensor], p: int, front: bool = False) -> Tensor:
    """All parameters' elements in p rows, with zeros at the end, or at the front."""
    line = torch.cat([w.reshape(-1) for w in parameters])
    padding = -len(line) % p
    return torch.nn.functional.pad(line, (padding, 0) if front else (0, padding)).view(
        p, -1
    )


def piece_mistakes(
    got: Tensor, once: list[Tensor], parameters: list[Tensor], p: int, rank: int
) -> dict[str, Tensor]:
    """Diagnosis → the piece that this mistake leads to; all have the right length."""
    right = cut(once, p)
    memory = [w.T if w.dim() == 2 and not w.is_contiguous() else w for w in once]
    last = list({id(w): w for w in reversed(parameters)}.values())[::-1]
    apart = [cut([w], p)[rank] for w in once]
    number = sum(w.numel() for w in once)
    ones = right.reshape(-1).clone()
    ones[number:] = 1.0
    orders = [
        once[::-1],
        sorted(once, key=lambda w: w.numel()),
        sorted(once, key=lambda w: -w.numel()),
    ]
    return {
        "the padding belongs at the end": cut(once, p, front=True)[rank],
        "the padding is of zeros": ones.view(p, -1)[rank],
        "this is every N-th element; a piece is contiguous": right.reshape(-1)[rank::p],
        (
            "elements come in the order of memory; a transposed parameter has another:"
            " use reshape(-1)"
        ): cut(memory, p)[rank],
        "a matrix is flattened column by column: its rows come one after another": (
            cut([w.T if w.dim() == 2 else w for w in once], p)[rank]
        ),
        "a tied weight stands where it appears first": cut(last, p)[rank],
        (
            "each parameter was padded and cut by itself: join them first, then cut the"
            " line"
        ): torch.cat(apart),
        "the parameters are in another order than in the list": either(
            got, *[cut(ws, p)[rank] for ws in orders]
        ),
        "this is another rank's piece": either(got, *right[torch.arange(p) != rank]),
    }


def _backward(
    W: list[Tensor],
    x: Tensor,
    g: Tensor,
    masked: Callable[[int], bool] = lambda i: True,
    mask_from: int = 1,
    with_g: bool = False,
    last_relu: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of all W, by hand, with what may be done wrongly.

    Args:
        masked: at which layers relu's mask is applied.
        mask_from: 1 masks g by h_{i+1}, 0 masks what goes to layer i by h_i.
        with_g: whether dW is made of g instead of δ.
        last_relu: whether the forward pass has a relu behind its last layer.
    """
    n = len(W)
    h = [x]
    for i, w in enumerate(W):
        y = h[-1] @ w.T
        h.append(y.relu() if last_relu or i < n - 1 else y)
    grads = []
    for i in reversed(range(n)):
        delta = g * (h[i + 1] > 0) if masked(i) and mask_from else g
        grads.insert(0, (g if with_g else delta).T @ h[i])
        g = delta @ W[i]
        g = g if mask_from else g * (h[i] > 0)
    return g, grads


def _chain_mistakes(W: list[Tensor]) -> dict[str, dict]:
    """Diagnosis → the arguments of `_backward` that make this mistake."""
    last = len(W) - 1
    return {
        "relu's mask is missing in backward: δ = g ⊙ [h > 0]": {
            "masked": lambda i: False
        },
        "relu's mask is missing at the last layer: a relu stands behind it, too": {
            "masked": lambda i: i < last
        },
        "a relu stands behind the last layer, too, in forward and in backward": {
            "masked": lambda i: i < last,
            "last_relu": False,
        },
        "the mask of layer i is [h_{i+1} > 0], its output's; this is its input's": {
            "mask_from": 0
        },
        "∂L/∂W_i is made of δ_i, behind the mask, not of g_{i+1}": {"with_g": True},
    }


def check_chain(
    results: list, W: list[Tensor], xs: list[Tensor], gs: list[Tensor]
) -> None:
    """Every rank's gradient of x, and its pieces of the gradients of all W."""
    p = len(xs)
    every = [_backward(W, x, g) for x, g in zip(xs, gs, strict=True)]
    total = [sum(grads[i] for _, grads in every) for i in range(len(W))]
    wrong = {
        text: [_backward(W, x, g, **how) for x, g in zip(xs, gs, strict=True)]
        for text, how in _chain_mistakes(W).items()
    }
    for rank, got in enumerate(results):
        what = f"chain_gradients on rank {rank}"
        if (
            not isinstance(got, tuple | list)
            or len(got) != 2
            or not isinstance(got[1], list | tuple)
        ):
            raise Mistake(
                f"{what} must return two things: the gradient of x, and a list of"
                " pieces"
            )
        if len(got[1]) != len(W):
            raise Mistake(f"{what} returned {len(got[1])} pieces for {len(W)} layers")
        grad_x = expect(
            got[0],
            shape=tuple(xs[rank].shape),
            dtype=torch.float32,
            what=f"{what}: the gradient of x",
        )
        diagnose(
            grad_x,
            right=every[rank][0],
            mistakes={
                **{text: ranks[rank][0] for text, ranks in wrong.items()},
                "x has been through no relu: its gradient is not masked": (
                    every[rank][0] * (xs[rank] > 0)
                ),
                "x belongs to this rank alone: its gradient is not summed over ranks": (
                    sum(gx for gx, _ in every)
                ),
            },
            tol=1e-4,
            what=f"{what}: the gradient of x",
        )
        for i, piece in enumerate(got[1]):
            name = f"{what}: the piece of the gradient of W_{i}"
            if isinstance(piece, Tensor) and piece.shape == W[i].shape:
                raise Mistake(
                    f"{name} is whole: a rank keeps its own rows only; a reduce-scatter"
                    " leaves it just those"
                )

            def rows(t, r=rank):
                return t.chunk(p)[r]

            if (
                isinstance(piece, Tensor)
                and piece.shape == rows(W[-1 - i]).shape != rows(W[i]).shape
            ):
                raise Mistake(
                    f"{name} has another layer's shape: the list goes from the first"
                    " layer to the last"
                )
            diagnose(
                expect(
                    piece, shape=tuple(rows(W[i]).shape), dtype=torch.float32, what=name
                ),
                right=rows(total[i]),
                mistakes={
                    "it is this rank's own gradient: sum it over the ranks": rows(
                        every[rank][1][i]
                    ),
                    "it is the mean over ranks; the sum is asked": rows(total[i]) / p,
                    **{
                        text: rows(sum(grads[i] for _, grads in ranks))
                        for text, ranks in wrong.items()
                    },
                    "these are the rows of another rank": (
                        total[i].chunk(p)[(rank + 1) % p]
                    ),
                },
                tol=1e-4,
                what=name,
            )
