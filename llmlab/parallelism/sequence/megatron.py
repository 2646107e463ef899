"""Megatron's sequence parallelism: tensor parallelism in which no activation is whole
on any rank.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2. Tensor
parallelism cuts the matrix products and leaves norms, residuals and dropouts whole on
each rank. Here those are cut along the sequence:

    x_r  (B, T/p, d)     RMSNorm     g     W_q, W_k, W_v by columns     attention
                                           W_o by rows     ḡ     + x_r
    x_r  (B, T/p, d)     RMSNorm     g     W_gate, W_up by columns      silu, ⊙
                                           W_down by rows  ḡ     + x_r

The embedding ends with ḡ, and `lm_head` begins with g, so that the vocabulary-parallel
loss sees all tokens as before.

What is replicated and sees T/p tokens only (the norms' weights, the biases after ḡ)
gets a partial gradient: `sum_replicated_gradients` must run between `backward` and the
optimizer's step. Without it the ranks drift apart.

    B  batch      T  tokens      p  ranks      d  hidden_size      D  head_dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.llama import rotate
from llmlab.parallelism import tensor
from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.fg import linears_of_shard, scatter_sequence
from llmlab.parallelism.tensor import PLAN, copy_to_ranks, gather_state

__all__ = [
    "gather_state",
    "pad_to_multiple",
    "parallelize",
    "replicated",
    "sum_replicated_gradients",
]

_RULE = {module: dim for module, dim, _ in PLAN}


def _columns(
    x: Float[Tensor, "B Tp d"], modules: tuple[nn.Module, ...], comm: Communicator
) -> list[Tensor]:
    """g, then several column-parallel linears, of which a copy may be held by several
    ranks (grouped-query attention).
    """
    shared = lambda m, t: copy_to_ranks(t, m.replicas) if hasattr(m, "replicas") else t  # noqa: E731
    ys = linears_of_shard(x, comm, *(shared(m, m.weight) for m in modules))
    return [
        y if m.bias is None else y + shared(m, m.bias)
        for y, m in zip(ys, modules, strict=True)
    ]


def _rows(
    y: Float[Tensor, "B T in_p"], module: nn.Module, comm: Communicator
) -> Float[Tensor, "B Tp d"]:
    """A row-parallel linear, then ḡ; the bias once, after the sum."""
    z = scatter_sequence(F.linear(y, module.weight), comm)
    return z if module.bias is None else z + module.bias


class SequenceAttention(nn.Module):
    """Attention over all T tokens with this rank's heads, from T/p tokens to T/p
    tokens.
    """

    def __init__(self, attention: nn.Module, comm: Communicator) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            getattr(attention, f"{x}_proj") for x in "qkvo"
        )
        self.head_dim, self.comm = attention.head_dim, comm

    def forward(
        self, x: Float[Tensor, "B Tp d"], rope, mask, cache, attention
    ) -> Float[Tensor, "B Tp d"]:
        q, k, v = _columns(x, (self.q_proj, self.k_proj, self.v_proj), self.comm)
        B, T, _ = q.shape
        heads = lambda t: t.view(B, T, -1, self.head_dim).transpose(1, 2)  # noqa: E731  (B, T, n·D) → (B, n, T, D)
        out = attention(
            rotate(heads(q), *rope), rotate(heads(k), *rope), heads(v), mask
        )
        # (B, n, T, D) → (B, T, n·D)
        return _rows(out.transpose(1, 2).reshape(B, T, -1), self.o_proj, self.comm)


class SequenceMLP(nn.Module):
    """SwiGLU with this rank's channels, from T/p tokens to T/p tokens."""

    def __init__(self, mlp: nn.Module, comm: Communicator) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.comm = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            comm,
        )

    def forward(self, x: Float[Tensor, "B Tp d"]) -> Float[Tensor, "B Tp d"]:
        gate, up = _columns(x, (self.gate_proj, self.up_proj), self.comm)
        return _rows(F.silu(gate) * up, self.down_proj, self.comm)


