# %% [markdown]
# # Solutions: ZeroQuant

# %%
import torch

from llmlab.checks.compression.zeroquant import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def zeroquant_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.zeroquant_step(zeroquant_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
