"""n-gram language models by interpolated Kneser-Ney: what a neural one has to beat.

Kneser & Ney 1995; the interpolated form of Chen & Goodman 1999,
https://doi.org/10.1006/csla.1999.0128, §2.7. For a word w after the n − 1 words h, with
h' = h without its first word:

    p_n(w | h) = max(c(h w) − D, 0) / c(h)  +  D · N₊(h ·) / c(h) · p_{n−1}(w | h')
    p_0(w)     = 1 / V

    c(h w)    at the highest order, how often h w was seen; below it, how many different
              words were seen before h w
    c(h)      Σ_w c(h w); where it is 0, p_n(w | h) = p_{n−1}(w | h')
    N₊(h ·)   how many different words were seen after h
    D         the discount, n₁ / (n₁ + 2 n₂), with n_k the number of n-grams whose
              count is k
    V         size of the vocabulary

Simplified: one discount per order, not three ("modified" Kneser-Ney). An n-gram is
stored as one integer, its digits in base V being its tokens, so that counting is
sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """The counts of one order n, sorted by key."""

    order: int
    vocab_size: int
    grams: Int[Tensor, "kinds"]  # h w
    counts: Int[Tensor, "kinds"]  # c(h w)
    contexts: Int[Tensor, "histories"]  # h
    totals: Int[Tensor, "histories"]  # c(h)
    followers: Int[Tensor, "histories"]  # N₊(h ·)
    discount: float

    def refine(
        self, grams: Int[Tensor, "M n"], lower: Float[Tensor, "M"]
    ) -> Float[Tensor, "M"]:
        """p_n of the last token of each n-gram, given `lower`, its p_{n−1}."""
        key = keys(grams, self.vocab_size)
        context = key // self.vocab_size
        count = lookup(self.grams, self.counts, key).double()
        total = lookup(self.contexts, self.totals, context).double()
        spared = self.discount * lookup(self.contexts, self.followers, context).double()
        p = ((count - self.discount).clamp(min=0) + spared * lower) / total.clamp(min=1)
        return torch.where(total > 0, p, lower)


@dataclass(frozen=True)
class NGram:
    """An n-gram model: `levels[n − 1]` refines the one before it."""

    levels: tuple[Level, ...]

    @property
    def order(self) -> int:
        """n: it looks at n − 1 tokens."""
        return len(self.levels)

    def losses(self, tokens: Int[Tensor, "N"]) -> Float[Tensor, "N-1"]:
        """−log p of each token but the first, in nats.

        Near the start, the context is as long as there is.
        """
        V = self.levels[0].vocab_size
        p = torch.full((len(tokens),), 1 / V, dtype=torch.float64)
        for level in self.levels[: len(tokens)]:
            n = level.order
            p[n - 1 :] = level.refine(tokens.unfold(0, n, 1), p[n - 1 :])
        return -p[1:].log()

    def distribution(self, context: Int[Tensor, "T"]) -> Float[Tensor, "V"]:
        """p(w | context) for every token w."""
        V = self.levels[0].vocab_size
        p = torch.full((V,), 1 / V, dtype=torch.float64)
        for level in self.levels[: len(context) + 1]:
            history = context[len(context) - level.order + 1 :].expand(V, -1)
            p = level.refine(torch.cat([history, torch.arange(V)[:, None]], dim=1), p)
        return p


def fit(tokens: Int[Tensor, "N"], order: int, vocab_size: int) -> NGram:
    """Count a text: order 1 is a unigram model, 2 a bigram, 3 a trigram.

    Raises:
        ValueError: order below 1 or too high for 64-bit keys, a token outside the
            vocabulary, or fewer tokens than order.
    """
    if order < 1 or vocab_size**order >= 2**63:
        raise ValueError(
            f"order={order} must be at least 1, with vocab_size ** order below 2 ** 63"
        )
    if len(tokens) < order:
        raise ValueError(
            f"tokens holds {len(tokens)}; it must hold at least order={order}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"tokens must lie between 0 and vocab_size - 1 = {vocab_size - 1}"
        )
    occurrences = keys(tokens.unfold(0, order, 1), vocab_size)
    grams, counts = occurrences.unique(return_counts=True)
    levels = [make_level(grams, counts, order, vocab_size)]
    for n in range(order - 1, 0, -1):
        # Without its first word, each (n + 1)-gram counts once: how many different
        # words were seen before the n others.
        grams, counts = (grams % vocab_size**n).unique(return_counts=True)
        levels.insert(0, make_level(grams, counts, n, vocab_size))
    return NGram(tuple(levels))


def make_level(
    grams: Int[Tensor, "kinds"],
    counts: Int[Tensor, "kinds"],
    order: int,
    vocab_size: int,
) -> Level:
    """Add up the counts over w, and set the discount."""
    contexts, place, followers = (grams // vocab_size).unique(
        return_inverse=True, return_counts=True
    )
    totals = torch.zeros_like(contexts).index_add(0, place, counts)
    n1 = int((counts == 1).sum())
    n2 = int((counts == 2).sum())
    # 0.5 where the text is too short to estimate it
    discount = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    return Level(
        order, vocab_size, grams, counts, contexts, totals, followers, discount
    )


def keys(grams: Int[Tensor, "M n"], vocab_size: int) -> Int[Tensor, "M"]:
    """Each n-gram as one integer: Σ token_i · V^(n−1−i)."""
    place = vocab_size ** torch.arange(grams.shape[1] - 1, -1, -1)
    return (grams * place).sum(1)


def lookup(
    known: Int[Tensor, "kinds"], values: Int[Tensor, "kinds"], wanted: Int[Tensor, "M"]
) -> Int[Tensor, "M"]:
    """values[i] where known[i] is wanted, else 0. `known` is sorted."""
    at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[at] == wanted, values[at], 0)
