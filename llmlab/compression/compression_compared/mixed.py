"""A plan for each matrix: some in many bits, some in few.

    {"model.layers.0.mlp.down_proj": QuantConfig(8, per="row"), …}

Matrices that the plan does not name stay floats. "model.embed_tokens" is the embedding;
where the head is tied to it, both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llmlab.compression import quantization_basics as qb
from llmlab.compression import recipes, walk
from llmlab.compression.compression_compared.speed import CodedEmbedding
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models.llama import Llama

Plan = Mapping[str, QuantConfig]


@torch.no_grad()
def follow(model: Llama, plan: Plan) -> tuple[Llama, Llama]:
    """(the model in codes, one that computes the same with their decoded floats).

    `model` itself is left as it is; what stays floats is shared with it.

    Raises:
        ValueError: a name that is no matrix of the model, a tied head under its own
            name, or a config that does not fit (named).
    """
    linears = walk.linears(model, skip=())
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    coded: dict[str, nn.Module] = {}
    floats: dict[str, nn.Module] = {}
    for name, grid in plan.items():
        if name == recipes.EMBEDDING:
            weight = model.model.embed_tokens.weight
        elif name == "lm_head" and tied:
            raise ValueError(
                f"lm_head is tied: it is {recipes.EMBEDDING}, by that name"
            )
        elif name in linears:
            weight = linears[name].weight
        else:
            raise ValueError(f"{name!r} is no matrix of this model")
        try:
            codes, scale, zero = qb.encode(weight, grid)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
        bias = linears[name].bias if name in linears else None
        coded[name] = QuantLinear.of(codes, scale, zero, grid, bias)
        # the scale as it is stored
        stored = coded[name].scale.float()
        floats[name] = dense(qb.decode(codes, stored, zero, grid), bias)
    if recipes.EMBEDDING in plan:
        table, floats_table = coded[recipes.EMBEDDING], floats[recipes.EMBEDDING]
        coded[recipes.EMBEDDING] = CodedEmbedding(table)
        floats[recipes.EMBEDDING] = nn.Embedding.from_pretrained(floats_table.weight)
        if tied:
            coded["lm_head"], floats["lm_head"] = table, floats_table
    return recipes.with_modules(model, coded), recipes.with_modules(model, floats)


def dense(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A linear with this weight."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear
