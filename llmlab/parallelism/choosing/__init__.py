"""The room `choosing`."""

from llmlab.parallelism.choosing.machines import machine
from llmlab.parallelism.choosing.plan import Estimate, Job, Plan

__all__ = [
    "Estimate",
    "Job",
    "Plan",
    "machine",
]
