"""Llama, the decoder that this course tunes, splits, shrinks and serves.

Touvron et al. 2023, https://arxiv.org/abs/2302.13971. One block, with h of shape (B, T,
d):

    h ← h + W_o · Attention(RoPE(W_q x), RoPE(W_k x), W_v x)      x = RMSNorm(h)
    h ← h + W_down · (silu(W_gate x) ⊙ W_up x)                    x = RMSNorm(h)

Parameter names are those of Hugging Face's `LlamaForCausalLM`, so that its checkpoints
load with no name map, and a method that walks one model by module names can walk the
other too. The seven linears of a block stay unfused.

    B  batch
    T  new tokens
    S  all tokens, those in the cache included (S = T without a cache)
    d  hidden_size
    f  intermediate_size
    D  head_dim
    H  query heads
    K  key/value heads
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.attention import (
    AttentionFn,
    Mask,
    attention_mask_for,
    documents_of,
    sdpa,
)
from llmlab.models.cache import Cache


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, in the words of Hugging Face's `config.json`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads (no GQA)
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # {}, or {"rope_type": "linear" | "llama3", "factor": …}, or "longrope": a factor
    # for each frequency, the same for short and long texts
    rope_scaling: dict = field(default_factory=dict)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{f.name} must be a positive integer, not {value!r}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of"
                    f" num_attention_heads={self.num_attention_heads}, or head_dim must"
                    " be given"
                )
            head_dim = self.hidden_size // self.num_attention_heads
            object.__setattr__(self, "head_dim", head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of"
                f" num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: RoPE turns pairs of channels"
            )
        kind = self.rope_scaling.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "longrope"):
            raise ValueError(
                f"rope_scaling['rope_type']={kind!r} is not supported: use default,"
                " linear, llama3 or longrope"
            )
        if kind == "longrope":
            self._check_longrope()

    def _check_longrope(self) -> None:
        """One positive factor for each pair of channels, whatever the text's length."""
        short = self.rope_scaling.get("short_factor")
        if not isinstance(short, list) or short != self.rope_scaling.get("long_factor"):
            raise ValueError(
                "rope_type='longrope' is supported where the lists short_factor and"
                " long_factor are the same"
            )
        if len(short) != self.head_dim // 2 or not all(f > 0 for f in short):
            raise ValueError(
                f"rope_type='longrope': short_factor must be {self.head_dim // 2}"
                f" positive numbers (half of head_dim={self.head_dim}), not"
                f" {str(short)[:60]}"
            )
        strength = self.rope_scaling.get("attention_factor")
        # None: transformers computes it, and it is 1 for a factor of at most 1
        if strength is None and self.rope_scaling.get("factor", 2) <= 1:
            strength = 1
        if strength != 1:
            raise ValueError(
                f"rope_type='longrope': attention_factor={strength} must be 1"
            )


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean square taken in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Float[Tensor, "half_head"]:
    """θ_i = base^(−2i/D): radians per token for each of the D/2 pairs of channels.

    `rope_scaling` slows them down, so that a longer context has the same angles.
    """
    D = config.head_dim
    scaling = config.rope_scaling
    theta = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    match scaling.get("rope_type", "default"):
        case "linear":
            return theta / scaling["factor"]
        case "llama3":
            return _llama3_frequencies(theta, scaling)
        case "longrope":
            return theta / torch.tensor(scaling["short_factor"])
    return theta


def _llama3_frequencies(
    theta: Float[Tensor, "half_head"], scaling: dict
) -> Float[Tensor, "half_head"]:
    """The rule of Llama 3.1: slow pairs are slowed down by `factor`, fast ones kept.

    Those between are blended.
    """
    # How often each pair turns around within the old context.
    turns = scaling["original_max_position_embeddings"] * theta / (2 * math.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / scaling["factor"]


def rope_tables(
    positions: Int[Tensor, "batch seq"], theta: Float[Tensor, "half_head"]
) -> tuple[
    Float[Tensor, "batch 1 seq head_dim"], Float[Tensor, "batch 1 seq head_dim"]
]:
    """cos and sin of position · θ.

    The angle of a pair occurs twice: channel i turns with channel i + D/2.
    """
    angles = positions[:, None, :, None] * theta  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], cos: Tensor, sin: Tensor
) -> Tensor:
    """RoPE in the half-split layout: (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin).

    Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, n, T, D) -> two of (B, n, T, D/2)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads.

    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        d = config.hidden_size
        D = config.head_dim
        bias = config.attention_bias
        self.layer = layer
        self.head_dim = D
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias=bias)

    def split_heads(self, x: Float[Tensor, "B T all"]) -> Float[Tensor, "B n T D"]:
        """(B, T, n·D) -> (B, n, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: Cache | None,
        attention: AttentionFn,
    ) -> Float[Tensor, "B T d"]:
        B, T, _ = x.shape
        cos, sin = rope
        q = self.split_heads(self.q_proj(x))  # (B, H, T, D)
        k = self.split_heads(self.k_proj(x))  # (B, K, T, D)
        v = self.split_heads(self.v_proj(x))  # (B, K, T, D)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        out = attention(q, k, v, mask)  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, -1)  # (B, T, H·D)
        return self.o_proj(out)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d = config.hidden_size
        f = config.intermediate_size
        bias = config.mlp_bias
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer: attention, then the MLP, each on a normed copy of h."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        h: Float[Tensor, "B T d"],
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: Cache | None,
        attention: AttentionFn,
    ) -> Float[Tensor, "B T d"]:
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, cache, attention)
        return h + self.mlp(self.post_attention_layernorm(h))


