"""How fast a model decodes here, and how fast the memory lets it.

A decoding step multiplies every weight once, by one token. It does two operations with
a weight and must fetch it first. So memory, not arithmetic, sets the pace
(Williams et al. 2009, the roofline, https://doi.org/10.1145/1498765.1498785):

    tokens per second  ≤  1 / (Q / β + t)

    Q   bytes that a step reads (`counting.per_token`)
    β   bandwidth: bytes per second that this machine reads (`models.machine`)
    t   time that depends on no byte: calls, norms, attention

Simplified: caches are taken as empty. A model that fits into the last cache can be
faster than this "limit".
"""

from __future__ import annotations

import time
from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression import kernels, recipes
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama


def predicted_rate(traffic: float, bandwidth: float, fixed: float = 0.0) -> float:
    """Tokens per second: 1 / (Q / β + t).

    Raises:
        ValueError: a number that is not above 0, or `fixed` below it.
    """
    if not traffic > 0 or not bandwidth > 0:
        raise ValueError(f"traffic={traffic} and bandwidth={bandwidth} must be above 0")
    if not fixed >= 0:
        raise ValueError(f"fixed={fixed} must be at least 0 seconds")
    return 1 / (traffic / bandwidth + fixed)


@torch.inference_mode()
def decode_rate(
    model: Llama, ids: Int[Tensor, "1 seq"], new: int = 8, trials: int = 2
) -> float:
    """Tokens per second of greedy decoding after a prompt; the best trial.

    The prompt is read before the clock starts.
    """
    best = float("inf")
    for _ in range(trials):
        cache = KVCache(model.config.num_hidden_layers)
        token = model(ids, cache=cache, logits_to_keep=1).argmax(-1)
        started = time.perf_counter()
        for _ in range(new):
            token = model(token, cache=cache)[:, -1:].argmax(-1)
        best = min(best, time.perf_counter() - started)
    return new / best


# Forms that decode --------------------------------------------------------------------


class EightBitLinear(nn.Module):
    """y = W x with 8-bit codes and a scale for each row, in C."""

    is_compressed = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.table = kernels.Int8Table(linear.weight)
        self.shape = tuple(linear.weight.shape)
        self.bias = linear.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The decoded weight."""
        return self.table.weight

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = self.table.logits(x)
        return y if self.bias is None else y + self.bias


class EightBitEmbedding(nn.Module):
    """An embedding that looks up in a table of codes."""

    def __init__(self, table: kernels.Int8Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
        return self.table.embed(ids)


@torch.no_grad()
def eight_bits(model: Llama) -> Llama:
    """A model with 8 bits for every matrix; `model` itself is left as it is.

    Raises:
        kernels.NoCompiler: the kernels cannot be compiled here.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            modules[name] = EightBitLinear(module)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    table = modules["lm_head"].table
    if not tied:
        table = kernels.Int8Table(model.model.embed_tokens.weight)
    modules["model.embed_tokens"] = EightBitEmbedding(table)
    return recipes.with_modules(copy(model), modules)


class CodedEmbedding(nn.Module):
    """An embedding whose table is stored in a few bits, and decoded when it is read."""

    def __init__(self, table: QuantLinear) -> None:
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Float[Tensor, "vocab dim"]:
        """The decoded rows."""
        return self.table.weight

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
        return self.weight[ids]


@torch.no_grad()
def embedding_in_codes(model: Llama, grid: QuantConfig) -> Llama:
    """Embedding and head get codes, in place; one table where they are tied."""
    embedding = model.model.embed_tokens.weight
    tied = model.lm_head.weight.data_ptr() == embedding.data_ptr()
    rows, columns = embedding.shape
    plain = nn.Linear(columns, rows, bias=False, device="meta")
    plain.weight = embedding
    table = QuantLinear(plain, grid)
    if tied:
        model.lm_head = table
    else:
        model.lm_head = QuantLinear(model.lm_head, grid)
    model.model.embed_tokens = CodedEmbedding(table)
    return model
