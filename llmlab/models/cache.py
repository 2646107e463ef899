"""The key/value cache: what a decoder remembers, so that each new token costs one
token's work.

    K  key/value heads      S  tokens stored      D  head_dim

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
        """Store (B, K, T, D) keys and values of one layer and return all of that
        layer's, (B, K, S, D).
        """


class KVCache:
    """A contiguous cache that grows by doubling, so that appending one token copies one
    token.

    `append` is called once a layer; `length` counts a token only when the last layer
    has it.
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
        start, stop = self.lengths[layer], self.lengths[layer] + k.shape[2]
        self.keys[layer] = _room_for(self.keys[layer], k, stop, self.capacity)
        self.values[layer] = _room_for(self.values[layer], v, stop, self.capacity)
        self.keys[layer][:, :, start:stop] = k
        self.values[layer][:, :, start:stop] = v
        self.lengths[layer] = stop
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on (speculative decoding rolls back this
        way).
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"length={length} must lie between 0 and the {self.length} tokens"
                " stored"
            )
        self.lengths = [length] * len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens stored, spare room not counted."""
        stored = [
            t[:, :, : self.length] for t in self.keys + self.values if t is not None
        ]
        return sum(t.numel() * t.element_size() for t in stored)


def _room_for(buffer: Tensor | None, like: Tensor, need: int, capacity: int) -> Tensor:
    """`buffer`, or a copy at least twice as long when `need` tokens do not fit."""
    if buffer is not None and buffer.shape[2] >= need:
        return buffer
    B, K, _, D = like.shape
    size = max(need, capacity, 2 * buffer.shape[2] if buffer is not None else 0)
    grown = torch.empty(B, K, size, D, dtype=like.dtype, device=like.device)
    if buffer is not None:
        grown[:, :, : buffer.shape[2]] = buffer
    return grown
