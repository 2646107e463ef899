# %% [markdown]
# # Solutions: P-Tuning
#
# Three functions: a small encoder in which virtual tokens know of their neighbours, the loss of a labelling task, and
# the label of a whole text in a padded batch. Stuck? `check.hint("encode_prompt")` shows a hint, and the next one when it is called
# again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.p_tuning import check

# %% [markdown]
# ## Exercise 1: neighbours
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# P-Tuning makes its virtual tokens with a bidirectional LSTM. Write the same thing with a plain recurrence, which has
# no gates. From free vectors $h_0 \dots h_{p-1}$:
#
# $$s_i = \tanh(W_f h_i + U_f s_{i-1}), \qquad t_i = \tanh(W_b h_i + U_b t_{i+1}), \qquad P_i = W [s_i; t_i]$$
#
# with $s_{-1} = 0$ and $t_p = 0$: the first reads from left to right, the second from right to left.


# %% tags=["exercise"]
def encode_prompt(
    h: Tensor, Wf: Tensor, Uf: Tensor, Wb: Tensor, Ub: Tensor, W: Tensor
) -> Tensor:
    """P, one virtual token per row.

    Shapes: h (p, d); Wf and Wb (m, d); Uf and Ub (m, m); W (d, 2m). Returns (p, d).
    All six are trained: a gradient must reach each.
    """
    # BEGIN SOLUTION
    p, m = len(h), len(Uf)
    forward, backward = [torch.zeros(m)], [torch.zeros(m)]
    for i in range(p):
        forward.append(torch.tanh(Wf @ h[i] + Uf @ forward[-1]))
        backward.append(torch.tanh(Wb @ h[p - 1 - i] + Ub @ backward[-1]))
    # (p, 2m)
    states = torch.cat(
        [torch.stack(forward[1:]), torch.stack(backward[1:]).flip(0)], dim=-1
    )
    return states @ W.T
    # END SOLUTION


# %% tags=["check"]
check.encode_prompt(encode_prompt)

# %% [markdown] tags=["solution"]
# The backward states come out last token first, so they are flipped before they are joined to the forward ones. Every $P_i$ now depends on every
# $h_j$, and a step on one free vector moves the whole prompt: that is the "association" between virtual tokens that
# [Liu et al. 2021](https://arxiv.org/abs/2103.10385 "liu2021gpt") wanted. None of the inputs depends on the request, so after training this runs once, and
# the $p$ rows that come out are the adapter.

# %% [markdown]
# ## Exercise 2: the loss of a labelling task
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# A label head gives $C$ scores for each token. Take the mean cross-entropy, in nats, over all tokens of the batch that have a label. Labels are
# $-100$ at tokens that have none: padding, and the later pieces of a word that was split.


# %% tags=["exercise"]
def labelling_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean of −log softmax(scores)[label] over the tokens whose label is not −100.

    Shapes: scores (B, T, C), labels (B, T) of int64. Returns a scalar.
    It is trained on: a gradient must reach the scores.
    """
    # BEGIN SOLUTION
    kept = labels != -100
    logp = scores.log_softmax(dim=-1)[kept]  # (n, C)
    return -logp[torch.arange(len(logp)), labels[kept]].mean()
    # END SOLUTION


# %% tags=["check"]
check.labelling_loss(labelling_loss)

# %% [markdown] tags=["solution"]
# Nothing is shifted. A language model is scored at token $t$ on token $t+1$; a labeller is scored at token $t$ on the label of token $t$. Code that is taken over
# from pretraining shifts by habit, and the model then learns to predict the label of the *next* token, which works surprisingly well
# where labels come in runs, so that nobody notices. The mean is over labelled tokens in the whole batch: a mean of
# each row's mean would let a token in a short text count more than one in a long text.

# %% [markdown]
# ## Exercise 3: the label of a text
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# To label a whole text with a decoder, read the scores at its last real token, which alone has seen everything. In a batch, some rows are padded
# on the left and some on the right. Pick the right place in each row.


# %% tags=["exercise"]
def last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores at the last token of each row that is not padding.

    Shapes: scores (B, T, C), mask (B, T) of int64, 1 for a token and 0 for padding.
        Returns (B, C).
    Training goes through it: a gradient must reach the scores.
    """
    # BEGIN SOLUTION
    places = torch.arange(mask.shape[1]) * mask  # 0 at padding, else the place
    return scores[torch.arange(len(scores)), places.argmax(dim=-1)]
    # END SOLUTION


# %% tags=["check"]
check.last_token(last_token)

# %% [markdown] tags=["solution"]
# The largest place that holds a token is the last one, wherever the padding lies. The usual shortcuts are right half of the time: `mask.sum(-1) - 1` holds for padding
# on the right, `scores[:, -1]` for padding on the left. With causal attention the first token has seen nothing but itself; encoders such as BERT
# read a label there, decoders cannot.
