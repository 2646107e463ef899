"""Mixture of experts, on one process and over ranks.

    moe               router, capacity, balance loss, and a loop over the experts
    expert_parallel   tokens travel to the ranks of their experts: all-to-all
    hierarchical      the same over nodes and ranks: once per node over the slow link
    cost              what the two send, in bytes, and how large the experts are

Start with `moe`: what `expert_parallel` computes must equal its `mixture`.
"""

from llmlab.parallelism.moe.cost import distinct_nodes, expert_parameters
from llmlab.parallelism.moe.expert_parallel import (
    ExpertParallelMoE,
    in_order,
    sum_router_gradients,
)
from llmlab.parallelism.moe.hierarchical import TwoLevelMoE
from llmlab.parallelism.moe.moe import (
    MoE,
    MoEConfig,
    Routing,
    balance_loss,
    capacity,
    keep,
    route,
)

__all__ = [
    "ExpertParallelMoE",
    "MoE",
    "MoEConfig",
    "Routing",
    "TwoLevelMoE",
    "balance_loss",
    "capacity",
    "distinct_nodes",
    "expert_parameters",
    "in_order",
    "keep",
    "route",
    "sum_router_gradients",
]
