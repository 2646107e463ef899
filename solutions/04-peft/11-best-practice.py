# %% [markdown]
# # Solutions: Best practice
#
# What training takes, who is worth their price, and the challenge of this part: reach a loss on a budget.
# Stuck? `check.hint("training_bytes")` shows a hint, and the next one when it is called again.

# %%
from torch import Tensor, nn

from llmlab.checks.peft.best_practice import check
from llmlab.peft import ia3
from llmlab.training import tasks
from llmlab.training.tasks import Batch

# %% [markdown]
# ## Exercise 1: what it takes to train
# ●○○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# A model of `total` parameters is frozen and stored with `base_bits` bits each (16, or about 4.127 for QLoRA). Beside it
# train `trained` more parameters, in mixed precision with Adam: each takes 2 bytes for the weight, 2 for its gradient, 4 for a
# master copy and 4 + 4 for Adam's averages. How many bytes is that, before any activation?


# %% tags=["exercise"]
def training_bytes(total: int, trained: int, base_bits: float) -> float:
    """Bytes of the frozen base (`total` parameters of `base_bits` bits) and of
    `trained` parameters that train beside it.
    """
    # BEGIN SOLUTION
    return total * base_bits / 8 + 16 * trained
    # END SOLUTION


# %% tags=["check"]
check.training_bytes(training_bytes)

# %% [markdown] tags=["solution"]
# The second term is why nobody should argue about a few million trained parameters: 20 million of them take 0.3 GB beside
# the 13.5 GB of a 7B base in 16 bits. The first term is what QLoRA attacks, and the reason it exists.

# %% [markdown]
# ## Exercise 2: the front
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Each method has a cost and a loss, both better when smaller. Method $i$ is *dominated* if some $j$ has $c_j \le c_i$ and
# $\ell_j \le \ell_i$, and at least one of the two is strict. Return which methods are not dominated. Two methods that are equal in
# both do not dominate each other.


# %% tags=["exercise"]
def front(cost: Tensor, loss: Tensor) -> Tensor:
    """True where nobody dominates. Shapes: cost and loss (n,). Returns (n,) of bool."""
    # BEGIN SOLUTION
    # [j, i]: j is no worse than i in both
    no_worse = (cost[:, None] <= cost) & (loss[:, None] <= loss)
    better = (cost[:, None] < cost) | (loss[:, None] < loss)  # and better in one
    return ~(no_worse & better).any(0)
    # END SOLUTION


# %% tags=["check"]
check.front(front)

# %% [markdown] tags=["solution"]
# Broadcasting compares all pairs at once. The strict half matters: without it every method would dominate itself, and the
# front would be empty. A front is all that data can say; which of its points you take depends on what a byte and a
# nat are worth to you.

# %% [markdown]
# ## Exercise 3: the challenge of this part
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 5 points
#
# Teach the course model to tell where a passage comes from. **Goal: a held-out loss of at most 1.60 nats, with at most 2,500
# trained parameters and at most 40 optimizer steps.** The frozen model's loss is above 6.
#
# You are given the model and 40 batches (`input_ids, labels, attention_mask`; `tasks.fit` trains on them, or write your own
# loop). Train `model` in place by any method of this part, leave it ready to use, and return how many parameters you trained. The
# check counts the optimizer's steps and its parameters itself, looks whether any other weight has moved, and then measures
# the loss on held-out passages.


# %% tags=["exercise"]
def reach(model: nn.Module, batches: list[Batch]) -> int:
    """Train at most 2,500 parameters of `model`, in place, in at most 40 steps. Returns
    how many parameters trained.
    """
    # BEGIN SOLUTION
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(model, batches, lr=0.3)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
    # END SOLUTION


# %% tags=["check"]
check.reach(reach)

# %% [markdown] tags=["solution"]
# 2,500 numbers are too few for LoRA on all linears (9,728 at rank 1) and too few for added biases everywhere (5,120), while a
# soft prompt of 19 tokens fits and learns too little in 40 steps. (IA)³ has 2,048, one for each channel of keys,
# values and hidden units, and each acts where the model already computes something. The other half of the answer is the
# rate: a scale that starts at 1 must move by tenths to matter, so 0.3 is right where LoRA takes 0.01. At LoRA's rate the same
# method looks useless, which is how methods get a bad name. LoRA at rank 1 on fewer layers is another way in.
