"""Tensor parallelism: one matrix product on several ranks.

    megatron   1-D: f and g, the split layers, the vocabulary, `parallelize`
    grid       2-D (SUMMA, Cannon), 2.5-D (Tesseract), 3-D, and an MLP that is measured
    cost       what each of them sends and holds, as formulas

Start with `megatron`.
"""

from llmlab.parallelism.tensor.cost import (
    MLPShape,
    crossover,
    llama_sent,
    mesh_for,
    mlp_cost,
)
from llmlab.parallelism.tensor.grid import Summa, block, measure, summa, unblock
from llmlab.parallelism.tensor.megatron import (
    PLAN,
    ColumnParallelLinear,
    CopyToRanks,
    RowParallelLinear,
    SumOverRanks,
    VocabParallelCrossEntropy,
    copy_to_ranks,
    cut_of_parameter,
    gather_state,
    parallelize,
    rows_per_rank,
    sum_over_ranks,
    vocab_parallel_cross_entropy,
)

__all__ = [
    "PLAN",
    "ColumnParallelLinear",
    "CopyToRanks",
    "MLPShape",
    "RowParallelLinear",
    "SumOverRanks",
    "Summa",
    "VocabParallelCrossEntropy",
    "block",
    "copy_to_ranks",
    "crossover",
    "cut_of_parameter",
    "gather_state",
    "llama_sent",
    "measure",
    "mesh_for",
    "mlp_cost",
    "parallelize",
    "rows_per_rank",
    "sum_over_ranks",
    "summa",
    "unblock",
    "vocab_parallel_cross_entropy",
]
