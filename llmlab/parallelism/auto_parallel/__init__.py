"""The room `auto_parallel`."""

from llmlab.parallelism.auto_parallel.problem import (
    brute_force,
    problem,
    seconds_of,
    solve,
)
from llmlab.parallelism.auto_parallel.sharding import DeviceMesh
from llmlab.parallelism.auto_parallel.stages import cut_stages, every_cut, latency

__all__ = [
    "DeviceMesh",
    "brute_force",
    "cut_stages",
    "every_cut",
    "latency",
    "problem",
    "seconds_of",
    "solve",
]
