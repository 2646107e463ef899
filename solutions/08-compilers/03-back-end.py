# %% [markdown]
# # Solutions: Back end

# %%
import torch

from llmlab.checks.compilers.back_end import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def back_end_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.back_end_step(back_end_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
