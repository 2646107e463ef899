"""Tensor parallelism in one dimension: every matrix of a Llama cut over p ranks, as in
Megatron-LM.

Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3. For an MLP, Y = φ(X
A), Z = Y B:

    A = [A_1 … A_p]  by columns     Y_i = φ(X A_i)          no communication: φ acts on
                                    each column alone
    B = [B_1; …; B_p]  by rows      Z = g(Σ_i Y_i B_i)      one all-reduce
    and f before X, so that the gradient of X is summed      one all-reduce backward

Attention likewise: the columns of W_q, W_k, W_v are cut by heads, the rows of W_o the
same way. A block costs two all-reduces forward and two backward. Norms are replicated;
their gradients are equal on all ranks by themselves. (PyTorch keeps a linear's weight
as (out, in): what the paper calls columns are dimension 0 here, its rows dimension 1.)

    p  ranks      d  hidden_size      H  query heads      K  key/value heads      D
                                                          head_dim      V  vocabulary

Grouped-query attention with K < p: each key/value head is held by p/K ranks. Each copy
sees the gradient of its own query heads only, so f around the *weight*, over those p/K
ranks, sums it, and the copies stay equal. Simplified: dropout and sequence parallelism
are left to `06-sequence`; `region_seed` says how dropout must be seeded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.tensor.fg import (
    copy_to_ranks,
    gather_from_ranks,
    sum_over_ranks,
)
from llmlab.parallelism.tensor.vocabulary import VocabParallelEmbedding, rows_per_rank

__all__ = [
    *(
        "PLAN",
        "ColumnParallelLinear",
        "RowParallelLinear",
        "VocabParallelEmbedding",
        "copy_to_ranks",
        "gather_from_ranks",
    ),
    *(
        "gather_state",
        "parallelize",
        "region_seed",
        "sum_over_ranks",
        "vocab_parallel_cross_entropy",
    ),
]

# What is cut: (module, dimension of its weight, by what). A bias is cut with dimension
# 0 and whole with dimension 1.
PLAN = (
    ("embed_tokens", 0, "vocabulary"),
    ("q_proj", 0, "heads"),
    ("k_proj", 0, "kv heads"),
    ("v_proj", 0, "kv heads"),
    ("o_proj", 1, "heads"),
    ("gate_proj", 0, "channels"),
    ("up_proj", 0, "channels"),
    ("down_proj", 1, "channels"),
    ("lm_head", 0, "vocabulary"),
)
_RULE = {module: (dim, by) for module, dim, by in PLAN}
# f stands at the door of each: one all-reduce for q, k, v together
_REGIONS = ("self_attn", "mlp")


class ColumnParallelLinear(nn.Module):
    """Y_i = f(X) A_i + b_i: a whole input, this rank's slice of the output."""

    def __init__(
        self,
        weight: Float[Tensor, "out_p in"],
        bias: Tensor | None,
        comm: Communicator,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(weight),
            None if bias is None else nn.Parameter(bias),
        )
        self.comm, self.gather = comm, gather

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out_p"]:
        """This rank's columns of the output, or all of them when `gather`."""
        y = F.linear(copy_to_ranks(x, self.comm), self.weight, self.bias)
        return gather_from_ranks(y, self.comm) if self.gather else y


