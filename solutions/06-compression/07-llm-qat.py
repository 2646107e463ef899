# %% [markdown]
# # Solutions: LLM-QAT
#
# Four functions: rounding that lets the gradient through, text that the model writes itself, a loss whose label is a whole distribution, and a
# cache that holds codes. $\alpha$ is the step between two levels, and codes of $N$ bits are the whole numbers
# $-(2^{N-1} - 1) \dots 2^{N-1} - 1$. Stuck? `check.hint("fake_quantize")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.llm_qat import check

# %% [markdown]
# ## Exercise 1: round each token, and let the gradient through
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# $x$ has shape (B, T, d). Each token (a row of $d$ values) has its own $\alpha = \max|x| / (2^{N-1} - 1)$, where $N$ is `bits`, and
# $\hat x = \alpha \lfloor x / \alpha \rceil$. Nothing is clipped. In the backward pass the rounding counts for nothing: the gradient of $x$ is that of $\hat x$,
# everywhere. No gradient runs through $\alpha$. A token of zeros comes back as zeros.


# %% tags=["exercise"]
def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """x̂ (B, T, d), float32, whose gradient is handed on to x (B, T, d) as it is.

    x itself stays as it is.
    """
    # BEGIN SOLUTION
    top = 2 ** (bits - 1) - 1
    alpha = x.detach().abs().amax(-1, keepdim=True) / top
    alpha = torch.where(alpha > 0, alpha, 1.0)
    x_hat = torch.round(x / alpha) * alpha
    return x + (x_hat - x).detach()
    # END SOLUTION


# %% tags=["check"]
check.fake_quantize(fake_quantize)

# %% [markdown] tags=["solution"]
# The derivative of a staircase is 0 nearly everywhere, so a model of staircases would learn nothing. `x + (x_hat - x).detach()` has the value of
# $\hat x$, and all that it knows of derivatives is that of its first term. It is a lie that serves: the weight moves as if it were not rounded, and now
# and then crosses to the next level. As $\alpha$ comes from the largest value itself, no code needs a clamp, and no value loses its gradient.

# %% [markdown]
# ## Exercise 2: the model writes its text
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# `model` takes ids (B, T) and gives logits (B, T, V). Start with one token per text. The next `greedy` tokens are the likeliest ones; there may be room for
# fewer. All others are drawn: call `torch.multinomial` once for each of these steps, with the softmax of the logits and with `generator`; greedy steps draw
# nothing. The model reads the whole text so far, and no gradient is kept.


# %% tags=["exercise"]
def write_text(
    model, first: Tensor, greedy: int, length: int, generator: torch.Generator
) -> Tensor:
    """Texts (B, length), int64, the first tokens (B,) among them."""
    # BEGIN SOLUTION
    ids = first[:, None]
    with torch.no_grad():
        for made in range(length - 1):
            logits = model(ids)[:, -1]
            if made < greedy:
                new = logits.argmax(-1, keepdim=True)
            else:
                p = logits.softmax(-1)
                new = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
    return ids
    # END SOLUTION


# %% tags=["check"]
check.write_text(write_text)

# %% [markdown] tags=["solution"]
# First tokens come from all over the vocabulary, so that texts differ. A token drawn right after a rare first token may be nonsense, and all that follows
# would follow nonsense; a few greedy tokens lead to something that the model is sure of. But greedy to the end, a model repeats itself. The
# package keeps a cache, as `model(ids)` reads everything again at each step.

# %% [markdown]
# ## Exercise 3: the teacher's distribution as the label
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 3 points
#
# Both arguments are logits (B, T, V) after the same tokens. Return the cross-entropy
#
# $$-\frac{1}{BT} \sum_{b,t} \sum_c p_T(c)\,\log p_S(c)$$
#
# where $p_T$ is the teacher's softmax and $p_S$ the student's. Every position counts. The teacher gets no gradient. Logits may be hundreds apart.


# %% tags=["exercise"]
def soft_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss, float32, a tensor without dimensions."""
    # BEGIN SOLUTION
    p = teacher.detach().softmax(-1)
    log_q = student.log_softmax(-1)
    return -(p * log_q).sum(-1).mean()
    # END SOLUTION


# %% tags=["check"]
check.soft_label_loss(soft_label_loss)

# %% [markdown] tags=["solution"]
# With tokens as labels one shifts: the logits at $t$ are compared with the token at $t + 1$. Here both sides are logits, so both are
# predictions of the same token $t + 1$, and nothing is shifted. Even the last position has a label, though nobody knows the token that follows. The gradient at the student's
# logits is $(p_S - p_T)/BT$: it vanishes where both agree, however unsure they are. A hard label would still pull.

# %% [markdown]
# ## Exercise 4: a cache of codes
# ●●●●○ difficulty · ●●●●○ importance · 20 minutes · 4 points
#
# The keys of $S$ tokens are stored as `codes` (B, K, S, D), and `alpha` (B, S): one per token, over its K heads and D channels together. $S$ may be 0. Now $T$
# new tokens arrive as floats `k`. Compute each one's $\alpha = \max|k| / (2^{N-1} - 1)$ ($N$ is `bits`), round it to float16, and make the codes with *that*
# $\alpha$. A token of zeros has $\alpha = 1$. Join them to what is there, behind it, and return what is stored together with all keys, dequantized.


# %% tags=["exercise"]
def append(
    codes: Tensor, alpha: Tensor, k: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """codes (B, K, S + T, D) int8, alpha (B, S + T) float16, k_hat (B, K, S + T, D)
    float32.

    Shapes: codes (B, K, S, D) int8, alpha (B, S) float16, k (B, K, T, D) float32; all
        three stay as they are.
    """
    # BEGIN SOLUTION
    top = 2 ** (bits - 1) - 1
    step = k.abs().amax((1, 3), keepdim=True) / top  # (B, 1, T, 1)
    step = torch.where(step > 0, step, 1.0).half()
    new = torch.round(k / step.float()).to(torch.int8)
    codes = torch.cat([codes, new], dim=2)
    alpha = torch.cat([alpha, step[:, 0, :, 0]], dim=1)
    k_hat = codes.float() * alpha.float()[:, None, :, None]
    return codes, alpha, k_hat
    # END SOLUTION


# %% tags=["check"]
check.append(append)

# %% [markdown] tags=["solution"]
# A token's $\alpha$ depends on that token alone. So old codes never change, and a prompt of five tokens leaves the same cache as five tokens one by one. One $\alpha$ over several tokens would
# break both. Codes must be made with the $\alpha$ that is stored, as it is the one that they will be multiplied with. At 4 bits a token of 8 heads with 128 channels takes
# 512 bytes of codes (two to a byte, which this exercise leaves out) and 2 bytes of $\alpha$.
