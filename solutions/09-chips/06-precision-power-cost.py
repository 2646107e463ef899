# %% [markdown]
# # Solutions: Precision, power and cost

# %%
import torch

from llmlab.checks.chips.precision_power_cost import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def precision_power_cost_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.precision_power_cost_step(precision_power_cost_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
