# %% [markdown]
# # Solutions: Sampling and speculation

# %%
import torch

from llmlab.checks.inference.sampling_and_speculation import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def sampling_and_speculation_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.sampling_and_speculation_step(sampling_and_speculation_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
