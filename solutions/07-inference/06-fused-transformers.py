# %% [markdown]
# # Solutions: Fused transformers

# %%
import torch

from llmlab.checks.inference.fused_transformers import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def fused_transformers_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.fused_transformers_step(fused_transformers_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
