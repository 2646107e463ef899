"""The values that right and wrong answers to the exercises of
05-parallelism/03-zero-and-fsdp lead to.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

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
        "the gradient was averaged over ranks as well as over tokens": step(g / p),
        (
            "each rank clipped by the norm of its own piece: sum the squares over"
            " ranks first"
        ): step(g, of_pieces(lambda c: clip(c.norm()))),
        "norms do not add: it is their squares that are summed over ranks": step(
            g, clip(norms.sum())
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
        "clipping is missing, at every step": step(g, 1.0),
    }


class Gathers:
    """A communicator that counts how many gathered matrices are alive at a time."""

    def __init__(self, comm) -> None:
        self._comm, self._alive, self.most = comm, [], 0

    def __getattr__(self, name: str):
        return getattr(self._comm, name)

    def all_gather(self, x: Tensor, dim: int = 0, **more):
        """As the communicator's own."""
        out = self._comm.all_gather(x, dim, **more)
        if isinstance(out, Tensor):
            self._alive = [ref for ref in self._alive if ref() is not None] + [
                weakref.ref(out)
            ]
            self.most = max(self.most, len(self._alive))
        return out


def _backward(
    W: list[Tensor], x: Tensor, g: Tensor, mask: bool = True
) -> tuple[Tensor, list[Tensor]]:
    h = [x]
    for w in W:
        h.append((h[-1] @ w.T).relu())
    grads = []
    for i in reversed(range(len(W))):
        delta = g * (h[i + 1] > 0) if mask else g
        grads.insert(0, delta.T @ h[i])
        g = delta @ W[i]
    return g, grads


def check_chain(
    results: list, W: list[Tensor], xs: list[Tensor], gs: list[Tensor]
) -> None:
    """Every rank's gradient of x, and its pieces of the gradients of all W."""
    p = len(xs)
    every = [_backward(W, x, g) for x, g in zip(xs, gs, strict=True)]
    unmasked = [_backward(W, x, g, mask=False) for x, g in zip(xs, gs, strict=True)]
    total = [sum(grads[i] for _, grads in every) for i in range(len(W))]
    wrong = [sum(grads[i] for _, grads in unmasked) for i in range(len(W))]
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
                "relu's mask is missing in backward: δ = g ⊙ [h > 0]": unmasked[rank][
                    0
                ],
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

            def cut(t, r=rank):
                return t.chunk(p)[r]

            if (
                isinstance(piece, Tensor)
                and piece.shape == cut(W[-1 - i]).shape != cut(W[i]).shape
            ):
                raise Mistake(
                    f"{name} has another layer's shape: the list goes from the first"
                    " layer to the last"
                )
            diagnose(
                expect(
                    piece, shape=tuple(cut(W[i]).shape), dtype=torch.float32, what=name
                ),
                right=cut(total[i]),
                mistakes={
                    "it is this rank's own gradient: sum it over the ranks": cut(
                        every[rank][1][i]
                    ),
                    "it is the mean over ranks; the sum is asked": cut(total[i]) / p,
                    "relu's mask is missing in backward: δ = g ⊙ [h > 0]": cut(
                        wrong[i]
                    ),
                    "these are the rows of another rank": (
                        total[i].chunk(p)[(rank + 1) % p]
                    ),
                },
                tol=1e-4,
                what=name,
            )
