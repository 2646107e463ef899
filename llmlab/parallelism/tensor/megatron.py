"""1-D tensor parallelism: every matrix of a Llama cut over p ranks, as in Megatron-LM.

Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3. For an MLP,
Y = φ(X A), Z = Y B:

    A = [A_1 … A_p]  by columns    Y_i = φ(f(X) A_i)       no communication forward:
                                                           φ acts on each number alone
    B = [B_1; …; B_p]  by rows     Z   = g(Σ_i Y_i B_i)    one all-reduce forward

f and g make the split layer differentiable. They are conjugate:

    f   identity forward, all-reduce backward.   It stands where a replicated activation
        enters a split region: each rank's gradient for it is a partial sum.
    g   all-reduce forward, identity backward.   It stands where the partial sums of a
        split region become one replicated activation.

Attention likewise: the columns of W_q, W_k, W_v are cut by heads, and the rows of W_o
the same way. A block costs two all-reduces forward and two backward. Norms are
replicated, and their gradients are equal on all ranks without communication. (PyTorch
keeps a linear's weight as (out, in): what the paper calls columns is dimension 0 here,
and rows are dimension 1.)

Grouped-query attention with K < p: each key/value head is held by p/K ranks. Each copy
sees the gradient of its own query heads only. So f around the *weight*, over those p/K
ranks, sums it, and the copies stay equal.

The vocabulary: rank r holds rows r·V/p … (r+1)·V/p of the embedding and of the output
projection. To gather the logits would send b·s·V numbers; the loss needs three numbers
per token:

    m    = max over all ranks of max_j z_j
    s    = Σ over all ranks of Σ_j exp(z_j − m)
    loss = log s + (m − z_target)
    dz_j = (exp(z_j − m) / s − [j = target]) · dloss     (no communication)

Simplified: dropout and sequence parallelism are left to `06-sequence`; `region_seed`
says how dropout must be seeded.

    p   ranks; r is this one
    d   hidden_size
    H   query heads
    K   key/value heads
    D   head_dim
    V   vocabulary
    Vp  ⌈V/p⌉, rows of the vocabulary per rank; the last rank's are padded and masked
    N   tokens
    z   logits
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator

# f and g -----------------------------------------------------------------------------


class CopyToRanks(torch.autograd.Function):
    """f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        """x as it is."""
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """The sum of all ranks' partial gradients."""
        return ctx.comm.all_reduce(grad), None


