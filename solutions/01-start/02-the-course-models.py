# %% [markdown]
# # Solutions: The course models

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.start.the_course_models import check

# %% [markdown]
# ## Exercise 1: the loss
#
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A model reads $B$ rows of $T$ tokens. Its logits at place $t$ speak about the token at $t + 1$. Return the mean of
# $-\log p(x_{t+1} \mid x_{\le t})$ over those tokens that the mask counts, all rows together. `mask[b, t]` is 1 where
# token $t$ of row $b$ is to be predicted, and 0 where it was only read: part of a prompt, or padding.


# %% tags=["exercise"]
def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean cross-entropy of the counted tokens, in nats: a tensor of shape (), with
    its gradient.

    logits: (B, T, V) floats; logits[b, t] speaks about tokens[b, t + 1].
    tokens: (B, T) integers below V.
    mask:   (B, T) integers; mask[b, t] is 1 where tokens[b, t] is to be predicted. The
            first of a row never is, whatever its mask says.
    """
    # BEGIN SOLUTION
    # (B, T − 1)
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    counted = mask[:, 1:]
    return (losses * counted).sum() / counted.sum()
    # END SOLUTION


# %% tags=["check"]
check.next_token_loss(next_token_loss)

# %% [markdown] tags=["solution"]
# The mask is cut as the tokens are, because it marks what is predicted. Marking where it is predicted *from* moves
# every boundary by one: the first token of an answer would not be learned, and the first token of the next prompt would.
#
# One division, at the end. The mean of row means would give a token in a short answer more weight than one in a long
# answer. The same mistake returns whenever work is split, over rows, microbatches or GPUs: add sums, and divide once.

# %% [markdown]
# ## Exercise 2: bits per byte
#
# ●○○○○ difficulty · ●●●●○ importance · 5 minutes · 1 point
#
# A tokenizer with long tokens makes each token harder to guess and needs fewer of them, so losses per token of two models do
# not compare. Bytes do. Return all the bits that the model needs for a text over the bytes of the text in UTF-8.


# %% tags=["exercise"]
def bits_per_byte(losses: Tensor, text: str) -> float:
    """The bits that a model needs for each byte of `text`: a float.

    losses: (M,) −log p of each token of the text, natural logarithm.
    text:   what those tokens spell.
    """
    # BEGIN SOLUTION
    return losses.double().sum().item() / math.log(2) / len(text.encode())
    # END SOLUTION


# %% tags=["check"]
check.bits_per_byte(bits_per_byte)

# %% [markdown] tags=["solution"]
# The number of tokens is nowhere in it. That is the point: the text and its bytes are the same for all models.
# An arithmetic coder driven by the model would store the text in that many bits, so 2 bits per byte is compression by four.

# %% [markdown]
# ## Exercise 3: the model to beat
#
# ●●●○○ difficulty · ●●●○○ importance · 20 minutes · 3 points
#
# The bigram model of interpolated Kneser-Ney smoothing. Let $c(a, b)$ be how often $b$ came right after $a$, and
# $c(a) = \sum_b c(a, b)$. Every pair that was seen gives up $D$ of its count, and what row $a$ gives up is shared out by $P_c$:
#
# $$P(b \mid a) = \frac{\max(c(a, b) - D,\, 0)}{c(a)} + \frac{D\, N_+(a\,\cdot)}{c(a)}\, P_c(b), \qquad P_c(b) = \frac{N_+(\cdot\, b)}{N_+(\cdot\,\cdot)}$$
#
# $N_+(a\,\cdot)$ is how many *different* tokens followed $a$, $N_+(\cdot\, b)$ how many different tokens $b$ followed, and
# $N_+(\cdot\,\cdot)$ how many different pairs there are. For an $a$ that nothing followed, $P(b \mid a) = P_c(b)$.


# %% tags=["exercise"]
def kneser_ney_bigram(tokens: Tensor, vocab_size: int, discount: float) -> Tensor:
    """P, of shape (vocab_size, vocab_size): P[a, b] is the probability of b right after
    a. Each row sums to 1.

    tokens:   (N,) integers below vocab_size, the training text.
    discount: D, between 0 and 1.
    """
    # BEGIN SOLUTION
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    c = (
        torch.bincount(pairs, minlength=vocab_size**2)
        .view(vocab_size, vocab_size)
        .double()
    )
    total = c.sum(1, keepdim=True)  # c(a)
    followers = (c > 0).sum(1, keepdim=True)  # N₊(a ·)
    continuation = (c > 0).sum(0) / (c > 0).sum()  # P_c(b)
    P = (
        (c - discount).clamp(min=0) + discount * followers * continuation
    ) / total.clamp(min=1)
    return torch.where(total > 0, P, continuation)
    # END SOLUTION


# %% tags=["check"]
check.kneser_ney_bigram(kneser_ney_bigram)

# %% [markdown] tags=["solution"]
# Row $a$ gives up $D$ for each of its $N_+(a\,\cdot)$ pairs, and $P_c$ sums to 1, so the row sums to 1 again.
#
# $P_c$ counts kinds and not occurrences, and that is what Kneser and Ney added. "Francisco" may be frequent, but it follows
# "San" and nothing else: after a word that was never followed by anything known, it is a bad guess.

# %% [markdown]
# ## Exercise 4: a text longer than the context
#
# ●●●●○ difficulty · ●●●●○ importance · 25 minutes · 3 points
#
# A model reads at most `context` tokens. Cut a text of $N$ tokens into windows: window $k = 0, 1, \dots$ starts at token
# $k \cdot$ `stride` and reads `context` tokens, or as many as there are before the last token. Its logits speak about the
# tokens after each of those that it read. Return the loss of every token but the first, each **once**: a token that an earlier window
# predicted keeps that loss. Stop when all are predicted: the check counts the windows that the model reads.


# %% tags=["exercise"]
def strided_losses(model, tokens: Tensor, context: int, stride: int) -> Tensor:
    """−log p of tokens 1 … N − 1, natural logarithm, of shape (N − 1,).

    model:   ids (1, T) → logits (1, T, V), for T up to `context`.
    tokens:  (N,) integers, N at least 2.
    stride:  from 1 to `context`: how far a window starts after the one before it.
    """
    # BEGIN SOLUTION
    losses, done, start = [], 0, 0
    while done < len(tokens) - 1:
        stop = min(start + context, len(tokens) - 1)
        logits = model(tokens[None, start:stop])[0]  # (T, V)
        # of tokens start + 1 … stop
        window = F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="none")
        losses.append(window[done - start :])
        done, start = stop, start + stride
    return torch.cat(losses)
    # END SOLUTION


# %% tags=["check"]
check.strided_losses(strided_losses)

# %% [markdown] tags=["solution"]
# A window predicts one token beyond those it reads, so `context` tokens give `context` losses. From the second window on each
# predicted token has at least `context − stride + 1` tokens before it. A small stride buys a lower and truer loss with more forward passes:
# about $N /$ `stride` of them. State the stride when you publish a perplexity; without it the number cannot be compared.
