# %% [markdown]
# # Solutions: Compression compared
#
# Four functions with which any two compressed models can be compared: what they store, how much worse they are and how sure that is, which
# of them are on the front, and how fast the memory lets them decode. Then the challenge of this part: a byte budget and a limit for the loss, on the real
# model. Stuck? `check.hint("mix")` shows a hint, and the next one when it is called again.

# %%
import math

from torch import Tensor

from llmlab.checks.compression.compression_compared import check
from llmlab.compression.quantization_basics import QuantConfig

# %% [markdown]
# ## Exercise 1: bits, with everything counted
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Each matrix of `shapes` is stored in codes of `bits`, with a scale of 16 bits for each `group` columns of a row. The last group of a row may be
# shorter. `group=None` means one scale for each row. The embedding has `embedding` numbers; they stay in 16 bits, without scales. Return the stored bits per
# parameter, where the parameters are all weights and all numbers of the embedding.


# %% tags=["exercise"]
def bits_per_parameter(
    shapes: list[tuple[int, int]], bits: int, group: int | None, embedding: int
) -> float:
    """Stored bits per parameter of the whole model; shapes are (rows, columns)."""
    # BEGIN SOLUTION
    stored = 16 * embedding
    parameters = embedding
    for rows, columns in shapes:
        size = columns if group is None else group
        groups = rows * math.ceil(columns / size)
        stored += bits * rows * columns + 16 * groups
        parameters += rows * columns
    return stored / parameters
    # END SOLUTION


# %% tags=["check"]
check.bits_per_parameter(bits_per_parameter)

# %% [markdown] tags=["solution"]
# A group never goes on in the next row, as a kernel multiplies row by row. So the number of groups is rounded up in each row. In a small model the
# embedding decides: at 4 bits SmolLM2's takes as much as all its linears.

# %% [markdown]
# ## Exercise 2: worse by how much, and how sure
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# The compressed model and the float model have judged the same tokens of `text`: their losses in nats, one per token. By how many bits per byte of
# the text (UTF-8) is the compressed one worse? Return that and its standard error. Both models read the same tokens, so take the differences token by token; the
# deviation is that of a sample, with $n - 1$.


# %% tags=["exercise"]
def grown(losses: Tensor, floats: Tensor, text: str) -> tuple[float, float]:
    """(growth, its standard error) in bits per byte; losses and floats are (n,)."""
    # BEGIN SOLUTION
    change = losses - floats
    n = len(change)
    bits_per_byte = n / math.log(2) / len(text.encode())
    error = change.std() / n**0.5
    return change.mean().item() * bits_per_byte, error.item() * bits_per_byte
    # END SOLUTION


# %% tags=["check"]
check.grown(grown)

# %% [markdown] tags=["solution"]
# Losses of single tokens vary by several nats, because some words are easy and others are not. That has nothing to do with compression, and in the
# differences it cancels. Two errors of single models would hide most of what the table shows.

# %% [markdown]
# ## Exercise 3: the front
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# Row $i$ of `points` is a method, a column is a coordinate. Less is better, but in the columns that `larger` lists more is better. Coordinates
# may be negative. A method is *dominated* if another is no worse in every coordinate and better in at least one. Return True for each method that none dominates.
# Two equal methods do not dominate each other.


# %% tags=["exercise"]
def front(points: Tensor, larger: list[int]) -> Tensor:
    """(n,) bool, from points (n, k); points itself stays as it is."""
    # BEGIN SOLUTION
    costs = points.clone()
    costs[:, larger] *= -1
    no_worse = (costs[:, None] <= costs).all(-1)  # [i, j]: i beside j
    better = (costs[:, None] < costs).any(-1)
    return ~(no_worse & better).any(0)
    # END SOLUTION


# %% tags=["check"]
check.front(front)

# %% [markdown] tags=["solution"]
# Both halves are needed. Without `better` each method would dominate itself. Without `no_worse` a method that wins in one coordinate would
# throw out all others. No weights between bytes and accuracy are chosen here: that is left to whoever takes one from the front.

# %% [markdown]
# ## Exercise 4: as fast as the memory
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# For one token a model reads its linears (`linears` bytes), its head, and the keys and values of `past` tokens, `cache` bytes for each. Embedding and head
# are tables of `table` bytes with `vocabulary` rows. If they are `tied`, they are the same table, and all of it is read. If not, the head is read whole and of the
# embedding one row. Memory gives `bandwidth` bytes per second, and `fixed` seconds per token depend on no byte. Return tokens per second.


# %% tags=["exercise"]
def tokens_per_second(
    linears: float,
    table: float,
    vocabulary: int,
    tied: bool,
    cache: float,
    past: int,
    bandwidth: float,
    fixed: float,
) -> float:
    """1 / (bytes that are read / bandwidth + fixed)."""
    # BEGIN SOLUTION
    traffic = linears + table + cache * past
    if not tied:
        traffic += table / vocabulary
    return 1 / (traffic / bandwidth + fixed)
    # END SOLUTION


# %% tags=["check"]
check.tokens_per_second(tokens_per_second)

# %% [markdown] tags=["solution"]
# Times add up, rates do not. With fewer bits the first term shrinks, and the second does not: a model in a quarter of the bytes is not
# four times as fast.

# %% [markdown]
# ## Exercise 5: the challenge of this part
# ●●●●○ difficulty · ●●●●● importance · 40 minutes · 6 points
#
# SmolLM2-135M-Instruct shall fit into **87 MB** (of 1,000,000 bytes), everything counted, and have a loss of **at most 3.83** nats per token on 256 tokens of
# held-out addresses; as floats it takes 269 MB and has 3.660. You get the name and the shape (out, in) of every matrix, and return a dict that says
# how each is rounded: a [`QuantConfig`](01-quantization-basics.ipynb) with `bits` (2 to 8), `symmetric`, `per` ("tensor", "row", "group"), `group_size` (it must
# divide the columns), `calibration` ("minmax", "percentile", "mse"). The check counts
# the bytes that the real model then holds (codes, scales, zero points), and judges it, rounded so, if they are few enough. What your dict leaves out stays in 16 bits, as the norms do. The head is tied to
# `model.embed_tokens` and goes with it. All in 8 bits with a scale for each row is 48 MB too much.
# The default, `QuantConfig(4)`, for all linears has a loss that is 0.18 too high.


# %% tags=["exercise"]
def mix(shapes: dict[str, tuple[int, int]]) -> dict[str, QuantConfig]:
    """How each matrix is rounded, by name."""
    # BEGIN SOLUTION
    plan = {}
    for name in shapes:
        if "self_attn" in name or name == "model.embed_tokens":
            plan[name] = QuantConfig(6, group_size=64)
        else:
            plan[name] = QuantConfig(4, group_size=64, symmetric=False)
    return plan
    # END SOLUTION


# %% tags=["check"]
check.mix(mix)

# %% [markdown] tags=["solution"]
# Three thoughts. The embedding is a fifth of the parameters: in 16 bits it would take two thirds of the budget, and at 6 bits it costs almost nothing. The attention is a
# quarter of the linears, and its keys and queries decide where a token looks: 6 bits for it are cheap. The rest gets 4 bits with a zero point, which is a twentieth of a
# bit per weight and a third of the error. There are other ways: 5 bits almost everywhere and 4 in the feed-forward of some layers in the middle; or measure for each matrix what it
# costs to round it alone, and spend bits where a bit saves most.
