"""Searching for a plan: Alpa's two levels.

    sharding          every way to cut an operator, what it sends, and what it costs
    integer_program   the best strategy for every operator of a graph
    stages            the best cut of a chain of layers into pipeline stages
    graphs            an MLP and a Llama block to plan for
    execute           runs a plan, so that the bytes can be compared with the price

Start with `sharding`, then read `integer_program`.
"""

from llmlab.parallelism.auto_parallel.integer_program import (
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
