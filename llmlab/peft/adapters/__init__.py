"""The room `adapters`."""

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
