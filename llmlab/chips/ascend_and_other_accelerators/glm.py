"""A block of ChatGLM-6B, the model that most first runs on an Ascend were about.

Du et al. 2022, "GLM", https://arxiv.org/abs/2103.10360; the 130B model, Zeng et al.
2022, https://arxiv.org/abs/2210.02414; the block as in the published
`modeling_chatglm.py`.
Three things a Llama does not have:

    mask        the prompt sees all of itself, the answer only what is before it:
                j is seen by i  ⇔  j ≤ i or j < c
    positions   two of each token, and half of a head turns by each: the place of a
                prompt's token, and 0; for the answer the place of its mask, and 1, 2, …
    residual    from behind the norm, and α times as large, α = √(2 L):
                a = LN(x);  h = α a + attention(a);  b = LN(h);  y = α b + MLP(b)

    c   tokens of the prompt, without the one that begins the answer
    L   layers of the whole model       H   heads

Simplified: no dropout, no cache, and the scores are not divided by the number of the
layer and multiplied again, which only keeps them small in 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from llmlab.models.llama import rope_tables, rotate


@dataclass(frozen=True)
class GLMConfig:
    """Sizes; those of ChatGLM-6B where nothing else is said."""

    layers: int = 28
    hidden: int = 4096
    heads: int = 32
    inner: int = 16384
    vocab: int = 130528
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 4:
            raise ValueError(
                f"hidden={self.hidden} must be heads={self.heads} times a multiple of"
                " 4: each half of a head turns in pairs"
            )

    @property
    def alpha(self) -> float:
        """α of the residual."""
        return math.sqrt(2 * self.layers)


def parameters(config: GLMConfig) -> int:
    """All of the model; the table of embeddings is the output's as well."""
    d, f = config.hidden, config.inner
    attention = 3 * d * d + 3 * d + d * d + d
    feed_forward = d * f + f + f * d + d
    norms = 4 * d
    return config.vocab * d + config.layers * (attention + feed_forward + norms) + 2 * d


def prefix_mask(length: int, prompt: int) -> Bool[Tensor, "i j"]:
    """Whether token i sees token j.

    Raises:
        ValueError: the prompt is longer than everything.
    """
    if not 0 <= prompt <= length:
        raise ValueError(f"prompt={prompt} must be from 0 to length={length}")
    i = torch.arange(length)[:, None]
    j = torch.arange(length)[None, :]
    return (j <= i) | (j < prompt)


def positions(length: int, prompt: int, mask: int) -> Int[Tensor, "2 length"]:
    """Two positions of each token.

    Args:
        mask: the place of the token [gMASK] in the prompt, which the answer fills.

    Raises:
        ValueError: the mask does not lie in the prompt.
    """
    if not 0 <= mask < prompt <= length:
        raise ValueError(
            f"mask={mask} must lie in the prompt={prompt} of length={length}"
        )
    first = torch.arange(length)
    first[prompt:] = mask
    second = (torch.arange(length) - prompt + 1).clamp(min=0)
    return torch.stack([first, second])


def turn(
    x: Float[Tensor, "heads length width"], places: Int[Tensor, " length"]
) -> Float[Tensor, "heads length width"]:
    """Rotary embedding of whole vectors by one row of positions, in halves."""
    half = x.shape[-1] // 2
    cos, sin = rope_tables(places[None], 10_000.0 ** (-torch.arange(half) / half))
    return rotate(x, cos[0], sin[0])  # (1, length, width), for all heads


def turn_twice(
    x: Float[Tensor, "heads length width"], places: Int[Tensor, "2 length"]
) -> Float[Tensor, "heads length width"]:
    """The first half of each head by the first position, the second by the second."""
    a, b = x.chunk(2, -1)
    return torch.cat([turn(a, places[0]), turn(b, places[1])], -1)


def weights(config: GLMConfig, seed: int = 0) -> dict[str, Tensor]:
    """Drawn weights of one block, by the names of the published model."""
    d, f = config.hidden, config.inner
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "query_key_value": (3 * d, d),
        "dense": (d, d),
        "dense_h_to_4h": (f, d),
        "dense_4h_to_h": (d, f),
    }
    made = {}
    for name, (out, into) in shapes.items():
        made[f"{name}.weight"] = torch.randn(out, into, generator=draw) / into**0.5
        made[f"{name}.bias"] = torch.randn(out, generator=draw) / 10
    for name in ("input_layernorm", "post_attention_layernorm"):
        made[f"{name}.weight"] = 1 + torch.randn(d, generator=draw) / 10
        made[f"{name}.bias"] = torch.randn(d, generator=draw) / 10
    return made


def block(
    x: Float[Tensor, "length hidden"],
    w: dict[str, Tensor],
    config: GLMConfig,
    mask: Bool[Tensor, "length length"],
    places: Int[Tensor, "2 length"],
) -> Float[Tensor, "length hidden"]:
    """One block of a GLM."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, value: Tensor) -> Tensor:
        scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
        return F.layer_norm(value, (config.hidden,), scale, shift, config.eps)

    length = len(x)
    a = norm("input_layernorm", x)
    # (length, 3 d) → (length, heads, 3 · width): q, k and v of a head lie together
    mixed = linear("query_key_value", a).reshape(length, config.heads, -1)
    q, k, v = (part.transpose(0, 1) for part in mixed.chunk(3, -1))
    q, k = turn_twice(q, places), turn_twice(k, places)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (heads, length, length)
    scores = scores.masked_fill(~mask, float("-inf"))
    seen = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
    h = config.alpha * a + linear("dense", seen)
    b = norm("post_attention_layernorm", h)
    inner = F.gelu(linear("dense_h_to_4h", b), approximate="tanh")
    return config.alpha * b + linear("dense_4h_to_h", inner)
