"""References and inputs for the checks of 01-start/02-the-course-models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.course.grading.checking import Mistake
from llmlab.models.llama import Llama, LlamaConfig


def nll_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """−log p of each token under the logits at its own place."""
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def over(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of those that the mask counts."""
    return (values * mask).sum() / mask.sum()


def pair_counts(tokens: Tensor, V: int) -> Tensor:
    """c[a, b], how often b came right after a, in float64."""
    return (
        torch.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V)
        .view(V, V)
        .double()
    )


def reference(tokens: Tensor, V: int, D: float) -> Tensor:
    """The formula of the exercise, one row at a time."""
    c = pair_counts(tokens, V)
    lower = (c > 0).sum(0) / (c > 0).sum()
    rows = [
        (
            (row - D).clamp(min=0) / row.sum() + D * (row > 0).sum() / row.sum() * lower
            if row.any()
            else lower
        )
        for row in c
    ]
    return torch.stack(rows)


class Reader:
    """The model as the learner gets it: it refuses more than its context, and counts
    the windows that it reads.
    """

    def __init__(self, model: Llama, context: int) -> None:
        self.model = model
        self.context = context
        self.lengths: list[int] = []  # of the windows that it read

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids (B, T) → logits (B, T, V)."""
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise Mistake(
                "the model reads a batch, ids of shape (1, T): index tokens with [None]"
            )
        if ids.shape[1] > self.context:
            raise Mistake(
                f"the model was given {ids.shape[1]} tokens at once; its context is"
                f" {self.context}"
            )
        self.lengths += [ids.shape[1]] * len(ids)
        return self.model(ids)


def tiny_model() -> Llama:
    """A random model whose predictions depend on all that it reads."""
    shape = {
        "vocab_size": 13,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "initializer_range": 0.6,
    }
    return Llama(LlamaConfig(**shape, num_attention_heads=2)).eval()


@torch.no_grad()
def losses_from(model: Llama, tokens: Tensor, starts: list[int]) -> Tensor:
    """−log p of token t = 1, 2, …, each predicted from tokens starts[t − 1] … t − 1
    alone.
    """
    logits = [model(tokens[None, s:t])[0, -1] for t, s in enumerate(starts, start=1)]
    return F.cross_entropy(torch.stack(logits), tokens[1:], reduction="none")
