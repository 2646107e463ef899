"""The room `tensor`."""

from llmlab.parallelism.tensor.cost import (
    MLPShape,
    crossover,
    llama_sent,
    mesh_for,
    mlp_cost,
)
from llmlab.parallelism.tensor.fg import copy_to_ranks, sum_over_ranks
from llmlab.parallelism.tensor.megatron import (
    PLAN,
    ColumnParallelLinear,
    RowParallelLinear,
    gather_state,
    parallelize,
)
from llmlab.parallelism.tensor.mlp import measure
from llmlab.parallelism.tensor.summa import block, unblock
from llmlab.parallelism.tensor.vocabulary import (
    rows_per_rank,
    vocab_parallel_cross_entropy,
)

__all__ = [
    "PLAN",
    "ColumnParallelLinear",
    "MLPShape",
    "RowParallelLinear",
    "block",
    "copy_to_ranks",
    "crossover",
    "gather_state",
    "llama_sent",
    "measure",
    "mesh_for",
    "mlp_cost",
    "parallelize",
    "rows_per_rank",
    "sum_over_ranks",
    "unblock",
    "vocab_parallel_cross_entropy",
]
