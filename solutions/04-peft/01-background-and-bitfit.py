# %% [markdown]
# # Solutions: Background and BitFit
#
# Three tasks: count what a training step costs when most of the model is frozen, freeze all but the biases, and fold
# away the changes that BitFit makes behind a norm.
# Stuck? `check.hint("training_bytes")` shows a hint, and the next one when it is called again.

# %%
from torch import Tensor, nn

from llmlab.checks.peft.background_and_bitfit import check

# %% [markdown]
# ## Exercise 1: the bill
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A model has `total` parameters, of which `trained` train; the others are frozen. Weights are held in 16 bits. Each
# trained parameter also has a gradient in 16 bits, a master copy in 32, and Adam's two averages in 32 bits each. The
# activations that the backward pass needs take `activations` bytes. What does a training step hold in memory?


# %% tags=["exercise"]
def training_bytes(total: int, trained: int, activations: int) -> int:
    """Bytes of weights, gradients, optimizer state and activations.

    `total` parameters, of which `trained` train (0 ≤ trained ≤ total); `activations` is
    in bytes.
    """
    # BEGIN SOLUTION
    frozen = total - trained
    return 2 * frozen + (2 + 2 + 4 + 4 + 4) * trained + activations
    # END SOLUTION


# %% tags=["check"]
check.training_bytes(training_bytes)

# %% [markdown] tags=["solution"]
# Freezing takes away 14 of the 16 bytes per parameter, and that is all it can take: the weights stay, since the forward
# pass goes through them, and so does the backward pass. With everything frozen but a sliver, the bill is 2 bytes a
# parameter plus activations, and the activations become the larger part for long texts.

# %% [markdown]
# ## Exercise 2: freeze all but the biases
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Write BitFit as its authors have it: of all parameters of the model, only those train whose name's last part is `bias`.
# Set `requires_grad` and return how many numbers train. Some may have been frozen before; names may contain the word
# elsewhere. A model without biases, such as a Llama, must be refused with a `ValueError`.


# %% tags=["exercise"]
def freeze_all_but_biases(model: nn.Module) -> int:
    """Let the biases of `model` train and nothing else; returns how many numbers that
    is.

    Raises ValueError when the model has no bias. Values stay as they are.
    """
    # BEGIN SOLUTION
    model.requires_grad_(False)
    biases = [
        p for name, p in model.named_parameters() if name.split(".")[-1] == "bias"
    ]
    if not biases:
        raise ValueError("the model has no biases: BitFit would train nothing")
    for bias in biases:
        bias.requires_grad_(True)
    return sum(bias.numel() for bias in biases)
    # END SOLUTION


# %% tags=["check"]
check.freeze_all_but_biases(freeze_all_but_biases)

# %% [markdown] tags=["solution"]
# `"bias" in name` would catch a layer that somebody called `bias_gate`. The `ValueError` matters more than it looks:
# an optimizer accepts a model in which nothing trains as long as it is handed some parameter, the loss is printed at
# every step, and it even wobbles, because the batches differ.

# %% [markdown]
# ## Exercise 3: fold
# ●●●○○ difficulty · ●●●○○ importance · 15 minutes · 3 points
#
# An RMSNorm has no place for a bias, so a trained change $\beta$ behind a norm cannot be merged into it. But all that
# reads the norm's output $x + \beta$ are linears, each with its own weight $W_i$, perhaps a bias $b_i$, and perhaps a change
# $c_i$ that was trained too: $y_i = W_i (x + \beta) + b_i + c_i$. Give each linear one new bias such that the norm can
# stay as it was.


# %% tags=["exercise"]
def fold(
    W: list[Tensor], b: list[Tensor | None], c: list[Tensor | None], beta: Tensor
) -> list[Tensor]:
    """The new bias of each linear.

    Shapes: W[i] (out_i, d); b[i] and c[i] (out_i,) or None; beta (d,). Returns a list
        of (out_i,).
    """
    # BEGIN SOLUTION
    new = []
    for W_i, b_i, c_i in zip(W, b, c, strict=True):
        bias = W_i @ beta
        for part in (b_i, c_i):
            if part is not None:
                bias = bias + part
        new.append(bias)
    return new
    # END SOLUTION


# %% tags=["check"]
check.fold(fold)

# %% [markdown] tags=["solution"]
# $W(x + \beta) = Wx + W\beta$: a constant before a linear is another constant behind it. So a bias behind the norm can do
# nothing that biases on q, k and v cannot do; it only ties the three together, with $d$ numbers instead of three vectors.
