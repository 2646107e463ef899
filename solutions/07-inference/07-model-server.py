# %% [markdown]
# # Solutions: Model server

# %%
import torch

from llmlab.checks.inference.model_server import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def model_server_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.model_server_step(model_server_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
