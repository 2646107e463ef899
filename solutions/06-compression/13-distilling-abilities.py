# %% [markdown]
# # Solutions: Distilling abilities

# %%
import torch

from llmlab.checks.compression.distilling_abilities import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def distilling_abilities_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.distilling_abilities_step(distilling_abilities_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
