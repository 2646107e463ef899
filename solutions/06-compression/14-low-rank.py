# %% [markdown]
# # Solutions: Low-rank factorisation

# %%
import torch

from llmlab.checks.compression.low_rank import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def low_rank_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.low_rank_step(low_rank_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
