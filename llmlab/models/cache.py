"""The key/value cache of a decoder: a new token then costs the work of one token.

    B  batch
    K  key/value heads
    T  new tokens
    S  tokens stored, the new ones included
    D  head_dim

Anything with `length` and `append(layer, k, v)` can stand in for it: a paged cache, a
quantised one, a ring buffer.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Cache(Protocol):
    """What `Llama` asks of a cache."""

    @property
    def length(self) -> int:
        """Tokens stored before this forward pass."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of one layer, (B, K, T, D).

        Returns:
            All keys and values of that layer, (B, K, S, D).
        """


class KVCache:
    """A contiguous cache that grows by doubling.

    So most appended tokens copy one token, and not the whole cache. `append` is called
    once per layer, and `length` counts a token when all layers have it.

    Raises:
        ValueError: `num_layers` or `capacity` is below 1.
    """

    def __init__(self, num_layers: int, capacity: int = 64) -> None:
        if num_layers < 1 or capacity < 1:
            raise ValueError(
                f"num_layers={num_layers} and capacity={capacity} must be at least 1"
            )
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.lengths = [0] * num_layers
        self.capacity = capacity

    @property
    def length(self) -> int:
        return min(self.lengths)

    def append(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        start = self.lengths[layer]
        stop = start + k.shape[2]
        self.keys[layer] = _room_for(self.keys[layer], k, stop, self.capacity)
        self.values[layer] = _room_for(self.values[layer], v, stop, self.capacity)
        self.keys[layer][:, :, start:stop] = k
        self.values[layer][:, :, start:stop] = v
        self.lengths[layer] = stop
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, as speculative decoding does.

        Raises:
            ValueError: fewer tokens than `length` are stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"length={length} must lie between 0 and the {self.length} tokens"
                " stored"
            )
        self.lengths = [length] * len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens stored; spare room is not counted."""
        total = 0
        for buffer in self.keys + self.values:
            if buffer is not None:
                stored = buffer[:, :, : self.length]
                total += stored.numel() * stored.element_size()
        return total


def _room_for(buffer: Tensor | None, like: Tensor, need: int, capacity: int) -> Tensor:
    """`buffer`, or a copy at least twice as long when `need` tokens do not fit."""
    if buffer is not None and buffer.shape[2] >= need:
        return buffer
    B, K, _, D = like.shape
    old = 0 if buffer is None else buffer.shape[2]
    size = max(need, capacity, 2 * old)
    grown = torch.empty(B, K, size, D, dtype=like.dtype, device=like.device)
    if buffer is not None:
        grown[:, :, :old] = buffer
    return grown
