"""How well a language model predicts text: its loss, perplexity, and bits per byte.

    L   = −(1/M) Σ log p(x_t | x_<t)        the mean over the M predicted tokens, in
                                            nats
    PPL = exp(L)                            as good as a fair draw from PPL tokens;
                                            depends on the tokenizer
    BPB = Σ −log₂ p(x_t | x_<t) / bytes     bits per byte of text; does not depend on it

BPB is that of Gao et al. 2020, https://arxiv.org/abs/2101.00027, section 3.1.

Text longer than the context is cut into windows. Window k starts at token k · stride
and predicts what no window before it has predicted, so that each token counts once, and
each after the first window has at least context − stride + 1 tokens before it. Stride 1
gives every token all the context there is, at `context` times the cost of stride =
context.

    B  batch        T  tokens of a row        V  vocabulary
    N  tokens of the whole text               nat = 1.443 bits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

# a target that counts for nothing: PyTorch's and Hugging Face's convention
IGNORE = -100


def next_token_loss(
    logits: Float[Tensor, "batch seq vocab"],
    tokens: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of predicting token t + 1 from the logits at t, in nats.

    Args:
        logits: what the model said after each token; those at the last token predict
            nothing.
        tokens: what it read. The value −100 marks a token that is not to be predicted.
        mask: 1 where a token is to be predicted, 0 where it was only read (a prompt,
            padding).
    Raises:
        ValueError: shapes that do not match, or no token left to predict.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits are for {tuple(logits.shape[:-1])} tokens; tokens has shape"
            f" {tuple(tokens.shape)}"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, not that of tokens,"
            f" {tuple(tokens.shape)}"
        )
    targets = tokens if mask is None else tokens.masked_fill(~mask.bool(), IGNORE)
    # shifting targets spares a copy of the logits
    targets = F.pad(targets[:, 1:], (0, 1), value=IGNORE)
    if bool((targets == IGNORE).all()):
        raise ValueError(
            "tokens and mask leave no token to predict: the first of a row never is one"
        )
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE
    )


def windows(
    length: int, context: int, stride: int | None = None
) -> list[tuple[int, int, int]]:
    """(start, stop, first) of each window: it reads tokens start … stop − 1 and
    predicts tokens first … stop.

    >>> windows(length=10, context=4, stride=3)
    [(0, 4, 1), (3, 7, 5), (6, 9, 8)]
    """
    stride = context if stride is None else stride
    if length < 2:
        raise ValueError(
            f"length={length} must be at least 2: the first token is not predicted"
        )
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must lie between 1 and context={context}")
    out, first = [], 1
    while first < length:
        start = len(out) * stride
        stop = min(start + context, length - 1)
        out.append((start, stop, first))
        first = stop + 1
    return out


@torch.inference_mode()
def token_losses(
    model: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "N"],
    context: int,
    stride: int | None = None,
    batch: int = 1,
) -> Float[Tensor, "N-1"]:
    """−log p of each token but the first, in nats, over text of any length.

    Put the token that starts a document in front, and every token of the text is
    predicted.

    Args:
        model: ids (B, T) → logits (B, T, V), or an object with `.logits` as
            transformers returns.
        context: tokens that the model reads at once.
        stride: from one window to the next; default `context`, which reads each token
            once.
        batch: windows in one forward pass. The logits take batch · context · V · 4
            bytes, twice.
    """
    if tokens.dim() != 1:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; it must be one row, of shape (N,)"
        )
    losses = []
    for _, group in groupby(
        windows(len(tokens), context, stride), key=lambda w: w[1] - w[0]
    ):
        same_length = list(group)
        for some in (
            same_length[i : i + batch] for i in range(0, len(same_length), batch)
        ):
            losses += _losses_of(model, tokens, some)
    return torch.cat(losses)


def _losses_of(model, tokens: Tensor, some: list[tuple[int, int, int]]) -> list[Tensor]:
    """The losses that each of these windows of one length adds."""
    ids = torch.stack([tokens[start:stop] for start, stop, _ in some])  # (B, T)
    targets = torch.stack([tokens[start + 1 : stop + 1] for start, stop, _ in some])
    out = model(ids)
    logits = getattr(out, "logits", out).float()  # (B, T, V)
    # (B, T)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return [
        row[first - start - 1 :]
        for row, (start, _, first) in zip(losses, some, strict=True)
    ]


def perplexity(losses: Float[Tensor, "M"]) -> float:
    """exp of the mean of losses in nats, one a token."""
    return math.exp(losses.double().mean().item())


def bits_per_byte(losses: Float[Tensor, "M"], num_bytes: int) -> float:
    """All the bits of `losses` (nats, one a token) over the bytes of the text (UTF-8)
    that these tokens spell.

    Unlike perplexity it compares models with different tokenizers: they disagree about
    tokens, not about bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes={num_bytes} must be at least 1")
    return losses.double().sum().item() / math.log(2) / num_bytes
