"""Adapters: small networks between the frozen layers.

    bottleneck         the network, and where in a block one can be put
    adapters           Houlsby's and Pfeiffer's adapters, AdapterDrop
    fusion             AdapterFusion: attention over several adapters
    parallel_adapter   an adapter beside the MLP
    files              their files

Start with `bottleneck`.
"""

from llmlab.peft.adapters.adapters import (
    AdapterConfig,
    apply,
    drop,
    dropping,
    load,
    num_parameters,
    remove,
    run_tasks,
    save,
    set_adapter,
    shared_cost,
)
from llmlab.peft.adapters.fusion import FusionConfig
from llmlab.peft.adapters.parallel_adapter import ParallelAdapterConfig

__all__ = [
    "AdapterConfig",
    "FusionConfig",
    "ParallelAdapterConfig",
    "apply",
    "drop",
    "dropping",
    "load",
    "num_parameters",
    "remove",
    "run_tasks",
    "save",
    "set_adapter",
    "shared_cost",
]
