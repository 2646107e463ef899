"""A label head: it stands for `lm_head` and scores C labels for each token.

    scores = W h_t + b

    h_t  (d)     the last layer's state of token t
    W    (C, d)  drawn at random and trained
    b    (C)     zero at the start, or none

A decoder's h_t has seen the tokens up to t; the label of a whole text is read at its
last token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import walk


def make_head(
    d: int, labels: int, bias: bool, generator: torch.Generator | None = None
) -> nn.Linear:
    """A label head as transformers starts one: weights from N(0, 0.02²), a bias of 0.

    Heads for token labels have a bias.
    """
    head = nn.Linear(d, labels, bias=bias)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    if bias:
        nn.init.zeros_(head.bias)
    return head


def last_token(
    scores: Float[Tensor, "B T C"], attention_mask: Tensor | None = None
) -> Float[Tensor, "B C"]:
    """The scores of each row's last real token: it alone has read everything.

    Padding may be left or right.
    """
    if attention_mask is None:
        return scores[:, -1]
    B, T, _ = scores.shape
    device = scores.device
    # padding has place 0, so that the largest place is the last real token's
    places = torch.arange(T, device=device) * attention_mask.to(device)  # (B, T)
    return scores[torch.arange(B, device=device), places.argmax(-1)]


class LabelHead(walk.Wrapper):
    """Stands for `lm_head`: label scores where the active encoder brings a head.

    Otherwise it gives the base's logits. `tokens` is the model's `VirtualTokens`.
    """

    def __init__(self, base: nn.Module, tokens: nn.Module) -> None:
        super().__init__(base)
        self.tokens = (tokens,)  # in a tuple it is no submodule of this one

    @property
    def weight(self) -> Tensor:
        """That of the head in use."""
        return walk.weight_of(self.in_use())

    @property
    def bias(self) -> Tensor | None:
        """That of the head in use."""
        return self.in_use().bias

    def in_use(self) -> nn.Module:
        """The active encoder's head, or the base."""
        head = getattr(self.tokens[0].encoder, "head", None)
        return self.base if head is None else head

    def forward(self, h: Float[Tensor, "B T d"]) -> Float[Tensor, "B T out"]:
        """(B, T, labels), or (B, T, vocabulary)."""
        head = self.in_use()
        if head is self.base:
            return head(h)
        return head(h.to(head.weight.dtype))
