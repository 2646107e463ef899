"""Bits, bytes and traffic of a model, counted from the tensors that it holds.

    stored bytes         Σ over tensors, each once: codes, scales, zero points, factors,
                         embedding, norms
    bits per parameter   8 · stored bytes / P: nothing is left out
    bytes per token      what a decoding step must read: every stored byte of the model,
                         but for one row of an embedding that is not the head, too; and
                         the keys and values of the tokens before

    P   parameters of the float model; a tied head is the embedding and counts once

A paper's "4 bits" are those of a code. With a 16-bit scale for each 64 weights they are
4.25 for a weight of a linear, and for a whole model more, as embedding and head mostly
stay in 16 bits. On disk floats take 16 bits, whatever they take in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlab.compression import recipes
from llmlab.models import accounting
from llmlab.models.llama import Llama, LlamaConfig


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer that is stored, each piece of memory once."""
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            yield name, tensor
        seen.add(tensor.data_ptr())


def on_disk(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Floats of the model in `dtype`; what a method stores stays as it is."""
    last = name.rpartition(".")[2]
    if tensor.dtype == torch.float32 and last in ("weight", "bias", "values"):
        return dtype
    return tensor.dtype


def stored_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of the model by part: linears, embedding, head, norms and biases.

    Args:
        dtype: of floats on disk, 16 bits say; by default what they have in memory.
    """
    inside = set(recipes.stored_linears(model))
    parts = {"linears": 0, "embedding": 0, "head": 0, "rest": 0}
    for name, tensor in tensors(model):
        stored = tensor.dtype if dtype is None else on_disk(name, tensor, dtype)
        part = "rest"
        if name.startswith(recipes.EMBEDDING):
            part = "embedding"
        elif name.startswith("lm_head"):
            part = "head"
        elif not name.endswith(".bias") and owners(name) & inside:
            part = "linears"
        parts[part] += tensor.numel() * stored.itemsize
    return parts


def owners(name: str) -> set[str]:
    """The modules that a tensor lies in."""
    words = name.split(".")
    return {".".join(words[:i]) for i in range(1, len(words))}


def bits_of_linears(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """Stored bits for each weight of the linears in the blocks."""
    shapes = [shape for _, shape in recipes.stored_linears(model).values()]
    weights = sum(rows * columns for rows, columns in shapes)
    return 8 * stored_bytes(model, dtype)["linears"] / weights


def parameters(config: LlamaConfig) -> int:
    """P, of the model before it was compressed."""
    return accounting.parameters(config)


def bits_per_parameter(model: Llama, dtype: torch.dtype | None = None) -> float:
    """8 · stored bytes / P."""
    return 8 * sum(stored_bytes(model, dtype).values()) / parameters(model.config)


def per_token(
    model: Llama, past: int = 0, cache_dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that decoding one token reads, with `past` tokens in the cache.

    Raises:
        ValueError: `past` is below 0.
    """
    if past < 0:
        raise ValueError(f"past={past} must be at least 0")
    parts = stored_bytes(model)
    if parts["head"]:
        # the head is a matrix of its own, and of the embedding one row is looked up
        parts["embedding"] //= model.config.vocab_size
    cache = accounting.kv_cache_bytes(model.config, 1, past, cache_dtype)
    return sum(parts.values()) + cache


def write(
    model: nn.Module, file: str | Path, dtype: torch.dtype = torch.float16
) -> Path:
    """All stored tensors as one safetensors file: the size of forms that no library
    opens.

    Raises:
        ValueError: a float would not be finite in `dtype`; nothing is written.
    """
    stored = {}
    for name, tensor in tensors(model):
        tensor = tensor.detach().to(on_disk(name, tensor, dtype))
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} would not be finite in dtype={dtype}")
        stored[name] = tensor.contiguous()
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, file, metadata={"format": "pt"})
    return file
