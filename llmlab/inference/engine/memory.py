"""What an engine needs of a machine's memory, before it runs.

    memory · utilisation  =  weights + activations + blocks · block_bytes

Weights are known when the engine is built. Activations are measured: one pass over the
largest step that the limits allow, with a count of the bytes that live at the same
time, as vLLM's profiling run does. What is left is cut into blocks of keys and values.

    L  layers        K  key/value heads        D  head_dim        b  block_size
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmlab.inference.engine.batch import Chunk, compute
from llmlab.inference.paged_attention import BlockManager, PagedCache, paged_attention
from llmlab.models.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class Memory:
    """Bytes, as planned; `blocks` is a number of blocks."""

    weights: int
    activations: int
    cache: int
    blocks: int

    @property
    def total(self) -> int:
        """All that is asked for."""
        return self.weights + self.activations + self.cache


def block_bytes(config: LlamaConfig, block_size: int, value_bytes: int) -> int:
    """Keys and values of b tokens in all layers: 2 · L · K · D · b numbers."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return token * block_size * value_bytes


def blocks_that_fit(
    memory: int,
    weights: int,
    activations: int,
    config: LlamaConfig,
    block_size: int = 16,
    value_bytes: int = 2,
    utilisation: float = 0.9,
) -> int:
    """How many blocks of the cache the memory has room for; 0 if there is none.

    Args:
        memory: bytes of the device.
        weights, activations: bytes that are taken before.
        block_size: tokens in a block.
        value_bytes: of one number in the cache.
        utilisation: the share of the memory that the engine may use, all together.
    Raises:
        ValueError: a share that is none.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must be above 0 and at most 1")
    left = int(memory * utilisation) - weights - activations
    return max(0, left // block_bytes(config, block_size, value_bytes))


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at one time, in `peak`.

    Views share their memory: it is counted once, until the last of them is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._owners: Counter[int] = Counter()  # address → tensors that live there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # what was there before this run, weights above all, is not counted
        given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in given:
                self._arrive(tensor, args, kwargs)
        return out

    def _arrive(self, tensor: Tensor, args, kwargs) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._owners[place]:
            for given in tree_leaves((args, kwargs)):
                old = isinstance(given, Tensor) and not given.is_meta
                if old and given.untyped_storage().data_ptr() == place:
                    return  # a view of something older
            self.now += size
            self.peak = max(self.peak, self.now)
        self._owners[place] += 1
        weakref.finalize(tensor, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._owners[place] -= 1
        if not self._owners[place]:
            self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that lived at one time while `run` ran, its result included."""
    with LiveBytes() as live:
        result = run()
    del result
    return live.peak


def activation_bytes(
    model: Llama, max_tokens: int, max_sequences: int, block_size: int
) -> int:
    """Of the largest step: max_tokens tokens, logits of max_sequences texts.

    The first texts bring one token each, the last one all the rest, as a prompt.
    """
    count = min(max_tokens, max_sequences)
    sizes = [1] * (count - 1) + [max_tokens - count + 1]
    blocks = [-(-size // block_size) for size in sizes]
    manager = BlockManager(sum(blocks), block_size)
    dtype = model.model.norm.weight.dtype
    cache = PagedCache(model.config, manager, dtype)
    chunks, start = [], 0
    for size, needed in zip(sizes, blocks, strict=True):
        table = list(range(start, start + needed))
        chunks.append(Chunk([0] * size, 0, table))
        start += needed
    return peak_bytes(lambda: compute(model, cache, chunks, paged_attention))


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers; what is shared counts once."""
    places = {}
    for tensor in (*model.parameters(), *model.buffers()):
        places[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(places.values())


@torch.inference_mode()
def planned(
    model: Llama,
    max_tokens: int,
    max_sequences: int,
    block_size: int,
    num_blocks: int | None = None,
    memory: int | None = None,
    utilisation: float = 0.9,
) -> Memory:
    """The memory of an engine: so many blocks, or as many as fit into `memory`.

    Raises:
        ValueError: not one of `num_blocks` and `memory`, or no room for a block.
    """
    if (num_blocks is None) == (memory is None):
        raise ValueError("give num_blocks or memory: exactly one of the two")
    config = model.config
    value_bytes = model.model.norm.weight.dtype.itemsize
    block = block_bytes(config, block_size, value_bytes)
    weights = weight_bytes(model)
    activations = activation_bytes(model, max_tokens, max_sequences, block_size)
    blocks = num_blocks
    if memory is not None:
        taken = (weights, activations)
        sizes = (block_size, value_bytes)
        blocks = blocks_that_fit(memory, *taken, config, *sizes, utilisation)
        if blocks == 0:
            raise ValueError(
                f"memory={memory} has no room for a block: weights take {weights},"
                f" activations {activations}, a block {block} bytes"
            )
    return Memory(weights, activations, blocks * block, blocks)
