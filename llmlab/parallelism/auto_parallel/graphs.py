"""Graphs to plan for, written by their loops: an MLP and a Llama block.

b     sequences
S     tokens of a sequence; never cut here
d     model width: loop k where it is summed over, n where it is made, K in a norm
f     feed-forward width
g     key/value heads
R     query heads per key/value head
D     head size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlab.parallelism.auto_parallel.sharding import Op


def linear(name: str, dims: str, x: str, w: str, **sizes: int) -> Op:
    """The product of x with a weight w, `dims` as for einsum."""

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum(dims, x, w)

    return Op(name, dims, (x, w), sizes, multiply, weights=(1,))


def norm(name: str, x: str, w: str, b: int, S: int, d: int) -> Op:
    """An RMS norm. K is summed over, and so is never cut."""
    sizes = dict(b=b, S=S, K=d)
    return Op(name, "bSK,K->bSK", (x, w), sizes, rms_norm, weights=(1,), work=4.0)


def add(name: str, x: str, y: str, b: int, S: int, d: int) -> Op:
    """The sum of two tensors: a residual connection."""
    sizes = dict(b=b, S=S, n=d)
    return Op(name, "bSn,bSn->bSn", (x, y), sizes, torch.add, work=1.0)


def mlp(b: int, S: int, d: int, f: int) -> list[Op]:
    """y = gelu(x A) B."""
    return [
        linear("up", "bSk,kf->bSf", "x", "A", b=b, S=S, k=d, f=f),
        Op("gelu", "bSf->bSf", ("up",), dict(b=b, S=S, f=f), F.gelu, work=8.0),
        linear("down", "bSf,fn->bSn", "gelu", "B", b=b, S=S, f=f, n=d),
    ]


def llama_block(b: int, S: int, d: int, f: int, g: int, R: int, D: int) -> list[Op]:
    """One block of a Llama with grouped-query attention.

    RoPE is left out: it has no loops of its own.
    """
    query = dict(b=b, S=S, g=g, R=R, D=D)
    key = dict(b=b, S=S, g=g, D=D)
    hidden = dict(b=b, S=S, f=f)
    attend = Op(
        "attention",
        "bSgRD,bSgD,bSgD->bSgRD",
        ("q", "k", "v"),
        query,
        attention,
        work=4.0 * S,
    )
    act = Op("act", "bSf,bSf->bSf", ("gate", "up"), hidden, swiglu, work=8.0)
    return [
        norm("norm1", "x", "w_norm1", b, S, d),
        linear("q", "bSk,kgRD->bSgRD", "norm1", "w_q", k=d, **query),
        linear("k", "bSk,kgD->bSgD", "norm1", "w_k", k=d, **key),
        linear("v", "bSk,kgD->bSgD", "norm1", "w_v", k=d, **key),
        attend,
        linear("o", "bSgRD,gRDn->bSn", "attention", "w_o", n=d, **query),
        add("add1", "o", "x", b, S, d),
        norm("norm2", "add1", "w_norm2", b, S, d),
        linear("gate", "bSk,kf->bSf", "norm2", "w_gate", k=d, **hidden),
        linear("up", "bSk,kf->bSf", "norm2", "w_up", k=d, **hidden),
        act,
        linear("down", "bSf,fn->bSn", "act", "w_down", n=d, **hidden),
        add("add2", "down", "add1", b, S, d),
    ]


def rms_norm(
    x: Float[Tensor, "b S K"], w: Float[Tensor, " K"], eps: float = 1e-6
) -> Float[Tensor, "b S K"]:
    """x / RMS(x) · w, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


def swiglu(
    gate: Float[Tensor, "b S f"], up: Float[Tensor, "b S f"]
) -> Float[Tensor, "b S f"]:
    """silu(gate) ⊙ up."""
    return F.silu(gate) * up


def attention(
    q: Float[Tensor, "b S g R D"],
    k: Float[Tensor, "b S g D"],
    v: Float[Tensor, "b S g D"],
) -> Float[Tensor, "b S g R D"]:
    """Causal attention on the heads of one shard."""
    S = q.shape[1]
    D = q.shape[-1]
    # s: token that asks, t: token that is looked at; (b, g, R, S, S)
    scores = torch.einsum("bsgrd,btgd->bgrst", q, k) / D**0.5
    future = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bgrst,btgd->bsgrd", probs, v)  # (b, S, g, R, D)


def leaves(graph: list[Op], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs and weights of a graph, and "grad" for its last output."""
    generator = torch.Generator().manual_seed(seed)
    made = {op.name for op in graph}
    found: dict[str, Tensor] = {}
    for op in graph:
        for name, dims in zip(op.inputs, op.reads, strict=True):
            if name in made or name in found:
                continue
            shape = [op.sizes[loop] for loop in dims]
            scale = shape[0] ** 0.5 if len(shape) > 1 else 1
            found[name] = torch.randn(shape, generator=generator) / scale
    last = graph[-1]
    shape = [last.sizes[loop] for loop in last.writes]
    found["grad"] = torch.randn(shape, generator=generator)
    return found


# The loop that Megatron cuts along the tensor axis: first columns, then rows.
MEGATRON = {
    "q": "g",
    "k": "g",
    "v": "g",
    "attention": "g",
    "o": "g",
    "gate": "f",
    "up": "f",
    "act": "f",
    "gelu": "f",
    "down": "f",
}


def by_hand(
    graph: list[Op], data: int | None = 0, tensor: int | None = 1, axes: int = 2
) -> dict[str, tuple[str, ...]]:
    """The usual plan: data parallelism along one axis, Megatron along another.

    Norms and additions are computed whole along the tensor axis, as Megatron does
    without sequence parallelism.

    Args:
        data: the mesh axis that cuts the sequences; None: no axis does.
        tensor: the mesh axis that cuts the weights; None: no axis does.
        axes: how many axes the mesh has.
    """
    plan = {}
    for op in graph:
        loops = [""] * axes
        if data is not None:
            loops[data] = "b"
        if tensor is not None:
            loops[tensor] = MEGATRON.get(op.name, "")
        plan[op.name] = tuple(loops)
    return plan
