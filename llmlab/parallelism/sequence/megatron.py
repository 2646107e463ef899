"""Megatron's sequence parallelism: no activation is whole on any rank.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2. Tensor
parallelism cuts the matrix products and leaves norms, residuals and dropouts whole on
each rank. These treat every token alone, so here they are cut along the sequence. Each
rank keeps T/p tokens; g collects all tokens before a product, and ḡ distributes them
again after it:

    g   all-gather forward, reduce-scatter backward
        (B, T/p, d) → (B, T, d)
    ḡ   reduce-scatter forward, all-gather backward
        (B, T, d), a partial sum on each rank → (B, T/p, d)

    x_r  (B, T/p, d)   RMSNorm   g   W_q, W_k, W_v by columns   attention
                                     W_o by rows                ḡ   + x_r
    x_r  (B, T/p, d)   RMSNorm   g   W_gate, W_up by columns    silu, ⊙
                                     W_down by rows             ḡ   + x_r

An all-reduce *is* a reduce-scatter and an all-gather, so g and ḡ send what f and g of
tensor parallelism send. The gathered input would be the only whole activation that is
left. `linears_of_shard` does not keep it: it saves the shard, and gathers it again in
backward, for the gradient of the weights (the paper's last paragraph of 4.2.2).

The embedding ends with ḡ, and `lm_head` begins with g, so that the vocabulary-parallel
loss sees all tokens as before.

A parameter that is replicated but sees T/p tokens only (the norms' weights, the biases
after ḡ) gets a partial gradient. `sum_replicated_gradients` must run between `backward`
and the optimizer's step. Without it the ranks drift apart.

    B   batch
    T   tokens; Tp is T/p
    p   ranks
    d   hidden_size
    D   head_dim
    n   this rank's heads
    Vp  this rank's columns of the vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.llama import rotate
from llmlab.parallelism import tensor
from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.shards import sum_over_ranks_in_place
from llmlab.parallelism.tensor import copy_to_ranks, cut_of_parameter, gather_state

__all__ = [
    "GatherSequence",
    "LinearsOfShard",
    "ScatterSequence",
    "gather_sequence",
    "gather_state",
    "linears_of_shard",
    "pad_to_multiple",
    "parallelize",
    "replicated",
    "scatter_sequence",
    "sum_replicated_gradients",
]

# g and ḡ; dimension 1 is the sequence ------------------------------------------------


class GatherSequence(torch.autograd.Function):
    """g: all-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        """(B, T/p, d) → (B, T, d)."""
        ctx.comm = comm
        return comm.all_gather(x, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(B, T, d) → (B, T/p, d), summed over ranks."""
        return ctx.comm.reduce_scatter(grad, dim=1), None


class ScatterSequence(torch.autograd.Function):
    """ḡ: reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        """(B, T, d) → (B, T/p, d), summed over ranks."""
        ctx.comm = comm
        return comm.reduce_scatter(x, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(B, T/p, d) → (B, T, d)."""
        return ctx.comm.all_gather(grad, dim=1), None


class LinearsOfShard(torch.autograd.Function):
    """g, then several linears; saves the shard instead of what g gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, *weights: Tensor):
        """(B, T/p, d) → one (B, T, out) per weight."""
        ctx.comm = comm
        ctx.save_for_backward(x, *weights)  # the shard, not `whole`
        whole = comm.all_gather(x, dim=1)  # (B, T, d)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        """The gradients of the shard and of each weight."""
        x, *weights = ctx.saved_tensors
        # the second time, because it was not kept
        whole = ctx.comm.all_gather(x, dim=1).flatten(0, 1)  # (B, T, d) → (B·T, d)
        dw = [grad.flatten(0, 1).T @ whole for grad in grads]  # (out, B·T) (B·T, d)
        # (B, T, d): one partial sum for all of them, so one reduce-scatter
        dx = sum(grad @ weight for grad, weight in zip(grads, weights, strict=True))
        return ctx.comm.reduce_scatter(dx, dim=1), None, *dw


def gather_sequence(
    x: Float[Tensor, "B Tp d"], comm: Communicator
) -> Float[Tensor, "B T d"]:
    """g: all ranks' tokens; backward, this rank's tokens of the summed gradient."""
    return GatherSequence.apply(x, comm)


def scatter_sequence(
    x: Float[Tensor, "B T d"], comm: Communicator
) -> Float[Tensor, "B Tp d"]:
    """ḡ: this rank's tokens of the sum over ranks; backward, all ranks' gradients.

    Raises:
        ValueError: T is not a multiple of the number of ranks.
    """
    return ScatterSequence.apply(x, comm)


def linears_of_shard(
    x: Float[Tensor, "B Tp d"], comm: Communicator, *weights: Float[Tensor, "out d"]
) -> tuple[Float[Tensor, "B T out"], ...]:
    """g(x) Wᵀ for each W, with one all-gather forward. Saves x, not g(x).

    Backward has one all-gather more, and one reduce-scatter.
    """
    return LinearsOfShard.apply(x, comm, *weights)


# The layers --------------------------------------------------------------------------


def _column_parallel(
    x: Float[Tensor, "B Tp d"], modules: tuple[nn.Module, ...], comm: Communicator
) -> list[Float[Tensor, "B T out_p"]]:
    """g, then several column-parallel linears with one all-gather for all."""
    weights = [_of_all_replicas(module, module.weight) for module in modules]
    outputs = []
    for module, y in zip(modules, linears_of_shard(x, comm, *weights), strict=True):
        if module.bias is not None:
            y = y + _of_all_replicas(module, module.bias)
        outputs.append(y)
    return outputs


def _of_all_replicas(module: nn.Module, parameter: Tensor) -> Tensor:
    """f around a parameter that several ranks hold a copy of (grouped-query attention).

    Others are returned as they are.
    """
    if hasattr(module, "replicas"):
        return copy_to_ranks(parameter, module.replicas)
    return parameter


def _row_parallel(
    y: Float[Tensor, "B T in_p"], module: nn.Module, comm: Communicator
) -> Float[Tensor, "B Tp d"]:
    """A row-parallel linear, then ḡ; the bias once, after the sum."""
    z = scatter_sequence(F.linear(y, module.weight), comm)
    if module.bias is None:
        return z
    return z + module.bias


class SequenceAttention(nn.Module):
    """Attention over all T tokens with this rank's heads; T/p tokens in and out."""

    def __init__(self, attention: nn.Module, comm: Communicator) -> None:
        super().__init__()
        self.q_proj = attention.q_proj
        self.k_proj = attention.k_proj
        self.v_proj = attention.v_proj
        self.o_proj = attention.o_proj
        self.head_dim = attention.head_dim
        self.comm = comm

    def forward(
        self, x: Float[Tensor, "B Tp d"], rope, mask, cache, attention
    ) -> Float[Tensor, "B Tp d"]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = _column_parallel(x, projections, self.comm)  # (B, T, n·D)
        q = rotate(self._split_heads(q), *rope)
        k = rotate(self._split_heads(k), *rope)
        v = self._split_heads(v)
        out = attention(q, k, v, mask)
        out = out.transpose(1, 2).flatten(2)  # (B, n, T, D) → (B, T, n·D)
        return _row_parallel(out, self.o_proj, self.comm)

    def _split_heads(self, t: Float[Tensor, "B T nD"]) -> Float[Tensor, "B n T D"]:
        # (B, T, n·D) → (B, T, n, D) → (B, n, T, D)
        return t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class SequenceMLP(nn.Module):
    """SwiGLU with this rank's channels, from T/p tokens to T/p tokens."""

    def __init__(self, mlp: nn.Module, comm: Communicator) -> None:
        super().__init__()
        self.gate_proj = mlp.gate_proj
        self.up_proj = mlp.up_proj
        self.down_proj = mlp.down_proj
        self.comm = comm

    def forward(self, x: Float[Tensor, "B Tp d"]) -> Float[Tensor, "B Tp d"]:
        gate, up = _column_parallel(x, (self.gate_proj, self.up_proj), self.comm)
        return _row_parallel(F.silu(gate) * up, self.down_proj, self.comm)


class SequenceEmbedding(nn.Module):
    """Looks up the tokens that this rank has, zeros for the others; then ḡ.

    Each rank gets the sum for its T/p tokens.
    """

    def __init__(self, weight: nn.Parameter, comm: Communicator) -> None:
        super().__init__()
        self.weight = weight
        self.comm = comm

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B Tp d"]:
        rows = len(self.weight)
        local = tokens - self.comm.rank * rows
        is_here = (local >= 0) & (local < rows)
        found = F.embedding(local.clamp(0, rows - 1), self.weight)  # (B, T, d)
        return scatter_sequence(found * is_here[..., None], self.comm)


class SequenceHead(nn.Module):
    """g, then this rank's columns of the logits, for all tokens."""

    def __init__(self, weight: nn.Parameter, comm: Communicator) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None
        self.comm = comm

    def forward(self, x: Float[Tensor, "B Tp d"]) -> Float[Tensor, "B T Vp"]:
        (logits,) = _column_parallel(x, (self,), self.comm)
        return logits


# The model ---------------------------------------------------------------------------


def parallelize(model: nn.Module, comm: Communicator) -> nn.Module:
    """Keep this rank's shard of our `Llama`, in place, and return it.

    The shards are those of tensor parallelism, with g and ḡ in place of f and g. Call
    the model with all T tokens, T a multiple of the number of ranks
    (`pad_to_multiple`). The logits are those of all tokens and of this rank's ⌈V/p⌉
    columns, for `vocab_parallel_cross_entropy`. For training: a cache and a mask are
    refused. Packed documents are kept apart as in the whole model, by `position_ids`
    (of all T tokens) that start anew.

    Raises:
        ValueError: heads or MLP channels do not divide over the ranks.
    """
    tensor.parallelize(model, comm)
    embedding = model.model.embed_tokens.weight
    head = model.lm_head.weight
    for block in model.model.layers:
        block.self_attn = SequenceAttention(block.self_attn, comm)
        block.mlp = SequenceMLP(block.mlp, comm)
    model.model.embed_tokens = SequenceEmbedding(embedding, comm)
    model.lm_head = SequenceHead(head, comm)
    model.register_forward_pre_hook(_AddPositions(comm.size), with_kwargs=True)
    return model


class _AddPositions:
    """A forward pre-hook: the positions of all T tokens.

    The model would count the T/p tokens of its activations, but its attention sees T.
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
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if positions.shape[-1] != T:
            raise ValueError(
                f"position_ids are {positions.shape[-1]} numbers for {T} tokens: each"
                " rank gives those of all tokens"
            )
        return args, kwargs | {"position_ids": positions}


def pad_to_multiple(
    tokens: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    p: int,
    *,
    ignore_index: int = -100,
) -> tuple[Int[Tensor, "B Tpad"], Int[Tensor, "B Tpad"]]:
    """Tokens and targets with the fewest columns added that make T a multiple of p.

    The added tokens (number 0) come last, so causal attention never looks at them.
    The loss ignores their targets.
    """
    missing = -tokens.shape[1] % p
    padded_tokens = F.pad(tokens, (0, missing))
    padded_targets = F.pad(targets, (0, missing), value=ignore_index)
    return padded_tokens, padded_targets


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank holds whole and applies to its own tokens.

    These are the norms, and the biases after ḡ.
    """
    return [
        parameter
        for name, parameter in model.named_parameters()
        if cut_of_parameter(name) is None
    ]


def sum_replicated_gradients(model: nn.Module, comm: Communicator) -> None:
    """Sum the gradients of `replicated(model)` over ranks, in place, in one message."""
    trained = [w for w in replicated(model) if w.requires_grad]
    sum_over_ranks_in_place([w.grad for w in trained], comm)
