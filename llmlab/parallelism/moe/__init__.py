"""The room `moe`."""

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
