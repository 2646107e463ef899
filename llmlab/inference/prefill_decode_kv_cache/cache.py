"""A cache for a batch whose rows have different lengths, allocated once.

Row b holds its tokens in places 0 … lengths[b] − 1; a token's place is its position.
New tokens come as a table that is padded on the right; row b has counts[b] of them. So
query i of row b stands at position lengths[b] + i, and sees the places j ≤ that:

    row 0   k k k k k n ·        k  cached         n  new
    row 1   k k n · · · ·        ·  free: zeros, or what a row left behind

Nothing is moved when a row ends or another begins: its length becomes 0. What lies
beyond a row's length is never seen, and the next token writes over it.

    B  batch                 C  capacity: places per row
    K  key/value heads       S  places that are read, max(lengths + counts)
    T  new tokens            D  head_dim

Simplified: a row takes its C places even while it is short. Paging is what mends that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmlab.models.attention import sdpa
from llmlab.models.llama import Llama


def append(
    buffer: Float[Tensor, "B K C D"],
    new: Float[Tensor, "B K T D"],
    lengths: Int[Tensor, "B"],
    counts: Int[Tensor, "B"],
) -> Int[Tensor, "B"]:
    """Write the first counts[b] new tokens of each row behind those that it has.

    Args:
        buffer: it is changed, in the places of the new tokens only.
        new: keys or values; what follows the first counts[b] of a row is padding.
        lengths: tokens that each row has; it stays as it is.
    Returns:
        The new lengths.
    Raises:
        ValueError: a row is full; then nothing was written.
    """
    after = lengths + counts
    C = buffer.shape[2]
    if (after > C).any():
        raise ValueError(f"a row would have {int(after.max())} tokens in {C} places")
    is_token = torch.arange(new.shape[2]) < counts[:, None]  # (B, T)
    row, i = is_token.nonzero(as_tuple=True)
    buffer[row, :, lengths[row] + i] = new[row, :, i]
    return after


def visible(
    lengths: Int[Tensor, "B"], new: int, places: int
) -> Bool[Tensor, "B 1 T S"]:
    """Where each of the new tokens may look: at its own place and those before it."""
    position = lengths[:, None] + torch.arange(new)  # (B, T)
    return torch.arange(places) <= position[:, None, :, None]


class BatchCache:
    """Keys and values of up to `batch` texts, `capacity` places each.

    As for `Llama`, `append` is called once per layer. `counts` says how many tokens of
    each row the pass brings; `advance` counts them when all layers have them.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int) -> None:
        if num_layers < 1 or batch < 1 or capacity < 1:
            raise ValueError(
                f"num_layers={num_layers}, batch={batch} and capacity={capacity} must"
                " be at least 1"
            )
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.counts = torch.zeros(batch, dtype=torch.long)
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def places(self) -> int:
        """Places that the pass under way reads in each row, S."""
        return int((self.lengths + self.counts).max())

    def append(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Store `counts` tokens of each row, and give all that any row needs."""
        if self.keys[layer] is None:
            B, K, _, D = k.shape
            # zeros, not empty: a weight of 0 times NaN would be NaN
            self.keys[layer] = k.new_zeros(B, K, self.capacity, D)
            self.values[layer] = v.new_zeros(B, K, self.capacity, v.shape[-1])
        append(self.keys[layer], k, self.lengths, self.counts)
        append(self.values[layer], v, self.lengths, self.counts)
        S = self.places
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]

    def advance(self) -> None:
        """The tokens of the pass are in all layers now."""
        self.lengths = self.lengths + self.counts
        self.counts = torch.zeros_like(self.counts)

    def truncate(self, row: int, length: int = 0) -> None:
        """Forget a row's tokens from `length` on; 0 frees it for another text.

        Raises:
            ValueError: the row has fewer tokens.
        """
        has = int(self.lengths[row])
        if not 0 <= length <= has:
            raise ValueError(
                f"length={length} must lie between 0 and the {has} tokens of row {row}"
            )
        self.lengths = self.lengths.clone()
        self.lengths[row] = length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whether a token is in them or not."""
        buffers = [b for b in self.keys + self.values if b is not None]
        return sum(b.numel() * b.element_size() for b in buffers)

    @property
    def used(self) -> float:
        """The share of the places that holds a token."""
        return int(self.lengths.sum()) / (len(self.lengths) * self.capacity)


@torch.no_grad()
def read(
    model: Llama,
    ids: Int[Tensor, "B T"],
    cache: BatchCache,
    counts: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B V"]:
    """Logits after each row's last new token; the tokens are in the cache then.

    One function for both phases: prefill brings many tokens, decode brings one.

    Args:
        ids: padded on the right, with any token.
        counts: new tokens of each row (None: all T). A row of 0 rests, and its logits
            mean nothing.
    Raises:
        ValueError: counts beyond 0 … T, or a row that is full.
    """
    B, T = ids.shape
    if counts is None:
        counts = torch.full((B,), T)
    if counts.shape != (B,) or counts.min() < 0 or counts.max() > T:
        raise ValueError(f"counts={counts.tolist()} must be {B} numbers from 0 to {T}")
    cache.counts = counts
    positions = cache.lengths[:, None] + torch.arange(T)  # (B, T)
    mask = visible(cache.lengths, T, cache.places)
    h = model.model(model.model.embed_tokens(ids), positions, mask, cache, sdpa)
    cache.advance()
    last = h[torch.arange(B), (counts - 1).clamp(min=0)]  # (B, d)
    return model.lm_head(last)


def generate(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy decoding of several prompts at once: the new tokens of each.

    Raises:
        ValueError: no prompt, an empty one, or no token asked for.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts must be at least one, with at least one token each")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    counts = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(counts.max())
    rows = [F.pad(torch.tensor(p), (0, longest - len(p))) for p in prompts]
    cache = BatchCache(
        len(model.model.layers), len(prompts), longest + max_new_tokens - 1
    )
    token = read(model, torch.stack(rows), cache, counts).argmax(-1)  # prefill
    new = [token]
    for _ in range(max_new_tokens - 1):
        token = read(model, token[:, None], cache).argmax(-1)  # decode
        new.append(token)
    return torch.stack(new, dim=1).tolist()
