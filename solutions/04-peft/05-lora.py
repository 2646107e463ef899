# %% [markdown]
# # Solutions: LoRA
#
# Four functions, each a few lines: the layer, merging, the best possible low-rank change, and a batch in which every
# row has its own adapter. Symbols are those of the lesson: $W$ is $(d, k)$, $A$ is $(r, k)$, $B$ is $(d, r)$.
# Stuck? `check.hint("lora_forward")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.lora import check

# %% [markdown]
# ## Exercise 1: the layer
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Write the forward pass of a linear layer with an adapter beside it:
#
# $$h = W x + \frac{\alpha}{r}\, B A\,(x \odot \text{keep})$$
#
# Here $x$ has any number of dimensions, the last of size $k$. `keep` is the dropout mask, already divided by $1-p$:
# it holds $0$ where an input of the low-rank path is dropped. Do not build the $d \times k$ matrix $BA$.


# %% tags=["exercise"]
def lora_forward(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float, keep: Tensor
) -> Tensor:
    """W x + (alpha / r) B A (x · keep).

    Shapes: x and keep (..., k), W (d, k), A (r, k), B (d, r). Returns (..., d).
    Training goes through it: a gradient must reach x, A and B.
    """
    # BEGIN SOLUTION
    r = A.shape[0]
    low = (x * keep) @ A.T  # (..., r)
    return x @ W.T + (low * (alpha / r)) @ B.T
    # END SOLUTION


# %% tags=["check"]
check.lora_forward(lora_forward)

# %% [markdown] tags=["solution"]
# A linear layer stores its weight as (out, in) and computes $x W^\top$, so the two factors are transposed too. Going
# down to $r$ numbers per token and up again costs $r(k+d)$ multiplications; building $BA$ first would cost $rdk$ and
# then $dk$ more for each token. The scale sits on the narrow middle, where it touches $r$ numbers instead of $d$: the
# result is the same, and in our timings the whole layer, forward and backward, took about 6% less. Dropout touches the
# low-rank path only. The frozen path is the pretrained model; noise there would change what it already knows.

# %% [markdown]
# ## Exercise 2: merge
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Fold several adapters into a weight: $W + \sum_i \frac{\alpha_i}{r_i} B_i A_i$. The weight is in bfloat16, which
# holds 8 significant bits; the factors are in float32. Add up in float32 and round once, at the end. `W` itself must
# stay as it is: someone may want it back.


# %% tags=["exercise"]
def merge(W: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """W plus the change of each adapter (A, B, alpha), in W's dtype, rounded once.

    Shapes: W (d, k) in bfloat16; A (r, k) and B (d, r) in float32, r differs from
        adapter to adapter. Returns (d, k).
    """
    # BEGIN SOLUTION
    total = W.float()
    for A, B, alpha in adapters:
        total = total + alpha / A.shape[0] * (B @ A)
    return total.to(W.dtype)
    # END SOLUTION


# %% tags=["check"]
check.merge(merge)

# %% [markdown] tags=["solution"]
# Near 1 the next bfloat16 number is 0.0078 away, and a LoRA change is often smaller than that. Added one by one and
# rounded each time, small changes vanish; added up first, they survive. This is also why subtracting the change does
# not undo a merge: $(W + \Delta W) - \Delta W$ was rounded on the way. Libraries that unmerge by subtraction return
# a slightly different $W$; `llmlab.peft.lora.lora` keeps the old one and puts it back.

# %% [markdown]
# ## Exercise 3: the best factors
# ●●●○○ difficulty · ●●●○○ importance · 15 minutes · 3 points
#
# Someone fine-tuned all of a layer and hands you $\Delta W$. Find $A$ and $B$ of rank $r$ such that $\frac{\alpha}{r} BA$
# is as near to it as any matrix of rank $r$ can be (in the Frobenius norm). How you split the product between $A$ and
# $B$ is up to you.


# %% tags=["exercise"]
def best_factors(delta: Tensor, r: int, alpha: float) -> tuple[Tensor, Tensor]:
    """A and B with (alpha / r) B A ≈ delta, as near as rank r allows.

    Shapes: delta (d, k). Returns A (r, k), then B (d, r).
    """
    # BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    half = S[:r].sqrt()
    A = half[:, None] * Vh[:r]
    B = U[:, :r] * half * (r / alpha)
    return A, B
    # END SOLUTION


# %% tags=["check"]
check.best_factors(best_factors)

# %% [markdown] tags=["solution"]
# [Eckart and Young 1936](https://doi.org/10.1007/BF02288367 "eckart1936approximation") proved that cutting the singular value decomposition after $r$ terms is the best one can do;
# what is lost is $\sum_{i>r} \sigma_i^2$. So the spectrum of $\Delta W$ tells in advance what each rank would cost, which
# is what the lesson's plot shows. With $\sqrt{\sigma}$ in each factor, both have the same size, and a further
# training run moves both alike. Note $r/\alpha$: LoRA multiplies by $\alpha/r$ when it uses the factors.

# %% [markdown]
# ## Exercise 4: one batch, many adapters
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# A server holds one base weight and $m$ adapters. A batch arrives; `ids[i]` says which adapter row $i$ wants, and
# $-1$ means none. Compute the whole batch at once, without a loop over rows:
#
# $$h_i = W x_i + s_{\text{ids}_i}\, B_{\text{ids}_i} A_{\text{ids}_i} x_i$$


# %% tags=["exercise"]
def serve(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, scaling: Tensor, ids: Tensor
) -> Tensor:
    """Each row through W and its own adapter; rows with id −1 through W alone.

    Shapes: x (n, seq, k), W (d, k), A (m, r, k), B (m, d, r), scaling (m,), ids (n,) of
        int64. Returns (n, seq, d).
    """
    # BEGIN SOLUTION
    # (n, 1, 1), 0 where there is no adapter
    scale = torch.where(ids >= 0, scaling[ids], 0.0)[:, None, None]
    low = x @ A[ids].mT * scale  # (n, seq, r)
    return x @ W.T + low @ B[ids].mT
    # END SOLUTION


# %% tags=["check"]
check.serve(serve)

# %% [markdown] tags=["solution"]
# `A[ids]` gathers one pair of factors for each row and the batched product does the rest: the large $W$ is read once
# for all customers. The trap is −1: to torch it is a valid index, the last adapter, so a request for the plain
# model would be answered by someone else's fine-tune, with no error. Gathering copies the factors; servers with
# thousands of adapters use a kernel that reads them where they are
# ([Sheng et al. 2023](https://arxiv.org/abs/2311.03285 "sheng2023slora")).
