"""Continuous batching: what each step computes, decided anew before every step.

    schedule    which requests get how many tokens in the next step

Start with `schedule`.
"""

from llmlab.inference.continuous_batching.schedule import (
    Job,
    Limits,
    Plan,
    blocks_needed,
    schedule,
)

__all__ = ["Job", "Limits", "Plan", "blocks_needed", "schedule"]
