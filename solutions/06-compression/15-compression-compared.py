# %% [markdown]
# # Solutions: Compression compared

# %%
import torch

from llmlab.checks.compression.compression_compared import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def compression_compared_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.compression_compared_step(compression_compared_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
