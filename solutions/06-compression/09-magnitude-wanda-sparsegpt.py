# %% [markdown]
# # Solutions: Magnitude, Wanda and SparseGPT

# %%
import torch

from llmlab.checks.compression.magnitude_wanda_sparsegpt import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def magnitude_wanda_sparsegpt_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.magnitude_wanda_sparsegpt_step(magnitude_wanda_sparsegpt_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
