# %% [markdown]
# # Solutions: Prompt and prefix tuning
#
# Three functions: put a soft prompt before a padded batch, cut a prefix into layers and heads, and attend to it.
# Symbols are those of the lesson: $p$ virtual tokens, $L$ layers, $H$ query heads, $K$ key/value heads of $D$ numbers.
# Stuck? `check.hint("prepend_prompt")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.prompt_and_prefix_tuning import check

# %% [markdown]
# ## Exercise 1: before the input
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Put the soft prompt before every row of an embedded batch, and make the mask and the positions fit. The batch may be padded
# on the left. Virtual tokens are never padding and take positions $0 \dots p-1$; each row's first *real* token takes position
# $p$, the next $p+1$, and so on. (What position a padding token gets does not matter.)


# %% tags=["exercise"]
def prepend_prompt(
    prompt: Tensor, embeds: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings, the mask and the positions with p virtual tokens before each row.

    Shapes: prompt (p, d), embeds (B, T, d), mask (B, T) of int64, 1 for a token and 0
        for padding.
    Returns embeddings (B, p+T, d), mask (B, p+T) and positions (B, p+T), the last two
    of int64.
    The prompt is trained: a gradient must reach it.
    """
    # BEGIN SOLUTION
    B, p = len(embeds), len(prompt)
    embeds = torch.cat([prompt.expand(B, -1, -1), embeds], dim=1)
    mask = torch.cat([mask.new_ones(B, p), mask], dim=1)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    return embeds, mask, positions
    # END SOLUTION


# %% tags=["check"]
check.prepend_prompt(prepend_prompt)

# %% [markdown] tags=["solution"]
# Once the mask has its $p$ ones, the running sum counts virtual and real tokens alike and skips padding: positions come for free. Two
# mistakes are common and silent. Leave the mask as it was and the library complains; extend it with zeros and nothing complains, but nobody attends to
# the prompt, so that it gets no gradient. Let positions count the padding and every row of a batch sees its prompt from another distance than
# it would alone, and the answer to a question then depends on the other questions in the batch.

# %% [markdown]
# ## Exercise 2: cut a prefix
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# A prefix is stored as one row for each virtual token. The row holds, layer after layer, first the token's key and then its value;
# each of them head after head, $D$ numbers per head. Cut it into what attention wants: for each layer, keys and values by head.


# %% tags=["exercise"]
def split_prefix(prefix: Tensor, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """All keys, then all values of a prefix.

    Shapes: prefix (p, 2·layers·heads·D). Returns keys (layers, heads, p, D) and values
        (layers, heads, p, D).
    The prefix is trained: a gradient must reach it.
    """
    # BEGIN SOLUTION
    p = len(prefix)
    # (p, L, 2, K, D): as it lies in memory
    parts = prefix.view(p, layers, 2, heads, -1)
    keys, values = parts.permute(2, 1, 3, 0, 4)  # (2, L, K, p, D)
    return keys, values
    # END SOLUTION


# %% tags=["check"]
check.split_prefix(split_prefix)

# %% [markdown] tags=["solution"]
# `view` names the axes in the order in which the numbers lie; only then does `permute` move them. A `view` straight to the wanted shape also runs
# and also trains, since the numbers are free. It fails when a prefix from a file is loaded: then row 0 must be token 0. The number of heads is that of
# keys and values. With the query heads of a model with grouped-query attention the division comes out wrong.

# %% [markdown]
# ## Exercise 3: attend to a prefix
# ●●●●○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# Write causal grouped-query attention with a prefix, from scratch (no `scaled_dot_product_attention`):
#
# $$O = \mathrm{softmax}\!\left(\frac{Q\,[P_K; K]^\top}{\sqrt{D}} + \text{mask}\right)[P_V; V]$$
#
# Query $i$ sees the whole prefix and the tokens $0 \dots i$. Query head $h$ reads key/value head $\lfloor h / (H/K) \rfloor$: the first $H/K$
# query heads share head 0. Scores of several hundred must not overflow.


# %% tags=["exercise"]
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> Tensor:
    """Attention of T tokens over a prefix and over each other, causally.

    Shapes: q (B, H, T, D); k and v (B, K, T, D); prefix_k and prefix_v (K, p, D), the
        same for each row of the batch.
    Returns (B, H, T, D).
    Training goes through it: a gradient must reach all five.
    """
    # BEGIN SOLUTION
    B, H, T, D = q.shape
    K, p = prefix_k.shape[:2]
    k = torch.cat([prefix_k.expand(B, -1, -1, -1), k], dim=2)  # (B, K, p+T, D)
    v = torch.cat([prefix_v.expand(B, -1, -1, -1), v], dim=2)
    k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))  # (B, H, p+T, D)
    visible = torch.ones(T, p + T, dtype=torch.bool).tril(p)
    scores = (q @ k.mT / D**0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1) @ v
    # END SOLUTION


# %% tags=["check"]
check.prefix_attention(prefix_attention)

# %% [markdown] tags=["solution"]
# The mask is the trap. `tril(0)` on a $T \times (p+T)$ matrix lets query 0 see one prefix token and query $T-1$ see no recent text at all; the diagonal
# belongs at $p$. One softmax runs over prefix and text together, so a prefix always takes attention away from the text:
# [He et al. 2022](https://arxiv.org/abs/2110.04366 "he2022towards") write it as $(1-\lambda)\,\mathrm{Attn}(Q, K, V) + \lambda\,\mathrm{Attn}(Q, P_K, P_V)$, where $\lambda$ is the
# prefix's share of the softmax. That is also why a prefix of zeros is not neutral: $e^0 = 1$, so its $\lambda$ is not 0.
