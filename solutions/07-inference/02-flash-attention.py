# %% [markdown]
# # Solutions: FlashAttention

# %%
import torch

from llmlab.checks.inference.flash_attention import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def flash_attention_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.flash_attention_step(flash_attention_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