class RowParallelLinear(nn.Module):
    """Z = g(Y_i B_i) + b: this rank's slice of the input, a whole output. The bias is
    added once, after the sum.
    """

    def __init__(
        self, weight: Float[Tensor, "out in_p"], bias: Tensor | None, comm: Communicator
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.comm = (
            nn.Parameter(weight),
            None if bias is None else nn.Parameter(bias),
            comm,
        )

    def forward(self, y: Float[Tensor, "... in_p"]) -> Float[Tensor, "... out"]:
        """The whole output, equal on all ranks."""
        z = sum_over_ranks(F.linear(y, self.weight), self.comm)
        return z if self.bias is None else z + self.bias


class SharedHeadLinear(nn.Module):
    """A key or value projection that several ranks hold a copy of (K < p): f around the
    weight keeps the copies equal.
    """

    def __init__(
        self, weight: Float[Tensor, "D in"], bias: Tensor | None, replicas: Communicator
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.replicas = (
            nn.Parameter(weight),
            None if bias is None else nn.Parameter(bias),
            replicas,
        )

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... D"]:
        """One head's keys or values."""
        bias = None if self.bias is None else copy_to_ranks(self.bias, self.replicas)
        return F.linear(x, copy_to_ranks(self.weight, self.replicas), bias)


def parallelize(
    model: nn.Module, comm: Communicator, *, gather_output: bool = False
) -> nn.Module:
    """Keep this rank's shard of every matrix, in place, and return the model. Every
    rank must hold the same master weights.

    Parameter names stay. Works on our `Llama` and on Hugging Face's `LlamaForCausalLM`.

    Args:
        gather_output: whole logits on every rank (for generation); by default each rank
            has its ⌈V/p⌉ columns, which is what `vocab_parallel_cross_entropy` wants.
    Raises:
        ValueError: heads or MLP channels do not divide over the ranks.
    """
    config, tied = model.config, model.lm_head.weight is model.model.embed_tokens.weight
    _check(config, comm.size)
    K, p = config.num_key_value_heads, comm.size
    replicas = comm.split(comm.rank * K // p) if p > K else None
    for name, module in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if leaf in _RULE:
            sharded = _shard_module(module, leaf, config, comm, replicas, gather_output)
            model.get_submodule(name.rpartition(".")[0]).register_module(leaf, sharded)
        elif leaf in _REGIONS:
            module.register_forward_pre_hook(_Door(comm), with_kwargs=True)
            # transformers repeats keys itself
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = config.num_attention_heads // max(K, p)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


class _Door:
    """f on the first argument of a region."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        if args:
            return (copy_to_ranks(args[0], self.comm), *args[1:]), kwargs
        return args, kwargs | {
            "hidden_states": copy_to_ranks(kwargs["hidden_states"], self.comm)
        }


def _check(config, p: int) -> None:
    H, K, ff = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )
    if H % p or (K % p and p % K):
        raise ValueError(
            f"{p} ranks cannot share num_attention_heads={H} and"
            f" num_key_value_heads={K}: the number of ranks must divide the query"
            " heads, and divide or be a multiple of the key/value heads"
        )
    if ff % p:
        raise ValueError(f"intermediate_size={ff} must be a multiple of the {p} ranks")


def _shard_module(
    module: nn.Module,
    leaf: str,
    config,
    comm: Communicator,
    replicas,
    gather_output: bool,
) -> nn.Module:
    dim, by = _RULE[leaf]
    weight = shard(module.weight.detach(), dim, by, config, comm)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias = (
            shard(bias.detach(), 0, by, config, comm)
            if dim == 0
            else bias.detach().clone()
        )
    match leaf:
        case "embed_tokens":
            return VocabParallelEmbedding(weight, comm)
        case "lm_head":
            return ColumnParallelLinear(weight, bias, comm, gather_output)
        case "o_proj" | "down_proj":
            return RowParallelLinear(weight, bias, comm)
        case "k_proj" | "v_proj" if replicas is not None:
            return SharedHeadLinear(weight, bias, replicas)
    plain = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
    )
    plain.weight, plain.bias = (
        nn.Parameter(weight),
        None if bias is None else nn.Parameter(bias),
    )
    return plain


def shard(whole: Tensor, dim: int, by: str, config, comm: Communicator) -> Tensor:
    """This rank's piece of a master weight, as a copy of its own."""
    p, r, K = comm.size, comm.rank, config.num_key_value_heads
    if by == "vocabulary":
        rows = rows_per_rank(len(whole), p)
        whole = F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, rows * p - len(whole)))
    if by == "kv heads" and p > K:
        return whole.chunk(K, dim)[r * K // p].clone()
    return whole.chunk(p, dim)[r].clone()


def gather_state(model: nn.Module, comm: Communicator) -> dict[str, Tensor]:
    """The state dict of the whole model, on every rank, from a parallelized one:
    `parallelize` undone.
    """
    config, p = model.config, comm.size
    whole = {}
    for name, value in model.state_dict().items():
        leaf, kind = name.split(".")[-2:]
        dim, by = _RULE.get(leaf, (None, None))
        if dim is None or (kind == "bias" and dim == 1):
            whole[name] = value.clone()
            continue
        pieces = list(comm.all_gather(value, dim).chunk(p, dim))
        if by == "kv heads" and config.num_key_value_heads < p:
            pieces = pieces[:: p // config.num_key_value_heads]
        whole[name] = torch.cat(pieces, dim)
        if by == "vocabulary":
            whole[name] = whole[name][: config.vocab_size].clone()
    return whole


def region_seed(seed: int, comm: Communicator, *, split: bool) -> int:
    """The seed of a dropout: a different one on each rank inside a split region, the
    same on all ranks outside.

    Replicated activations must be dropped alike or the ranks drift apart; slices of one
    activation must be dropped independently or the mask repeats p times. (Megatron-LM's
    offset is 2718, too.)
    """
    return seed + 2718 + comm.rank if split else seed
