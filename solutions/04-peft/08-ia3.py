# %% [markdown]
# # Solutions: (IA)³
#
# Three functions: the scaled linear, the plain linear that it amounts to, and a batch in which every row belongs to another
# task. Symbols are those of the lesson: $W$ is (out, in), $b$ is (out), and $l$, in code `scale`, is as long as the side that it
# scales.
# Stuck? `check.hint("ia3_linear")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.ia3 import check

# %% [markdown]
# ## Exercise 1: the scaled linear
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Keys and values are scaled at the output of their linear, the activations of the MLP at the input of theirs:
#
# $$l \odot (W x + b) \qquad \text{or, with feedforward,} \qquad W (l \odot x) + b$$


# %% tags=["exercise"]
def ia3_linear(
    x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor, feedforward: bool
) -> Tensor:
    """The linear W, b with its output multiplied by scale, or with `feedforward` its
    input.

    Shapes: x (..., in), W (out, in), b (out,) or None, scale (out,), or (in,) with
        `feedforward`. Returns (..., out).
    Training goes through it: a gradient must reach x and scale.
    """
    # BEGIN SOLUTION
    if feedforward:
        x = x * scale
    out = x @ W.T
    if b is not None:
        out = out + b
    return out if feedforward else out * scale
    # END SOLUTION


# %% tags=["check"]
check.ia3_linear(ia3_linear)

# %% [markdown] tags=["solution"]
# The paper scales the keys, $l_k \odot K$, and a key includes its linear's bias. T5, on which (IA)³ was made, has no biases, and
# nor has Llama; Qwen2 has, and there it matters on which side of the addition the scale stands.

# %% [markdown]
# ## Exercise 2: merge
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Give the weight and the bias of the *plain* linear that does what the scaled one does. $W$ and $b$ are in bfloat16 and $l$ is
# in float32: multiply in float32, and round once, to the dtype that W has: another $W$ may be in
# float32. Where there is no bias, none is to come out.


# %% tags=["exercise"]
def merge(
    W: Tensor, b: Tensor | None, scale: Tensor, feedforward: bool
) -> tuple[Tensor, Tensor | None]:
    """The new weight and bias, in W's dtype. Shapes as in exercise 1; nothing is
    changed in place.
    """
    # BEGIN SOLUTION
    if feedforward:
        return (W.float() * scale).to(W.dtype), b
    new_b = None if b is None else (scale * b.float()).to(b.dtype)
    return (scale[:, None] * W.float()).to(W.dtype), new_b
    # END SOLUTION


# %% tags=["check"]
check.merge(merge)

# %% [markdown] tags=["solution"]
# An entry $W_{ij}$ takes input $j$ to output $i$. A scale on outputs is $l_i$ and reaches row $i$; a scale on inputs is $l_j$ and
# reaches column $j$. On a square matrix both run, and only one is right. There is no `unmerge` exercise on purpose: dividing by $l$
# rounds a second time, and where $l_i = 0$ the row is gone. Keep $W$.

# %% [markdown]
# ## Exercise 3: one batch, many tasks
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# A server holds one weight and a table of $m$ tasks' scales for its output. `ids[i]` says which task row $i$ of the batch belongs to,
# and $-1$ means the plain model. Compute the whole batch at once, without a loop over rows.


# %% tags=["exercise"]
def serve(x: Tensor, W: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Each row through W, scaled by its own task's vector; rows with id −1 through W
    alone.

    Shapes: x (n, seq, in), W (out, in), scale (m, out), ids (n,) of int64. Returns (n,
        seq, out).
    """
    # BEGIN SOLUTION
    rows = torch.where(ids[:, None] >= 0, scale[ids], 1.0)  # (n, out)
    return x @ W.T * rows[:, None]
    # END SOLUTION


# %% tags=["check"]
check.serve(serve)

# %% [markdown] tags=["solution"]
# Compare it with LoRA's: there each row needs two gathered matrices and two batched products, here one gathered vector and one
# multiplication: mixing tasks in a batch is nearly free. And −1 is again the trap: for
# torch it is the last row of the table.
