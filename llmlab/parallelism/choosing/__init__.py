"""Which plan is best for a model, a machine and a batch.

    shapes     a model as numbers: parameters, FLOPs, activations
    machines   devices and links as data
    plan       a plan, the job that it is for, and why a plan may not fit
    memory     bytes on a device under a plan
    time       seconds of a step under a plan
    planner    all plans for a job, the fastest first

Start with `plan`, then read `memory` and `time`.
"""

from llmlab.parallelism.choosing.machines import machine
from llmlab.parallelism.choosing.plan import Estimate, Job, Plan

__all__ = [
    "Estimate",
    "Job",
    "Plan",
    "machine",
]
