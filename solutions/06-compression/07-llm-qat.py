# %% [markdown]
# # Solutions: LLM-QAT

# %%
import torch

from llmlab.checks.compression.llm_qat import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def llm_qat_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.llm_qat_step(llm_qat_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
