"""Selective recomputation, on a GPT layer that is split over tensor-parallel ranks.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, sections 4 and 5. The scores
of attention are large and cheap to compute: 5as²b bytes for 4bs²h FLOPs. `recompute`
throws them away and computes them again in the backward pass, with the same dropout.

    y = LayerNorm(x)     Q, K, V = W_q y, W_k y, W_v y
                         x ← x + dropout(W_o · dropout(softmax(Q Kᵀ/√d)) V)
    y = LayerNorm(x)     x ← x + dropout(W_2 · gelu(W_1 y))

The layer is made to be counted: it saves what `activation_memory.layer_bytes` says, to
the byte.

Two generators draw the dropout masks. `split` draws inside the split regions, so it
must differ from rank to rank. `whole` draws outside of them, where all ranks must drop
alike, unless the sequence is cut as well: then it must differ, too.

Simplified: the weights are drawn from a fixed seed, and the linears have no bias.

    b  batch
    s  tokens
    h  hidden size
    a  heads
    d  h/a, channels of a head
    t  ranks
    p  probability that a dropout sets an element to 0
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.activation_memory import RECOMPUTE, GPTShape
from llmlab.parallelism.sequence.megatron import linears_of_shard, scatter_sequence
from llmlab.parallelism.tensor import copy_to_ranks, sum_over_ranks


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, generator: Generator) -> Tensor:
        keep = torch.rand(x.shape, generator=generator) >= p
        ctx.p = p
        ctx.save_for_backward(keep)  # one byte per element
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
        ctx.fn = fn
        ctx.generators = generators
        ctx.forward_states = [generator.get_state() for generator in generators]
        ctx.save_for_backward(*xs)
        # Autograd records nothing inside `forward`, so nothing inside fn is saved.
        return fn(*xs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        xs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        # The second run must draw the dropout masks of the first one. Afterwards the
        # generators go on from where they were.
        current_states = [generator.get_state() for generator in ctx.generators]
        _set_states(ctx.generators, ctx.forward_states)
        with torch.enable_grad():
            y = ctx.fn(*xs)
        _set_states(ctx.generators, current_states)
        torch.autograd.backward(y, grad)
        return None, None, *(x.grad for x in xs)


def _set_states(generators: tuple[Generator, ...], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def dropout(x: Tensor, p: float, generator: Generator) -> Tensor:
    """x with a share p of its elements set to 0 and the rest divided by 1 − p.

    Saves a mask of one byte per element.
    """
    if not p:
        return x
    return _Dropout.apply(x, p, generator)


def recompute(
    fn: Callable[..., Tensor], *xs: Tensor, generators: tuple[Generator, ...] = ()
) -> Tensor:
    """fn(*xs), of which only xs are kept; the backward pass runs fn again.

    Args:
        generators: what fn draws from. Their states are restored for the second run, so
            that it draws the same numbers.
    """
    return _Recompute.apply(fn, generators, *xs)


# (name, rows and columns in units of h, the dimension that is cut)
MATRICES = (
    ("q", 1, 1, 0),
    ("k", 1, 1, 0),
    ("v", 1, 1, 0),
    ("o", 1, 1, 1),
    ("up", 4, 1, 0),
    ("down", 1, 4, 1),
)


class GPTLayer(nn.Module):
    """One layer of GPT, of which this rank holds 1/t of every matrix.

    Args:
        shape: s, b, h, a.
        comm: the t tensor-parallel ranks.
        sequence_parallel: whether what is outside of the products is cut along the
            sequence (g and ḡ instead of f and g).
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
        self.shape = shape
        self.comm = comm
        self.sequence_parallel = sequence_parallel
        self.recompute = recompute
        self.p = p
        # every rank draws the whole matrix and keeps its shard
        master = Generator().manual_seed(0)
        for name, out, into, dim in MATRICES:
            out_features = out * shape.h
            in_features = into * shape.h
            whole = torch.randn(out_features, in_features, generator=master)
            whole = whole / in_features**0.5
            shard = whole.chunk(comm.size, dim)[comm.rank].clone().to(dtype)
            self.register_parameter(name, nn.Parameter(shard))
        self.norms = nn.ModuleList(nn.LayerNorm(shape.h, dtype=dtype) for _ in range(2))
        future = torch.full((shape.s, shape.s), -torch.inf, dtype=dtype).triu(1)
        self.register_buffer("future", future, persistent=False)
        self.split = Generator().manual_seed(1 + comm.rank)
        # outside of the split regions: see the top of this file
        differs = comm.rank if sequence_parallel else 0
        self.whole = Generator().manual_seed(101 + differs)

    def forward(self, x: Float[Tensor, "b s h"]) -> Float[Tensor, "b s h"]:
        """The layer, on all tokens, or on this rank's s/t where the sequence is cut."""
        if self.recompute == "full":
            return recompute(self._layer, x, generators=(self.split, self.whole))
        return self._layer(x)

    def _layer(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = self._column_parallel(y, self.q, self.k, self.v)
        if self.recompute == "selective":
            z = recompute(self._attention, q, k, v, generators=(self.split,))
        else:
            z = self._attention(q, k, v)
        x = x + dropout(self._row_parallel(z, self.o), self.p, self.whole)
        y = self.norms[1](x)
        (u,) = self._column_parallel(y, self.up)
        z = self._row_parallel(F.gelu(u), self.down)
        return x + dropout(z, self.p, self.whole)

    def _attention(
        self, q: Float[Tensor, "b s h_t"], k: Tensor, v: Tensor
    ) -> Float[Tensor, "b s h_t"]:
        """Attention without its projections: large to keep, cheap to compute again."""
        q = self._split_heads(q)
        k = self._split_heads(k)
        v = self._split_heads(v)
        # Softmax saves its output; dropout saves its mask. The products save their
        # inputs. The sum with `future` saves nothing.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (b, a/t, s, s)
        weights = (scores + self.future).softmax(-1)
        out = dropout(weights, self.p, self.split) @ v  # (b, a/t, s, d)
        return out.transpose(1, 2).flatten(2)  # (b, a/t, s, d) → (b, s, h/t)

    def _split_heads(self, x: Float[Tensor, "b s h_t"]) -> Float[Tensor, "b a_t s d"]:
        local_heads = self.shape.a // self.comm.size
        # (b, s, h/t) → (b, s, a/t, d) → (b, a/t, s, d)
        return x.unflatten(2, (local_heads, -1)).transpose(1, 2)

    def _column_parallel(self, y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if self.sequence_parallel:
            return linears_of_shard(y, self.comm, *weights)
        y = copy_to_ranks(y, self.comm)
        return tuple(F.linear(y, weight) for weight in weights)

    def _row_parallel(self, z: Tensor, weight: Tensor) -> Tensor:
        partial = F.linear(z, weight)
        if self.sequence_parallel:
            return scatter_sequence(partial, self.comm)
        return sum_over_ranks(partial, self.comm)
