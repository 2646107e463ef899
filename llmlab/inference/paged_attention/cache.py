"""The memory that the block tables point into, and `Llama` on top of it.

    B  sequences        T  new tokens of each        S  tokens of the longest
    N  blocks           b  block_size                K  key/value heads     D  head_dim

A `Batch` is what a forward pass sees: some sequences, whose new tokens are written to
their blocks. It has the cache's `append(layer, k, v)`, so that our Llama needs no
change. A prompt is computed by itself, over gathered keys and values; then all
sequences decode together, whatever their lengths, with `paged_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.inference.paged_attention.attention import as_tensor, paged_attention
from llmlab.inference.paged_attention.blocks import BlockManager, Copy
from llmlab.inference.paged_attention.radix_manager import RadixManager
from llmlab.models.generation import sample
from llmlab.models.llama import Llama, LlamaConfig


class PagedCache:
    """Keys and values of every layer in blocks, (N, b, K, D), made once."""

    def __init__(
        self,
        config: LlamaConfig,
        manager: BlockManager | RadixManager,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.manager = manager
        shape = (
            manager.num_blocks,
            manager.block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in layers]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, over all layers, keys and values."""
        block = self.keys[0][0]
        return 2 * len(self.keys) * block.numel() * block.element_size()

    def copy(self, pair: Copy) -> None:
        """Copy-on-write: the whole block, in every layer."""
        source, target = pair
        for store in (*self.keys, *self.values):
            store[target] = store[source]

    def append(self, sequence: int, token: int) -> bool:
        """Room for a token, in a block of its own if need be. Was one copied?"""
        pair = self.manager.append(sequence, token)
        if pair is not None:
            self.copy(pair)
        return pair is not None

    def truncate(self, sequence: int, length: int) -> bool:
        """Forget all its tokens from `length` on. Was a block copied?"""
        pair = self.manager.truncate(sequence, length)
        if pair is not None:
            self.copy(pair)
        return pair is not None


