# %% [markdown]
# # Solutions: Low-rank factorisation
#
# Four functions: the nearest matrix of a rank, the one that changes a layer's outputs least, the floats of 4 bits, and blocks of them with a shared
# scale. Symbols are those of the lesson: $W$ has shape (out, in), `gram` is $X X^\top$ with shape (in, in), $A$ has shape (out, r) and $B$ (r, in). Stuck?
# `check.hint("truncate")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.low_rank import check

# %% [markdown]
# ## Exercise 1: the nearest matrix of a rank
# ●●○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# Return $A$ and $B$ such that $A B$ is the matrix of this rank that is nearest to $W$. How you share the singular values between the two is up to you: the
# check looks at the product. `torch.linalg.svd(W, full_matrices=False)` returns $U$, $\sigma$ and $V^\top$.


# %% tags=["exercise"]
def truncate(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (out, rank) and B (rank, in), both float32. W itself stays as it is."""
    # BEGIN SOLUTION
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vt[:rank]
    # END SOLUTION


# %% tags=["check"]
check.truncate(truncate)

# %% [markdown] tags=["solution"]
# $W$ is a sum of terms $\sigma_i u_i v_i^\top$ that do not overlap, so leaving out terms costs $\sum \sigma_i^2$ over those left out, and the cheapest to leave out are
# the last. A root of $\sigma_i$ on each side makes the factors equally large. That is not needed for the product, but both are easier to store in 8 bits.

# %% [markdown]
# ## Exercise 2: the one that changes the outputs least
# ●●●○○ difficulty · ●●●●● importance · 12 minutes · 3 points
#
# Now $\lVert (W - A B) X \rVert$ shall be least. With $S S^\top = X X^\top$ it is $\lVert (W - A B) S \rVert$: decompose $W S$, keep the largest singular values, and see to it that $A B S$ is
# what you kept. `torch.linalg.cholesky(gram)` is a lower triangular $S$. `gram` is $X X^\top$, (in, in); it has an inverse, so no damping is needed.


# %% tags=["exercise"]
def truncate_whitened(W: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (out, rank) and B (rank, in), both float32. W and gram stay as they are."""
    # BEGIN SOLUTION
    S = torch.linalg.cholesky(gram)
    U, sigma, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    A = U[:, :rank] * sigma[:rank]
    B = Vt[:rank] @ torch.linalg.inv(S)
    return A, B
    # END SOLUTION


# %% tags=["check"]
check.truncate_whitened(truncate_whitened)

# %% [markdown] tags=["solution"]
# $\lVert M X \rVert^2$ is the trace of $M X X^\top M^\top = (M S)(M S)^\top$, so it is $\lVert M S \rVert^2$ for any such $S$: the Cholesky factor is the cheapest root. For $W S$
# exercise 1 has the answer, and as $S$ has an inverse, each matrix of rank $r$ is some $A B S$. Nothing is approximate here: it is the optimum.

# %% [markdown]
# ## Exercise 3: floats of 4 bits
# ●●●○○ difficulty · ●●●●○ importance · 12 minutes · 3 points
#
# E2M1 has the levels 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with the codes 0 to 7 in this order, and the same with a minus and codes that are 8 larger. Return the code of the level
# nearest to each number. Right in the middle of two levels the *even* code wins. Beyond 6 it is 6. The sign bit is that of $x$, also where $|x|$
# rounds to 0: −0.1 has code 8.


# %% tags=["exercise"]
def e2m1_codes(x: Tensor) -> Tensor:
    """Codes 0 … 15 in the shape of x, uint8. x itself stays as it is."""
    # BEGIN SOLUTION
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    size = x.abs()[..., None]
    code = (size > borders[0::2]).sum(-1) + (size >= borders[1::2]).sum(-1)
    return (code + 8 * x.signbit()).to(torch.uint8)
    # END SOLUTION


# %% tags=["check"]
check.e2m1_codes(e2m1_codes)

# %% [markdown] tags=["solution"]
# The code counts the borders that $|x|$ has passed. Border $i$ lies between the codes $i$ and $i + 1$; when $i$ is even, a tie stays below it, otherwise it goes
# above. Ties to even are what IEEE 754 asks: ties that all go one way would make sums drift.

# %% [markdown]
# ## Exercise 4: blocks with a shared scale (MXFP4)
# ●●●●○ difficulty · ●●●●○ importance · 18 minutes · 4 points
#
# Each row of `x` is a block. Its scale is $s = 2^{\lfloor \log_2 \max|x| \rfloor - 2}$, stored as the code "exponent + 127", clamped to 0 … 254. A clamped code
# changes $s$, too: it is always the scale that is stored. A block of zeros has scale code 0. Its elements are the E2M1 codes of $x / s$, two in a byte: of
# elements $2i$ and $2i + 1$ the first is in the low half of byte $i$. `torch.frexp(t)` gives a mantissa in $[0.5, 1)$ and the exponent of 2 that belongs to it,
# exactly.


# %% tags=["exercise"]
def encode_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes (blocks, 16) and the codes of the scales (blocks,), both uint8.

    x has shape (blocks, 32) and stays as it is.
    """
    # BEGIN SOLUTION
    top = x.abs().amax(1)
    _, exponent = torch.frexp(top)  # ⌊log2 top⌋ + 1
    scale = (exponent - 1 - 2 + 127).clamp(0, 254)
    scale = torch.where(top > 0, scale, 0)
    codes = e2m1_codes(x / 2.0 ** (scale[:, None] - 127.0))
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed, scale.to(torch.uint8)
    # END SOLUTION


# %% tags=["check"]
check.encode_mxfp4(encode_mxfp4)

# %% [markdown] tags=["solution"]
# After the division the largest element lies in $[4, 8)$. What is above 6 becomes 6: the specification would rather clip a few than double the step of all. A
# power of two as a scale costs one byte, and multiplying by it only moves the exponent. `log2` in floats may be off just below a power of two; `frexp` reads the exponent's bits.
