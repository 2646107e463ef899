# %% [markdown]
# # Solutions: PEQA and QLoRA
#
# Four functions: a linear that computes with frozen integers, the gradient of its scales, what the four ways to fine-tune take in memory, and the
# swap of a task. Symbols are those of the lesson: codes $\bar W$ of shape (out, in), a zero point $z$ and a scale $s$ for each group of
# neighbours in a row, $\hat W = s \cdot (\bar W - z)$. Stuck? `check.hint("scale_gradient")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.peqa_and_qlora import check

# %% [markdown]
# ## Exercise 1: a linear of integers and scales
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Codes and zero points come as `uint8`, as in a file. The first `group_size` columns of a row are its first group, and so on. Return
# $x \hat W^\top$. Gradients must reach `x` and `scale`.


# %% tags=["exercise"]
def peqa_forward(
    x: Tensor, codes: Tensor, zero: Tensor, scale: Tensor, group_size: int
) -> Tensor:
    """The outputs (tokens, out), float32, of ŵ = scale · (code − zero).

    Shapes: x (tokens, in); codes (out, in), uint8; zero (out, groups), uint8; scale
        (out, groups); groups = in / group_size.
    """
    # BEGIN SOLUTION
    z = zero.float().repeat_interleave(group_size, dim=1)
    s = scale.repeat_interleave(group_size, dim=1)
    weight = s * (codes.float() - z)
    return x @ weight.T
    # END SOLUTION


# %% tags=["check"]
check.peqa_forward(peqa_forward)

# %% [markdown] tags=["solution"]
# In `uint8`, 3 − 8 is 251, without any warning. So the codes become floats first. Autograd has all that it needs: the integers are constants, and the
# path from `scale` to the outputs is a product. The package writes the backward pass itself, so that no float weight is kept until then.

# %% [markdown]
# ## Exercise 2: the gradient of a scale
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 3 points
#
# $G$ is the gradient of the loss with respect to $\hat W$. Return that with respect to each scale, a sum over the weights of its group $b$
# (codes $\bar W$, zero point $z_b$):
#
# $$\frac{\partial L}{\partial s_b} = \sum_{(i,j) \in b} G_{ij} \, (\bar W_{ij} - z_b)$$


# %% tags=["exercise"]
def scale_gradient(G: Tensor, codes: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """The gradient of the scales, (out, groups), float32.

    Shapes: G (out, in); codes (out, in), uint8; zero (out, groups), uint8; groups =
        in / group_size.
    """
    # BEGIN SOLUTION
    z = zero.float().repeat_interleave(group_size, dim=1)
    said = G * (codes.float() - z)
    return said.unflatten(1, (-1, group_size)).sum(-1)
    # END SOLUTION


# %% tags=["check"]
check.scale_gradient(scale_gradient)

# %% [markdown] tags=["solution"]
# A group moves as one. What its weights ask for adds up, each in proportion to its integer: a weight on level 0 has no say, one on the
# last level the most. It is a sum and not a mean, as one step of $s$ moves all of them.

# %% [markdown]
# ## Exercise 3: what training takes
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Bytes in memory to train some linears with (out, in) of `shapes`, activations not counted:
#
# - float weights and adapters: 2 bytes per value;
# - codes: `bits` bits each, and one scale of 2 bytes for each group of `group_size` weights of a row, no zero points;
# - each trained value: a gradient of 2 bytes, and 12 bytes in the optimizer (two moments and a master copy of 4 bytes each).
#
# `"full"` trains all float weights. `"lora"` has frozen float weights, and an adapter of `rank` on each linear: matrices of rank × in and
# out × rank, which train. `"qlora"` is that on codes and scales, which are frozen. `"peqa"` has codes, and scales that train.


# %% tags=["exercise"]
def training_bytes(
    shapes: list[tuple[int, int]],
    method: str,
    bits: int,
    group_size: int,
    rank: int,
) -> float:
    """Bytes of weights, adapters, gradients and optimizer.

    `group_size` divides every `in`. What a method does not use is given all the same.
    """
    # BEGIN SOLUTION
    n = sum(rows * columns for rows, columns in shapes)
    adapters = sum(rank * (rows + columns) for rows, columns in shapes)
    scales = n // group_size
    in_codes = n * bits / 8 + 2 * scales
    held = {
        "full": 2 * n,
        "lora": 2 * n + 2 * adapters,
        "qlora": in_codes + 2 * adapters,
        "peqa": in_codes,
    }
    trained = {"full": n, "lora": adapters, "qlora": adapters, "peqa": scales}
    return held[method] + (2 + 12) * trained[method]
    # END SOLUTION


# %% tags=["check"]
check.training_bytes(training_bytes)

# %% [markdown] tags=["solution"]
# Full fine-tuning takes 16 bytes per weight, of which 2 are the weight. LoRA removes the 14 others and keeps the 2; QLoRA and PEQA shrink
# these as well. What is left between the two is small change: the adapters, or nothing at all.

# %% [markdown]
# ## Exercise 4: swap the task
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# A server holds one set of integers and many tasks. `scales` are those of the model now, by name; `task` comes from a file, in 16 bits or 32. Return a new dictionary
# with the scales of the task in float32, all of them copies. Raise a `ValueError` that names the linear when the task does not fit: a linear is missing
# or unknown, its scales have another shape, or one of them is NaN or infinite. `scales` and `task` stay as they are.


# %% tags=["exercise"]
def swap_task(scales: dict[str, Tensor], task: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scales of the task, float32, under the names of the model.

    Raises:
        ValueError: the task does not fit; the message names the linear.
    """
    # BEGIN SOLUTION
    odd = scales.keys() ^ task.keys()
    if odd:
        raise ValueError(f"missing or unknown: {', '.join(sorted(odd))}")
    for name, values in task.items():
        if values.shape != scales[name].shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}")
        if not values.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    return {name: task[name].to(torch.float32, copy=True) for name in scales}
    # END SOLUTION


# %% tags=["check"]
check.swap_task(swap_task)

# %% [markdown] tags=["solution"]
# Everything is looked at before anything is built, so that a bad file changes nothing. A tensor of one scale would broadcast
# silently over all rows: compare shapes, not numbers of dimensions. What no shape can tell is whether the scales were trained with
# *these* integers. The package writes a fingerprint of the integers into the file for that.
