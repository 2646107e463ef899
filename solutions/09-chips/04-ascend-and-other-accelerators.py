# %% [markdown]
# # Solutions: Ascend and other accelerators

# %%
import torch

from llmlab.checks.chips.ascend_and_other_accelerators import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def ascend_and_other_accelerators_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.ascend_and_other_accelerators_step(ascend_and_other_accelerators_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