class SequenceEmbedding(nn.Module):
    """Looks up the tokens that this rank has, zeros for the others, and ḡ: each rank
    gets the sum for its T/p tokens.
    """

    def __init__(self, weight: nn.Parameter, comm: Communicator) -> None:
        super().__init__()
        self.weight, self.comm = weight, comm

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B Tp d"]:
        rows = len(self.weight)
        local = tokens - self.comm.rank * rows
        inside = (local >= 0) & (local < rows)
        return scatter_sequence(
            F.embedding(local.clamp(0, rows - 1), self.weight) * inside[..., None],
            self.comm,
        )


class SequenceHead(nn.Module):
    """g, then this rank's columns of the logits, for all tokens."""

    def __init__(self, weight: nn.Parameter, comm: Communicator) -> None:
        super().__init__()
        self.weight, self.bias, self.comm = weight, None, comm

    def forward(self, x: Float[Tensor, "B Tp d"]) -> Float[Tensor, "B T Vp"]:
        return _columns(x, (self,), self.comm)[0]


def parallelize(model: nn.Module, comm: Communicator) -> nn.Module:
    """Keep this rank's shard of our `Llama`, in place, and return it: tensor
    parallelism whose doors are g and ḡ.

    Call it with all T tokens, T a multiple of the number of ranks (`pad_to_multiple`).
    The logits are those of all tokens and of this rank's ⌈V/p⌉ columns, for
    `vocab_parallel_cross_entropy`. For training: a cache and a padding mask are
    refused.

    Raises:
        ValueError: heads or MLP channels do not divide over the ranks.
    """
    # the same shards; what follows changes the doors only
    tensor.parallelize(model, comm)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    for block in model.model.layers:
        block.self_attn = SequenceAttention(block.self_attn, comm)
        block.mlp = SequenceMLP(block.mlp, comm)
    model.model.embed_tokens = SequenceEmbedding(embedding, comm)
    model.lm_head = SequenceHead(head, comm)
    model.register_forward_pre_hook(_Positions(comm.size), with_kwargs=True)
    return model


class _Positions:
    """Tells the model that its activations hold T/p tokens but its attention sees all
    T.
    """

    def __init__(self, p: int) -> None:
        self.p = p

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        tokens = args[0] if args else kwargs["input_ids"]
        T = tokens.shape[1]
        if T % self.p:
            raise ValueError(
                f"{T} tokens must be a multiple of the {self.p} ranks: see"
                " pad_to_multiple"
            )
        for name in ("cache", "attention_mask", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported under sequence parallelism")
        return (
            args,
            {"position_ids": torch.arange(T, device=tokens.device)[None]} | kwargs,
        )


def pad_to_multiple(
    tokens: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    p: int,
    *,
    ignore_index: int = -100,
) -> tuple[Int[Tensor, "B Tp"], Int[Tensor, "B Tp"]]:
    """Tokens and targets with the fewest columns added, on the right, that make T a
    multiple of p.

    The added tokens (number 0) come last, so causal attention never looks at them;
    their targets are ignored by the loss.
    """
    more = -tokens.shape[1] % p
    return F.pad(tokens, (0, more)), F.pad(targets, (0, more), value=ignore_index)


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank holds whole and applies to its own tokens: norms,
    and biases after ḡ.
    """
    cut = lambda leaf, kind: leaf in _RULE and not (kind == "bias" and _RULE[leaf] == 1)  # noqa: E731
    return [w for name, w in model.named_parameters() if not cut(*name.split(".")[-2:])]


def sum_replicated_gradients(model: nn.Module, comm: Communicator) -> None:
    """Sum the gradients of `replicated(model)` over ranks, in place, in one
    all-reduce.
    """
    grads = [w.grad for w in replicated(model) if w.grad is not None]
    total = comm.all_reduce(torch.cat([g.flatten() for g in grads]))
    for g, piece in zip(grads, total.split([g.numel() for g in grads]), strict=True):
        g.copy_(piece.view_as(g))