class SumOverRanks(torch.autograd.Function):
    """g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        """The sum of all ranks' partial x."""
        return comm.all_reduce(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """The gradient as it is: it is the same on all ranks."""
        return grad, None


class _GatherFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm = comm
        ctx.dim = dim
        ctx.length = x.shape[dim]
        return comm.all_gather(x, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        start = ctx.comm.rank * ctx.length
        return grad.narrow(ctx.dim, start, ctx.length), None, None


def copy_to_ranks(x: Tensor, comm: Communicator) -> Tensor:
    """f: x forward, the sum of all ranks' gradients backward."""
    return CopyToRanks.apply(x, comm)


def sum_over_ranks(x: Tensor, comm: Communicator) -> Tensor:
    """g: the sum of all ranks' x forward, the gradient as it is backward."""
    return SumOverRanks.apply(x, comm)


def gather_from_ranks(x: Tensor, comm: Communicator, dim: int = -1) -> Tensor:
    """All ranks' x joined along `dim`; backward, each rank keeps its own piece.

    This is right where what follows is replicated: then every rank holds the same,
    whole gradient.
    """
    return _GatherFromRanks.apply(x, comm, dim % x.dim())


# The layers --------------------------------------------------------------------------


def _optional_parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value)


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
        self.weight = nn.Parameter(weight)
        self.bias = _optional_parameter(bias)
        self.comm = comm
        self.gather = gather

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out_p"]:
        """This rank's columns of the output, or all of them when `gather`."""
        y = F.linear(copy_to_ranks(x, self.comm), self.weight, self.bias)
        if self.gather:
            return gather_from_ranks(y, self.comm)
        return y


class RowParallelLinear(nn.Module):
    """Z = g(Y_i B_i) + b: this rank's slice of the input, a whole output."""

    def __init__(
        self, weight: Float[Tensor, "out in_p"], bias: Tensor | None, comm: Communicator
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = _optional_parameter(bias)
        self.comm = comm

    def forward(self, y: Float[Tensor, "... in_p"]) -> Float[Tensor, "... out"]:
        """The whole output, equal on all ranks."""
        z = sum_over_ranks(F.linear(y, self.weight), self.comm)
        if self.bias is None:
            return z
        # after the sum: every rank has the bias, and it must be added once
        return z + self.bias


class SharedHeadLinear(nn.Module):
    """A key or value projection that several ranks hold a copy of (K < p).

    f around the weight keeps the copies equal.
    """

    def __init__(
        self, weight: Float[Tensor, "D in"], bias: Tensor | None, replicas: Communicator
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = _optional_parameter(bias)
        self.replicas = replicas

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... D"]:
        """One head's keys or values."""
        weight = copy_to_ranks(self.weight, self.replicas)
        bias = None
        if self.bias is not None:
            bias = copy_to_ranks(self.bias, self.replicas)
        return F.linear(x, weight, bias)


# The vocabulary ----------------------------------------------------------------------


def rows_per_rank(vocab_size: int, p: int) -> int:
    """⌈V/p⌉: all ranks hold equally many rows, so V is padded to a multiple of p."""
    return -(-vocab_size // p)


def _local_rows(
    tokens: Int[Tensor, " ..."], rows: int, rank: int
) -> tuple[Int[Tensor, " ..."], Bool[Tensor, " ..."]]:
    """Each token's row on this rank (0 where it is on another), and whether it is here.

    Args:
        rows: how many rows of the vocabulary each rank holds.
    """
    local = tokens - rank * rows
    is_here = (local >= 0) & (local < rows)
    return local.where(is_here, torch.zeros_like(local)), is_here


class VocabParallelEmbedding(nn.Module):
    """Looks up the tokens that this rank has, zeros for the others; then g."""

    def __init__(self, weight: Float[Tensor, "Vp d"], comm: Communicator) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.comm = comm

    def forward(self, tokens: Int[Tensor, " ..."]) -> Float[Tensor, "... d"]:
        """Embeddings of all tokens, on every rank."""
        local, is_here = _local_rows(tokens, len(self.weight), self.comm.rank)
        found = F.embedding(local, self.weight) * is_here[..., None]  # (…, d)
        return sum_over_ranks(found, self.comm)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss of each token from slices of its logits, which are never gathered."""

    @staticmethod
    def forward(
        ctx,
        logits: Float[Tensor, "N Vp"],
        targets: Int[Tensor, " N"],
        comm: Communicator,
        vocab_size: int,
    ) -> Float[Tensor, " N"]:
        """log s + (m − z_target), with two all-reduces."""
        rows = logits.shape[-1]
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))  # at least fp32
        # the padding of an uneven vocabulary takes no part
        column = comm.rank * rows + torch.arange(rows, device=z.device)  # (Vp,)
        z = z.masked_fill(column >= vocab_size, -torch.inf)
        # The maximum must be that of all ranks: the sums of exp(z − m) are added below.
        m = comm.all_reduce(z.amax(-1), op="max")  # (N,)
        e = (z - m[:, None]).exp()  # (N, Vp)
        # z_target is on one rank only; the others contribute zero
        local, is_here = _local_rows(targets, rows, comm.rank)
        z_target = z.gather(1, local[:, None]).squeeze(1)  # (N, 1) → (N,)
        z_target = z_target.where(is_here, torch.zeros_like(m))
        # both sums in one message
        s, z_target = comm.all_reduce(torch.stack([e.sum(-1), z_target]))  # (2, N)
        ctx.save_for_backward(e / s[:, None], local, is_here)
        ctx.dtype = logits.dtype
        return s.log() + (m - z_target)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, " N"]):
        """This rank's slice of dz, from what forward saved alone."""
        softmax, local, is_here = ctx.saved_tensors
        dz = softmax.clone()  # (N, Vp)
        token = torch.arange(len(dz), device=dz.device)
        dz[token, local] -= is_here.to(dz.dtype)
        return (dz * grad[:, None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Float[Tensor, "... Vp"],
    targets: Int[Tensor, " ..."],
    comm: Communicator,
    vocab_size: int,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in fp32, from this rank's slice of the logits.

    The mean is over the targets that are not `ignore_index`. Sends 3 numbers per token
    in 2 all-reduces, and nothing backward.

    Raises:
        ValueError: the slices do not add up to ⌈V/p⌉ columns; a target outside the
            vocabulary.
    """
    rows = logits.shape[-1]
    expected_rows = rows_per_rank(vocab_size, comm.size)
    if rows != expected_rows:
        raise ValueError(
            f"logits have {rows} columns; vocab_size={vocab_size} over {comm.size}"
            f" ranks makes ⌈V/p⌉ = {expected_rows}"
        )
    flat_logits = logits.reshape(-1, rows)  # (…, Vp) → (N, Vp)
    flat_targets = targets.reshape(-1)  # (…) → (N,)
    keep = flat_targets != ignore_index
    outside = (flat_targets < 0) | (flat_targets >= vocab_size)
    if outside[keep].any():
        raise ValueError(
            f"targets must lie in 0 … {vocab_size - 1} or be"
            f" ignore_index={ignore_index}"
        )
    losses = VocabParallelCrossEntropy.apply(
        flat_logits[keep], flat_targets[keep], comm, vocab_size
    )
    return losses.sum() / keep.sum()


# The model ---------------------------------------------------------------------------

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
_CUT_OF_MODULE = {module: (dim, by) for module, dim, by in PLAN}

# f stands before each of these, so that q, k and v share one all-reduce backward
_REGIONS = ("self_attn", "mlp")


def cut_of_parameter(name: str) -> tuple[int, str] | None:
    """How `PLAN` cuts a parameter: (dimension, by what), or None if it stays whole.

    Args:
        name: as in the model's state dict, "model.layers.0.mlp.up_proj.weight".
    """
    module, kind = name.split(".")[-2:]
    if module not in _CUT_OF_MODULE:
        return None
    dim, by = _CUT_OF_MODULE[module]
    # a row-parallel bias is added after the sum, by every rank
    if kind == "bias" and dim == 1:
        return None
    return dim, by


def parallelize(
    model: nn.Module, comm: Communicator, *, gather_output: bool = False
) -> nn.Module:
    """Keep this rank's shard of every matrix, in place, and return the model.

    Every rank must hold the same master weights. Parameter names stay, and what was
    frozen stays frozen. Works on our `Llama` and on Hugging Face's `LlamaForCausalLM`.

    Args:
        gather_output: whole logits on every rank (for generation); by default each rank
            has its ⌈V/p⌉ columns, which is what `vocab_parallel_cross_entropy` wants.
    Raises:
        ValueError: heads or MLP channels do not divide over the ranks; a matrix is in a
            wrapper (an adapter) or is not of floats. At a forward: a matrix has got a
            wrapper since.
    """
    config = model.config
    p = comm.size
    K = config.num_key_value_heads
    _check_divides(config, p)
    _check_plain(model)
    frozen = [name for name, w in model.named_parameters() if not w.requires_grad]
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    # the ranks that hold the same key/value head
    replicas = comm.split(comm.rank * K // p) if p > K else None
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in _CUT_OF_MODULE:
            sharded = _shard_module(module, leaf, config, comm, replicas, gather_output)
            model.get_submodule(parent).register_module(leaf, sharded)
        elif leaf in _REGIONS:
            module.register_forward_pre_hook(_CopyFirstInput(comm), with_kwargs=True)
            # transformers repeats keys itself
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = config.num_attention_heads // max(K, p)
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model.register_forward_pre_hook(_StayPlain(model))
    return model


def _check_plain(model: nn.Module) -> None:
    """Raises: ValueError: a matrix to be cut is not a plain linear's or embedding's."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in _CUT_OF_MODULE:
            continue
        kind = type(module).__name__
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(
                f"{name} is a {kind}, which cannot be cut: merge adapters for good"
                " before the split"
            )
        if not module.weight.is_floating_point():
            raise ValueError(
                f"{name} is a {kind} of {module.weight.dtype}: only floats can be cut"
            )


class _StayPlain:
    """A forward pre-hook: no cut matrix has got a wrapper since the split.

    The adapter in it would be whole on every rank, and each rank would have only the
    part of its gradient that comes from its own slice.
    """

    def __init__(self, model: nn.Module) -> None:
        self.cut = [n for n, _ in model.named_parameters() if cut_of_parameter(n)]

    def __call__(self, model: nn.Module, _args: tuple) -> None:
        now = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        gone = [name for name in self.cut if name not in now]
        if gone:
            raise ValueError(
                f"{gone[0]} is not where the split left it: adapters on a split matrix"
                " are not supported. Merge them for good before the split"
            )


class _CopyFirstInput:
    """A forward pre-hook: f on the first argument of a region."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        if args:
            return (copy_to_ranks(args[0], self.comm), *args[1:]), kwargs
        # transformers passes it by name
        hidden_states = copy_to_ranks(kwargs["hidden_states"], self.comm)
        return args, kwargs | {"hidden_states": hidden_states}


def _check_divides(config, p: int) -> None:
    H = config.num_attention_heads
    K = config.num_key_value_heads
    if H % p or (K % p and p % K):
        raise ValueError(
            f"{p} ranks cannot share num_attention_heads={H} and"
            f" num_key_value_heads={K}: the number of ranks must divide the query"
            " heads, and divide or be a multiple of the key/value heads"
        )
    if config.intermediate_size % p:
        raise ValueError(
            f"intermediate_size={config.intermediate_size} must be a multiple of the"
            f" {p} ranks"
        )


def _shard_module(
    module: nn.Module,
    leaf: str,
    config,
    comm: Communicator,
    replicas: Communicator | None,
    gather_output: bool,
) -> nn.Module:
    dim, by = _CUT_OF_MODULE[leaf]
    weight = shard(module.weight.detach(), dim, by, config, comm)
    bias = getattr(module, "bias", None)
    if bias is not None:
        if dim == 0:
            bias = shard(bias.detach(), 0, by, config, comm)
        else:
            bias = bias.detach().clone()
    match leaf:
        case "embed_tokens":
            return VocabParallelEmbedding(weight, comm)
        case "lm_head":
            return ColumnParallelLinear(weight, bias, comm, gather_output)
        case "o_proj" | "down_proj":
            return RowParallelLinear(weight, bias, comm)
        case "k_proj" | "v_proj" if replicas is not None:
            return SharedHeadLinear(weight, bias, replicas)
    # The rest is column-parallel, but f stands before the region already: a plain
    # linear with this rank's rows. On "meta" no weights are drawn and thrown away.
    out_features, in_features = weight.shape
    plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    plain.bias = _optional_parameter(bias)
    return plain


def shard(whole: Tensor, dim: int, by: str, config, comm: Communicator) -> Tensor:
    """This rank's piece of a master weight or bias, as a copy of its own.

    Args:
        dim: the dimension that is cut.
        by: what it is cut by, as in `PLAN`.
    """
    p = comm.size
    K = config.num_key_value_heads
    if by == "kv heads" and p > K:
        head = comm.rank * K // p
        return whole.chunk(K, dim)[head].clone()
    if by == "vocabulary":
        padding = rows_per_rank(len(whole), p) * p - len(whole)
        # F.pad counts dimensions from the last: (0, 0) for all but dimension 0
        whole = F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, padding))
    return whole.chunk(p, dim)[comm.rank].clone()


def gather_state(model: nn.Module, comm: Communicator) -> dict[str, Tensor]:
    """The whole model's state dict, on every rank: `parallelize` undone."""
    config = model.config
    p = comm.size
    K = config.num_key_value_heads
    whole = {}
    for name, value in model.state_dict().items():
        cut = cut_of_parameter(name)
        if cut is None:
            whole[name] = value.clone()
            continue
        dim, by = cut
        pieces = list(comm.all_gather(value, dim).chunk(p, dim))
        if by == "kv heads" and p > K:
            pieces = pieces[:: p // K]  # one of the p/K equal copies
        whole[name] = torch.cat(pieces, dim)
        if by == "vocabulary":
            whole[name] = whole[name][: config.vocab_size].clone()  # without padding
    return whole


def region_seed(seed: int, comm: Communicator, *, split: bool) -> int:
    """The seed of a dropout, inside a split region or outside.

    Inside, slices of one activation must be dropped independently, or the mask repeats
    p times: a different seed on each rank. Outside, replicated activations must be
    dropped alike, or the ranks drift apart: the same seed on all ranks. (Megatron-LM's
    offset is 2718, too.)
    """
    if split:
        return seed + 2718 + comm.rank
    return seed
