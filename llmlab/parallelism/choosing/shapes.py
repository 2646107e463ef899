"""The shape of a model to be trained: parameters, FLOPs and saved activations.

    L  layers
    d  hidden size
    H  heads
    K  key/value heads
    D  head size
    f  feed-forward width
    V  vocabulary
    E  experts
    k  experts per token
    s  tokens of a sequence
    b  sequences of a microbatch
    t  tensor-parallel ranks
    x  a shape, in the code

Two families. *GPT* (GPT-3, Megatron): two feed-forward matrices, biases, LayerNorm,
learned positions, dropout, attention scores kept for the backward pass. *Llama*: three
matrices (SwiGLU), RMSNorm, no biases, no dropout, FlashAttention.

Activations of a GPT layer in bytes, 16-bit numbers and 1-byte dropout masks
(Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, table 2):

    tensor parallel                   s b d (10 + 24/t + 5 H s / (d t))
    and sequence parallel             s b d (34/t + 5 H s / (d t))
    and selective recomputation       s b d · 34/t
    full recomputation                s b d · 2           (/t with sequence parallelism)
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.models.llama import LlamaConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Raises:
        ValueError: a size is out of its range, named in the message.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int
    ffn: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden / heads
    family: str = "gpt"  # or "llama"
    tied: bool = True  # one matrix for the embedding and the output
    positions: int = 0  # learned ones
    experts: int = 0  # > 0: so many feed-forward networks in place of each
    top_k: int = 1  # experts that a token uses

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
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        ffn=config.intermediate_size,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        family="llama",
        tied=config.tie_word_embeddings,
    )


# Published configurations: Jiang et al. 2024, https://arxiv.org/abs/2401.04088, and the
# config.json of the larger model.
MIXTURES = {
    "mixtral-8x7b": Shape(
        32, 4096, 32, 32_000, 14_336, 8, 128, "llama", tied=False, experts=8, top_k=2
    ),
    "mixtral-8x22b": Shape(
        56, 6144, 48, 32_768, 16_384, 8, 128, "llama", tied=False, experts=8, top_k=2
    ),
}


def attention_parameters(x: Shape) -> int:
    """q, k, v, o of a layer, with the biases of a GPT."""
    matrices = 2 * x.hidden * (x.q + x.kv)
    if x.family == "gpt":
        return matrices + x.q + 2 * x.kv + x.hidden
    return matrices


def mlp_parameters(x: Shape) -> int:
    """One feed-forward network (one expert)."""
    if x.family == "llama":
        return 3 * x.hidden * x.ffn
    return 2 * x.hidden * x.ffn + x.ffn + x.hidden


def replicated_parameters(x: Shape) -> int:
    """What tensor parallelism does not cut in a layer: two norms, and the router."""
    norms = (4 if x.family == "gpt" else 2) * x.hidden
    router = x.experts * x.hidden
    return norms + router


def layer_parameters(x: Shape) -> int:
    """All of a layer."""
    return (
        attention_parameters(x)
        + max(1, x.experts) * mlp_parameters(x)
        + replicated_parameters(x)
    )


def parameters(x: Shape) -> int:
    """All parameters, a tied embedding once."""
    last_norm = (2 if x.family == "gpt" else 1) * x.hidden
    vocabulary_matrices = 1 if x.tied else 2
    return (
        x.layers * layer_parameters(x)
        + vocabulary_matrices * x.vocab * x.hidden
        + x.positions * x.hidden
        + last_norm
    )


def active_parameters(x: Shape) -> int:
    """Those that one token uses: of the experts, `top_k`."""
    return parameters(x) - x.layers * max(0, x.experts - x.top_k) * mlp_parameters(x)


def layer_flops(x: Shape, s: int) -> tuple[float, float]:
    """Forward FLOPs of a layer for one token.

    Returns:
        (matrix products with weights, the two products of attention over s keys)
    """
    matrices = 3 if x.family == "llama" else 2
    feed_forward = experts_per_token(x) * matrices * x.hidden * x.ffn
    projections = 2 * x.hidden * (x.q + x.kv)
    router = x.experts * x.hidden
    return 2.0 * (projections + feed_forward + router), 4.0 * x.q * s


def experts_per_token(x: Shape) -> int:
    """Feed-forward networks that a token passes through in a layer."""
    return x.top_k if x.experts else 1


def token_flops(x: Shape, s: int) -> float:
    """FLOPs per trained token, forward and backward: what MFU counts.

    Nothing is recomputed. For a GPT this is 72 L d² (1 + s/6d + V/12Ld), which is 3/4
    of equation 3 of Narayanan et al. 2021, who count recomputation.
    """
    forward = x.layers * sum(layer_flops(x, s)) + 2.0 * x.vocab * x.hidden
    return 3 * forward


def layer_activations(
    x: Shape,
    s: int,
    b: int,
    t: int = 1,
    sequence: bool = False,
    recompute: str = "none",
) -> float:
    """Bytes that a layer keeps of one microbatch until its backward pass.

    They are counted on one of t tensor-parallel ranks.

    Args:
        sequence: whether Megatron's sequence parallelism cuts what tensor parallelism
            leaves whole.
        recompute: "none", "selective" (the attention scores), "full" (all but the
            input of the layer).
    Raises:
        ValueError: an unknown way to recompute.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(
            f"recompute={recompute!r} must be one of {', '.join(RECOMPUTE)}"
        )
    n = s * b
    whole = t if sequence else 1
    if recompute == "full":
        return 2.0 * n * x.hidden / whole
    if x.family == "gpt":
        scores = 0.0 if recompute == "selective" else 5.0 * x.heads * s
        return n * (10.0 * x.hidden / whole + (24.0 * x.hidden + scores) / t)
    # Llama: input and output of both norms; q, k, v and the result of attention; gate,
    # up and their product (a fused SwiGLU).
    norms = 8.0 * x.hidden / whole
    attention = 4.0 * (x.q + x.kv)
    feed_forward = 6.0 * x.ffn * experts_per_token(x)
    return n * (norms + (attention + feed_forward) / t)
