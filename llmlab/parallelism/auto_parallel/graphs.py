"""Graphs to plan for: an MLP and a Llama block, written by their loops.

b  sequences      S  tokens (never cut here)      k, n  model width as it is summed
                                                        over, or made      f
                                                        feed-forward
g  key/value heads      R  query heads for each of them      D  head size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.parallelism.auto_parallel.sharding import Op


def _product(dims: str):
    return lambda x, w: torch.einsum(dims, x, w)


def linear(name: str, dims: str, x: str, w: str, **sizes: int) -> Op:
    """A product with a weight: `dims` as for einsum."""
    return Op(name, dims, (x, w), sizes, _product(dims), (1,))


def mlp(b: int, S: int, d: int, f: int) -> list[Op]:
    """y = gelu(x A) B."""
    return [
        linear("up", "bSk,kf->bSf", "x", "A", b=b, S=S, k=d, f=f),
        Op("gelu", "bSf->bSf", ("up",), dict(b=b, S=S, f=f), F.gelu, work=8.0),
        linear("down", "bSf,fn->bSn", "gelu", "B", b=b, S=S, f=f, n=d),
    ]


def llama_block(b: int, S: int, d: int, f: int, g: int, R: int, D: int) -> list[Op]:
    """One block of a Llama with grouped-query attention. RoPE is left out: it has no
    loops of its own.
    """
    shape, ff = dict(b=b, S=S), dict(b=b, S=S, f=f)
    heads = dict(b=b, S=S, g=g, R=R, D=D)
    return [
        Op(
            "norm1",
            "bSK,K->bSK",
            ("x", "w_norm1"),
            dict(b=b, S=S, K=d),
            _rms_norm,
            (1,),
            4.0,
        ),
        linear("q", "bSk,kgRD->bSgRD", "norm1", "w_q", k=d, **heads),
        linear("k", "bSk,kgD->bSgD", "norm1", "w_k", k=d, **shape, g=g, D=D),
        linear("v", "bSk,kgD->bSgD", "norm1", "w_v", k=d, **shape, g=g, D=D),
        Op(
            "attention",
            "bSgRD,bSgD,bSgD->bSgRD",
            ("q", "k", "v"),
            heads,
            attention,
            work=4.0 * S,
        ),
        linear("o", "bSgRD,gRDn->bSn", "attention", "w_o", n=d, **heads),
        Op(
            "add1", "bSn,bSn->bSn", ("o", "x"), dict(b=b, S=S, n=d), torch.add, work=1.0
        ),
        Op(
            "norm2",
            "bSK,K->bSK",
            ("add1", "w_norm2"),
            dict(b=b, S=S, K=d),
            _rms_norm,
            (1,),
            4.0,
        ),
        linear("gate", "bSk,kf->bSf", "norm2", "w_gate", k=d, **ff),
        linear("up", "bSk,kf->bSf", "norm2", "w_up", k=d, **ff),
        Op(
            "act",
            "bSf,bSf->bSf",
            ("gate", "up"),
            ff,
            lambda a, b: F.silu(a) * b,
            work=8.0,
        ),
        linear("down", "bSf,fn->bSn", "act", "w_down", n=d, **ff),
        Op(
            "add2",
            "bSn,bSn->bSn",
            ("down", "add1"),
            dict(b=b, S=S, n=d),
            torch.add,
            work=1.0,
        ),
    ]


def _rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on local heads: q (b, S, g, R, D), k and v (b, S, g, D)."""
    S, D = q.shape[1], q.shape[-1]
    scores = torch.einsum("bsgrd,btgd->bgrst", q, k) / D**0.5
    mask = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum(
        "bgrst,btgd->bsgrd", scores.masked_fill(mask, float("-inf")).softmax(-1), v
    )


def leaves(graph: list[Op], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs and weights of a graph, and "grad" for its last output."""
    dice, made = torch.Generator().manual_seed(seed), {op.name for op in graph}
    found = {}
    for op in graph:
        for name, dims in zip(op.inputs, op.reads, strict=True):
            if name not in made and name not in found:
                shape = [op.sizes[x] for x in dims]
                found[name] = torch.randn(shape, generator=dice) / (
                    shape[0] ** 0.5 if len(shape) > 1 else 1
                )
    last = graph[-1]
    found["grad"] = torch.randn([last.sizes[x] for x in last.writes], generator=dice)
    return found


def by_hand(
    graph: list[Op], data: int | None = 0, tensor: int | None = 1, axes: int = 2
) -> dict[str, tuple[str, ...]]:
    """The usual plan: sequences along axis `data`; column then row (Megatron) along
    axis `tensor`. None: axis unused.

    Norms and additions are computed whole along the tensor axis, as Megatron does
    without sequence parallelism.
    """
    rows = {"o": "g", "down": "f"}
    columns = {
        "q": "g",
        "k": "g",
        "v": "g",
        "attention": "g",
        "gate": "f",
        "up": "f",
        "act": "f",
        "gelu": "f",
    }
    cuts = {
        op.name: {data: "b", tensor: (rows | columns).get(op.name, "")} for op in graph
    }
    return {
        name: tuple(each.get(a, "") for a in range(axes)) for name, each in cuts.items()
    }
