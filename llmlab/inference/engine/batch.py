"""One forward pass over new tokens of many requests, however many each has.

All of them lie one behind the other in a single row, (1, T): linears and norms do not
care whose token is whose. Two seams of our Llama do:

    position_ids   where each token stands in its own text
    cache          writes each key and value to its slot:  table[i // b] · b + i mod b
    attention      a few new tokens: each is a query over the blocks of its own text,
                   all requests together. Many, as in a prompt: one request at a time,
                   over its keys in a row

    T  new tokens, of all requests       b  block_size
    R  queries that read blocks          H  query heads     K  key/value heads
    S  tokens of one text so far         D  head_dim

Only rows that are asked for go through the vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlab.inference.engine.adapters import Adapters
from llmlab.inference.paged_attention import PagedCache, as_tensor
from llmlab.models.llama import Llama

# (q, keys, values, tables, lengths) → output, as `paged_attention`
PagedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
FEW = 8  # new tokens of a request that read blocks; more are a prompt


@dataclass
class Chunk:
    """New tokens of one request.

    Attributes:
        tokens: they follow the first `start` ones, which are stored.
        table: the blocks of the request, room for the new tokens included.
        wanted: after how many of the last of them logits are asked for.
        adapter: its LoRA, or None.
    """

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    wanted: int = 1
    adapter: str | None = None

    @property
    def stop(self) -> int:
        """Tokens of the text when these are stored."""
        return self.start + len(self.tokens)

    @property
    def drafted(self) -> list[int]:
        """Its last tokens, as many as logits are wanted beyond one: drafted ones."""
        return list(self.tokens[len(self.tokens) - self.wanted + 1 :])


class Ragged:
    """The cache and the attention that a forward pass sees. See the top of the file."""

    length = 0  # `Llama` asks for it: positions are given, so nothing counts on from it

    def __init__(
        self, cache: PagedCache, chunks: Sequence[Chunk], attention: PagedAttention
    ) -> None:
        b = cache.manager.block_size
        self.cache = cache
        self._attention = attention
        self._layer = 0
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        reading: list[int] = []  # places in the row of those that read blocks
        tables: list[Sequence[int]] = []
        lengths: list[int] = []
        self.prompts: list[tuple[slice, int, Tensor | None]] = []
        for chunk in chunks:
            row = slice(len(ids), len(ids) + len(chunk.tokens))
            ids += chunk.tokens
            for i in range(chunk.start, chunk.stop):
                positions.append(i)
                slots.append(chunk.table[i // b] * b + i % b)
            if len(chunk.tokens) <= FEW:
                reading += range(row.start, row.stop)
                tables += [chunk.table] * len(chunk.tokens)
                lengths += range(chunk.start + 1, chunk.stop + 1)
            else:
                self.prompts.append((row, chunk.start, self._row_of(chunk, b)))
        self.ids = torch.tensor([ids])  # (1, T)
        self.positions = torch.tensor([positions])  # (1, T)
        self.slots = torch.tensor(slots)  # (T,)
        self.reading = torch.tensor(reading, dtype=torch.long)  # (R,)
        self.all_read = len(reading) == len(ids)
        if reading:
            self.tables = as_tensor(tables)  # (R, M)
            self.lengths = torch.tensor(lengths)  # (R,)

    def _row_of(self, chunk: Chunk, b: int) -> Tensor | None:
        """The blocks of a text, in order; None where all its tokens are new."""
        if chunk.start == 0:
            return None
        blocks = -(-chunk.stop // b)
        return torch.tensor(chunk.table[:blocks])

    def append(
        self, layer: int, k: Float[Tensor, "1 K T D"], v: Float[Tensor, "1 K T D"]
    ) -> tuple[Float[Tensor, "1 K T D"], Float[Tensor, "1 K T D"]]:
        """Write the new keys and values to their slots."""
        for store, new in ((self.cache.keys, k), (self.cache.values, v)):
            flat = store[layer].flatten(0, 1)  # (N, b, K, D) → (N·b, K, D)
            flat.index_copy_(0, self.slots, new[0].transpose(0, 1).to(flat.dtype))
        self._layer = layer
        return k, v

    def attend(
        self,
        q: Float[Tensor, "1 H T D"],
        k: Float[Tensor, "1 K T D"],
        v: Float[Tensor, "1 K T D"],
        mask: Tensor | None,
    ) -> Float[Tensor, "1 H T D"]:
        """`attention=` of the forward pass."""
        keys, values = self.cache.keys[self._layer], self.cache.values[self._layer]
        rows = q[0].transpose(0, 1)  # (T, H, D)
        if self.all_read:
            out = self._attention(rows, keys, values, self.tables, self.lengths)
            return out.transpose(0, 1)[None]
        out = torch.empty_like(rows)
        if len(self.reading):
            out[self.reading] = self._attention(
                rows[self.reading], keys, values, self.tables, self.lengths
            )
        for row, start, table in self.prompts:
            k_all, v_all = k[:, :, row], v[:, :, row]  # (1, K, t, D)
            if table is not None:
                S = start + (row.stop - row.start)
                k_all = _in_a_row(keys, table, S)  # (1, K, S, D)
                v_all = _in_a_row(values, table, S)
            out[row] = _causal(q[:, :, row], k_all, v_all, start)
        return out.transpose(0, 1)[None]


def _in_a_row(
    store: Float[Tensor, "N b K D"], table: Tensor, length: int
) -> Float[Tensor, "1 K S D"]:
    """What the blocks of a table hold."""
    found = store[table].flatten(0, 1)[:length]  # (m, b, K, D) → (S, K, D)
    return found.transpose(0, 1)[None]


def _causal(
    q: Float[Tensor, "1 H t D"],
    k: Float[Tensor, "1 K S D"],
    v: Float[Tensor, "1 K S D"],
    start: int,
) -> Float[Tensor, "t H D"]:
    """Query i stands at start + i and sees the keys up to there."""
    mask = None
    if start:
        t, S = q.shape[2], k.shape[2]
        mask = torch.ones(t, S, dtype=torch.bool).tril(start)
    out = F.scaled_dot_product_attention(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        attn_mask=mask,
        is_causal=start == 0,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)  # (1, H, t, D) → (t, H, D)


@torch.inference_mode()
def compute(
    model: Llama,
    cache: PagedCache,
    chunks: Sequence[Chunk],
    attention: PagedAttention,
    adapters: Adapters | None = None,
) -> Float[Tensor, "wanted vocab"]:
    """Store keys and values of all chunks; logits after the tokens that want them,
    chunk by chunk.
    """
    batch = Ragged(cache, chunks, attention)
    wanted: list[int] = []
    names: list[str | None] = []
    stop = 0
    for chunk in chunks:
        stop += len(chunk.tokens)
        wanted += range(stop - chunk.wanted, stop)
        names += [chunk.adapter] * len(chunk.tokens)
    if adapters is not None:
        adapters.use(names)
    try:
        h = model.model.embed_tokens(batch.ids)  # (1, T, d)
        h = model.model(h, batch.positions, None, batch, batch.attend)
        if not wanted:
            return h.new_zeros(0, model.config.vocab_size)
        if adapters is not None:
            adapters.use([names[i] for i in wanted])
        return model.lm_head(h[0, wanted])
    finally:
        if adapters is not None:
            adapters.use([])
