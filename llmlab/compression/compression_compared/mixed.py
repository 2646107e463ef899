"""A plan for each matrix: some in many bits, some in few.

    {"model.layers.0.mlp.down_proj": QuantConfig(8, per="row"), …}

Matrices that the plan does not name stay floats. "model.embed_tokens" is the embedding;
where the head is tied to it, both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmlab.compression import quantization_basics as qb
from llmlab.compression import recipes, walk
from llmlab.compression.compression_compared import counting
from llmlab.compression.compression_compared.speed import CodedEmbedding
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models.llama import Llama

Plan = Mapping[str, QuantConfig]


@torch.no_grad()
def follow(model: Llama, plan: Plan) -> tuple[Llama, Llama]:
    """(the model in codes, one that computes the same with their decoded floats).

    `model` itself is left as it is; what stays floats is shared with it.

    Raises:
        ValueError: as `matrices`, or a config that does not fit (named).
    """
    coded: dict[str, nn.Module] = {}
    floats: dict[str, nn.Module] = {}
    for name, linear in matrices(model, plan).items():
        stored = encoded(name, linear, plan[name])
        coded[name] = QuantLinear.of(*stored, plan[name], linear.bias)
        floats[name] = dense(qb.decode(*stored, plan[name]), linear.bias)
    return placed(model, coded, CodedEmbedding), placed(model, floats, lookup)


@torch.no_grad()
def rounded(model: Llama, plan: Plan) -> Llama:
    """The second model of `follow`: nothing is packed."""
    floats: dict[str, nn.Module] = {}
    for name, linear in matrices(model, plan).items():
        stored = encoded(name, linear, plan[name])
        floats[name] = dense(qb.decode(*stored, plan[name]), linear.bias)
    return placed(model, floats, lookup)


def planned_bytes(model: Llama, plan: Plan, dtype: torch.dtype) -> int:
    """What `counting.stored_bytes` finds in the first model of `follow`; nothing is
    compressed.

    Args:
        dtype: of the floats that stay.
    Raises:
        ValueError: as `matrices`, or a group that does not fit (named).
    """
    total = sum(counting.stored_bytes(model, dtype).values())
    for name, linear in matrices(model, plan).items():
        total -= linear.weight.numel() * dtype.itemsize
        total += coded_bytes(name, linear.weight, plan[name])
    return total


def coded_bytes(name: str, weight: Tensor, grid: QuantConfig) -> int:
    """Bytes of codes, scales and zero points."""
    with named(name):
        # meta: shapes without numbers
        blocks = len(qb.to_blocks(weight.to("meta"), grid))
    total = math.ceil(weight.numel() * grid.bits / 8)
    total += blocks * grid.scale_dtype.itemsize
    if not grid.symmetric:
        total += math.ceil(blocks * grid.bits / 8)
    return total


def matrices(model: Llama, plan: Plan) -> dict[str, nn.Linear]:
    """What the plan names, the embedding as a linear, too.

    Raises:
        ValueError: a name that is no matrix of the model, or a tied head under its own
            name.
    """
    linears = walk.linears(model, skip=())
    found = {}
    for name in plan:
        if name == recipes.EMBEDDING:
            found[name] = dense(model.model.embed_tokens.weight, None)
        elif name == "lm_head" and is_tied(model):
            raise ValueError(
                f"lm_head is tied: it is {recipes.EMBEDDING}, by that name"
            )
        elif name in linears:
            found[name] = linears[name]
        else:
            raise ValueError(f"{name!r} is no matrix of this model")
    return found


def is_tied(model: Llama) -> bool:
    """Whether the head is the embedding."""
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@contextmanager
def named(name: str) -> Iterator[None]:
    """A `ValueError` says which matrix it is about."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from None


def encoded(name: str, linear: nn.Linear, grid: QuantConfig) -> tuple[Tensor, ...]:
    """Codes, scale and zero point; the scale is one that `grid` can store."""
    with named(name):
        return qb.encode(linear.weight, grid)


def placed(model: Llama, made: dict[str, nn.Module], embedding: Callable) -> Llama:
    """The model with these in it; `embedding` makes a lookup of a table."""
    modules = dict(made)
    if recipes.EMBEDDING in made:
        modules[recipes.EMBEDDING] = embedding(made[recipes.EMBEDDING])
        if is_tied(model):
            modules["lm_head"] = made[recipes.EMBEDDING]
    return recipes.with_modules(model, modules)


def lookup(table: nn.Linear) -> nn.Embedding:
    """The rows of a linear, as an embedding."""
    return nn.Embedding.from_pretrained(table.weight)


def dense(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A linear with this weight."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear
