# %% [markdown]
# # Solutions: GPTQ
#
# Four functions, which together are GPTQ: the step of Optimal Brain Surgeon, the factor that all rows share, the loop over the columns, and
# the order that takes large inputs first. Symbols are those of the lesson: $W$ has shape (out, in), $H$ is $X X^\top$ with shape (in, in), and
# $H^{-1} = U^\top U$. A factor in $H$ changes nothing. Stuck? `check.hint("surgeon")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.gptq import check

# %% [markdown]
# ## Exercise 1: one weight is fixed, the others make up for it
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A row $w$ shall keep its outputs although weight $q$ becomes `value`. The best change of the whole row is
#
# $$\delta = - \frac{w_q - \text{value}}{[H^{-1}]_{qq}} \, (H^{-1})_{:,q}$$
#
# Return the new row, whose entry $q$ is `value`.


# %% tags=["exercise"]
def surgeon(w: Tensor, q: int, value: float, H_inv: Tensor) -> Tensor:
    """The row w (in,) after weight q was set to `value`; H_inv is the inverse of H,
    (in, in). w itself stays as it is.
    """
    # BEGIN SOLUTION
    error = (w[q] - value) / H_inv[q, q]
    return w - error * H_inv[:, q]
    # END SOLUTION


# %% tags=["check"]
check.surgeon(surgeon)

# %% [markdown] tags=["solution"]
# At entry $q$ the column of $H^{-1}$ holds $[H^{-1}]_{qq}$, so the change there is $-(w_q - \text{value})$, and the entry becomes `value` by
# itself. A weight whose input varies with that of $q$ takes over its work; one whose input has nothing to do with it, in the sense of
# $H^{-1}$, stays. If $H$ is diagonal, nobody can help.

# %% [markdown]
# ## Exercise 2: one factor for all rows
# ●●●○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Add damping to the diagonal: `damping` times the mean of $H$'s diagonal. Then return $U$, upper triangular, with
# $H^{-1} = U^\top U$, where $H$ is the damped one. `torch.linalg.cholesky` has an argument `upper`.


# %% tags=["exercise"]
def inverse_factor(H: Tensor, damping: float) -> Tensor:
    """U, upper triangular, of H⁻¹ = Uᵀ U after damping: float32, (in, in).

    H itself stays as it is.
    """
    # BEGIN SOLUTION
    share = damping * H.diagonal().mean()
    damped = H + share * torch.eye(len(H))
    lower = torch.linalg.cholesky(damped)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)
    # END SOLUTION


# %% tags=["check"]
check.inverse_factor(inverse_factor)

# %% [markdown] tags=["solution"]
# Fewer tokens than inputs, or two inputs that are always equal, leave $H$ without an inverse. The damping gives it one, and keeps the inverse
# from growing without bound along directions that the calibration text hardly shows. The two factorisations are more
# than a way to invert: row $q$ of $U$ holds what OBQ would find only after it had eliminated the weights before $q$ one by one.

# %% [markdown]
# ## Exercise 3: round with feedback
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 4 points
#
# Take the columns of $W$ from first to last. Round the column *as it is now* to codes $-\text{top} \dots \text{top}$ times the row's scale. Divide
# the error (what the column was, minus what it became) by $U_{qq}$, and subtract the error times $U_{q,j}$ from each later column $j$.


# %% tags=["exercise"]
def round_with_feedback(W: Tensor, U: Tensor, scale: Tensor, top: int) -> Tensor:
    """Ŵ (out, in), float32: each weight a code −top … top times its row's scale.

    Shapes: W (out, in), U (in, in) upper triangular, scale (out,). W itself stays as
        it is.
    """
    # BEGIN SOLUTION
    W = W.clone()
    for q in range(W.shape[1]):
        w = W[:, q].clone()
        W[:, q] = torch.round(w / scale).clamp(-top, top) * scale
        error = (w - W[:, q]) / U[q, q]
        W[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return W
    # END SOLUTION


# %% tags=["check"]
check.round_with_feedback(round_with_feedback)

# %% [markdown] tags=["solution"]
# It is the step of exercise 1 for all rows at once, in the same order for every row. OBQ would choose for each row the weight that costs least, and
# would need an inverse for each row. Updated weights may leave the range of the scale, which was made from the old ones:
# hence the clamp. `w` has to be a copy: a view of `W[:, q]` would change with it, and the error would be 0.

# %% [markdown]
# ## Exercise 4: the largest inputs first
# ●●●●○ difficulty · ●●●○○ importance · 15 minutes · 3 points
#
# The first columns are rounded while many others can still make up for it. So take the columns in order of decreasing $H_{jj}$ ("act-order"). Each
# group of `group_size` neighbours *in the original order* has its scale, made beforehand. Permute $W$ and $H$, take your `inverse_factor` with damping
# 0.01, round with feedback, and put the columns back in their places.


# %% tags=["exercise"]
def largest_first(
    W: Tensor, H: Tensor, scale: Tensor, group_size: int, top: int
) -> Tensor:
    """Ŵ (out, in) in the original order of columns, rounded in order of decreasing
    H_jj.

    Shapes: W (out, in), H (in, in), scale (out, in / group_size). No two H_jj are
        equal. W and H stay as they are.
    """
    # BEGIN SOLUTION
    perm = H.diagonal().argsort(descending=True)
    U = inverse_factor(H[perm][:, perm], 0.01)
    W = W[:, perm]  # a copy
    for i in range(W.shape[1]):
        w = W[:, i].clone()
        s = scale[:, perm[i] // group_size]
        W[:, i] = torch.round(w / s).clamp(-top, top) * s
        error = (w - W[:, i]) / U[i, i]
        W[:, i + 1 :] -= torch.outer(error, U[i, i + 1 :])
    return W[:, perm.argsort()]
    # END SOLUTION


# %% tags=["check"]
check.largest_first(largest_first)

# %% [markdown] tags=["solution"]
# `perm[i]` is the column that is rounded $i$-th, so its group is `perm[i] // group_size`, and `perm.argsort()` is the way back. Groups must have their scales
# beforehand, because the members of a group no longer come one after the other. In return, scales lie in memory as a kernel
# expects them: column $j$ has the scale of group $j / g$.
