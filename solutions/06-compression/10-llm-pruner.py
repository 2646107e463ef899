# %% [markdown]
# # Solutions: LLM-Pruner

# %%
import torch

from llmlab.checks.compression.llm_pruner import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def llm_pruner_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.llm_pruner_step(llm_pruner_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
