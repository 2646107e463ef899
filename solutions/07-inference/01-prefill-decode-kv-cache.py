# %% [markdown]
# # Solutions: Prefill, decode and the KV cache
#
# Four functions: what a token takes in the cache, how new tokens get into the cache of a batch, how long a step takes, and attention that keeps one small vector per token.
# Stuck? `check.hint("append", 1)` shows a hint.

# %%
import torch
from torch import Tensor

from llmlab.checks.inference.prefill_decode_kv_cache import check

# %% [markdown]
# ## Exercise 1: bytes per token
# ●○○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# Return the bytes that **one token** takes in the cache of a whole model, over all `layers`, if a number takes `bytes_each` bytes. By `kind`, each layer keeps
#
# - `"MHA"`: a key and a value for each of `heads` heads, of `head_dim` numbers each;
# - `"GQA"`: a key and a value for each of `groups` groups of heads;
# - `"MQA"`: one key and one value, which all heads share;
# - `"MLA"`: one latent vector of `latent` numbers and one key with positions of `rope` numbers, which all heads share.
#
# Any other `kind` is a `ValueError`. `bytes_each` may be a fraction: four numbers of 6 bits share 3 bytes.


# %% tags=["exercise"]
def cache_bytes(
    kind: str,
    layers: int,
    heads: int,
    head_dim: int,
    *,
    groups: int = 1,
    latent: int = 0,
    rope: int = 0,
    bytes_each: float = 2,
) -> float:
    """Bytes in the cache for one token."""
    # BEGIN SOLUTION
    if kind == "MHA":
        numbers = 2 * heads * head_dim
    elif kind == "GQA":
        numbers = 2 * groups * head_dim
    elif kind == "MQA":
        numbers = 2 * head_dim
    elif kind == "MLA":
        numbers = latent + rope
    else:
        raise ValueError(f"kind={kind!r} must be MHA, GQA, MQA or MLA")
    return layers * numbers * bytes_each
    # END SOLUTION


# %% tags=["check"]
check.cache_bytes(cache_bytes)

# %% [markdown] tags=["solution"]
# MHA, GQA and MQA are one formula with three numbers of groups: all heads, some, one. MLA has no factor 2, since key and value come from the same latent, and no
# number of heads. For DeepSeek-V2 it keeps 512 + 64 numbers per layer where MHA would keep 2 · 128 · 128.

# %% [markdown]
# ## Exercise 2: into the cache of a batch
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# `buffer` has room for `C` tokens in each row; row `b` holds `lengths[b]` tokens in its first places. `new` brings up to `T` tokens per row and is padded on the right: row `b` has `counts[b]` of them,
# the first ones. Write them into the buffer, **in place**, right behind those that the row has, and nothing else. Return the new lengths; `lengths` itself stays as it is. A row may bring no token at all.
#
# If any row would have more than `C` tokens, raise a `ValueError`, with no row changed.


# %% tags=["exercise"]
def append(buffer: Tensor, new: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """Write the new tokens of each row; return the new lengths.

    Shapes: buffer (B, K, C, D), new (B, K, T, D), lengths and counts (B,), whole.
    """
    # BEGIN SOLUTION
    after = lengths + counts
    if (after > buffer.shape[2]).any():
        raise ValueError(f"a row would have {int(after.max())} tokens")
    for b in range(len(buffer)):
        start, stop = int(lengths[b]), int(after[b])
        buffer[b, :, start:stop] = new[b, :, : stop - start]
    return after
    # END SOLUTION


# %% tags=["check"]
check.append(append)

# %% [markdown] tags=["solution"]
# A token's place is its position, so a row's next token goes to place `lengths[b]`, counted from 0. Padding must not be counted: it would take positions from real tokens. It does no harm behind the row's
# length, for the mask ends there, but the exercise asks for a clean buffer. The package writes all rows at once: `(torch.arange(T) < counts[:, None]).nonzero()` lists the real tokens by row and offset.

# %% [markdown]
# ## Exercise 3: the time of a step
# ●●○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# A decoding step gives each of `batch` rows one token. It reads all `weights` (bytes) once, for all rows together, and from the cache of each row its `context` tokens, `cache` bytes each. It computes `work` FLOPs for
# each row. Reading at `bandwidth` bytes per second and computing at `speed` FLOPs per second overlap perfectly. Return the seconds that the step takes at least.


# %% tags=["exercise"]
def decode_time(
    batch: int,
    context: int,
    *,
    weights: float,
    cache: float,
    work: float,
    bandwidth: float,
    speed: float,
) -> float:
    """Seconds of one decoding step at least."""
    # BEGIN SOLUTION
    reading = (weights + batch * context * cache) / bandwidth
    computing = batch * work / speed
    return max(reading, computing)
    # END SOLUTION


# %% tags=["check"]
check.decode_time(decode_time)

# %% [markdown] tags=["solution"]
# The weights are the only term without `batch`: that is why a larger batch gives more tokens per second. Cache and work grow with it, so the gain ends, either where computing takes longer, or where the caches are larger than the weights.

# %% [markdown]
# ## Exercise 4: stay in the latent space
# ●●●●○ difficulty · ●●●●○ importance · 20 minutes · 4 points
#
# Multi-head latent attention caches for each token one latent $c_s$ and one key with positions $k^R_s$, for all heads. Head $h$ has the key $k_{h,s} = W^{UK}_h c_s$ and the value $v_{h,s} = W^{UV}_h c_s$. Return
#
# $$o_{h,t} = \sum_s p_{h,t,s}\, v_{h,s}, \qquad p_{h,t} = \operatorname{softmax}_s \frac{q_{h,t} \cdot k_{h,s} + q^R_{h,t} \cdot k^R_s}{\sqrt{d_n + d_r}}$$
#
# where a query only sees tokens for which `mask` is True. But **make no keys and values**: use $q \cdot (W^{UK} c) = ({W^{UK}}^\top q) \cdot c$, and take $W^{UV}$ out of the sum. With one query and many cached tokens, no tensor on the way
# may be as large as a vector per head and cached token; scores, one number each, are fine.


# %% tags=["exercise"]
def absorbed(
    q: Tensor,
    q_rope: Tensor,
    c: Tensor,
    k_rope: Tensor,
    W_UK: Tensor,
    W_UV: Tensor,
    mask: Tensor,
) -> Tensor:
    """Latent attention, (B, H, T, d_v).

    Shapes: q (B, H, T, d_n), q_rope (B, H, T, d_r), c (B, S, d_c), k_rope (B, S, d_r),
    W_UK (H, d_n, d_c), W_UV (H, d_v, d_c), mask (1, 1, T, S).
    """
    # BEGIN SOLUTION
    q_latent = torch.einsum("bhtn,hnc->bhtc", q, W_UK)
    scores = torch.einsum("bhtc,bsc->bhts", q_latent, c)
    scores = scores + torch.einsum("bhtr,bsr->bhts", q_rope, k_rope)
    scores = scores * (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    out_latent = torch.einsum("bhts,bsc->bhtc", p, c)
    return torch.einsum("bhtc,hvc->bhtv", out_latent, W_UV)
    # END SOLUTION


# %% tags=["check"]
check.absorbed(absorbed)

# %% [markdown] tags=["solution"]
# Both products are linear, so the matrix may stand on either side. In the latent space all heads share one key and one value, as in MQA, only wider. The scale stays $\sqrt{d_n + d_r}$: the scores are the same numbers, made in another way.
# RoPE between $W^{UK}$ and the query would turn by another angle for each pair of positions, and no one matrix could be taken to the other side. Hence the channels of $k^R$.
