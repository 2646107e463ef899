"""Selective recomputation, on a layer of GPT that is split over tensor-parallel ranks.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, sections 4 and 5. The scores
of attention are large and cheap to compute: 5as²b bytes for 4bs²h FLOPs. `recompute`
throws them away and computes them again in the backward pass, with the same dropout.

    x ← x + dropout(W_o · softmax(Q Kᵀ/√d, dropped) V)     Q, K, V = W_q y, W_k y, W_v y
                                                           y = LayerNorm(x)
    x ← x + dropout(W_2 · gelu(W_1 y))                                  y = LayerNorm(x)

The layer exists to be counted: `activation_memory.layer_bytes` is what it saves, to the
byte.

    b  batch     s  tokens     h  hidden size     a  heads     t  ranks

Two generators draw the dropout masks. `split` draws inside the split regions, so it
must differ from rank to rank; `whole` draws outside of them, where all ranks must drop
alike, unless the sequence is cut as well: then it must differ, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.activation_memory import RECOMPUTE, GPTShape
from llmlab.parallelism.sequence.fg import linears_of_shard, scatter_sequence
from llmlab.parallelism.tensor import copy_to_ranks, sum_over_ranks


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, generator: Generator) -> Tensor:
        keep = torch.rand(x.shape, generator=generator) >= p
        ctx.p = p
        ctx.save_for_backward(keep)  # one byte an element
        return x * keep / (1 - p)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (keep,) = ctx.saved_tensors
        return grad * keep / (1 - ctx.p), None, None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, fn: Callable, generators: tuple[Generator, ...], *xs: Tensor
    ) -> Tensor:
        ctx.fn, ctx.generators = fn, generators
        ctx.states = [g.get_state() for g in generators]
        ctx.save_for_backward(*xs)
        return fn(*xs)  # gradients are off here: nothing inside is saved

    @staticmethod
    def backward(ctx, grad: Tensor):
        xs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        later = [g.get_state() for g in ctx.generators]
        for g, state in zip(ctx.generators, ctx.states, strict=True):
            g.set_state(state)  # the dropout masks of the forward pass
        with torch.enable_grad():
            y = ctx.fn(*xs)
        for g, state in zip(ctx.generators, later, strict=True):
            g.set_state(state)
        torch.autograd.backward(y, grad)
        return None, None, *(x.grad for x in xs)


def dropout(x: Tensor, p: float, generator: Generator) -> Tensor:
    """x with a share p of its elements set to 0 and the rest divided by 1 − p. Saves a
    mask of one byte an element.
    """
    return _Dropout.apply(x, p, generator) if p else x


def recompute(
    fn: Callable[..., Tensor], *xs: Tensor, generators: tuple[Generator, ...] = ()
) -> Tensor:
    """fn(*xs), of which only xs are kept; the backward pass runs fn again.

    Args:
        generators: what fn draws from. Their states are put back for the second run, so
            that it draws the same numbers.
    """
    return _Recompute.apply(fn, generators, *xs)


class GPTLayer(nn.Module):
    """One layer of GPT, of which this rank holds 1/t of every matrix.

    Args:
        shape: s, b, h, a.
        comm: the t tensor-parallel ranks.
        sequence_parallel: whether what is outside of the products is cut along the
            sequence (doors g and ḡ instead of f and g).
        recompute: "none", "selective" (the core of attention) or "full" (the layer).
        p: of the three dropouts.
    Raises:
        ValueError: t does not divide a (or, with `sequence_parallel`, s); an unknown
            kind of recomputation.
    """

    def __init__(
        self,
        shape: GPTShape,
        comm: Communicator,
        *,
        sequence_parallel=False,
        recompute="none",
        p=0.1,
        dtype=torch.bfloat16,
    ) -> None:
        super().__init__()
        if shape.a % comm.size or (sequence_parallel and shape.s % comm.size):
            raise ValueError(
                f"a={shape.a} and, cut along the sequence, s={shape.s} must be"
                f" multiples of {comm.size} ranks"
            )
        if recompute not in RECOMPUTE:
            raise ValueError(
                f"recompute={recompute!r} must be one of {', '.join(RECOMPUTE)}"
            )
        self.shape, self.comm, self.sequence_parallel, self.recompute, self.p = (
            shape,
            comm,
            sequence_parallel,
            recompute,
            p,
        )
        # every rank draws the whole matrix and keeps its shard
        master = Generator().manual_seed(0)
        sizes = {
            "q": (1, 1, 0),
            "k": (1, 1, 0),
            "v": (1, 1, 0),
            "o": (1, 1, 1),
            "up": (4, 1, 0),
            "down": (1, 4, 1),
        }
        for name, (out, into, dim) in sizes.items():
            whole = (
                torch.randn(out * shape.h, into * shape.h, generator=master)
                / (into * shape.h) ** 0.5
            )
            mine = whole.chunk(comm.size, dim)[comm.rank].clone().to(dtype)
            self.register_parameter(name, nn.Parameter(mine))
        self.norms = nn.ModuleList(nn.LayerNorm(shape.h, dtype=dtype) for _ in range(2))
        future = torch.full((shape.s, shape.s), -torch.inf, dtype=dtype).triu(1)
        self.register_buffer("future", future, persistent=False)
        self.split = Generator().manual_seed(1 + comm.rank)
        self.whole = Generator().manual_seed(101 + comm.rank * sequence_parallel)

    def forward(self, x: Float[Tensor, "b s h"]) -> Float[Tensor, "b s h"]:
        """The layer, on all tokens, or on this rank's s/t where the sequence is cut."""
        if self.recompute == "full":
            return recompute(self._layer, x, generators=(self.split, self.whole))
        return self._layer(x)

    def _layer(self, x: Tensor) -> Tensor:
        q, k, v = self._columns(self.norms[0](x), self.q, self.k, self.v)
        core = lambda *qkv: self._core(*qkv)  # noqa: E731
        z = (
            recompute(core, q, k, v, generators=(self.split,))
            if self.recompute == "selective"
            else core(q, k, v)
        )
        x = x + dropout(self._rows(z, self.o), self.p, self.whole)
        (u,) = self._columns(self.norms[1](x), self.up)
        return x + dropout(self._rows(F.gelu(u), self.down), self.p, self.whole)

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b s h_t"]:
        """Attention without its projections: the part that is worth forgetting."""
        b, s, _ = q.shape

        def heads(t):
            return t.view(b, s, self.shape.a // self.comm.size, -1).transpose(1, 2)

        q, k, v = heads(q), heads(k), heads(v)
        # neither is saved
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.future
        weights = dropout(scores.softmax(-1), self.p, self.split)
        # (b, a/t, s, d) → (b, s, h/t)
        return (weights @ v).transpose(1, 2).reshape(b, s, -1)

    def _columns(self, y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if self.sequence_parallel:
            return linears_of_shard(y, self.comm, *weights)
        y = copy_to_ranks(y, self.comm)
        return tuple(F.linear(y, w) for w in weights)

    def _rows(self, y: Tensor, weight: Tensor) -> Tensor:
        return (scatter_sequence if self.sequence_parallel else sum_over_ranks)(
            F.linear(y, weight), self.comm
        )