class Batch:
    """Some sequences in one forward pass: a cache for `Llama`, and its attention.

    Args:
        new: tokens of each sequence whose keys and values come now, the last ones.
        gather: whether `append` returns all keys and values, for any attention. That
            asks for sequences of one length. Without it, give `attention=batch.attend`,
            which reads the blocks themselves; then there is one new token each.
    Raises:
        ValueError: unequal lengths, or several new tokens, where there may be none.
    """

    def __init__(
        self,
        cache: PagedCache,
        sequences: Sequence[int],
        new: int = 1,
        *,
        gather: bool = False,
        attention: Callable[..., Tensor] = paged_attention,
    ) -> None:
        manager = cache.manager
        lengths = [len(manager.tokens[sequence]) for sequence in sequences]
        if gather and len(set(lengths)) > 1:
            raise ValueError(f"gather=True with lengths={lengths}: they must be equal")
        if not gather and new != 1:
            raise ValueError(f"new={new} must be 1 where blocks are read as they are")
        if not 1 <= new <= min(lengths):
            raise ValueError(f"new={new} must lie between 1 and {min(lengths)}")
        self.cache = cache
        self.sequences = list(sequences)
        self.new = new
        self.gather = gather
        self.tables = as_tensor([manager.tables[s] for s in sequences])  # (B, M)
        self.lengths = torch.tensor(lengths)  # (B,), the new tokens included
        self._attention = attention
        self._layer = 0

    @property
    def length(self) -> int:
        """Tokens of the longest sequence before this pass."""
        return int(self.lengths.max()) - self.new

    @property
    def positions(self) -> Tensor:
        """Where the new tokens stand in their texts, (B, T)."""
        return self.lengths[:, None] - self.new + torch.arange(self.new)

    def append(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Write the new keys and values to their blocks."""
        b = self.cache.manager.block_size
        block = self.tables.gather(1, self.positions // b)  # (B, T)
        place = self.positions % b  # (B, T)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[block, place] = k.transpose(1, 2)  # (B, K, T, D) → (B, T, K, D)
        values[block, place] = v.transpose(1, 2)
        self._layer = layer
        if layer == len(self.cache.keys) - 1:
            for sequence in self.sequences:
                self.cache.manager.stored(sequence)
        if not self.gather:
            return k, v
        S = int(self.lengths[0])
        k, v = (store[self.tables].flatten(1, 2)[:, :S] for store in (keys, values))
        return k.transpose(1, 2), v.transpose(1, 2)  # (B, S, K, D) → (B, K, S, D)

    def attend(
        self, q: Float[Tensor, "B H 1 D"], k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "B H 1 D"]:
        """`attention=` of the forward pass; k and v are in the blocks already."""
        keys = self.cache.keys[self._layer]
        values = self.cache.values[self._layer]
        out = self._attention(q[:, :, 0], keys, values, self.tables, self.lengths)
        return out[:, :, None]


@dataclass
class Run:
    """What `generate` did.

    Attributes:
        tokens: for each sequence, what was written after its prompt.
        found: for each prompt, tokens that were in the cache.
        computed: for each prompt, tokens that were not.
        copies: blocks that were copied on write.
        blocks: the most that stood in tables at one time.
        unshared: what they would have been, had nothing been shared.
    """

    tokens: list[list[int]] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    copies: int = 0
    blocks: int = 0
    unshared: int = 0


@torch.inference_mode()
def prefill(model: Llama, cache: PagedCache, prompt: Sequence[int]) -> tuple:
    """A new sequence, its prompt computed as far as nobody has done so before.

    Returns:
        Its number, the tokens found, and the logits after its last token, (1, vocab).
    Raises:
        OutOfBlocks: the prompt does not fit now.
    """
    sequence, found = cache.manager.add(prompt)
    batch = Batch(cache, [sequence], len(prompt) - found, gather=True)
    ids = torch.tensor([list(prompt[found:])])
    logits = model(ids, cache=batch, logits_to_keep=1)[:, -1]
    return sequence, found, logits


@torch.inference_mode()
def decode(
    model: Llama,
    cache: PagedCache,
    sequences: Sequence[int],
    attention: Callable[..., Tensor] = paged_attention,
) -> Float[Tensor, "B vocab"]:
    """Logits after the last token of each sequence, whose room is there already."""
    batch = Batch(cache, sequences, attention=attention)
    ids = torch.tensor([[cache.manager.tokens[s][-1]] for s in sequences])
    return model(
        ids, position_ids=batch.positions, cache=batch, attention=batch.attend
    )[:, -1]


def generate(
    model: Llama,
    cache: PagedCache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    attention: Callable[..., Tensor] = paged_attention,
) -> Run:
    """Text after each prompt, all sequences in one batch.

    Args:
        samples: continuations of each prompt. Its blocks are shared by all of them.
    Raises:
        ValueError: `max_new_tokens` or `samples` below 1.
        OutOfBlocks: there are not enough. All sequences are freed then.
    """
    if max_new_tokens < 1 or samples < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} and samples={samples} must be at least 1"
        )
    manager = cache.manager
    generator = torch.Generator().manual_seed(seed)
    run = Run()
    sequences: list[int] = []
    rows = []
    before = set(manager.tables)
    try:
        for prompt in prompts:
            sequence, found, logits = prefill(model, cache, prompt)
            run.found.append(found)
            run.computed.append(len(prompt) - found)
            sequences.append(sequence)
            sequences += [manager.fork(sequence) for _ in range(samples - 1)]
            rows += [logits] * samples
        tokens = sample(torch.cat(rows), temperature, generator=generator)
        run.tokens = [[token] for token in tokens.tolist()]
        _count(run, manager, sequences)
        for _ in range(max_new_tokens - 1):
            for sequence, written in zip(sequences, run.tokens, strict=True):
                run.copies += cache.append(sequence, written[-1])
            logits = decode(model, cache, sequences, attention)
            tokens = sample(logits, temperature, generator=generator)
            for written, token in zip(run.tokens, tokens.tolist(), strict=True):
                written.append(token)
            _count(run, manager, sequences)
    finally:
        for sequence in set(manager.tables) - before:
            manager.free(sequence)
    return run


def _count(run: Run, manager: BlockManager, sequences: Sequence[int]) -> None:
    """Blocks at this moment, shared and as they would be if they were not."""
    run.blocks = max(run.blocks, manager.used)
    tables = [manager.tables[sequence] for sequence in sequences]
    run.unshared = max(run.unshared, sum(map(len, tables)))
