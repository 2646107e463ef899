# %% [markdown]
# # Solutions: Clusters and networks

# %%
import torch

from llmlab.checks.chips.clusters_and_networks import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def clusters_and_networks_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.clusters_and_networks_step(clusters_and_networks_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
