"""Prefixes: keys and values of tokens that were never computed.

Li & Liang 2021, https://arxiv.org/abs/2101.00190, section 4: at the positions of the
prefix the activations are trained numbers instead of the model's own; every later token
attends to them. In a decoder what attention reads of a token are its key and its value,
so a prefix is, for each layer,

    K ← [P_K; K]        V ← [P_V; V]

    p  virtual tokens    K  key/value heads    B  batch
    L  layers            D  head_dim           T  new tokens
                                               S  stored tokens

The keys go in as they lie in a cache, that is after RoPE: a trained key is at its
position already. Combinations (MAM, UniPELT) use `split` and `PrefixCache`, or
`prefix_attention_inputs` on one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.cache import Cache, KVCache
from llmlab.models.llama import Llama

Pair = tuple[Float[Tensor, "1 K p D"], Float[Tensor, "1 K p D"]]


@dataclass(frozen=True)
class Shape:
    """What an encoder must know of a model, ours or transformers'."""

    d: int  # hidden_size
    layers: int
    heads: int  # key/value heads, fewer than query heads under GQA
    head_dim: int

    @property
    def deep_width(self) -> int:
        """Numbers of one virtual token: a key and a value for each head of each
        layer.
        """
        return 2 * self.layers * self.heads * self.head_dim


def shape_of(model: nn.Module) -> Shape:
    """The sizes of `model`, from its config.

    Raises:
        ValueError: it has none.
    """
    c = getattr(model, "config", None)
    if not hasattr(c, "hidden_size"):
        raise ValueError(
            f"model is a {type(model).__name__} without sizes in a config: only a Llama"
            " is supported"
        )
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return Shape(c.hidden_size, c.num_hidden_layers, heads, head_dim)


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The token embedding of our Llama or of transformers'.

    Raises:
        ValueError: `model` has no `model.embed_tokens`.
    """
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if embedding is None:
        raise ValueError(
            f"model is a {type(model).__name__} without model.embed_tokens: only a"
            " Llama is supported"
        )
    return embedding


def split(prefix: Float[Tensor, "p width"], layers: int, heads: int) -> list[Pair]:
    """(p, 2·L·K·D) → for each layer a key and a value of (1, K, p, D), in the order of
    `peft`'s files.

    Raises:
        ValueError: the width is no multiple of 2 · layers · heads.
    """
    p, width = prefix.shape
    if width % (2 * layers * heads):
        raise ValueError(
            f"prefix is {width} wide; that is no multiple of 2 · layers={layers} ·"
            f" heads={heads}"
        )
    kv = prefix.view(p, layers, 2, heads, -1).permute(1, 2, 3, 0, 4)  # (L, 2, K, p, D)
    return [(k[None], v[None]) for k, v in kv]


def join(pairs: list[Pair]) -> Float[Tensor, "p width"]:
    """What `split` took apart: one row for each token."""
    kv = torch.stack([torch.cat(pair) for pair in pairs])  # (L, 2, K, p, D)
    return kv.permute(3, 0, 1, 2, 4).flatten(1)


def prefix_attention_inputs(
    pair: Pair,
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    gate: Tensor | float = 1.0,
) -> tuple[Float[Tensor, "B K p+S D"], Float[Tensor, "B K p+S D"]]:
    """[g·P_K; K] and [g·P_V; V]: the prefix before one layer's keys and values.

    A gate g may scale it (UniPELT).

    Args:
        gate: a number, or one that broadcasts over (B, K, p, D), as (B, 1, 1, 1) does.
    """
    B = len(k)
    P_K, P_V = pair  # (1, K, p, D) each
    P_K = (gate * P_K).to(k.dtype).expand(B, -1, -1, -1)
    P_V = (gate * P_V).to(v.dtype).expand(B, -1, -1, -1)
    return torch.cat([P_K, k], dim=2), torch.cat([P_V, v], dim=2)


class PrefixCache:
    """A cache for one forward pass of our Llama: it holds the prefix.

    It stores nothing, so that gradients can flow.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    @property
    def length(self) -> int:
        """The prefix's p tokens."""
        return self.pairs[0][0].shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix of one layer, then these keys and values."""
        return prefix_attention_inputs(self.pairs[layer], k, v)


def fill(
    cache: object | None, pairs: list[Pair], batch: int, transformers: bool = False
) -> object:
    """A cache that holds the prefix for `batch` rows.

    It is `cache`, which must be empty, or a new one.

    Args:
        transformers: whether it is a transformers cache (`update`) or one of ours
            (`append`).
    """
    if cache is None and not transformers:
        return PrefixCache(pairs)
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache()
    for layer, (P_K, P_V) in enumerate(pairs):
        k = P_K.expand(batch, -1, -1, -1)
        v = P_V.expand(batch, -1, -1, -1)
        if transformers:
            cache.update(k, v, layer)
        else:
            cache.append(layer, k, v)
    return cache


@torch.no_grad()
def of_tokens(model: nn.Module, ids: Int[Tensor, "p"]) -> Float[Tensor, "p width"]:
    """The prefix that *is* a text: the keys and values that `model` computes for it."""
    if isinstance(model, Llama):
        cache: Cache = KVCache(model.config.num_hidden_layers, capacity=len(ids))
        model(ids[None], cache=cache)
        pairs = list(zip(cache.keys, cache.values, strict=True))
        return join([(k[:, :, : len(ids)], v[:, :, : len(ids)]) for k, v in pairs])
    stored = model(ids[None], use_cache=True).past_key_values
    return join([(layer.keys, layer.values) for layer in stored.layers])


class PrefixMLP(nn.Module):
    """The reparameterisation of section 4.3: P = MLP(P').

    A small table goes through a large network, of which only P is left after training.
    The names are those of `peft`'s encoder.
    """

    deep = True

    def __init__(
        self,
        p: int,
        d: int,
        hidden: int,
        width: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(p, d, generator=generator))
        self.transform = nn.Sequential(
            nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, width)
        )
        reset_linears(self.transform, generator)

    def forward(self) -> Float[Tensor, "p width"]:
        """MLP(P')."""
        return self.transform(self.embedding)


def reset_linears(module: nn.Module, generator: torch.Generator | None) -> None:
    """PyTorch's own start of each linear, U(−1/√k, 1/√k), drawn from `generator`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5  # 1/√k
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
