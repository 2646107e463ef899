# %% [markdown]
# # Solutions: NVIDIA GPU

# %%
import torch

from llmlab.checks.chips.nvidia_gpu import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def nvidia_gpu_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.nvidia_gpu_step(nvidia_gpu_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
