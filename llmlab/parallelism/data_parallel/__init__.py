"""Data parallelism: one replica per rank, averaged gradients.

    data_parallel   buckets, overlap, accumulation, as in PyTorch's DDP
    replicate       the older `torch.nn.DataParallel`
    timeline        when each bucket is sent, and what of it stays exposed

Start with `data_parallel`.
"""

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
