"""The room `data_parallel`."""

from llmlab.parallelism.data_parallel.data_parallel import (
    MIB,
    DataParallel,
    DDPConfig,
    plan_buckets,
    token_share,
    train_step,
)
from llmlab.parallelism.data_parallel.replicate import replicate_step
from llmlab.parallelism.data_parallel.timeline import (
    draw,
    exposed,
    from_ledger,
    keep_time,
    timeline,
)

__all__ = [
    "MIB",
    "DDPConfig",
    "DataParallel",
    "draw",
    "exposed",
    "from_ledger",
    "keep_time",
    "plan_buckets",
    "replicate_step",
    "timeline",
    "token_share",
    "train_step",
]
