"""Multi-head latent attention: DeepSeek-V2, section 2.1 and appendix B.

https://arxiv.org/abs/2405.04434. For a token with hidden state h,

    c   =  norm(W_DKV h)            one latent vector for all heads: this is cached
    k_R =  RoPE(W_KR h)             one key with positions for all heads: cached, too
    q_C, q_R  =  W_Q h, or W_UQ norm(W_DQ h), with RoPE on q_R            per head
    k_C =  W_UK c,   v = W_UV c                                          per head
    score  =  (q_C · k_C + q_R · k_R) / √(d_n + d_r)
    out    =  W_O [ Σ_s p_s v_s ]

Neither k_C nor v need be made. As q_C · (W_UK c) = (W_UKᵀ q_C) · c, the query can go
down into the latent space, where all heads share one key and one value, and the sum
Σ p_s c_s comes up again through W_UV. RoPE would stand between W_UK and the query, and
turn otherwise for each pair of positions. That is why it has channels of its own.

    B  batch                H   heads
    T  new tokens           d_c latent (kv_lora_rank)
    S  all tokens           d_n, d_v  channels of a head's k_C and v
    d  hidden_size          d_r channels of k_R

Simplified: no YaRN, no biases. RoPE turns neighbouring pairs, as DeepSeek's code does.
Names are those of transformers' `DeepseekV2Attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlab.models.cache import KVCache
from llmlab.models.llama import RMSNorm


@dataclass(frozen=True)
class LatentConfig:
    """The shape of one layer; the defaults are DeepSeek-V2's.

    Raises:
        ValueError: a size below 1, or an odd number of channels to turn.
    """

    hidden_size: int = 5120
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536  # None: one matrix for the query
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE turns"
                " pairs of channels"
            )


def turn_pairs(
    x: Float[Tensor, "B n T d_r"], positions: Int[Tensor, "B_or_1 T"], theta: float
) -> Float[Tensor, "B n T d_r"]:
    """RoPE on neighbouring channels: (x₀, x₁), (x₂, x₃), … ."""
    d_r = x.shape[-1]
    speed = theta ** (-torch.arange(0, d_r, 2, dtype=torch.float32) / d_r)
    angle = positions[:, None, :, None] * speed  # (B, 1, T, d_r/2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack(
        [
            even * angle.cos() - odd * angle.sin(),
            odd * angle.cos() + even * angle.sin(),
        ],
        dim=-1,
    )
    return turned.flatten(-2).to(x.dtype)  # (…, d_r/2, 2) -> (…, d_r)


def expanded(
    q: Float[Tensor, "B H T d_n"],
    q_rope: Float[Tensor, "B H T d_r"],
    c: Float[Tensor, "B S d_c"],
    k_rope: Float[Tensor, "B S d_r"],
    W_UK: Float[Tensor, "H d_n d_c"],
    W_UV: Float[Tensor, "H d_v d_c"],
    mask: Bool[Tensor, "B_or_1 1 T S"],
) -> Float[Tensor, "B H T d_v"]:
    """Attention with a key and a value for each head, made from the latents."""
    k = torch.einsum("hnc,bsc->bhsn", W_UK, c)
    v = torch.einsum("hvc,bsc->bhsv", W_UV, c)
    scores = q @ k.mT + torch.einsum("bhtr,bsr->bhts", q_rope, k_rope)
    scores = scores * (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def absorbed(
    q: Float[Tensor, "B H T d_n"],
    q_rope: Float[Tensor, "B H T d_r"],
    c: Float[Tensor, "B S d_c"],
    k_rope: Float[Tensor, "B S d_r"],
    W_UK: Float[Tensor, "H d_n d_c"],
    W_UV: Float[Tensor, "H d_v d_c"],
    mask: Bool[Tensor, "B_or_1 1 T S"],
) -> Float[Tensor, "B H T d_v"]:
    """The same, in the latent space: no tensor has a key or a value for each head."""
    q_latent = torch.einsum("bhtn,hnc->bhtc", q, W_UK)
    scores = torch.einsum("bhtc,bsc->bhts", q_latent, c)
    scores = scores + torch.einsum("bhtr,bsr->bhts", q_rope, k_rope)
    scores = scores * (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    out_latent = torch.einsum("bhts,bsc->bhtc", p, c)
    return torch.einsum("bhtc,hvc->bhtv", out_latent, W_UV)


class LatentAttention(nn.Module):
    """One layer of multi-head latent attention."""

    def __init__(self, config: LatentConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        d = config.hidden_size
        H = config.num_attention_heads
        per_query = config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(d, H * per_query, bias=False)
        else:
            rank = config.q_lora_rank
            self.q_a_proj = nn.Linear(d, rank, bias=False)
            self.q_a_layernorm = RMSNorm(rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(rank, H * per_query, bias=False)
        d_c = config.kv_lora_rank
        per_kv = config.qk_nope_head_dim + config.v_head_dim
        # W_DKV and W_KR in one matrix
        self.kv_a_proj_with_mqa = nn.Linear(
            d, d_c + config.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = RMSNorm(d_c, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(d_c, H * per_kv, bias=False)  # W_UK and W_UV
        self.o_proj = nn.Linear(H * config.v_head_dim, d, bias=False)

    def queries(
        self, x: Float[Tensor, "B T d"], positions: Int[Tensor, "B_or_1 T"]
    ) -> tuple[Float[Tensor, "B H T d_n"], Float[Tensor, "B H T d_r"]]:
        """q_C and q_R."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        # (B, T, H·(d_n + d_r)) -> (B, H, T, d_n + d_r)
        q = q.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
        d_n, d_r = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        q, q_rope = q.split([d_n, d_r], dim=-1)
        return q, turn_pairs(q_rope, positions, self.config.rope_theta)

    def latents(
        self, x: Float[Tensor, "B T d"], positions: Int[Tensor, "B_or_1 T"]
    ) -> tuple[Float[Tensor, "B 1 T d_c"], Float[Tensor, "B 1 T d_r"]]:
        """c and k_R: all that is cached, as the one head of a cache."""
        d_c, d_r = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        c, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split([d_c, d_r], dim=-1)
        k_rope = turn_pairs(k_rope, positions, self.config.rope_theta)
        return self.kv_a_layernorm(c), k_rope

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        cache: KVCache | None = None,
        *,
        absorb: bool = True,
    ) -> Float[Tensor, "B T d"]:
        """Causal attention over cached tokens and new ones.

        Args:
            absorb: whether to stay in the latent space.
        """
        T = x.shape[1]
        past = 0 if cache is None else cache.lengths[self.layer]
        positions = torch.arange(past, past + T)[None]
        q, q_rope = self.queries(x, positions)
        c, k_rope = self.latents(x, positions)
        if cache is not None:
            c, k_rope = cache.append(self.layer, c, k_rope)
        d_n, d_v = self.config.qk_nope_head_dim, self.config.v_head_dim
        # (H·(d_n + d_v), d_c) -> (H, d_n + d_v, d_c)
        up = self.kv_b_proj.weight.unflatten(0, (self.config.num_attention_heads, -1))
        W_UK, W_UV = up.split([d_n, d_v], dim=1)
        mask = torch.ones(T, past + T, dtype=torch.bool).tril(past)[None, None]
        attend = absorbed if absorb else expanded
        out = attend(q, q_rope, c[:, 0], k_rope[:, 0], W_UK, W_UV, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H·d_v) -> d
