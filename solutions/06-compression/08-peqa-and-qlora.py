# %% [markdown]
# # Solutions: PEQA and QLoRA

# %%
import torch

from llmlab.checks.compression.peqa_and_qlora import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def peqa_and_qlora_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.peqa_and_qlora_step(peqa_and_qlora_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
