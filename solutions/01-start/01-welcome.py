# %% [markdown]
# # Solutions: Welcome

# %%
import math

import torch

from llmlab.checks.start.welcome import check

# %% [markdown]
# ## Exercise 1: how large is it?
#
# ●○○○○ difficulty · ●●●●● importance · 5 minutes · 1 point
#
# A model of $N$ parameters, each stored in $b$ bits, takes $N b / 8$ bytes. Quantised models store fewer than
# 8 bits per weight, packed side by side, and the scales that go with them make the average width a fraction: 4.5 bits is
# common. Return a whole number of bytes, rounded up.


# %% tags=["exercise"]
def weight_bytes(params: int, bits: float = 16) -> int:
    """The bytes that `params` weights of `bits` each take, packed: a whole number,
    rounded up.

    weight_bytes(1000, 16) is 2000. `bits` may be odd (3) or a fraction (4.5).
    """
    # BEGIN SOLUTION
    return math.ceil(params * bits / 8)
    # END SOLUTION


# %% tags=["check"]
check.weight_bytes(weight_bytes)

# %% [markdown] tags=["solution"]
# The rounding stands last because memory is packed: seven weights of 4 bits share three and a half bytes, which take
# four. Rounding each weight up to a byte would double a 4-bit model, and `bits // 8` would make it vanish.

# %% [markdown]
# ## Exercise 2: how fast can it write?
#
# ●●○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# To write the next token for $b$ requests, an accelerator reads all weights once, $W$ bytes, and each request's own
# cache, $C$ bytes. Its memory delivers $\beta$ bytes per second. Nothing else counts here: what is the most tokens per
# second, over all requests together, that it can write?


# %% tags=["exercise"]
def tokens_per_second(
    weight_bytes: float, bandwidth: float, batch: int = 1, cache_bytes: float = 0.0
) -> float:
    """The most tokens per second, all requests together, that memory bandwidth allows.

    weight_bytes: W, of all weights; they are read once per step, whatever the batch.
    bandwidth:    β, in bytes per second.
    batch:        b, the requests; each gets one token per step.
    cache_bytes:  C, of one request's keys and values; each request's are read once a
                  step.
    """
    # BEGIN SOLUTION
    bytes_per_step = weight_bytes + batch * cache_bytes
    return batch * bandwidth / bytes_per_step
    # END SOLUTION


# %% tags=["check"]
check.tokens_per_second(tokens_per_second)

# %% [markdown] tags=["solution"]
# Tokens per second are tokens per step over seconds per step: $b$ over $(W + bC)/\beta$. While $bC$ is small against
# $W$, doubling the batch doubles the tokens and leaves the time: that is why servers batch. As $b$ grows the caches take
# over, and the speed ends at $\beta / C$, however large the batch.

# %% [markdown]
# ## Exercise 3: a softmax that survives
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# The last step before a token is drawn:
#
# $$\mathrm{softmax}(x)_i = \frac{e^{x_i}}{\sum_j e^{x_j}}$$
#
# In fp32, $e^{89}$ is already infinity. Yet taking the same number from every $x_i$ changes nothing on paper. Write it so
# that it also works for logits in the thousands, for rows that lie thousands apart, and for a logit of $-\infty$ (a token
# that is ruled out). Do it with `exp` and sums: `torch.softmax` would be no exercise.


# %% tags=["exercise"]
def softmax(x: torch.Tensor) -> torch.Tensor:
    """The softmax over the last dimension of `x` (…, n): same shape and dtype, each row
    sums to 1. `x` stays as it is.
    """
    # BEGIN SOLUTION
    # the largest exponent of each row is 0
    e = (x - x.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=-1, keepdim=True)
    # END SOLUTION


# %% tags=["check"]
check.softmax(softmax)

# %% [markdown] tags=["solution"]
# With the row's largest logit $m$ taken away, every exponent is at most 0, so nothing overflows, and the largest term
# is $e^0 = 1$, so the sum is never 0. One maximum for the whole tensor is not enough: a row that lies 1000 below it
# underflows to 0/0. The lesson on flash attention turns this one line into an algorithm.
