"""The shape of a model to be trained, as far as a plan depends on it: parameters, FLOPs
and saved activations.

    L  layers     d  hidden     H, K, D  heads, key/value heads, head size     f
                                         feed-forward width     V  vocabulary
    s  sequence   b  microbatch       t  tensor-parallel ranks                 E, k
                                         experts, experts a token

Two families. *GPT* (GPT-3, Megatron): two feed-forward matrices, biases, LayerNorm,
learned positions, dropout, attention scores kept for the backward pass. *Llama*: three
matrices (SwiGLU), RMSNorm, no biases, no dropout, FlashAttention.

Activations of a GPT layer in bytes, 16-bit numbers and 1-byte dropout masks
(Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, table 2; a is H, h is d):

    tensor parallel                   s b h (10 + 24/t + 5 a s / (h t))
    and sequence parallel             s b h (34/t + 5 a s / (h t))
    and selective recomputation       s b h · 34/t
    full recomputation                s b h · 2           (/t with sequence parallelism)
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.models.llama import LlamaConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Shape:
    """What is to be trained. `experts` > 0 replaces each feed-forward network by so
    many, of which a token uses `top_k`.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int
    ffn: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden / heads
    family: str = "gpt"
    tied: bool = True
    positions: int = 0  # learned ones
    experts: int = 0
    top_k: int = 1

    def __post_init__(self) -> None:
        if self.family not in ("gpt", "llama"):
            raise ValueError(f"family={self.family!r} must be 'gpt' or 'llama'")
        for name in ("layers", "hidden", "heads", "vocab", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.head_dim and self.hidden % self.heads:
            raise ValueError(
                f"hidden={self.hidden} must be a multiple of heads={self.heads}"
            )
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden // self.heads)
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(
                f"top_k={self.top_k} must be from 1 to the {self.experts} experts"
            )

    @property
    def q(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key (or value) heads."""
        return self.kv_heads * self.head_dim


def gpt(
    layers: int, hidden: int, heads: int, vocab: int = 51_200, positions: int = 2048
) -> Shape:
    """A GPT as Megatron's papers have it: f = 4d, tied embedding, learned positions."""
    return Shape(layers, hidden, heads, vocab, 4 * hidden, positions=positions)


def llama(config: LlamaConfig) -> Shape:
    """The shape of one of our Llamas."""
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.vocab_size,
        config.intermediate_size,
        config.num_key_value_heads,
        config.head_dim,
        "llama",
        config.tie_word_embeddings,
    )


# the published configurations (Jiang et al. 2024, https://arxiv.org/abs/2401.04088, and
# the model's own file)
MIXTURES = {
    "mixtral-8x7b": Shape(
        32, 4096, 32, 32_000, 14_336, 8, 128, "llama", tied=False, experts=8, top_k=2
    ),
    "mixtral-8x22b": Shape(
        56, 6144, 48, 32_768, 16_384, 8, 128, "llama", tied=False, experts=8, top_k=2
    ),
}


def attention_parameters(x: Shape) -> int:
    """q, k, v, o of a layer, with the family's biases."""
    return 2 * x.hidden * (x.q + x.kv) + (
        x.q + 2 * x.kv + x.hidden if x.family == "gpt" else 0
    )


def mlp_parameters(x: Shape) -> int:
    """One feed-forward network (one expert)."""
    return (
        3 * x.hidden * x.ffn
        if x.family == "llama"
        else 2 * x.hidden * x.ffn + x.ffn + x.hidden
    )


def replicated_parameters(x: Shape) -> int:
    """Of a layer, what tensor parallelism does not cut: two norms, and a router where
    there are experts.
    """
    return (4 if x.family == "gpt" else 2) * x.hidden + x.experts * x.hidden


def layer_parameters(x: Shape) -> int:
    """All of a layer."""
    return (
        attention_parameters(x)
        + max(1, x.experts) * mlp_parameters(x)
        + replicated_parameters(x)
    )


def parameters(x: Shape) -> int:
    """All parameters, a tied embedding once."""
    norm = (2 if x.family == "gpt" else 1) * x.hidden
    return (
        x.layers * layer_parameters(x)
        + (2 - x.tied) * x.vocab * x.hidden
        + x.positions * x.hidden
        + norm
    )


def active_parameters(x: Shape) -> int:
    """Those that one token uses: of the experts, `top_k`."""
    return parameters(x) - x.layers * max(0, x.experts - x.top_k) * mlp_parameters(x)


def layer_flops(x: Shape, s: int) -> tuple[float, float]:
    """Forward FLOPs of a layer for one token: (matrix products with weights, q kᵀ and p
    v over s keys).
    """
    ff = (
        max(1, x.top_k if x.experts else 1)
        * (3 if x.family == "llama" else 2)
        * x.hidden
        * x.ffn
    )
    return (
        2.0 * (2 * x.hidden * (x.q + x.kv) + ff + x.experts * x.hidden),
        4.0 * x.q * s,
    )


def token_flops(x: Shape, s: int) -> float:
    """FLOPs a trained token, forward and backward, nothing recomputed: what MFU counts.

    For a GPT it is Narayanan et al. 2021, equation 3, times 3/4: 72 L h² (1 + s/6h +
    V/12Lh) (they count recomputation).
    """
    return 3 * (x.layers * sum(layer_flops(x, s)) + 2.0 * x.vocab * x.hidden)


def layer_activations(
    x: Shape,
    s: int,
    b: int,
    t: int = 1,
    sequence: bool = False,
    recompute: str = "none",
) -> float:
    """Bytes that a layer keeps of one microbatch until its backward pass, on one of t
    tensor-parallel ranks.

    Args:
        sequence: whether Megatron's sequence parallelism cuts what tensor parallelism
            leaves whole.
        recompute: "none", "selective" (the attention scores), "full" (all but the
            layer's input).
    Raises:
        ValueError: an unknown way to recompute.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(
            f"recompute={recompute!r} must be one of {', '.join(RECOMPUTE)}"
        )
    n, whole = s * b, t if sequence else 1
    if recompute == "full":
        return 2.0 * n * x.hidden / whole
    if x.family == "gpt":
        scores = 0.0 if recompute == "selective" else 5.0 * x.heads * s
        return n * (10.0 * x.hidden / whole + (24.0 * x.hidden + scores) / t)
    # Llama: input and output of both norms; q, k, v and the attention's result; gate,
    # up and their product (a fused SwiGLU)
    experts = max(1, x.top_k if x.experts else 1)
    return n * (
        8.0 * x.hidden / whole + (4.0 * (x.q + x.kv) + 6.0 * x.ffn * experts) / t
    )
