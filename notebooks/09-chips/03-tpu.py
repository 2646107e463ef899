# %% [markdown]
# # TPU
#
# TODO two sentences: what this is, and what the reader can do at the end. It teaches: systolic arrays (weight and output stationary), v1→v6, XLA's view, ICI torus.

# %%
import torch

from llmlab.checks.chips.tpu import check
from llmlab.chips.tpu import tpu
from llmlab.course import compare, explore, figure, plt, predict, show, your_turn

# %% [markdown]
# ## What it costs
#
# TODO why this costs money: one number, computed in the next cell.

# %%
raise NotImplementedError("TODO compute the number")

# %% [markdown]
# ## Predict
#
# TODO the situation that the reader makes a guess about.

# %%
guess = predict("TODO a question with one number as its answer?", unit="TODO")

# %% tags=["hide-output"]
raise NotImplementedError("TODO compute the answer, then: guess.settle(answer)")

# %% [markdown]
# ## By hand
#
# TODO the method on four numbers or a 2 × 3 matrix, worked through.

# %% [markdown]
# ## The idea
#
# TODO a figure first, then the mathematics in the paper's symbols, cited as
# [Author et al. 2020](https://arxiv.org/abs/0000.00000 "author2020word").

# %% tags=["hide-input"]
fig, ax = plt.subplots()
figure(fig, alt="TODO what a reader who cannot see the figure needs to know")

# %% [markdown]
# ## Your turn
#
# TODO what comes in, what must come out; about five lines.


# %%
def first_step(x):
    """TODO what it returns."""
    raise NotImplementedError("five lines of yours")


your_turn(check.TODO_name, first_step)

# %% [markdown]
# ## The code
#
# Open ours when you have your own.

# %% tags=["hide-output"]
show(tpu.apply)

# %% [markdown]
# TODO the table of shapes.

# %% [markdown]
# ## Against the library
#
# TODO the official implementation on the same inputs. The syllabus names: SCALE-Sim's cycle counts.

# %%
compare(torch.zeros(1), torch.ones(1), what="TODO")

# %% [markdown]
# ## The experiment
#
# TODO what must come out: utilisation by shape, cycle by cycle.

# %% tags=["hide-input"]
raise NotImplementedError("TODO run the experiment and draw it")

# %% [markdown]
# ## Play
#
# TODO a challenge: what the reader shall find with the slider, and how to know that it is right.


# %% tags=["hide-input", "nbval-ignore-output"]
def draw(setting):
    fig, ax = plt.subplots()
    ax.set_title(f"TODO {setting}")
    return fig


explore(draw, alt=lambda setting: f"TODO {setting}", setting=[1, 2, 4])

# %% [markdown]
# ## At scale
#
# TODO what changes with 8 GPUs or 7B parameters, the exact command, and published numbers: paper, ours, same or why not.

# %%
raise NotImplementedError("TODO reproduce the published number")

# %% [markdown]
# ## What to keep
#
# ```python
# TODO the key function, in six lines or fewer
# ```
#
# **Use it** TODO when. **Not** TODO when.
#
# <details><summary>TODO a question to recall the page by, and two more like it</summary>
#
# TODO the answer.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/03-tpu.ipynb).
#
# References: TODO
