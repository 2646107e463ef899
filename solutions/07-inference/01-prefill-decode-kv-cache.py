# %% [markdown]
# # Solutions: Prefill, decode and the KV cache

# %%
import torch

from llmlab.checks.inference.prefill_decode_kv_cache import check

# %% [markdown]
# ## Exercise 1: TODO
#
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# TODO what to do, and the formula.


# %% tags=["exercise"]
def prefill_decode_kv_cache_step(x: torch.Tensor) -> torch.Tensor:
    """TODO all that is needed, with shapes."""
    # BEGIN SOLUTION
    raise NotImplementedError("TODO")
    # END SOLUTION


# %% tags=["check"]
check.prefill_decode_kv_cache_step(prefill_decode_kv_cache_step)

# %% [markdown] tags=["solution"]
# TODO why it is so.
