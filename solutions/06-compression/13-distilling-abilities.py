# %% [markdown]
# # Solutions: Distilling abilities
#
# What is learnt and what is only read; two tasks in one loss; which of the teacher's rationales are kept; and how to tell whether a
# student understood a question or found a shortcut. Stuck? `check.hint("labels")` shows a hint, and the next one when it is called again.

# %%
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.compression.distilling_abilities import check

# %% [markdown]
# ## Exercise 1: what is learnt
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A batch of examples, each a prompt with its reply behind it, padded on the right. Return labels: the ids on tokens of the *reply*, its end token
# included, and −100 everywhere else. A label stands at the place of its token; the loss moves them later. The end token is the pad token here, as in
# many tokenizers, so go by lengths.


# %% tags=["exercise"]
def labels(ids: Tensor, prompts: Tensor, lengths: Tensor) -> Tensor:
    """The ids, −100 on prompts and behind the end of each example.

    Shapes: ids (B, T); `prompts` (B,), tokens of each prompt; `lengths` (B,), tokens of
    prompt and reply together. Result (B, T), a new tensor.
    """
    # BEGIN SOLUTION
    at = torch.arange(ids.shape[1])
    learnt = (at >= prompts[:, None]) & (at < lengths[:, None])
    return ids.masked_fill(~learnt, -100)
    # END SOLUTION


# %% tags=["check"]
check.labels(labels)

# %% [markdown] tags=["solution"]
# −100 is what `F.cross_entropy` and `transformers` skip. `ids == pad` would find the padding as well, and throw out the end token with it where both are one:
# such a student writes a right answer and then goes on. TRL goes by lengths, as we do; the collator for language modelling in `transformers` goes by the pad token.

# %% [markdown]
# ## Exercise 2: two tasks, one loss
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# MT-CoT asks each question twice: for the answer at once, and for a rationale with the answer behind it. Return $\alpha L_\text{answer} + (1-\alpha)
# L_\text{rationale}$. Each $L$ is the mean cross-entropy over that task's own labels that are not −100. Labels stand at the places of their tokens;
# the logits at $t$ predict the token at $t + 1$.


# %% tags=["exercise"]
def mt_cot_loss(
    answer_logits: Tensor,
    answer_labels: Tensor,
    rationale_logits: Tensor,
    rationale_labels: Tensor,
    alpha: float,
) -> Tensor:
    """α L_answer + (1 − α) L_rationale, a scalar with gradients to both logits.

    Shapes: logits (B, T, V) and labels (B, T); T may differ between the tasks.
    """

    # BEGIN SOLUTION
    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    of_answers = mean(answer_logits, answer_labels)
    of_rationales = mean(rationale_logits, rationale_labels)
    return alpha * of_answers + (1 - alpha) * of_rationales
    # END SOLUTION


# %% tags=["check"]
check.mt_cot_loss(mt_cot_loss)

# %% [markdown] tags=["solution"]
# Two means, not one: a rationale has many more tokens than an answer. In one mean over all of them the answers would hardly count, and $\alpha$ would mean
# something else for each length.

# %% [markdown]
# ## Exercise 3: which rationales are kept
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# The teacher was asked several times. Keep the rationales whose *last* number is the answer, each text once, in the order in which they were drawn,
# and at most `most` of them, which may be 0. Numbers are whole, may have a minus sign right before them, and text may follow them. A rationale without a number is thrown out.


# %% tags=["exercise"]
def keep(sampled: list[str], answer: int, most: int) -> list[str]:
    """Fine-tune-CoT's filter: right ones, each once, in order, at most so many."""
    # BEGIN SOLUTION
    right = []
    for text in sampled:
        numbers = re.findall(r"-?\d+", text)
        if numbers and int(numbers[-1]) == answer:
            right.append(text)
    return list(dict.fromkeys(right))[:most]
    # END SOLUTION


# %% tags=["check"]
check.keep(keep)

# %% [markdown] tags=["solution"]
# `text.endswith(str(answer))` would keep 312 for 12, and lose "12, I think."; `str(answer) in text` keeps all that mention it. A `set` loses the order, and a
# limit before the copies go keeps too few. What this filter cannot see are two mistakes that cancel: the answer is right, the rationale is not.

# %% [markdown]
# ## Exercise 4: understood, or guessed?
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Pairs of questions: one with its label, and one edited so that its label is another. Return two shares of *all pairs*, in this order: pairs in which the
# prediction changed, and pairs in which both predictions are right. They come as a tuple of numbers (or of tensors with one number).


# %% tags=["exercise"]
def consistency(
    predicted: Tensor, labels: Tensor, predicted_new: Tensor, new: Tensor
) -> tuple[float, float]:
    """The share of pairs that changed, and of those with both halves right.

    Shapes: all (N,), class numbers; `predicted_new` and `new` after the edit.
    """
    # BEGIN SOLUTION
    changed = predicted != predicted_new
    both = (predicted == labels) & (predicted_new == new)
    return changed.float().mean().item(), both.float().mean().item()
    # END SOLUTION


# %% tags=["check"]
check.consistency(consistency)

# %% [markdown] tags=["solution"]
# A student that lives on a shortcut has a good accuracy before the edit and a bad one after it. Their mean looks harmless; the share of pairs with both
# halves right does not. A constant prediction has half of all single questions right, and no pair.