class LlamaModel(nn.Module):
    """Embedding, blocks and the last norm: everything but the vocabulary projection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # On the meta device nothing has numbers. To draw or count them there, PyTorch
        # 2.13 imports its whole compiler, which takes seconds.
        if torch.get_default_device().type == "meta":
            table = torch.empty(config.vocab_size, config.hidden_size)
            theta = torch.empty(config.head_dim // 2)
            self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        else:
            theta = rope_frequencies(config)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("theta", theta, persistent=False)

    def forward(
        self,
        h: Float[Tensor, "B T d"],
        positions: Int[Tensor, "B_or_1 T"],
        mask: Mask | None,
        cache: Cache | None,
        attention: AttentionFn,
    ) -> Float[Tensor, "B T d"]:
        cos, sin = rope_tables(positions, self.theta.float())
        rope = (cos.to(h.dtype), sin.to(h.dtype))
        for block in self.layers:
            h = block(h, rope, mask, cache, attention)
        return self.norm(h)


class Llama(nn.Module):
    """A Llama language model: token ids in, logits out.

    >>> config = LlamaConfig(
    ...     vocab_size=64,
    ...     hidden_size=16,
    ...     intermediate_size=40,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=4,
    ... )
    >>> Llama(config)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialise(self, module: nn.Module) -> None:
        if next(module.parameters(recurse=False), torch.empty(0)).is_meta:
            return
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch seq dim"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        cache: Cache | None = None,
        attention: AttentionFn = sdpa,
        logits_to_keep: int = 0,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Logits for every position, or for the last `logits_to_keep`.

        Args:
            input_ids: tokens.
            inputs_embeds: embeddings in place of tokens. Give one of the two.
            attention_mask: (B, S), 1 for a token and 0 for padding (left or right),
                over cached and new tokens. Or where each query may look, (B, T, S) or
                (B, 1 or heads, T, S): True, or what is added to its scores.
            position_ids: RoPE positions; by default they count on from the cache's
                length. Where they start anew in a row, another document begins, and no
                query sees another's. As in transformers 5.23 that is so without a mask
                and without a cache: with one of them, give a mask of documents
                (`attention.document_mask`). There a call makes a cache unless it is
                told use_cache=False, and then documents see each other.
            cache: keys and values of earlier tokens; it is extended in place.
            attention: (q, k, v, mask) → output; swap it to study another kernel. One
                that has a method `check_positions` is shown the positions first.
            logits_to_keep: how many of the last positions go through `lm_head`; 0 means
                all. Generation needs 1.
        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; a mask of
                the wrong length.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds: exactly one of the two")
        if inputs_embeds is None:
            h = self.model.embed_tokens(input_ids)  # (B, T, d)
        else:
            h = inputs_embeds
        T = h.shape[1]
        past = 0 if cache is None else cache.length
        # an attention over a cut sequence knows where its tokens stand
        check_positions = getattr(attention, "check_positions", None)
        documents = None
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=h.device)[None]  # (1, T)
        elif attention_mask is None and cache is None and check_positions is None:
            documents = documents_of(position_ids)
        if check_positions is not None:
            check_positions(position_ids)
        mask = attention_mask_for(T, past, attention_mask, h.device, documents, h.dtype)
        h = self.model(h, position_ids, mask, cache, attention)
        if logits_to_keep:
            h = h[:, -logits_to_keep:]
        return self.lm_head(h)
